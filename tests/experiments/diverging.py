"""Studies in which chosen networks diverge, and what must hold of all of them."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ntt_sparse.training.metrics import MetricsLog


def run(study, config, workdir, overflowing, *, killed_at=(), entry=None):
    """Runs a study in which networks overflow; returns its summary.

    Args:
        study: Its module, which calls `fit_stage`.
        config: The settings.
        workdir: Where to.
        overflowing: By stage, names of networks whose weights overflow in the first step.
        killed_at: Stage and step of a record after which the study is killed, to go on then.
        entry: What runs it, if that is in another module.
    """
    fit_stage, write = study.fit_stage, MetricsLog.write
    entry = entry or study.run

    def overflow(config, workdir, stage, names, members, *args, **kwargs):
        bad = jnp.isin(jnp.arange(len(names)), jnp.asarray(
            [names.index(name) for name in overflowing.get(stage, ())], int
        ))  # fmt: skip
        params = jax.tree.map(
            lambda leaf: jnp.where(bad.reshape(-1, *[1] * (leaf.ndim - 1)), 1e30 * leaf, leaf),
            members.params,
        )
        members = members._replace(params=params)
        return fit_stage(config, workdir, stage, names, members, *args, **kwargs)

    def stopping(log, step, values, **kwargs):
        record = write(log, step, values, **kwargs)
        if (log.stage, step) == killed_at:
            raise KeyboardInterrupt
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "fit_stage", overflow)
        if killed_at:
            with patch.context() as killing:
                killing.setattr(MetricsLog, "write", stopping)
                with pytest.raises(KeyboardInterrupt):
                    entry(config, workdir)
        return entry(config, workdir)


def check(workdir, summary, expected):
    """What diverged is named, and there is no NaN: `expected` are pairs of stage and member."""
    workdir = Path(workdir)
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert "NaN" not in json.dumps(summary)
    assert [(row["stage"], row["member"]) for row in summary["diverged"]] == expected
    text = (workdir / "report.md").read_text()
    assert not re.search(r"\bnan\b", text)
    for row in summary["diverged"]:
        why = f"{row['term']!r} was not finite at step {row['step']} of stage {row['stage']!r}"
        if "of" in row:
            why = f"starts from {row['of']}, which diverged"
        assert f"- {row['member']}: {why}\n" in text
    return text


def networks(workdir):
    """The names of saved networks."""
    return {path.stem for path in (Path(workdir) / "networks").rglob("*.safetensors")}


def last(workdir, stage, name):
    """The values of a metric after the last step of a stage."""
    return MetricsLog(Path(workdir) / f"{stage}.jsonl", stage).column(name)[1][-1]

"""Lottery tickets, DLTH and L0: what is trained before sparse networks are, and from where."""

import json

import jax
import numpy as np
import pytest
from cka_sr_problems import member_of
from sparse_training_problems import get_config, kernels, largest, networks, start, tiny_init

from experiments import sparse_training_lottery as lottery
from experiments import sparse_training_members as sparse_members
from experiments import sparse_training_study as study
from experiments.configs import sparse_training as configs
from ntt_sparse.training.metrics import MetricsLog

# What is trained is of all regularisers the same: that of the smallest program.
PLAIN = {"regularisers": "l2", "coefficients": (1e-3,)}


@pytest.mark.parametrize(
    "restore",
    [
        "weights",
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("learning_rate", "random")),
    ],
)
@pytest.mark.usefixtures("narrow", "unrendered")
def test_lottery_tickets(tmp_path, monkeypatch, restore):
    """Each level has the largest weights of the one before and goes back to the step asked for;
    the dense level is the dense run, bit for bit."""
    started = {}
    real = study.fit_stage

    def fit_stage(config, workdir, stage, names, members, step_fn, plan, *args, **kwargs):
        started[stage] = plan, jax.tree.map(np.asarray, members._replace(key=()))
        return real(config, workdir, stage, names, members, step_fn, plan, *args, **kwargs)

    monkeypatch.setattr(study, "fit_stage", fit_stage)
    fields = {
        "density": (1.0, 0.5, 0.1), "supervised.max_steps": 12, "supervised.record_every": 4,
        "supervised.batch_size": 600, "lth.rewind": 0.25, "supervised.milestones": (0.5,), **PLAIN,
    }  # fmt: skip
    config = get_config("mnist_lth", **fields, **{"lth.restore": restore})
    study.run(config, tmp_path / "lth")
    assert [*started] == ["rewind", "level_1.0", "level_0.5", "level_0.1"]
    assert started["rewind"][0].total_steps == 3
    assert all(started[f"level_{d}"][0].start == 3 for d in (1.0, 0.5, 0.1))
    del fields["lth.rewind"]
    study.run(get_config("mnist_random", **{**fields, "density": (1.0,)}), tmp_path / "dense")
    found, dense = networks(tmp_path / "lth"), networks(tmp_path / "dense")
    for name, (params, _) in dense.items():
        jax.tree.map(np.testing.assert_array_equal, params, found[name][0])
    _, snapshot = started["level_1.0"]
    init = {seed: tiny_init(config, seed) for seed in config.seeds}
    runs = sparse_members.whole_runs(config)
    for before, density in ((1.0, 0.5), (0.5, 0.1)):
        for index, run in enumerate(runs):
            old = sparse_members.member_names([run._replace(density=before)])[0]
            new = sparse_members.member_names([run._replace(density=density)])[0]
            trained, kept = (kernels(tree) for tree in found[old])
            scores = {
                name: np.where(kept[name], np.abs(leaf), -1) for name, leaf in trained.items()
            }
            count = round(density * sum(leaf.size for leaf in trained.values()))
            expected = largest(scores, count)
            member = jax.tree.map(lambda leaf, i=index: leaf[i], started[f"level_{density}"][1])
            source = member_of(snapshot.params, index) if restore == "weights" else found[old][0]
            for name, mask in expected.items():
                np.testing.assert_array_equal(kernels(found[new][1])[name].astype(bool), mask)
                start = kernels(member.params)[name]
                if restore == "random":
                    assert np.mean(start[mask] == kernels(init[run.seed])[name][mask]) < 0.1
                    assert 0.5 < np.std(start[mask]) / np.std(kernels(init[run.seed])[name]) < 2
                else:
                    np.testing.assert_array_equal(start, np.where(mask, kernels(source)[name], 0))
            # The schedule goes on from there; moments too, where weights go back.
            old_state = member_of(snapshot.opt_state, index)
            for was, now in zip(
                jax.tree.leaves(old_state), jax.tree.leaves(member.opt_state), strict=True
            ):
                again = restore == "weights" or np.issubdtype(was.dtype, np.integer)
                np.testing.assert_array_equal(now, was if again else np.zeros_like(was))
    summary = json.loads((tmp_path / "lth" / "summary.json").read_text())
    assert [row["density"] for row in summary["supervised"]] == [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]
    for row in summary["supervised"]:
        total = sum(summary["layers"].values())
        assert [sum(kept) for kept in row["kept"]] == [round(row["density"] * total)] * 2


# Several cycles begin as one does.
@pytest.mark.parametrize("cycles", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.usefixtures("narrow", "unrendered")
def test_what_is_going_to_be_pruned_is_drawn_to_zero(tmp_path, monkeypatch, cycles):
    """DLTH: random places, the same as without it; the others shrink while all are trained."""
    ended, started, real = {}, {}, study.fit_stage

    def fit_stage(config, workdir, stage, names, members, step_fn, plan, *args, **kwargs):
        started[stage] = plan, members
        ended[stage] = real(config, workdir, stage, names, members, step_fn, plan, *args, **kwargs)
        return ended[stage]

    monkeypatch.setattr(study, "fit_stage", fit_stage)
    fields = {"supervised.max_steps": 4, "supervised.record_every": 4, **PLAIN}
    config = get_config(
        "mnist_dlth",
        **fields,
        **{
            "transform.cycles": cycles, "transform.every": 2, "transform.increment": 0.05,
            "transform.hold": 90, "transform.learning_rate": 0.05,
        },
    )  # fmt: skip
    study.run(config, tmp_path / "dlth")
    assert [*ended] == [f"transform_{c + 1}" for c in range(cycles)] + ["supervised"]
    assert started["transform_1"][0].total_steps == 21 * 2 + 90
    # Each cycle has an order of the data of its own, and so has what follows.
    keys = [tuple(jax.random.key_data(members.key[0]).tolist()) for _, members in started.values()]
    assert len(set(keys)) == cycles + 1
    _, random = start(get_config("mnist_random", **fields), study.prepare(config, None).module)
    last = ended[f"transform_{cycles}"]
    jax.tree.map(np.testing.assert_array_equal, last.masks, random.masks)
    runs, before = sparse_members.runs_of(config), None
    for cycle in range(1, cycles + 1):
        _, members = started[f"transform_{cycle}"]
        kept, weights = kernels(members.masks), kernels(members.params)
        total = sum(mask.reshape(len(runs), -1).sum(1) for mask in kept.values())
        size = sum(mask[0].size for mask in kept.values())
        np.testing.assert_allclose(
            total / size, [run.density ** (cycle / cycles) for run in runs], atol=2e-3
        )
        # Nothing is cut yet, and what stays in a cycle stayed in the one before.
        assert all(np.mean(leaf != 0) > 0.99 for leaf in weights.values())
        assert before is None or all(np.all(before[name] >= kept[name]) for name in kept)
        before = kept
        end = kernels(ended[f"transform_{cycle}"].params)
        for name, mask in kept.items():
            gone = ~mask.astype(bool)
            # A small layer may keep everything.
            if gone.any():
                assert np.abs(end[name][gone]).mean() < 0.05 * np.abs(end[name][~gone]).mean()
    for name, leaf in kernels(started["supervised"][1].params).items():
        mask = kernels(last.masks)[name].astype(bool)
        np.testing.assert_array_equal(leaf, np.where(mask, kernels(last.params)[name], 0))


@pytest.mark.usefixtures("narrow", "unrendered")
def test_gates_are_trained_before_weights_are_cut(tmp_path, monkeypatch):
    """L0: whole networks with gates, shared by all densities; then exact counts, gates applied."""
    started, ended, real = {}, {}, study.fit_stage

    def fit_stage(config, workdir, stage, names, members, *args, **kwargs):
        started[stage] = names, members
        ended[stage] = real(config, workdir, stage, names, members, *args, **kwargs)
        return ended[stage]

    monkeypatch.setattr(study, "fit_stage", fit_stage)
    fields = {
        "supervised.max_steps": 4, "supervised.record_every": 4, "l0.max_steps": 60,
        "l0.record_every": 60, "l0.learning_rate": 0.1, "l0.coefficient": 0.3, **PLAIN,
    }  # fmt: skip
    config = get_config("mnist_l0", **fields)
    summary = study.run(config, tmp_path)
    names, members = started["gates"]
    assert len(names) == 4 and all("-d1.0-" in name for name in names)
    assert {*members.params} == {"weights", "log_alpha"}
    after = ended["gates"].params
    alpha, weights = kernels(after["log_alpha"]), kernels(after["weights"])
    assert all(np.all((leaf > -4.61) & (leaf < 4.61)) for leaf in alpha.values())
    runs = sparse_members.runs_of(config)
    _, cut = started["supervised"]
    # The order of the data is that of other methods, before that another one.
    assert np.all(jax.random.key_data(cut.key[:4]) != jax.random.key_data(members.key))
    _, random = start(get_config("mnist_random", **PLAIN), study.prepare(config, None).module)
    np.testing.assert_array_equal(jax.random.key_data(cut.key), jax.random.key_data(random.key))
    size = sum(leaf[0].size for leaf in alpha.values())
    for index, run in enumerate(runs):
        source = names.index(sparse_members.member_names([run._replace(density=1.0)])[0])
        chance = {n: 1 / (1 + np.exp(-a[source] - 2 / 3 * np.log(11))) for n, a in alpha.items()}
        scores = {n: np.abs(weights[n][source]) * chance[n] for n in alpha}
        expected = largest(scores, round(run.density * size))
        masks, params = (kernels(member_of(tree, index)) for tree in (cut.masks, cut.params))
        for name, keep in expected.items():
            # Scores here are of double precision.
            assert np.mean(masks[name].astype(bool) != keep) < 1e-3
            gate = np.clip(1.2 / (1 + np.exp(-alpha[name][source])) - 0.1, 0, 1)
            effective = np.where(masks[name], weights[name][source] * gate, 0)
            np.testing.assert_allclose(params[name], effective, atol=1e-6)
        assert sum(leaf.sum() for leaf in masks.values()) == round(run.density * size)
    first, second = summary["gates"]
    assert (first["regulariser"], second["regulariser"]) == ("none", "l2")
    open_ = sum((leaf > -np.log(11)).reshape(4, -1).sum(1) for leaf in alpha.values())
    assert first["kept"] + second["kept"] == open_.tolist() and open_.max() < size
    assert "What gates alone kept" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_a_lottery_that_was_stopped_goes_on(tmp_path):
    """Killed between two levels, the same command ends with the same networks."""
    config = get_config("mnist_lth", density=(0.5, 0.1), seeds=(1,))
    whole = study.run(config, tmp_path / "whole")
    real, calls = study.fit_stage, []

    def fit_stage(config, workdir, stage, *args, **kwargs):
        if stage == "level_0.1" and not calls:
            calls.append(stage)
            raise KeyboardInterrupt
        return real(config, workdir, stage, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "fit_stage", fit_stage)
        with pytest.raises(KeyboardInterrupt):
            study.run(config, tmp_path / "broken")
        again = study.run(config, tmp_path / "broken")
    assert again["supervised"] == whole["supervised"]


@pytest.mark.slow
def test_levels_may_be_written_as_integers(tmp_path):
    config = get_config("mnist_lth", density=(1, 0.5), seeds=(1,), coefficients=(0.1,))
    rows = study.run(config, tmp_path)["supervised"]
    assert [row["density"] for row in rows] == [1, 1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("prune", "density", "expected"),
    [
        (0.0, (0.5, 0.1), [1.0, 0.5, 0.1]),
        (0.5, (0.5, 0.1), [1.0, 0.5, 0.2236, 0.1]),
        (0.2, (1.0, 0.64), [1.0, 0.8, 0.64]),
        (0.9, (0.5, 0.4), [1.0, 0.5, 0.4]),
    ],
)
def test_levels_lead_to_what_is_asked_for(prune, density, expected):
    config = get_config("mnist_lth", density=density, **{"lth.prune": prune})
    assert lottery.levels(config) == expected


def test_levels_as_published():
    """A fifth of what is left at each level, as nearly as densities that are asked for allow."""
    config = configs.get_config("mnist_lth")
    levels = lottery.levels(config)
    assert len(levels) == 28 and set(config.density) <= set(levels)
    kept = np.divide(levels[1:], levels[:-1])
    assert np.all((kept > 0.76) & (kept < 0.83))


@pytest.mark.slow
def test_levels_between_are_trained_but_not_reported(tmp_path):
    config = get_config(
        "mnist_lth", density=(0.5, 0.1), seeds=(1,), coefficients=(0.1,), **{"lth.prune": 0.5}
    )
    rows = study.run(config, tmp_path)["supervised"]
    assert [row["density"] for row in rows] == [0.5, 0.5, 0.1, 0.1]
    size = 64 * 300 + 300 * 100 + 100 * 10
    for density in (0.5, 0.2236, 0.1):
        log = MetricsLog(tmp_path / f"level_{density}.jsonl", "level")
        assert np.all(log.column("kept")[1].sum(-1) == round(density * size))

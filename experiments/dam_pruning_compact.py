"""Networks of the structured pruning study made small: written, compared and timed."""

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.dam_pruning_members import member_names, runs_of
from experiments.dam_pruning_stages import Setup, variables_of
from ntt_sparse.pruning.compact import compact
from ntt_sparse.training import deploy
from ntt_sparse.training.files import write_text
from ntt_sparse.training.state import Member

_logger = logging.getLogger(__name__)

_BATCHES = (1, 128)
_ROUNDS = 15
_PROBE = 16
_LARGEST_DIFFERENCE = 1e-5


def write(
    config: Any, setup: Setup, members: Member, workdir: Path, gone: Collection[int] = ()
) -> None:
    """Writes every network of a study as a small one, and what was measured of them.

    `compact/` holds a file for each, of `ntt_sparse.training.deploy`; `compact.json` by name
    its `parameters` and `multiply_adds` as counted, the `constants` beside them, the layers
    `removed`, the largest `difference` of outputs on held-out images relative to the largest
    output and, of the first seed of each setting, `latency`: milliseconds before and after, by
    batch. Of networks that are gone there is nothing. Nothing is done again where it is there.
    """
    path = workdir / "compact.json"
    if path.exists():
        return
    directory = workdir / "compact"
    directory.mkdir(exist_ok=True)
    names, runs = member_names(runs_of(config)), runs_of(config)
    shape, images = setup.data.input_shape, setup.data.validation.x
    apply = jax.jit(lambda variables, x: setup.module.apply(variables, x))
    found, timed = {}, set()
    members = jax.device_get(members)
    for index, (name, run) in enumerate(zip(names, runs, strict=True)):
        if index in gone:
            continue
        member = jax.tree.map(lambda leaf, i=index: jnp.asarray(leaf[i]), members)
        variables = variables_of(member)
        small = compact(setup.module, variables, shape, empty="remove")
        deploy.save(directory / f"{name}.safetensors", small.module, small.variables)
        x = jnp.asarray(images[:_PROBE])
        before, after = apply(variables, x), small.module.apply(small.variables, x)
        found[name] = {
            "parameters": small.after.parameters,
            "multiply_adds": small.after.multiply_adds,
            "constants": small.constants,
            "removed": list(small.removed),
            "difference": float(
                jnp.max(jnp.abs(after - before)) / jnp.maximum(jnp.max(jnp.abs(before)), 1e-6)
            ),
        }
        if not found[name]["difference"] < _LARGEST_DIFFERENCE:
            _logger.warning(
                "the small network of %s differs by %.1e of the largest output, expected less "
                "than %.0e", name, found[name]["difference"], _LARGEST_DIFFERENCE,
            )  # fmt: skip
        if run[:-1] not in timed:
            timed.add(run[:-1])
            found[name]["latency"] = {
                str(batch): _latency(
                    setup.module, variables, small, np.resize(images, (batch, *shape))
                )
                for batch in _BATCHES
            }
    write_text(path, json.dumps(found, indent=1) + "\n")


def _latency(module: Any, variables: Any, small: Any, x: Any) -> dict[str, float]:
    calls = {
        "before": deploy.compiled(module, variables, x),
        "after": deploy.compiled(small.module, small.variables, x),
    }
    times = deploy.latencies(calls, rounds=_ROUNDS)
    return {name: 1e3 * float(np.median(each)) for name, each in times.items()}

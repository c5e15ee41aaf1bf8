"""A run to be killed: trains the small problem in a work directory, as a process of its own."""

import sys
from pathlib import Path

import jax
import problems

from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import terms
from ntt_sparse.training.checkpoint import Checkpoints, digest
from ntt_sparse.training.loop import Plan, fit
from ntt_sparse.training.metrics import MetricsLog

PLAN = Plan(total_steps=200, steps_per_epoch=6, record_every=5, checkpoint_seconds=0.0)


def main(workdir: Path) -> None:
    """Runs or continues, then leaves a fingerprint of the end state."""
    mesh = meshes.make_mesh()
    data = jax.device_put(problems.data(), meshes.replicated(mesh))

    @jax.jit
    @jax.vmap
    def evaluate(member):
        return terms.evaluate_supervised(problems.apply_fn, member.params, member.masks, data)

    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state = fit(
            problems.program(mesh),
            problems.members(),
            data,
            PLAN,
            log=MetricsLog(workdir / "metrics.jsonl", "made"),
            checkpoints=checkpoints,
            member_names=["a", "b", "c", "d"],
            evaluate=evaluate,
        )
    (workdir / "fingerprint").write_text(digest(state).tobytes().hex())


if __name__ == "__main__":
    main(Path(sys.argv[1]))

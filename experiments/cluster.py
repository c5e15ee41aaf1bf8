"""Several processes that run one study, found by JAX's own cluster detection."""

import os
import sys
import traceback
from typing import NoReturn


def join() -> None:
    """Joins the processes of a job of Slurm, Open MPI or Kubernetes.

    Raises:
        ValueError: There is no such job, or its processes do not find one another.
    """
    import jax

    # A SIGTERM is the loop's to hear: it leaves a checkpoint.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"--distributed found no job to join ({' '.join(str(error).split())}): start processes "
            "by srun, mpirun or an indexed Kubernetes Job, or leave the flag out"
        ) from error


def is_joined() -> bool:
    """Whether this process is one of several."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def leave(code: int) -> NoReturn:
    """Ends this process alone.

    Leaving in the ordinary way waits for the others, which wait for this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_after_error() -> NoReturn:
    """Shows the error that is being handled and ends this process, so that the others end too."""
    traceback.print_exc()
    leave(1)

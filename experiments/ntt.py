r"""Neural Tangent Transfer: sparse networks initialised without labels, and their rivals.

One command transfers a dense teacher's outputs and tangent kernel to sparse students,
trains them beside dense, random, SNIP, Logit-SNIP and magnitude-pruned networks, and
writes summary.json, report.md, metrics and figures into the work directory. The same
command after an interruption goes on where it stopped.

    python -m experiments.ntt
    python -m experiments.ntt --config=experiments/configs/ntt.py:mnist_lenet300 \
        --config.density=0.03 --config.seeds=1,2,3,4,5 --workdir=runs/mnist

Without flags it runs on the handwritten digits inside scikit-learn.
"""

import pathlib

from absl import flags

from experiments import cli
from experiments.configs import ntt as ntt_configs

_CONFIG = cli.define_config(pathlib.Path(ntt_configs.__file__), ntt_configs.get_config)
# So that --help lists it: it is defined in another module.
flags.declare_key_flag("config")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results and checkpoints go; by default runs/ntt-NAME."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Prepared TensorFlow Datasets; by default $TFDS_DATA_DIR."
)


def main() -> None:
    """Runs the study that the flags describe."""
    # Imported here, so that --help and flag errors come at once.
    from experiments import ntt_study

    config = _CONFIG.value
    workdir = _WORKDIR.value or f"runs/ntt-{config.name.replace(',', '-')}"
    ntt_study.run(config, workdir, data_dir=_DATA_DIR.value)


if __name__ == "__main__":
    cli.run(main, doc=f"{__doc__}\n{ntt_configs.__doc__}")

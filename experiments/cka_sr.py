r"""CKA-SR in random sparse training: does less alike make a better sparse network?

One command trains random sparse networks with fixed masks, with and without each
regulariser, at every coefficient, density and seed as one program, and writes summary.json,
report.md, similarities, metrics and figures into the work directory. Regularised networks are
compared with those of the same seeds that are not. The same command after an interruption
goes on where it stopped.

    python -m experiments.cka_sr
    python -m experiments.cka_sr --config=experiments/configs/cka_sr.py:mnist_lenet300 \
        --config.coefficients=1e-3,1e-2 --workdir=runs/cka_sr

Without flags it runs on the handwritten digits inside scikit-learn.
"""

import pathlib

from absl import flags

from experiments import cli
from experiments.configs import cka_sr as cka_sr_configs

_CONFIG = cli.define_config(pathlib.Path(cka_sr_configs.__file__), cka_sr_configs.get_config)
# So that --help lists it: it is defined in another module.
flags.declare_key_flag("config")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results and checkpoints go; by default runs/cka_sr-NAME."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Prepared TensorFlow Datasets; by default $TFDS_DATA_DIR."
)


def main() -> None:
    """Runs the study that the flags describe."""
    # Imported here, so that --help and flag errors come at once.
    from experiments import cka_sr_study

    config = _CONFIG.value
    workdir = _WORKDIR.value or f"runs/cka_sr-{config.name.replace(',', '-')}"
    cka_sr_study.run(config, workdir, data_dir=_DATA_DIR.value)


if __name__ == "__main__":
    cli.run(main, doc=f"{__doc__}\n{cka_sr_configs.__doc__}")

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

from experiments import cli
from experiments.configs import cka_sr as configs

if __name__ == "__main__":
    cli.start("cka_sr", configs, doc=__doc__, study="sparse_training")

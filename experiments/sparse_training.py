r"""Sparse training of every kind, with and without CKA-SR.

One command trains sparse networks whose masks come from one method, with and without each
regulariser, at every coefficient, density and seed as one program, and writes summary.json,
report.md, similarities, metrics and figures into the work directory. The same command after an
interruption goes on where it stopped.

    python -m experiments.sparse_training
    python -m experiments.sparse_training \
        --config=experiments/configs/sparse_training.py:mnist_rigl --workdir=runs/rigl

Without flags it runs on the handwritten digits inside scikit-learn.
"""

from experiments import cli
from experiments.configs import sparse_training as configs

if __name__ == "__main__":
    cli.start("sparse_training", configs, doc=__doc__)

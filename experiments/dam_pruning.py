r"""Structured pruning with gates: how small does a network become, and how accurate is it?

One command trains a network at every coefficient, target, order of channels and seed as one
program, and writes summary.json, report.md, metrics and figures into the work directory. The
same command after an interruption goes on where it stopped.

    python -m experiments.dam_pruning
    python -m experiments.dam_pruning --config=experiments/configs/dam_pruning.py:table5a \
        --config.coefficients=0.01,0.1 --data_dir=$HOME/tensorflow_datasets
"""

from experiments import cli
from experiments.configs import dam_pruning as configs

if __name__ == "__main__":
    cli.start("dam_pruning", configs, doc=__doc__)

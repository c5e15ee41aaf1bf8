r"""DAM in representation learning: does the bottleneck end at the dimension of the data?

One command trains autoencoders on data of known dimensions, at every rank, coefficient,
learning rate, first offset and seed as one program, and writes summary.json, report.md,
metrics and figures into the work directory. The same command after an interruption goes on
where it stopped.

    python -m experiments.dam_representation
    python -m experiments.dam_representation \
        --config=experiments/configs/dam_representation.py:quadratic --config.ranks=5,10
"""

from experiments import cli
from experiments.configs import dam_representation as configs

if __name__ == "__main__":
    cli.start("dam_representation", configs, doc=__doc__)

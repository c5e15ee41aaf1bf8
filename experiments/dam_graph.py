r"""DAM in graph autoencoders: which links are predicted from how many numbers for each node?

One command trains graph autoencoders whose codes have gates, at every coefficient and seed as one
program, then plain ones at each embedding size that the gates ended with, and writes summary.json,
report.md, networks, metrics and figures into the work directory. The same command after an
interruption goes on where it stopped.

    python -m experiments.dam_graph
    python -m experiments.dam_graph --config=experiments/configs/dam_graph.py:cora \
        --data_dir=$HOME/data

Without flags it runs on a graph that is made. Those of the paper are read from files `ind.cora.*`.
"""

from experiments import cli
from experiments.configs import dam_graph as configs

if __name__ == "__main__":
    cli.start("dam_graph", configs, doc=__doc__)

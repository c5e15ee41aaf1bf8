r"""DAM in place of dropout: how many numbers describe a pair of a user and an item?

One command trains IGMC, a graph network that predicts ratings from the ratings around a pair,
with dropout and with gates on the code of the pair, for every seed as one program for each, and
writes summary.json, report.md, metrics, networks and figures into the work directory. The same
command after an interruption goes on where it stopped.

    python -m experiments.dam_recommender
    python -m experiments.dam_recommender \
        --config=experiments/configs/dam_recommender.py:flixster --data_dir=DATA

DATA holds `flixster/training_test_dataset.mat` and the like, see `ntt_sparse.data.ratings`.
Without flags it runs on made ratings.
"""

from experiments import cli
from experiments.configs import dam_recommender as configs

if __name__ == "__main__":
    cli.start("dam_recommender", configs, doc=__doc__)

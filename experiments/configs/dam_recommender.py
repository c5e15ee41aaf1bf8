r"""Settings of compact recommenders (Bu et al. 2021, arXiv:2110.01684, Section 4.2, Table 1).

A name picks the settings. `,validated` holds out a fifth of the training ratings, another one for
each seed; `,smoke` shrinks all to seconds, to see that all parts work:

    python -m experiments.dam_recommender
    python -m experiments.dam_recommender \
        --config=experiments/configs/dam_recommender.py:yahoo_music --data_dir=DATA

===========  ==============================================================================
made         the default, ours: 791 ratings of a taste of low rank, no download
flixster     Table 1; half stars, lambda 0.1
douban       Table 1; stars, lambda 0.1
yahoo_music  Table 1; ratings from 1 to 100, lambda 50
ml_100k      ours: MovieLens-100K, at most 50 other users and items in a subgraph
===========  ==============================================================================

IGMC as in its published code: four relational convolutions of 32, whose weights share 4 bases,
tanh; a code of 128 with ReLU; a linear rating. The levels of edges are those of the training
ratings, 69 of Yahoo's 71 (there: all). Messages are summed over neighbours, a fifth of
the directed edges is dropped in each step. The loss is the mean squared error, plus 0.001 times
what the weights of neighbouring ratings differ, plus lambda times the offset of the gates. Adam,
100 epochs, a tenth of the rate after every 50; ratings that fill no batch of 50 wait for the next
epoch. DAM takes the place of the dropout of one half; its order numbers are the paper's.

As published, all training ratings train, and the error is that of the mean prediction of the
networks 30, 20, 10 and 0 epochs before the end; the last network's own is beside it, and of it is
the number of open channels. Seeds differ in weights, order and what is dropped. (The published
spread is of runs with one seed.) Nothing is chosen by test ratings, nor by held-out ones, whose
error is in the records.
"""

from typing import Any

import ml_collections

from experiments.configs.common import build

_BASE: dict[str, Any] = {
    "name": "",
    # What is on the code: none (dropout), dam. Each is run with every coefficient and seed.
    "gates": "none,dam",
    "dam_coefficients": (0.1,),
    "seeds": (1, 2, 3, 4, 5),
    # Offset to start from.
    "initial": 1.0,
    "data": {
        "name": "made",
        # Of the training ratings, which are then unknown to training and test subgraphs too.
        "validation_fraction": 0.0,
        # Other users, and other items, of a subgraph; more are drawn.
        "most": 10_000,
    },
    "model": {
        "widths": (32, 32, 32, 32),
        "bases": 4,
        "code": 128,
        "dropout": 0.5,
        "edge_dropout": 0.2,
    },
    "training": {
        "epochs": 100,
        "batch_size": 50,
        "learning_rate": 1e-3,
        # The rate falls by a factor after every so many epochs.
        "decay_epochs": 50,
        "decay": 0.1,
        # Weight of what the weights of neighbouring ratings differ.
        "adjacent": 1e-3,
        # Steps between records; 0: once an epoch.
        "record_every": 0,
        # 0: epochs decide.
        "max_steps": 0,
    },
    # Epochs before the end whose networks predict with the last one; () for that alone.
    "ensemble": (30, 20, 10),
    "checkpoint_seconds": 60.0,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "made": {"training.epochs": 40, "training.decay_epochs": 20, "ensemble": (10, 5)},
    "flixster": {"data.name": "flixster"},
    "douban": {"data.name": "douban"},
    "yahoo_music": {"data.name": "yahoo_music", "dam_coefficients": (50.0,)},
    "ml_100k": {"data.name": "ml_100k", "data.most": 50},
}
_OPTIONS = {
    "validated": {"data.validation_fraction": 0.2},
    "smoke": {
        "seeds": (1, 2),
        "training.epochs": 2,
        "training.max_steps": 20,
        "training.record_every": 5,
        "ensemble": (1,),
    },
}


def get_config(name: str = "made") -> ml_collections.ConfigDict:
    """The settings of a name, such as `"flixster"` or `"flixster,validated,smoke"`.

    Raises:
        ValueError: The name or an option is unknown.
    """
    return build(name, _BASE, _CONFIGS, _OPTIONS)

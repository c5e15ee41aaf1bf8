"""What codes are good for: a classifier that learns from them (Bu et al. 2021, Section 4.4)."""

import json
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int64

from ntt_sparse.training.checkpoint import digest
from ntt_sparse.training.files import write_text

# Of the published code.
_HIDDEN = (50, 50)
_SEED = 1


class Examples(NamedTuple):
    """Images as rows of pixels, or their codes, and their classes."""

    x: Float[np.ndarray, "n d"]
    y: Int[np.ndarray, " n"]


def evenly(n: int, count: int) -> Int64[np.ndarray, " count"]:
    """Indices of `count` of n examples, spread evenly in their order; 0 stands for all."""
    return np.linspace(0, n - 1, count or n).round().astype(np.int64)


def macro_f1(train: Examples, test: Examples, epochs: int) -> float:
    """The macro-averaged F1 score on test codes, of a classifier trained on others.

    Args:
        train: What it learns from.
        test: What it is measured on.
        epochs: The most that it trains for; it stops where its loss does not fall any more.

    Returns:
        In [0, 1]. Without channels, the score of always naming the most frequent class.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import f1_score
    from sklearn.neural_network import MLPClassifier

    if train.x.shape[1] == 0:
        predicted = np.full(len(test.y), np.bincount(train.y).argmax())
    else:
        classifier = MLPClassifier(_HIDDEN, random_state=_SEED, max_iter=epochs)
        with warnings.catch_warnings():
            # The published number of epochs is mostly reached.
            warnings.simplefilter("ignore", ConvergenceWarning)
            predicted = classifier.fit(train.x, train.y).predict(test.x)
    return float(f1_score(test.y, predicted, average="macro"))


def score_codes(path: Path, train: Examples, test: Examples, epochs: int) -> None:
    """Writes `macro_f1` into a file, unless that holds the score of the same codes."""
    fingerprint = digest((train, test, np.int64(epochs))).tobytes().hex()
    try:
        found = json.loads(path.read_text())["codes"]
    except (FileNotFoundError, ValueError):
        found = None
    if found != fingerprint:
        scored = {"codes": fingerprint, "macro_f1": macro_f1(train, test, epochs)}
        write_text(path, json.dumps(scored) + "\n")


def read_score(path: Path) -> float:
    """The F1 score that `score_codes` wrote."""
    return json.loads(path.read_text())["macro_f1"]

"""Combinations of options, of which the usual run takes as few as show every pair."""

import itertools

import pytest


def every_pair(*options):
    """All combinations, for `parametrize`; those that add no pair of values are slow."""
    combinations = list(itertools.product(*options))

    def pairs(combination):
        return set(itertools.combinations(enumerate(combination), 2))

    missing = set().union(*map(pairs, combinations))
    chosen = []
    while missing:
        chosen.append(max(combinations, key=lambda each: len(pairs(each) & missing)))
        missing -= pairs(chosen[-1])
    slow = [pytest.param(*each, marks=pytest.mark.slow) for each in combinations]
    return [each if each in chosen else mark for each, mark in zip(combinations, slow, strict=True)]

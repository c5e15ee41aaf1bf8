"""Features, and what CKA is of them by its definitions in NumPy."""

import numpy as np


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def reference_cka(x, y):
    """The definition, with the centring matrix."""
    x, y, n = x.reshape(len(x), -1), y.reshape(len(y), -1), len(x)
    h = np.eye(n) - 1 / n
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    return np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))


def reference_hsic1(x, y):
    """The unbiased estimate of Song et al. 2012, Eq. 5, from raw Gram matrices."""
    x, y, n = x.reshape(len(x), -1), y.reshape(len(y), -1), len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    total = np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (k @ m).sum()) / (n * (n - 3))


def reference_debiased(x, y):
    return reference_hsic1(x, y) / np.sqrt(reference_hsic1(x, x) * reference_hsic1(y, y))

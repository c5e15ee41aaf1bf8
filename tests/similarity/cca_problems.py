"""Features, and what the tests of CCA compare with: general solvers, in float64 NumPy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntt_sparse.similarity import cca

# Rounding of one operation. A condition number of about 10 in the features below and sums over
# at most 64 examples bring it to about 64 * 10 roundings, to 1000 with the references' own.
ROUNDING = {"float32": 1000 * 2.0**-24, "float64": 1000 * 2.0**-53}

precision = pytest.mark.parametrize("dtype", ["float32", "float64"])
x64 = pytest.mark.usefixtures("x64")


def correlated(seed=0, n=64, p1=5, p2=7):
    """Features that share two directions, with noise; off centre."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, 2))
    x = shared @ rng.normal(size=(2, p1)) + rng.normal(size=(n, p1)) + 0.5
    y = shared @ rng.normal(size=(2, p2)) + rng.normal(size=(n, p2)) - 2.0
    return x, y


def signals(n, k, seed=0):
    """k orthonormal n-vectors with mean 0, as columns."""
    rng = np.random.default_rng(seed)
    return np.linalg.qr(np.c_[np.ones(n), rng.normal(size=(n, k))])[0][:, 1:]


def known(correlations, scales, n=64, seed=0):
    """Features of one signal each, with given canonical correlations and scales of x."""
    rho, k = np.array(correlations), len(correlations)
    basis = signals(n, 2 * k, seed)
    return basis[:, :k] * scales, basis[:, :k] * rho + basis[:, k:] * np.sqrt(1 - rho**2)


def invertible(rng, p):
    """A matrix of condition number at most 4."""
    left, right = (np.linalg.qr(rng.normal(size=(p, p)))[0] for _ in range(2))
    return left * rng.uniform(0.5, 2, p) @ right


# Compiled once for all features of a shape.
compiled = types.SimpleNamespace(
    **{
        function.__name__: jax.jit(function)
        for function in (
            cca.canonical_correlations,
            cca.cca_similarity,
            cca.svcca_similarity,
            cca.pwcca_similarity,
            cca.ridge_cca,
        )
    },
)


def arrays(dtype, *values):
    return [jnp.asarray(value, dtype) for value in values]


# References: the generalised eigenproblem of covariances, by general solvers.


def eigen_cca(x, y):
    """Canonical correlations, descending, and the coefficients of x, by S_x^-1 S_xy S_y^-1 S_yx."""
    x, y = x - x.mean(0), y - y.mean(0)
    operator = np.linalg.solve(x.T @ x, x.T @ y) @ np.linalg.solve(y.T @ y, y.T @ x)
    squares, coefficients = np.linalg.eig(operator)
    order = np.argsort(-squares.real)[: min(x.shape[1], y.shape[1])]
    return np.sqrt(squares.real[order].clip(0)), coefficients.real[:, order]


def eigen_pwcca(x, y):
    rho, coefficients = eigen_cca(x, y)
    variates = (x - x.mean(0)) @ coefficients
    variates /= np.linalg.norm(variates, axis=0)
    weights = [sum(abs(h @ feature) for feature in x.T) for h in variates.T]
    return np.average(rho, weights=weights)


def leading(x, threshold, power):
    x = x - x.mean(0)
    squares, vectors = np.linalg.eigh(x.T @ x)
    shares = np.sqrt(squares.clip(0)) ** power
    k = 1
    while sum(shares[-k:]) < threshold * sum(shares):
        k += 1
    return x @ vectors[:, -k:]


def cosine(a, b):
    return np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))


def ridged(x, ridge):
    n = len(x)
    centring = np.eye(n) - np.ones((n, n)) / n
    kernel = centring @ x @ x.T @ centring
    return kernel @ np.linalg.inv(kernel + ridge * np.trace(kernel) / n * np.eye(n))

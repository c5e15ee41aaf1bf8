"""Tangent kernels: the empirical neural tangent kernel of any pure function."""

from ntt_sparse.ntk.kernel import empirical_ntk as empirical_ntk

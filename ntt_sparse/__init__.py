"""Find, train and understand sparse networks in JAX.

Import the room you need: `ntt_sparse.pruning.masks`, `ntt_sparse.ntk`,
`ntt_sparse.objectives.ntt`, ...
"""

__version__ = "0.1.0"

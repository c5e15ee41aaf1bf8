r"""Hard-concrete gates: random gates that are exactly zero, or exactly one, with some probability.

A gate draws from a logistic distribution about its parameter $\log\alpha$, is squashed to between
0 and 1, stretched beyond both ends and cut off there. The probability that it is not zero is a
smooth function of the parameter, so that the expected number of weights that are left, the
expected L0 norm, can be minimised by gradient descent.

The functions take parameters of any shape: one for each channel, as `HardConcrete`, or one for
each weight.

Source: Louizos, Welling & Kingma 2018, "Learning Sparse Neural Networks through L0
Regularization", https://arxiv.org/abs/1712.01312, and its published code.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Real

from ntt_sparse._types import PRNGKey, Scalar
from ntt_sparse.gates._checks import per_channel

TEMPERATURE = 2 / 3
"""How soft the distribution is; the smaller, the more of it is at zero and one."""
LOW, HIGH = -0.1, 1.1
"""The ends of what is stretched."""
LIMITS = (math.log(0.01), math.log(100.0))
"""Of parameters, after each step (`clip`)."""
_SMALLEST = 1e-6


def sample(log_alpha: Real[ArrayLike, "..."], noise: Real[ArrayLike, "..."]) -> Float[Array, "..."]:
    r"""Gates of training.

    $z = \mathrm{clip}(1.2\, \sigma((\log u - \log(1 - u) + \log\alpha) / \tau) - 0.1, 0, 1)$.

    Args:
        log_alpha: Of each gate.
        noise: Uniform draws between 0 and 1 of the same shape, see `uniform`.

    Returns:
        Gates from 0 to 1, of the shape of the parameters.
    """
    noise = jnp.asarray(noise)
    logistic = jnp.log(noise) - jnp.log1p(-noise)
    return _stretched((logistic + jnp.asarray(log_alpha)) / TEMPERATURE)


def deterministic(log_alpha: Real[ArrayLike, "..."]) -> Float[Array, "..."]:
    r"""Gates of evaluation, $\mathrm{clip}(1.2\, \sigma(\log\alpha) - 0.1, 0, 1)$.

    Zero for parameters of `-log(11)` = -2.398 or less, one from 2.398 on.
    """
    return _stretched(jnp.asarray(log_alpha))


def _stretched(x: Array) -> Array:
    return jnp.clip(jax.nn.sigmoid(x) * (HIGH - LOW) + LOW, 0.0, 1.0)


def probability(log_alpha: Real[ArrayLike, "..."]) -> Float[Array, "..."]:
    r"""The probability that a gate of training is not zero.

    $\sigma(\log\alpha - \tau \log(0.1 / 1.1))$; as in the published code, at least 1e-6
    and at most one less that.
    """
    chance = jax.nn.sigmoid(jnp.asarray(log_alpha) - TEMPERATURE * math.log(-LOW / HIGH))
    return jnp.clip(chance, _SMALLEST, 1 - _SMALLEST)


def uniform(key: PRNGKey, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draws for `sample`, away from 0 and 1 by 1e-6."""
    dtype = jnp.result_type(float)
    return jax.random.uniform(key, shape, dtype, _SMALLEST, 1 - _SMALLEST)


def clip(log_alpha: Real[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Parameters held between log 0.01 and log 100, to be called after each step."""
    return jnp.clip(jnp.asarray(log_alpha), *LIMITS)


@dataclasses.dataclass(frozen=True)
class HardConcrete:
    """A random gate for each channel, see `ntt_sparse.gates.layer`.

    In training, where the network is applied with an RNG `dropout`, gates are drawn; without it
    they are those of evaluation.

    Attributes:
        drop: Chance of being dropped at the start, between 0 and 1; parameters start from
            `log((1 - drop) / drop)`. (The published code adds normal draws of deviation 0.01,
            and takes 0.5 for 0.)
    """

    drop: float = 0.3
    place = "layer"

    def __post_init__(self):
        """Checks the fields.

        Raises:
            ValueError: The chance is not between 0 and 1, or gates would start at zero.
        """
        # The negated form also refuses NaN.
        if not 0.0 < self.drop < 1.0:
            raise ValueError(f"drop is {self.drop}, expected a number between 0 and 1")
        if self.start > LIMITS[1]:
            raise ValueError(
                f"drop is {self.drop}, expected at least {1 / (1 + math.exp(LIMITS[1])):.4f}: "
                "parameters are held below log 100"
            )
        if self.start <= math.log(-LOW / HIGH):
            raise ValueError(
                f"drop is {self.drop}, expected less than {HIGH / (HIGH - LOW):.4f}: gates of "
                "evaluation would all start at zero"
            )

    @property
    def start(self) -> float:
        """The parameter at the start."""
        return math.log((1 - self.drop) / self.drop)

    def init(self, n: int) -> dict[str, Array]:
        """The parameters of one layer of `n` channels: `{"log_alpha": (n,)}`."""
        return {"log_alpha": jnp.full(n, self.start, jnp.result_type(float))}

    def noise(self, key: PRNGKey, n: int) -> Float[Array, " n"]:
        """What the gates of a layer of `n` channels are drawn from, `(n,)`."""
        return uniform(key, (n,))

    def values(
        self,
        params: Mapping[str, Array],
        n: int,
        *,
        ranks: Int[ArrayLike, " n"] | None = None,
        noise: Real[ArrayLike, " n"] | None = None,
    ) -> Float[Array, " n"]:
        """The gates of a layer of `n` channels, `(n,)`, drawn if there is noise.

        Raises:
            ValueError: There are others than `n`.
        """
        del ranks
        log_alpha = per_channel(params, "log_alpha", n)
        if noise is None:
            return deterministic(log_alpha)
        return sample(log_alpha, per_channel({"noise": jnp.asarray(noise)}, "noise", n))

    def penalty(self, layers: Sequence[Mapping[str, Array]]) -> Scalar:
        """The expected number of open channels of all layers.

        For weights in place of channels, weigh `probability` by what a channel has of them, or
        take `ntt_sparse.gates.channels.soft_fractions` of it: about the expected fraction of
        parameters of a network whose gates are drawn apart. (Of what a sum has it takes the most
        likely part, and layers that close whole are not thought of.)
        """
        if not layers:
            raise ValueError("there are no gates, expected one per gated layer")
        return jnp.sum(jnp.stack([jnp.sum(probability(layer["log_alpha"])) for layer in layers]))

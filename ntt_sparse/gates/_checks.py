"""What kinds of gates check alike."""

import math
from collections.abc import Mapping

from jaxtyping import Array


def check_initial(value: float, why: str = "") -> None:
    """Checks that gates start open.

    Raises:
        ValueError: The value is not finite and above zero; `why` says why it must be.
    """
    # The negated form also refuses NaN.
    if not 0.0 < value < math.inf:
        raise ValueError(f"initial is {value}, expected a finite number above 0{why}")


def per_channel(params: Mapping[str, Array], name: str, n: int) -> Array:
    """The parameter of a layer that has one number for each of its `n` channels.

    Raises:
        ValueError: It has others than `n`.
    """
    value = params[name]
    if value.shape != (n,):
        raise ValueError(f"{name} has shape {value.shape}, expected ({n},): one per channel")
    return value

"""Descriptions of networks as text, for files."""

import dataclasses
import json
from typing import Any, get_args

from ntt_sparse.gates.network import Network, Node, check

_KINDS = {kind.__name__: kind for kind in get_args(Node)}


def to_json(network: Network) -> str:
    """The description as text, for files."""
    return json.dumps(
        {
            name: {"node": type(node).__name__, **dataclasses.asdict(node)}
            for name, node in network.nodes.items()
        }
    )


def from_json(text: str) -> Network:
    """The network that `to_json` described.

    Raises:
        ValueError: The text describes none.
    """
    try:
        return check(Network({key: _node(**fields) for key, fields in json.loads(text).items()}))
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"this describes no network: {error}") from None


def _node(node: str, **fields: Any) -> Node:
    tuples = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    return _KINDS[node](**{**fields, **tuples})

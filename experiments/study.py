"""What studies share: held-out data, one stage over all devices, networks as files."""

import hashlib
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntt_sparse._types import PRNGKey
from ntt_sparse.data import folders, images
from ntt_sparse.data.augment import pad_crop_flip
from ntt_sparse.data.batches import steps_per_epoch, total_steps
from ntt_sparse.data.folders import FolderImages
from ntt_sparse.data.stream import Stream
from ntt_sparse.data.text import TextData
from ntt_sparse.pruning.masks import LayerDensity, layer_densities
from ntt_sparse.training import mesh as meshes
from ntt_sparse.training import processes
from ntt_sparse.training.export import save_network
from ntt_sparse.training.loop import Plan
from ntt_sparse.training.state import Member
from ntt_sparse.training.step import Augment

_Data = TypeVar("_Data", bound=images.ImageData | TextData)
_logger = logging.getLogger(__name__)


def asked_densities(config: Any) -> list[float]:
    """The densities of the settings, where 1 is an integer on a command line."""
    return [float(density) for density in config.density]


def stack(trees: Sequence[Any]) -> Any:
    """Trees of one structure and the same dtypes as one, with a leading axis.

    Numbers and arrays are stacked on the host, where nothing is compiled; keys are not.
    """

    def stacked(*leaves: Any) -> jax.Array:
        if not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves):
            # Python's numbers, with JAX's types and limits.
            leaves = tuple(jnp.asarray(leaf) for leaf in leaves)
        (dtype,) = {leaf.dtype for leaf in leaves}
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return jnp.stack(leaves)
        return jax.device_put(np.stack(jax.device_get(leaves)))

    return jax.tree.map(stacked, *trees)


@jax.jit
def concatenate(trees: Sequence[Any]) -> Any:
    """Trees of one structure along their leading axes."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def member_mode(members: Member) -> meshes.MemberMode:
    """How the members of one device ride by default."""
    return meshes.default_member_mode(shapes_of_one(members.params))


def shapes_of_one(stacked: Any) -> Any:
    """The shapes of a tree without its leading axis."""
    return jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree), stacked)


def warn_of_empty_layers(name: str, masks: Any) -> dict[str, LayerDensity]:
    """Logs a warning of layers without any weight. Returns what each layer keeps."""
    rows = layer_densities(masks)
    if empty := [layer for layer, row in rows.items() if row.kept == 0]:
        _logger.warning("%s: layers without any weight: %s", name, ", ".join(empty))
    return rows


def hold_out(data: _Data, fraction: float, seed: int) -> _Data:
    """Splits the training part; with a fraction of 0 the validation set is the training set."""
    if fraction == 0:
        return data._replace(validation=data.train)
    train, validation = images.split_indices(len(data.train.y), fraction, seed)
    return data._replace(
        train=images.take(data.train, train), validation=images.take(data.train, validation)
    )


def unit_pixels(data: images.ImageData) -> images.ImageData:
    """Images whose pixels go from 0 to 1, the darkest and the brightest of those in training."""
    std, mean = data.std.astype(np.float32), data.mean.astype(np.float32)
    train = np.asarray(data.train.x) * std + mean
    low, high = train.min(), train.max()

    def scaled(split: images.Split) -> images.Split:
        return images.Split((np.asarray(split.x) * std + mean - low) / (high - low), split.y)

    return data._replace(
        train=scaled(data.train), validation=scaled(data.validation), test=scaled(data.test)
    )


def training_input(config: Any, split: images.Split) -> tuple[Any, Augment | None]:
    """What `fit_stage` trains on, and how its steps change their batches.

    Images in memory are cropped and mirrored on the device, those of a folder where they are read,
    if the settings augment.
    """
    x, y = split
    if not isinstance(x, FolderImages):
        return (x, y), augment_images if config.data.augment else None

    def read(index: int, rng: np.random.RandomState) -> Any:
        return x.random(index, rng) if config.data.augment else x.central(index), y[index]

    def standardise(key: PRNGKey, batch: Any) -> Any:
        del key
        return folders.standardise(batch[0]), batch[1]

    listed = f"{x.shape} {x.paths} {x.indices.tolist()}"
    return Stream(read, len(y), identity=hashlib.sha256(listed.encode()).hexdigest()), standardise


def make_plan(settings: Any, n: int, checkpoint_seconds: float) -> Plan:
    """The plan of a stage from its settings, for n training examples."""
    per_epoch = steps_per_epoch(n, settings.batch_size)
    steps = settings.max_steps or total_steps(n, settings.batch_size, settings.epochs)
    return Plan(steps, per_epoch, settings.record_every or per_epoch, checkpoint_seconds)


def decayed_rate(settings: Any, total_steps: int, factor: float = 0.1) -> optax.Schedule:
    """The learning rate of a stage, times a factor at fractions of its steps."""
    return optax.piecewise_constant_schedule(
        settings.learning_rate,
        {round(fraction * total_steps): factor for fraction in settings.milestones},
    )


def augment_images(key: PRNGKey, batch: Any) -> Any:
    """Pads, crops and mirrors the images of a batch `(x, y)`."""
    x, y = batch
    return pad_crop_flip(key, x), y


def save_networks(
    directory: Path, names: Sequence[str], members: Member, gone: Collection[int] = ()
) -> None:
    """Writes each trained network, as it was after the last step, under its name.

    Args:
        directory: Where to; made if it is not there.
        names: One for each member.
        members: With a leading member axis.
        gone: Indices of those that diverged, which are not written.
    """
    if not processes.is_first():
        return
    directory.mkdir(exist_ok=True)
    trees = jax.device_get((members.params, members.masks, members.model_state))
    for index, name in enumerate(names):
        if index in gone:
            continue
        params, masks, state = jax.tree.map(lambda leaf, i=index: jnp.asarray(leaf[i]), trees)
        save_network(directory / f"{name}.safetensors", params, masks, state)

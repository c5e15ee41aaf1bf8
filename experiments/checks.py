"""Checks of a study's config that types do not make, before any work."""

from collections.abc import Mapping, Sequence
from typing import Any

from ntt_sparse.data.folders import FolderImages
from ntt_sparse.data.images import Split
from ntt_sparse.pruning.masks import check_density

LARGEST_INT = 2**31 - 1


def check_members(config: Any) -> None:
    """Checks `density` and `seeds`, which span the members of every study.

    Raises:
        ValueError: They are empty, repeated or out of range.
    """
    _check_different(config, "density")
    for density in config.density:
        if type(density) not in (int, float):
            raise ValueError(f"config.density holds {density!r}, expected a fraction in (0, 1]")
        check_density(float(density), "config.density")
    check_seeds(config)


def check_seeds(config: Any) -> None:
    """Checks `seeds`.

    Raises:
        ValueError: They are empty, repeated or out of range.
    """
    _check_different(config, "seeds")
    # JAX keeps 32 bits of a seed.
    if any(type(seed) is not int or not 0 <= seed < 2**32 for seed in config.seeds):
        raise ValueError(f"config.seeds is {config.seeds}, expected integers from 0 to 2**32 - 1")


def check_values(config: Any, field: str, least: float, most: float) -> None:
    """Checks a field of different numbers; the ends of the range are allowed.

    Raises:
        ValueError: They are empty, repeated, no numbers or out of range.
    """
    _check_different(config, field)
    for value in _get(config, field):
        # The negated form also refuses NaN.
        if type(value) not in (int, float) or not least <= value <= most:
            raise ValueError(
                f"config.{field} holds {value}, expected numbers from {least} to {most}"
            )


def check_milestones(milestones: Sequence[float], field: str) -> None:
    """Checks the fractions of a run at which its learning rate falls.

    Raises:
        ValueError: They are repeated or no fractions; the message names the field.
    """
    if len(set(milestones)) < len(milestones):
        raise ValueError(f"{field} is {milestones}, expected different fractions")
    for fraction in milestones:
        if not isinstance(fraction, int | float) or not 0 < fraction < 1:
            raise ValueError(
                f"{field} holds {fraction}, expected fractions of the run between 0 and 1"
            )


def check_augment(config: Any, input_shape: Sequence[int]) -> None:
    """Checks that images are as large as `augment_images` needs them, which reflects four pixels.

    Raises:
        ValueError: They are not.
    """
    height, width, *_ = input_shape
    if config.data.augment and min(height, width) < 5:
        raise ValueError(
            f"config.data.augment is True, images are {height} x {width}: it needs 5 x 5 or more"
        )


def check_evaluated(config: Any, train: Split) -> None:
    """Checks that images of a folder are not all held in memory to measure accuracy.

    Raises:
        ValueError: They would be.
    """
    if isinstance(train.x, FolderImages) and not config.evaluated:
        raise ValueError(
            "config.evaluated is 0, expected how many images of the folder are held to measure "
            "accuracy: as many of them as fit into memory"
        )


def check_stages(stages: Any, field: str) -> None:
    """Checks patterns of layers, stage by stage, joined by commas in each.

    Raises:
        ValueError: There are none, or one is no pattern.
    """
    if not stages:
        raise ValueError(f"{field} is empty, expected patterns of layers, stage by stage")
    if not all(isinstance(stage, str) and all(stage.split(",")) for stage in stages):
        raise ValueError(f"{field} is {stages}, expected patterns of layers")


def check_stage_maps(stages: Sequence[str], maps: Sequence[Sequence[Any]], field: str) -> None:
    """Checks that there is something to compare in each stage.

    Raises:
        ValueError: A stage has less than two feature maps.
    """
    for pattern, found in zip(stages, maps, strict=True):
        if len(found) < 2:
            raise ValueError(
                f"{field} holds {pattern!r}, which is {len(found)} feature map: a stage needs two "
                "or more to compare"
            )


def _check_different(config: Any, field: str) -> None:
    values = _get(config, field)
    if not values or len(set(values)) < len(values):
        raise ValueError(f"config.{field} is {values}, expected different values")


def check_fields(
    config: Any,
    choices: Mapping[str, Sequence[Any]],
    ranges: Mapping[str, tuple[float, float]],
) -> None:
    """Checks fields by their paths, such as `"model.norm"`.

    Args:
        config: The settings.
        choices: The allowed values of fields.
        ranges: Smallest and largest value of numbers; the ends are allowed.

    Raises:
        ValueError: A value is unknown or out of range; the message names the field.
    """
    for field, allowed in choices.items():
        value = _get(config, field)
        if value not in allowed:
            raise ValueError(
                f"config.{field} is {value!r}, expected one of {', '.join(map(repr, allowed))}"
            )
    for field, (least, most) in ranges.items():
        value = _get(config, field)
        # The negated form also refuses NaN.
        if not least <= value <= most:
            raise ValueError(f"config.{field} is {value}, expected a number from {least} to {most}")


def check_names(config: Any, field: str, known: Sequence[str]) -> None:
    """Checks a field of different names, joined by commas.

    Raises:
        ValueError: A name is unknown or repeated.
    """
    names = config[field].split(",")
    if set(names) - set(known) or len(set(names)) < len(names):
        raise ValueError(
            f"config.{field} is {config[field]!r}: expected different names, joined by commas, "
            f"from {','.join(known)}"
        )


def _get(config: Any, path: str) -> Any:
    for field in path.split("."):
        config = config[field]
    return config

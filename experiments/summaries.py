"""Summaries of studies: writes them, and reads what may be damaged.

They are strict JSON, of numbers to reckon with.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ntt_sparse.training.files import write_texts

# Far beyond all that is measured; squares of these, and sums over seeds, are still finite.
_LARGEST = 1e100


def settings(config: ConfigDict) -> dict[str, Any]:
    """The settings of a study as its summary holds them: lists for tuples."""
    return json.loads(json.dumps(config.to_dict()))


def write(workdir: Path, summary: Mapping[str, Any], report: str) -> None:
    """Writes `summary.json` and `report.md`: both, or neither where one does not fit.

    Raises:
        OSError: They cannot be written; it names the file.
        ValueError: The summary holds NaN or an infinity.
    """
    text = json.dumps(summary, indent=2, allow_nan=False)
    write_texts({workdir / "summary.json": f"{text}\n", workdir / "report.md": report})


def read(path: Path) -> dict[str, Any]:
    """The object that a `summary.json` holds.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no object of JSON, is nested too deeply, or holds NaN, an infinity, a
            number that cannot be reckoned with or a text that cannot be written.
    """
    try:
        summary = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_refuse,
            parse_int=_integer,
            parse_float=_number,
        )
        # JSON can spell half of a character, which no report can be written with.
        json.dumps(summary, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a character (a lone surrogate)") from error
    if not isinstance(summary, dict):
        raise ValueError("it is no object of JSON")
    return summary


def _refuse(name: str) -> float:
    raise ValueError(f"it holds {name}")


def _number(text: str) -> float:
    number = float(text)
    if abs(number) > _LARGEST:
        short = text if len(text) <= 20 else f"{text[:20]}..."
        raise ValueError(f"it holds {short}, a number beyond {_LARGEST:g}")
    return number


def _integer(text: str) -> int:
    # As a float first: Python reads no integer of thousands of digits.
    _number(text)
    return int(text)

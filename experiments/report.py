r"""Everything that was run, beside what is published, as one page.

Gathers every `summary.json` under a folder: for each table and figure of the papers the published
numbers, ours with their intervals and numbers of seeds, the commands and commits that made them,
and what was not run and why. Writes `REPORT.md` and `report.html` there.

    python -m experiments.report
    python -m experiments.report --results=runs --readme=README.md

`--readme` names a file that gets the short form between its two markers. A summary that cannot be
read is a line that names it; the rest is reported.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from experiments import cli
from experiments.report_build import TITLE, answers, build
from experiments.report_document import Block, markdown, page
from experiments.report_gather import Gathered, gather
from experiments.report_short import prefix_from, put_into, short
from ntt_sparse.training.files import write_texts

_PAGES = ("REPORT.md", "report.html")


def report(results: Path, readme: Path | None = None) -> Gathered:
    """Writes the report of a folder into it, and its short form into a README.

    Args:
        results: The folder.
        readme: With both markers; `None` for none.

    Returns:
        What was found.

    Raises:
        UserError: There is no summary that can be read, or a file cannot be written.
    """
    if not results.is_dir():
        raise cli.UserError(f"{results} is no folder: choose one with --results")
    gathered = gather(results)
    if not gathered.runs:
        found = "; ".join(gathered.problems) or "no summary.json"
        todo = "mend that or run a study first" if gathered.problems else "run a study first"
        raise cli.UserError(f"{results} holds nothing to report ({found}): {todo}")
    found = answers(gathered)
    blocks = build(gathered, short(found))
    with cli.user_errors():
        # Last the README, which holds more than the report.
        texts = dict(zip((results / name for name in _PAGES), pages(blocks), strict=True))
        if readme is not None:
            texts[readme] = _with_short(readme, short(found, prefix_from(readme, results)))
        _write(texts)
    return gathered


def _with_short(readme: Path, blocks: Sequence[Block]) -> str:
    try:
        return put_into(readme.read_text(encoding="utf-8"), blocks)
    except OSError as error:
        raise OSError(
            f"{readme} cannot be read ({error.strerror}): choose a file with --readme"
        ) from error
    except ValueError as error:
        raise ValueError(f"{readme}: {error}") from error


def _write(texts: Mapping[Path, str]) -> None:
    try:
        write_texts(texts)
    except OSError as error:
        raise OSError(
            f"{error.filename} cannot be written ({error.strerror}): mend that and run this again"
        ) from error


def pages(blocks: Sequence[Block]) -> tuple[str, str]:
    """Blocks as Markdown and as HTML."""
    return markdown(blocks), page(TITLE, blocks)


def _start() -> None:
    results = flags.DEFINE_string("results", "results", "The folder that is searched and written.")
    readme = flags.DEFINE_string("readme", None, "A file that gets the short form.")

    def main() -> None:
        gathered = report(Path(results.value), Path(readme.value) if readme.value else None)
        for line in gathered.problems:
            print(f"not read: {line}", file=sys.stderr)
        for name in _PAGES:
            print(Path(results.value) / name)

    cli.launch(main, doc=__doc__)


if __name__ == "__main__":
    _start()

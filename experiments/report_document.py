"""A page as a list of blocks, and the same page in Markdown and in HTML.

Nothing of a text is markup: what comes from files is shown as it is, in both.
"""

import html
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple
from urllib.parse import quote


class Code(NamedTuple):
    """A part of a line that is typed or a name."""

    text: str


class Link(NamedTuple):
    """A part of a line that leads to a file, relative to the page, or to an address."""

    text: str
    target: str


Line = Sequence[str | Code | Link]
"""Text with names and links in it; a plain text is a line as well."""


class Heading(NamedTuple):
    """A heading; level 1 is the title of the page."""

    level: int
    text: str


class Paragraph(NamedTuple):
    """One line of text."""

    line: Line


class Items(NamedTuple):
    """A list."""

    lines: Sequence[Line]


class Table(NamedTuple):
    """A table; every row has as many cells as the head."""

    head: Sequence[str]
    rows: Sequence[Sequence[Line]]


class Command(NamedTuple):
    """Lines of a shell."""

    lines: Sequence[str]


class Figures(NamedTuple):
    """Pictures by their paths, relative to the page."""

    paths: Sequence[str]


Block = Heading | Paragraph | Items | Table | Command | Figures

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
h1, h2, h3 { line-height: 1.2; margin-top: 2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
.wide { overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: 0.2em 0.7em; text-align: left; vertical-align: top;
  white-space: nowrap; }
td:first-child, th:first-child { padding-left: 0; }
pre { background: #f6f6f6; padding: 0.7em; overflow-x: auto; font-size: 12px; }
code { font-size: 0.9em; }
img { max-width: 24rem; width: 100%; margin: 0.3em; border: 1px solid #eee; }
summary { cursor: pointer; }
"""


def _parts(line: Line) -> Sequence[str | Code | Link]:
    return [line] if isinstance(line, str) else line


def _one_line(text: str) -> str:
    """Without breaks and other characters that are not shown."""
    return "".join(each if each.isprintable() else " " for each in text)


def markdown(blocks: Sequence[Block]) -> str:
    """The page as GitHub's Markdown."""
    return "\n\n".join(_MARKDOWN[type(block)](block) for block in blocks) + "\n"


def _escaped(text: str) -> str:
    text = re.sub(r"([\\`*|~#])", r"\\\1", _one_line(text))
    if re.search(r"\]\s*[(:\[]", text):
        # Else brackets, which intervals have, are no link.
        text = text.replace("[", r"\[").replace("]", r"\]")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str, in_table: bool = False) -> str:
    text = _one_line(text)
    # One more than stand in a row within.
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text.replace('|', chr(92) + '|') if in_table else text}{space}{fence}"


def _in_markdown(line: Line, in_table: bool = False) -> str:
    found = []
    for part in _parts(line):
        if isinstance(part, Code):
            found.append(_code(part.text, in_table))
        elif isinstance(part, Link):
            found.append(f"[{_escaped(part.text)}]({_target(part.target)})")
        else:
            found.append(_escaped(part))
    return "".join(found)


def _target(target: str) -> str:
    """An address of ours as it is; a path with all but its slashes quoted."""
    return target if re.match(r"https://|#", target) else quote(target, errors="surrogateescape")


def _markdown_table(block: Table) -> str:
    lines = [block.head, ["---"] * len(block.head), *block.rows]
    return "\n".join(
        f"| {' | '.join(_in_markdown(cell, in_table=True) for cell in cells)} |" for cells in lines
    )


def _markdown_command(block: Command) -> str:
    text = "\n".join(map(_one_line, block.lines))
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}bash\n{text}\n{fence}"


_MARKDOWN: dict[type, Callable[..., str]] = {
    Heading: lambda block: f"{'#' * block.level} {_escaped(block.text)}",
    Paragraph: lambda block: _in_markdown(block.line),
    Items: lambda block: "\n".join(f"- {_in_markdown(line)}" for line in block.lines),
    Table: _markdown_table,
    Command: _markdown_command,
    Figures: lambda block: "Figures: " + ", ".join(
        f"[{_escaped(path.rsplit('/', 1)[-1])}]({_target(path)})" for path in block.paths
    ) + ".",
}  # fmt: skip


def page(title: str, blocks: Sequence[Block]) -> str:
    """The page as HTML, whole in one file but for the pictures, which are where they are."""
    body = "\n".join(_HTML[type(block)](block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        # No script and nothing from elsewhere, whatever stands in a text.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src 'self' file:\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _in_html(line: Line) -> str:
    found = []
    for part in _parts(line):
        text = html.escape(_one_line(part if isinstance(part, str) else part.text))
        if isinstance(part, Code):
            text = f"<code>{text}</code>"
        elif isinstance(part, Link):
            text = f'<a href="{html.escape(_target(part.target))}">{text}</a>'
        found.append(text)
    return "".join(found)


def _html_table(block: Table) -> str:
    head = "".join(f"<th>{_in_html(cell)}</th>" for cell in block.head)
    rows = "\n".join(
        f"<tr>{''.join(f'<td>{_in_html(cell)}</td>' for cell in cells)}</tr>"
        for cells in block.rows
    )
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{rows}\n</table></div>'


def _html_figures(block: Figures) -> str:
    pictures = "".join(
        f'<img loading="lazy" src="{html.escape(_target(path))}" '
        f'alt="{html.escape(_one_line(path))}">'
        for path in block.paths
    )
    return f"<details><summary>{len(block.paths)} figures</summary>{pictures}</details>"


_HTML: dict[type, Callable[..., str]] = {
    Heading: lambda block: f"<h{block.level}>{_in_html(block.text)}</h{block.level}>",
    Paragraph: lambda block: f"<p>{_in_html(block.line)}</p>",
    Items: lambda block: (
        "<ul>\n" + "\n".join(f"<li>{_in_html(line)}</li>" for line in block.lines) + "\n</ul>"
    ),
    Table: _html_table,
    Command: lambda block: f"<pre>{html.escape(chr(10).join(map(_one_line, block.lines)))}</pre>",
    Figures: _html_figures,
}

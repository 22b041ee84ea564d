"""A report as one HTML file with its pictures in it, from the Markdown that reports are written in."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

from fastkd._core.files import write_atomic

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0 }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd }}
code, pre {{ background: #f4f4f4; overflow-wrap: anywhere }}
pre {{ padding: .6rem; white-space: pre-wrap }}
img {{ max-width: 100% }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write(report: Path) -> Path:
    """The Markdown file `report` as an HTML file beside it, whole or not there; returns its path."""
    text = report.read_text()
    title = next((line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")), report.stem)
    target = report.with_suffix(".html")
    write_atomic(target, PAGE.format(title=escape(title), body=body(text, report.parent)).encode())
    return target


def body(text: str, folder: Path) -> str:
    """The elements of a page. Reports have headings, tables, lists, code, pictures of `folder` and paragraphs.

    Everything else of the text is escaped: names of methods, folders and classes come from outside.
    """
    return "\n".join(_element(kind, lines, folder) for kind, lines in _parts(text.splitlines()))


def _parts(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(kind, its lines): neighbouring lines of one kind are one element."""
    kind, found = "", list[str]()
    for line in lines:
        if kind == "code":
            if line.startswith("```"):
                yield kind, found
                kind, found = "", []
            else:
                found.append(line)
            continue
        new = _kind(line)
        if new != kind or new in ("heading", "code"):
            if found:
                yield kind, found
            kind, found = new, []
        if new not in ("code", ""):
            found.append(line)
    if found:
        yield kind, found


def _kind(line: str) -> str:
    if not line.strip():
        return ""
    starts = {"#": "heading", "|": "table", "```": "code", "- ": "list"}
    return next((kind for start, kind in starts.items() if line.startswith(start)), "paragraph")


def _element(kind: str, lines: list[str], folder: Path) -> str:
    if kind == "heading":
        level = min(6, len(lines[0]) - len(lines[0].lstrip("#")))
        return f"<h{level}>{_inline(lines[0].lstrip('# '), folder)}</h{level}>"
    if kind == "code":
        return "<pre>" + escape("\n".join(lines)) + "</pre>"
    if kind == "list":
        return "<ul>" + "".join(f"<li>{_inline(line[2:], folder)}</li>" for line in lines) + "</ul>"
    if kind == "table":
        return _table([line.strip().strip("|").split("|") for line in lines], folder)
    return f"<p>{_inline(' '.join(lines), folder)}</p>"


def _table(rows: list[list[str]], folder: Path) -> str:
    """Its second row says how columns are aligned: `---:` to the right."""
    right = [cell.strip().endswith(":") for cell in rows[1]] if len(rows) > 1 else []
    lines = []
    for number, row in enumerate([rows[0], *rows[2:]]):
        tag = "td" if number else "th"
        styles = [' style="text-align: right"' if turned else ' style="text-align: left"' for turned in right]
        cells = [f"<{tag}{style}>{_inline(c.strip(), folder)}</{tag}>" for c, style in zip(row, styles, strict=False)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _inline(text: str, folder: Path) -> str:
    """Pictures, code and bold text; all else escaped."""
    pieces = re.split(r"(!\[[^\]]*\]\([^)]*\)|`[^`]+`)", text)
    return "".join(_piece(piece, folder) for piece in pieces)


def _piece(piece: str, folder: Path) -> str:
    picture = re.fullmatch(r"!\[([^\]]*)\]\(([^)]*)\)", piece)
    if picture:
        return _picture(picture[1], folder / Path(picture[2]).name)  # of this folder, whatever a name says
    if len(piece) > 2 and piece.startswith("`"):
        return f"<code>{escape(piece[1:-1])}</code>"
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(piece))


def _picture(about: str, path: Path) -> str:
    if not path.is_file() or path.suffix != ".png":
        return f"<em>{escape(about)}</em>"
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(about)}" src="data:image/png;base64,{content}">'

"""Reads the Markdown of the project: code blocks and their marks, links, headings, tables."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "csrc").glob("*/README.md")) + [p for p in [ROOT / "examples/README.md"] if p.exists()]
INDENTED = "indented"  # the language of a block without a fence: commands


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line
    language: str
    text: str
    mark: str  # what a comment right before it says: "signature", "not run: REASON"

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Fenced blocks, and indented ones that follow an empty line."""
    lines, found, number = page.read_text().splitlines(), [], 0
    while number < len(lines):
        start, fence = number + 1, re.match(r"( *)```([^`]*)$", lines[number])
        if fence:
            end = next(n for n in range(start, len(lines)) if lines[n].strip() == "```")
            text = "\n".join(line.removeprefix(fence[1]) for line in lines[start:end])
            mark = re.fullmatch(r"<!-- (.*) -->", lines[number - 1].strip()) if number else None
            found.append(Block(page, start + 1, fence[2].strip(), text, mark[1] if mark else ""))
            number = end + 1
        elif lines[number].startswith("    ") and number and not lines[number - 1].strip():
            end = next((n for n in range(start, len(lines)) if not lines[n].startswith("    ")), len(lines))
            text = "\n".join(line[4:] for line in lines[number:end])
            found.append(Block(page, start, INDENTED, text, ""))
            number = end
        else:
            number += 1
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    """Targets of links and pictures that are on no other host."""
    text = re.sub(r"`[^`]*`", "", re.sub(r"\[`[^`]*`(, `[^`]*`)*\]", "[code]", prose(page)))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


def anchor(heading: str) -> str:
    """As GitHub and the site make it."""
    plain = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip()
    return plain.replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)}


def rows(page: Path) -> list[str]:
    """Rows of tables as they are read: without padding, targets of links, ticks."""
    found = [line for line in prose(page).splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    return [re.sub(r" {2,}", " ", re.sub(r"\]\([^)]*\)", "]", row)).replace("`", "") for row in found]

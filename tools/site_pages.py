"""The site's pages that stand elsewhere than in docs/, and links between all of them (hooks of mkdocs)."""

from __future__ import annotations

import ast
import html
import logging
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# file of the repository > page of the site; files of docs/ keep their names.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PAGES |= {"examples/README.md": "integrations.md"}
PAGES |= {
    f"csrc/{path.parent.name}/README.md": f"kernels/{path.parent.name}.md" for path in ROOT.glob("csrc/*/README.md")
}
API = ("fastkd", "functional", "losses", "methods", "models", "nn", "data", "train", "graphs", "testing")
PICTURES = "benchmarks/results"  # those that pages show
WARNINGS = logging.getLogger("mkdocs.hooks.site_pages")  # an error, in a strict build
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds what stands outside of docs/, the pages of the API, and the pictures that pages refer to."""
    for source, page in PAGES.items():
        if (ROOT / source).is_file() and not source.startswith("docs/"):
            files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for name in API:
        files.append(File.generated(config, f"api/{name}.md", content=_api(name)))
    for picture in (ROOT / PICTURES).rglob("*.png"):
        page = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, page, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of the repository become links of the site; to what is no page of it, they become their text."""
    source = next((file for file, uri in PAGES.items() if uri == page.file.src_uri), f"docs/{page.file.src_uri}")

    def link(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        if "://" in target or target.startswith("#"):
            return match[0]
        path, mark, part = target.partition("#")
        found = os.path.normpath(os.path.join(os.path.dirname(source), path))
        uri = PAGES.get(found, found.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None or not (ROOT / found).exists():
            return text
        return f"[{text}]({os.path.relpath(uri, os.path.dirname(page.file.src_uri) or '.')}{mark}{part})"

    pieces = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    turned = [p if p.startswith("```") else LINK.sub(link, _images(p, source, page)) for p in pieces]
    return "".join(turned)


def on_post_build(config: Any) -> None:
    """Every link of the built pages leads to a file of the site and to a place in it, or to another host."""
    site = Path(config["site_dir"])
    pages = {page: page.read_text() for page in site.rglob("*.html") if page.name != "404.html"}
    places = {page: set(re.findall(r'\b(?:id|name)="([^"]+)"', text)) for page, text in pages.items()}
    for page, text in pages.items():
        for link in map(html.unescape, re.findall(r'\b(?:href|src)="([^"]+)"', text)):
            path, _, place = link.partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            found = (page.parent / unquote(path)).resolve() if path else page
            found = found / "index.html" if found.is_dir() else found
            if not found.is_file() or (place and found in places and unquote(place) not in places[found]):
                WARNINGS.warning("%s: the link %s leads nowhere", page.relative_to(site), link)


def _images(text: str, source: str, page: Any) -> str:
    def image(match: re.Match[str]) -> str:
        found = os.path.normpath(os.path.join(os.path.dirname(source), match[2])).removeprefix("docs/")
        return f"![{match[1]}]({os.path.relpath(found, os.path.dirname(page.file.src_uri) or '.')})"

    return re.sub(r"!\[([^\]]*)\]\(([^)\s]+)\)", image, text)


def _api(name: str) -> str:
    """The docstrings of what a module gives out, one entry each."""
    module = "fastkd" if name == "fastkd" else f"fastkd.{name}"
    tree = _tree(module)
    lines = [f"# {module}", "", ast.get_docstring(tree) or "", ""]
    elsewhere = {*API, *_public(_tree("fastkd.losses"))} if name == "fastkd" else set()
    for each, path in _public(tree).items():
        if each not in elsewhere and not each.startswith("__"):
            lines += [f"::: {path or module}.{each}", ""]
    return "\n".join(lines)


def _tree(module: str) -> ast.Module:
    folder = ROOT / module.replace(".", "/")
    return ast.parse((folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")).read_text())


def _public(tree: ast.Module) -> dict[str, str]:
    """The names of __all__, or the classes and functions that a module defines; where they are, if it is not here."""
    values = {getattr(node.targets[0], "id", ""): node.value for node in tree.body if isinstance(node, ast.Assign)}
    if "__all__" not in values:
        kinds = (ast.ClassDef, ast.FunctionDef)
        return {node.name: "" for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")}
    found: dict[str, str] = {}
    for item in values["__all__"].elts:  # type: ignore[attr-defined]
        if isinstance(item, ast.Starred):  # of fastkd.train: names of fastkd.runs
            later = ast.literal_eval(values[item.value.id])  # type: ignore[attr-defined]
            found |= {name: f"fastkd.runs.{where}" for name, where in later.items() if not name.isupper()}
        else:
            found[ast.literal_eval(item)] = ""
    return found

"""README and docs: their code runs, commands and signatures exist, links lead somewhere, tables can be read."""

import ast
import contextlib
import inspect
import io
import re
import shlex

import document_helpers as documents
import pytest
import torch
from document_helpers import INDENTED, PAGES, ROOT, Block
from torch import nn

import fastkd
from benchmarks import tables
from fastkd import functional
from fastkd.cli import COMMANDS, main
from fastkd.cli.options import parse

LONGEST_ROW = 240  # characters; a row of two lines on a page
LANGUAGES = {"python", "sh", "text", "yaml", INDENTED}
ALL = [block for page in PAGES for block in documents.blocks(page)]
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5))


def names() -> dict[str, object]:
    """What the examples of the pages take for granted: networks, a loader, logits, and those of a language model."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 2, 2), torch.randint(5, (8,))
    rows, wide = torch.tensor([0, 2]), dict(hidden_1=4, hidden_2=6, hidden_3=6)
    heads = {name: torch.randn(2 if name == "hidden_3" else 8, width) for name, width in wide.items()}
    heads |= {name.replace("hidden", "weight"): torch.randn(7, width) for name, width in wide.items()}
    return heads | {
        "torch": torch,
        "fastkd": fastkd,
        "F": functional,
        "images": images,
        "labels": labels,
        "target": labels,
        "inputs": images,
        "loader": [(images, labels)],
        "epochs": 1,
        "student": network(),
        "teacher": network(),
        "assistant": network(),
        "teachers": [network(), network()],
        "s": torch.randn(8, 5),
        "t": torch.randn(8, 5),
        "proportions": torch.tensor([0.25, 0.75]),
        "n": 4,
        "hidden": torch.randn(8, 3, requires_grad=True),
        "weight": torch.randn(7, 3, requires_grad=True),
        "rows_3": rows,
        "ids": torch.tensor([[0, 1]] * 8),
        "log_probs": torch.full((8, 2), 0.25).log(),
        "num_items_in_batch": 8,
    }


def of_page(page: str) -> dict[str, object]:
    """`names`, and what one page alone takes for granted."""
    given = names()
    if page == "methods.md":
        method = fastkd.methods.KD(given["student"], given["teacher"])
        given |= {"method": method, "optimizer": torch.optim.SGD(method.parameter_groups(0.1))}
        given |= {"pivot": network(), "medium": network(), "large": network()}
    if page == "losses.md":
        given["logits"] = [torch.randn(8, 5), torch.randn(8, 5)]
    if page == "language_models.md":
        given["logits"] = torch.randn(8, 7)
    if page == "scaling.md":
        data = fastkd.data.load("fake", image_size=8, train_images=8, test_images=4)
        networks = [fastkd.models.create("plain2", 10, image_size=8) for _ in range(2)]
        given |= {"data": data, "method": fastkd.methods.KD(*networks)}
    return given


def python_of(page) -> list[Block]:
    return [block for block in documents.blocks(page) if block.language == "python" and not block.mark]


WITH_PYTHON = [page for page in PAGES if python_of(page)]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run_one_after_another(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = of_page(page.name)
    for block in python_of(page):
        code = ast.increment_lineno(ast.parse(block.text), block.line - 1)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, str(block), "exec"), given)


@pytest.mark.parametrize("block", ALL, ids=str)
def test_a_block_has_a_language_and_a_mark_that_is_known(block):
    assert block.language in LANGUAGES, "write ```python, ```sh, ```yaml or ```text"
    assert re.fullmatch(r"|signature|not run: .+", block.mark), block.mark


SIGNATURES = [block for block in ALL if block.mark == "signature"]


@pytest.mark.parametrize("block", SIGNATURES, ids=str)
def test_signatures_are_those_of_the_functions(block):
    for call in re.split(r"\n(?=F\.)", block.text):
        name = re.match(r"F\.(\w+)\(", call)[1]
        head = call[: call.rindex(")") + 1].partition("(")[2]
        written = inspect.signature(_function(f"({head}"))
        actual = inspect.signature(getattr(functional, name))
        kinds = [{n: (p.kind, p.default) for n, p in each.parameters.items()} for each in (written, actual)]
        assert kinds[0] == kinds[1]


def _function(arguments: str):
    space: dict[str, object] = {}
    exec(f"def f{arguments}: pass", space)
    return space["f"]


def test_every_loss_has_its_signature_on_the_page():
    text = " ".join(block.text for block in SIGNATURES)
    names = ("multi_teacher_kd", "multi_label_kd", "mutual_kd", "cross_entropy", "group_stats", "rkd_angle")
    for name in (*names, "feature_ensemble"):
        assert f"F.{name}(" in text


def commands() -> list:
    found = []
    for block in ALL:
        indented = block.language == INDENTED and block.page.parent.parent.name != "csrc"  # formulas, there
        for line in block.text.splitlines() if indented or block.language == "sh" else []:
            found.append(pytest.param(line, id=f"{block}: {line.split('  ')[0][:60]}"))
    return found


TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PLACES = {"M": "kd", "N": "2"}  # what stands for a value


@pytest.mark.parametrize("line", commands())
def test_commands_are_known(line):
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    assert not words or words[0] in ("make", "pip", "python", "torchrun", "fastkd", "git", "bash", "cd", "source"), line
    if words and words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS
    if "fastkd" in words and "..." not in words:
        _check(words[words.index("fastkd") + 1 :])


def _check(words: list[str]) -> None:
    assert words[0] in COMMANDS
    if words[0] in ("train", "compare"):
        config = parse(words[0], [PLACES.get(word, word) for word in words[1:]])
        assert config is not None


def test_the_first_ten_minutes_commands_run(tmp_path, monkeypatch, capsys):
    """Those of docs/start.md, as they stand there, with a smaller network."""
    monkeypatch.chdir(tmp_path)
    lines = [line for block in documents.blocks(ROOT / "docs/start.md") for line in block.text.splitlines()]
    lines = [line for line in lines if line.startswith("fastkd ")]
    assert len(lines) == 4
    for line in lines:
        small = "--student plain2 --teacher plain2 --quiet".split() if "--data" in line else []
        assert main([*shlex.split(line)[1:], *small]) == 0, capsys.readouterr().err
    assert "<img" in (tmp_path / "runs/first/report.html").read_text()


@PAGE
def test_links_lead_somewhere(page):
    for link in documents.links(page):
        path, _, part = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no such file"
        if part:
            assert part in documents.anchors(target), f"{link}: there is no such heading"


@PAGE
def test_rows_of_tables_are_short_enough_to_read(page):
    assert [row for row in documents.rows(page) if len(row) > LONGEST_ROW] == []


def test_the_site_is_built_with_warnings_as_errors():
    """Under --quiet mkdocs would count none."""
    assert re.search(r"^\t.*/mkdocs build --strict$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_readmes_first_screen():
    """What it is, its licence, the line that installs it, the lines that drop in, the first number."""
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    for needed in ("for PyTorch", "Apache-2.0", "pip install", "fastkd.MultiTeacherKD(", "times faster"):
        assert needed in screen
    assert len(python_of(ROOT / "README.md")[0].text.splitlines()) <= 8


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_tables_of_speed_are_those_of_the_results(name):
    """`python -m benchmarks.tables` writes them; nobody types a number."""
    text = (ROOT / name).read_text()
    assert len(tables.BLOCK.findall(text)) >= 1
    assert tables.rewritten(text) == text


def test_readmes_first_number_is_in_its_table():
    text = (ROOT / "README.md").read_text()
    found = re.search(r"\*\*(\d+) to (\d+) times faster\*\*", text)
    row = next(row for row in documents.rows(ROOT / "README.md") if "multi_teacher_kd | [256, 1000] K=4" in row)
    low, high = re.search(r"\(([\d.]+)-([\d.]+)\)", row).groups()
    assert [round(float(low)), round(float(high))] == [int(found[1]), int(found[2])]


def test_every_public_loss_and_method_is_in_the_decision_table():
    text = (ROOT / "docs/which.md").read_text()
    plain = {"Batch", "Method", "Phase", "CE", "GroupStats", "network_scores"}
    wanted = [*functional.__all__, *fastkd.methods.__all__]
    assert [name for name in wanted if name not in plain and name not in text] == []
    assert [name for name in fastkd.train.RECIPES if name != "ce" and f"`{name}`" not in text] == []

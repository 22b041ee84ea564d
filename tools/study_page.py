"""The tables and pictures of docs/study.md from the studies' rows: `python tools/study_page.py`.

A table stands between `<!-- study: STUDY CSV KIND -->` and `<!-- /study -->`: STUDY is one of the package, CSV its
rows, a file of docs, and KIND one of state, accuracies, gains-BASELINE, orderings.
"""

from __future__ import annotations

import re
from pathlib import Path

from fastkd.runs import study_report
from fastkd.runs.study import DEFAULT, Study, find, read
from fastkd.runs.study_rows import read_rows
from fastkd.runs.study_stats import Rows

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "study.md"
BLOCK = re.compile(r"(<!-- study: (\S+) (\S+) (\S+) -->\n)(.*?)(<!-- /study -->)", re.DOTALL)
PICTURES = {"study": ("cifar10-16px", "study.csv"), "study-orderings": ("digits-orderings", "study-orderings.csv")}


def state(study: Study, rows: Rows) -> str:
    """How many runs there are, and of which seeds all or some methods of the default setting."""
    planned = [run for run in study.runs if run.setting == DEFAULT]
    there = {(row["method"], row["seed"]) for row in rows if row["setting"] == DEFAULT}
    whole, parts = [], []
    for seed in dict.fromkeys(run.seed for run in planned):
        methods = [run.method for run in planned if run.seed == seed]
        done = [method for method in methods if (method, seed) in there]
        if len(done) == len(methods):
            whole.append(str(seed))
        elif done:
            parts.append(f"{len(done)} of {len(methods)} of seed {seed}")
    what = [f"all methods of seed{'s' * (len(whole) > 1)} {', '.join(whole)}"] * bool(whole) + parts
    others = len(rows) - len(there)
    what += [f"{others} in other settings"] * bool(others)
    return f"**{len(rows)} of {len(study.runs)} runs: {'; '.join(what)}.**"


def table(study: Study, rows: Rows, kind: str) -> str:
    """What stands in a block of this kind."""
    if kind == "state":
        return state(study, rows)
    own = [row for row in rows if row["setting"] == DEFAULT]
    if kind == "accuracies":
        found = study_report.accuracies(own)
    elif kind == "orderings":
        found = study_report.orderings(rows, study.pairs)
    else:
        found = study_report.gains(own, kind.removeprefix("gains-"))
    return "\n".join(_narrow(line) for line in found.splitlines())


def _narrow(line: str) -> str:
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    return "| " + " | ".join("---" if set(cell) <= {"-", ":"} and len(cell) > 1 else cell for cell in cells) + " |"


def rewritten(text: str) -> str:
    """The page with each block as its rows say."""

    def block(match: re.Match[str]) -> str:
        head, name, file, kind, _, tail = match.groups()
        return f"{head}\n{table(read(find(name)), read_rows(DOCS / file), kind)}\n\n{tail}"

    return BLOCK.sub(block, text)


def draw() -> None:
    """docs/images/NAME-gains.png and NAME-costs.png, of the default setting."""
    for name, (study, file) in PICTURES.items():
        rows = [row for row in read_rows(DOCS / file) if row["setting"] == DEFAULT]
        study_report.draw_gains(rows, read(find(study)).baselines, DOCS / "images" / f"{name}-gains.png")
        study_report.draw_costs(rows, DOCS / "images" / f"{name}-costs.png")


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
    draw()

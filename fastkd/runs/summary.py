"""`fastkd report RUN ...`: what runs have come to, finished or not, from the files that they keep."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from fastkd._core.files import write_atomic
from fastkd._core.messages import UserError
from fastkd.runs import html
from fastkd.runs.figures import LAST_EPOCH, draw_curves, draw_runs
from fastkd.runs.folder import CONFIG, UNFINISHED, Run, read
from fastkd.runs.tables import percent, table

DEFAULT_OUT = "report"


def summary(runs: Sequence[Run]) -> str:
    """A Markdown table with a line a run."""
    cells = []
    for run in runs:
        done, planned = run.epochs
        accuracy = f"{percent(run.last(f'{run.part}_accuracy'))} ({run.part})"
        who = [str(run.options.get(name, "-")) for name in ("method", "data", "student", "seed")]
        seconds = f"{sum(row.get('seconds', 0.0) for row in run.rows):.0f}"
        loss = f"{run.last('train_loss'):.4g}"
        cells.append([str(run.folder), *who, f"{done} of {planned}", loss, accuracy, seconds])
    header = ["run", "method", "data", "student", "seed", "epochs", "training loss", "accuracy [%]", "seconds"]
    return table(header, cells)


def report(folders: Sequence[str], out: str | None, command: str, say: Callable[[str], None] = print) -> Path:
    """Report on one run in its own folder, on several in `out`; returns the path of report.md.

    The report that a finished run wrote by itself is kept: it says more.
    """
    runs = [run for folder in folders for run in read(folder)]
    if not runs:
        raise UserError(f"{', '.join(folders)}: no run there has finished an epoch: there is nothing to report")
    say(summary(runs))
    if len(runs) == 1 and out is None:
        return _report_one(runs[0], command, say)
    target = Path(out or DEFAULT_OUT)
    if any((target / name).exists() for name in (CONFIG, "study.csv")):
        raise UserError(f"--out {target} holds a run or a study: name another folder for the report")
    target.mkdir(parents=True, exist_ok=True)
    draw_runs(runs, target / "runs.png")
    lines = [f"# {len(runs)} runs", "", summary(runs), "", "![accuracy and loss of each run](runs.png)", ""]
    return _write(target / "report.md", [*lines, LAST_EPOCH, "", f"`{command}`"], say, target / "runs.png")


def _report_one(run: Run, command: str, say: Callable[[str], None]) -> Path:
    path, picture = run.folder / "report.md", run.folder / "curves.png"
    title = f"{run.options.get('method')}, {run.options.get('student')} on {run.options.get('data')}"
    draw_curves(run.rows, picture, title)
    if run.finished and path.exists() and UNFINISHED not in path.read_text():
        say(f"report: {path} (the run's own, kept), curves: {picture}")
        return path
    lines = [f"# {title}", ""]
    if not run.finished:
        done, planned = run.epochs
        lines += [f"{UNFINISHED} It has done {done} of {planned} epochs; `fastkd train --resume` goes on with it.", ""]
    lines += [summary([run]), "", "![loss and accuracy over the epochs](curves.png)", "", "## Options", ""]
    values = [[str(name), str(value)] for name, value in run.options.items()]
    return _write(path, [*lines, table(["option", "value"], values), "", f"`{command}`"], say, picture)


def _write(path: Path, lines: list[str], say: Callable[[str], None], picture: Path) -> Path:
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    say(f"report: {path}, picture: {picture}")
    return path


USAGE = "fastkd report RUN [RUN ...] [--out DIR] [--html]"


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    found = argparse.ArgumentParser(
        prog="fastkd report",
        usage=USAGE,
        description="report.md and pictures of a run, finished or not, or of several side by side; "
        "--html makes of it, and of the report of a comparison or a study, one file",
        exit_on_error=False,
        allow_abbrev=False,
    )
    found.add_argument("run", nargs="*", metavar="RUN", help="folder (--out) of a run, a comparison or a study")
    found.add_argument("--out", metavar="DIR", help=f"folder for the report of several runs (default: {DEFAULT_OUT})")
    found.add_argument("--html", action="store_true", help="also report.html: one file with the pictures in it")
    return found


def main(argv: list[str], command: str) -> int:
    """`fastkd report`; returns the exit status."""
    if "-h" in argv or "--help" in argv:
        parser().print_help()
        return 0
    options, unknown = parser().parse_known_args(argv)
    if unknown:
        raise UserError(f"fastkd report has no option {unknown[0]}: use {USAGE}")
    if not options.run:
        raise UserError(f"fastkd report needs the folder of a run: {USAGE}")
    if options.html and len(options.run) == 1 and _has_own(Path(options.run[0])):
        print(f"as one file: {html.write(Path(options.run[0]) / 'report.md')}")
        return 0
    path = report(options.run, options.out, command)
    if options.html:
        print(f"as one file: {html.write(path)}")
    return 0


def _has_own(folder: Path) -> bool:
    """Whether `folder` is a finished comparison's, or a study's: the report there says more than a list of runs."""
    finished = (folder / "results.csv").is_file() or (folder / "study.csv").is_file()
    return finished and (folder / "report.md").is_file()

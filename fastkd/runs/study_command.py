"""What `fastkd study` does: starts runs, collects their rows, writes the report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastkd._core.extras import require
from fastkd._core.locks import lock
from fastkd._core.messages import UserError
from fastkd.runs import study_pool, study_report
from fastkd.runs.processes import DONE, STOPPED
from fastkd.runs.study import Run, Study, check_resumed, find, read
from fastkd.runs.study_pool import Pool
from fastkd.runs.study_rows import adopt, finished, read_rows, write_rows
from fastkd.runs.study_worker import ROW
from fastkd.runs.tables import percent
from fastkd.train.option_types import is_switch
from fastkd.train.settings import Settings
from fastkd.train.time_left import duration

USAGE = "fastkd study FILE --out DIR [--jobs N] [--only A,B,...] [--known CSV] [--limit MINUTES] [--OPTION VALUE ...]"
ABOUT = """Methods x seeds x settings of a YAML file, one row a run in DIR/study.csv, a report with intervals and tests.
The same command goes on where it was stopped. FILE may be the name of a study in the package, or a study.csv: then only
its report is written. Options of `fastkd train` (--data, --download, --epochs ...) are put over those of the file."""


def parser() -> argparse.ArgumentParser:
    """The options of the command, beside those of `fastkd train`."""
    found = argparse.ArgumentParser(
        prog="fastkd study", usage=USAGE, description=ABOUT, exit_on_error=False, allow_abbrev=False
    )
    found.add_argument("file", nargs="?", metavar="FILE", help="YAML file, name of a study, or a study.csv")
    found.add_argument("--out", metavar="DIR", help="folder of the study")
    found.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at once, each with one thread (default: 1)"
    )
    found.add_argument("--only", default="", metavar="A,B", help="these methods, settings, seeds (seed0) alone")
    found.add_argument("--known", default="", metavar="CSV", help="a study.csv whose runs are not done again")
    found.add_argument("--limit", type=float, default=math.inf, metavar="MINUTES", help="stop cleanly after this time")
    return found


def main(argv: list[str], command: str) -> int:
    """`fastkd study`; returns the exit status."""
    if "-h" in argv or "--help" in argv:
        parser().print_help()
        return 0
    options, rest = parser().parse_known_args(argv)
    if not options.file or not options.out:
        raise UserError(f"fastkd study needs {'--out DIR' if options.file else 'a file'}: {USAGE}")
    if options.jobs < 1 or not options.limit >= 0:
        what = f"--jobs must be at least 1, got {options.jobs}"
        raise UserError(what if options.jobs < 1 else f"--limit must be minutes >= 0, got {options.limit}")
    if options.file.endswith(".csv"):
        return from_csv(Path(options.file), Path(options.out), command)
    study = read(find(options.file), overrides(rest))
    if options.known:
        adopt(Path(options.known), study, Path(options.out))
    only = [word for word in options.only.split(",") if word]
    return study_runs(study, Path(options.out), command, options.jobs, only, 60 * options.limit)


def overrides(rest: list[str]) -> dict[str, Any]:
    """--train-size 100 --download --options.beta=2 > {"train_size": 100, "download": True, "options": {"beta": 2}}."""
    known = {field.name: str(field.type) for field in dataclasses.fields(Settings)} | {"options": "dict"}
    found: dict[str, Any] = {}
    while rest:
        word, *rest = rest
        flag, equals, text = word.partition("=")
        name, _, key = flag.removeprefix("--").replace("-", "_").partition(".")
        negated = name.startswith("no_") and is_switch(known.get(name[3:])) and not equals
        if not flag.startswith("--") or (name not in known and not negated):
            raise UserError(f"fastkd study has no option {flag}: use {USAGE}")
        if negated:
            name, text = name[3:], "false"
        elif not equals and is_switch(known[name]) and (not rest or rest[0] not in ("true", "false")):
            text = "true"
        elif not equals:
            if not rest:
                raise UserError(f"{flag} needs a value")
            text, *rest = rest
        value = _value(f"[{text}]" if known[name].startswith("list") and not text.startswith("[") else text)
        found[name] = found.get(name, {}) | {key: value} if key else value
    return found


def _value(text: str) -> Any:
    if re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", text):  # text to YAML
        return float(text)
    return require("yaml", "fastkd study").safe_load(text)


def study_runs(
    study: Study,
    out: Path,
    command: str,
    jobs: int,
    only: list[str],
    limit: float,
    say: Callable[[str], None] = print,
) -> int:
    """Carry out what is not finished, for `limit` seconds at most; status 1 where a run failed, 130 after Ctrl-C."""
    started, runs = time.monotonic(), study.chosen(only)
    out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    with lock(out):
        check_resumed(runs, out)
        done = finished(out, runs)
        say(f"{study.name}: {len(done)} of {len(runs)} runs are finished{_left(out, runs, done, jobs)}")

        def ended(run: Run, status: int) -> None:
            if status != DONE:
                failed.append(run.name)
                say(f"{run.name} failed: see {out / 'runs' / run.name / 'log.txt'}")
                return
            done[run.name] = row = json.loads((out / "runs" / run.name / ROW).read_text())
            write_rows(out, study)
            took = duration(study_pool.spent(out)[run.name])
            accuracy = f"{percent(row['accuracy'])} % ({row['judged_on']})"
            say(f"{len(done)} of {len(runs)}: {run.name} {accuracy} in {took}{_left(out, runs, done, jobs)}")

        pool = Pool(out, jobs, started + limit, ended)
        pool.carry_out([run for run in runs if run.name not in done])
        report = finish(study, out, command, say)
    if len(done) + len(failed) < len(runs):
        say(f"stopped with {len(done)} of {len(runs)} runs finished; the same command goes on")
    say(f"report: {report}, one row a run: {out / 'study.csv'}" if report else "no run is finished yet")
    return 1 if failed else STOPPED if pool.interrupted else 0


def _left(out: Path, runs: list[Run], done: dict[str, Any], jobs: int) -> str:
    seconds = study_pool.left(out, runs, set(done), jobs)
    return "" if seconds is None or len(done) == len(runs) else f"; about {duration(seconds)} left"


def finish(study: Study, out: Path, command: str, say: Callable[[str], None] = print) -> Path | None:
    """study.csv and the report of what is there."""
    rows = write_rows(out, study)
    if not rows:
        return None
    planned = {
        run.setting: [other.method for other in study.runs if other.setting == run.setting] for run in study.runs
    }
    facts = study_report.Facts(study.name, planned, study.baselines, study.pairs)
    say("\n" + study_report.tables(rows, facts) + "\n")
    return study_report.write(out, rows, facts, command, study)


def from_csv(path: Path, out: Path, command: str, say: Callable[[str], None] = print) -> int:
    """The report of a study.csv, wherever it came from."""
    rows = read_rows(path)
    out.mkdir(parents=True, exist_ok=True)
    facts = study_report.Facts(path.stem, {}, (rows[0]["method"],), ())
    say(study_report.tables(rows, facts))
    say(f"report: {study_report.write(out, rows, facts, command)}")
    return 0

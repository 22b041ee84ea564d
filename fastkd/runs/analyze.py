"""`fastkd analyze NAME [RUN] --out DIR`: the analyses of the papers, each a table (CSV) and a picture (PNG)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fastkd._core.messages import UserError, guess
from fastkd.runs import dkel_analyses, roles
from fastkd.runs.folder import read

ABOUT = {
    "dkel-geometry": "student and mean teacher as points of the plane, from three starts of the teacher",
    "dkel-monte-carlo": "convergence of the same from many starts with noise: quantiles, collapse rate, closed form",
    "roles": "of a run of orc: who was promoted in each epoch, and what the three teachings leave to learn",
}
OF_A_RUN = ("roles",)


def main(argv: list[str], say: Callable[[str], None] = print) -> int:
    """`fastkd analyze`; returns the exit status."""
    parser = _parser()
    if "-h" in argv or "--help" in argv or not argv:
        parser.print_help()
        return 0
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown option {unknown[0]}: see fastkd analyze --help")
    if options.name not in ABOUT:
        near = guess(options.name, list(ABOUT))
        raise UserError(f"there is no analysis {options.name!r}: {near}use {', '.join(ABOUT)}")
    wants_run = options.name in OF_A_RUN
    if wants_run == (options.run is None):
        what = "needs the folder (--out) of a run" if wants_run else f"takes no run, got {options.run}"
        raise UserError(f"fastkd analyze {options.name} {what}")
    out = Path(options.out)
    if (out / "config.yaml").exists() and not wants_run:
        raise UserError(f"--out {out} holds a run: name another folder for the analysis")
    out.mkdir(parents=True, exist_ok=True)
    for path in _analysis(options, out):
        say(f"{options.name}: {path}")
    return 0


def _analysis(options: argparse.Namespace, out: Path) -> list[Path]:
    if options.name == "roles":
        runs = read(options.run)
        if len(runs) != 1:
            raise UserError(f"{options.run} holds {len(runs)} runs: give the folder of one, such as {runs[0].folder}")
        return roles.roles(runs[0], out)
    if options.name == "dkel-geometry":
        return dkel_analyses.geometry(out, seed=options.seed)
    return dkel_analyses.monte_carlo(out, seed=options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastkd analyze",
        usage="fastkd analyze NAME [RUN] --out DIR [--seed N]",
        description="Analyses of the papers, each a CSV and a PNG in DIR. Where a paper's protocol is not known it is "
        "ours; the first line of the source says so.\n\n" + "\n".join(f"  {n:18}{text}" for n, text in ABOUT.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="one of those above")
    parser.add_argument("run", metavar="RUN", nargs="?", help="folder of a run, for roles")
    parser.add_argument("--out", metavar="DIR", default="analysis", help="folder for the files (default: analysis)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the random starts (default: 0)")
    return parser

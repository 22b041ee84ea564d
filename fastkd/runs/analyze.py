"""`fastkd analyze NAME [RUN] --out DIR`: the analyses of the papers, each a table (CSV) and a picture (PNG)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastkd._core.messages import UserError, guess
from fastkd.runs import dkel_analyses, feed_analyses
from fastkd.runs.ablations import ABLATIONS
from fastkd.runs.diversity import diversity
from fastkd.runs.folder import read
from fastkd.runs.revisit import runs_by
from fastkd.runs.roles import roles


@dataclass(frozen=True)
class Analysis:
    """An analysis: of a run, (runs, out) -> files, or of none, (out, seed=) -> files.

    Attributes:
        methods: of a run: those whose runs it is of, all where there is none.
    """

    about: str
    make: Callable[..., list[Path]]
    of_a_run: bool = True
    methods: tuple[str, ...] = ()


ANALYSES = {
    "diversity": Analysis(
        "how alike a run's networks are: distance, common errors, homogeneity, collapse (best: train --diversity)",
        diversity,
    ),
    "roles": Analysis(
        "of runs of orc: who was promoted in each epoch, and the effect of intensive teaching on the hard samples",
        roles,
        methods=("orc",),
    ),
    "reconstruction": Analysis(
        "how much of the last feature map is restored: networks alone, of parallel and of sequential FEED",
        feed_analyses.reconstruction,
        methods=("feed-parallel", "feed-sequential", "ce"),
    ),
    "generations": Analysis(
        "what sequential FEED (or ban) gains from one network of the chain to the next",
        feed_analyses.generations,
        methods=("feed-sequential", "ban"),
    ),
    "dkel-geometry": Analysis(
        "student and mean teacher as points of the plane, from three starts of the teacher",
        dkel_analyses.geometry,
        of_a_run=False,
    ),
    "dkel-monte-carlo": Analysis(
        "convergence of the same from many starts with noise: quantiles, collapse rate, closed form",
        dkel_analyses.monte_carlo,
        of_a_run=False,
    ),
}


def main(argv: list[str], say: Callable[[str], None] = print) -> int:
    """`fastkd analyze`; returns the exit status."""
    if "-h" in argv or "--help" in argv or not argv:
        parser().print_help()
        return 0
    options, unknown = parser().parse_known_args(argv)
    if unknown:
        raise UserError(f"unknown option {unknown[0]}: see fastkd analyze --help")
    if options.name not in ANALYSES:
        names = [*ANALYSES, "ablate"]
        raise UserError(f"there is no analysis {options.name!r}: {guess(options.name, names)}use {', '.join(names)}")
    analysis = ANALYSES[options.name]
    if analysis.of_a_run == (options.run is None):
        what = "needs the folder (--out) of a run" if analysis.of_a_run else f"takes no run, got {options.run}"
        raise UserError(f"fastkd analyze {options.name} {what}")
    for path in _analysed(options, analysis, say):
        say(f"{options.name}: {path}")
    return 0


def _analysed(options: argparse.Namespace, analysis: Analysis, say: Callable[[str], None]) -> list[Path]:
    runs = read(options.run) if analysis.of_a_run else []
    if analysis.of_a_run and not runs:
        raise UserError(f"{options.run}: no run there has finished an epoch: there is nothing to analyse")
    if analysis.methods:
        runs = runs_by(runs, analysis.methods, options.name)
    out = Path(options.out)
    if (out / "config.yaml").exists() and not analysis.of_a_run:
        raise UserError(f"--out {out} holds a run: name another folder for the analysis")
    out.mkdir(parents=True, exist_ok=True)
    if not analysis.of_a_run:
        return analysis.make(out, seed=options.seed)
    if not all(run.finished for run in runs):
        say("note: not all epochs are done; what is there is analysed")
    return analysis.make(runs, out)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    lines = [f"  {name:18}{analysis.about}" for name, analysis in ANALYSES.items()]
    found = argparse.ArgumentParser(
        prog="fastkd analyze",
        usage="fastkd analyze NAME [RUN] --out DIR [--seed N]",
        description="Analyses of the papers, each a CSV and a PNG in DIR. Where a paper's protocol is not known it is "
        "ours; the first lines of the source say so.\n\n"
        + "\n".join(lines)
        + f"\n\n  ablate METHOD     a comparison over the switches of {', '.join(ABLATIONS)};\n"
        "                    --quick for a look, and the options of fastkd compare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    found.add_argument("name", metavar="NAME", help="one of those above")
    found.add_argument("run", metavar="RUN", nargs="?", help="folder of a run, a comparison or a study")
    found.add_argument("--out", metavar="DIR", default="analysis", help="folder for the files (default: analysis)")
    found.add_argument("--seed", metavar="N", type=int, default=0, help="of the random starts (default: 0)")
    return found

"""OUT/data.json: what the data of a run consist of, so that it goes on with the same ones or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd._core.files import write_atomic
from fastkd._core.messages import UserError, note
from fastkd.data.description import changes
from fastkd.data.folders import listed
from fastkd.train import checkpoint
from fastkd.train.distributed import World

FILE = "data.json"


def go_on(folders: Sequence[Path], description: dict[str, Any]) -> None:
    """For runs in these folders that go on: UserError where one has trained on other data.

    A run whose data were not recorded, as by earlier versions, is named in a note; they are recorded from now on.
    """
    unknown = [folder for folder in folders if has_state(folder) and not _is_of(folder, description)]
    for folder in unknown:
        keep(folder, description)
    if unknown:
        names = listed([str(folder) for folder in unknown])
        note(
            f"{names}: no {FILE} tells on which data this has trained so far; it goes on with the present ones, which "
            "are recorded from now on"
        )


def check(folder: Path, description: dict[str, Any]) -> None:
    """UserError where the run in this folder has trained on other data, as far as they were recorded."""
    _is_of(folder, description)


def check_alike(world: World, description: dict[str, Any]) -> None:
    """UserError where another process of the run has other data. Times, which differ between machines, do not count."""
    found = world.gather(_without_times(description))

    def compare() -> None:
        for rank, other in enumerate(found):
            differing = changes(found[0], other)
            if differing:
                raise UserError(
                    f"process {rank} of this run has other data than the first one ({_listed(differing)}): put "
                    "the same data on every machine"
                )

    world.broadcast(compare)


def _without_times(description: dict[str, Any]) -> dict[str, Any]:
    parts = {}
    for name, part in description["parts"].items():
        if part.get("compared") == "times":
            part = part | {"files": {key: [*facts[:-1], ""] for key, facts in part["files"].items()}}
        parts[name] = part
    return description | {"parts": parts}


def keep(folder: Path, description: dict[str, Any]) -> None:
    """Record them."""
    write_atomic(folder / FILE, json.dumps(description).encode() + b"\n")


def check_sizes(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """UserError where the facts of a state (`Fit.facts`) are of networks for other images than the present ones."""
    for name in ("num_classes", "channels", "image_size"):
        if name in old and name in new and old[name] != new[name]:
            raise UserError(
                f"{folder} has trained on other data ({name} was {old[name]}, is {new[name]}): put them back, or name "
                "a new --out"
            )


def has_state(folder: Path) -> bool:
    """Whether a run in this folder has trained."""
    checkpoints = folder / "checkpoints"
    return bool(checkpoint.epochs(checkpoints)) or (checkpoints / checkpoint.PARTIAL).exists()


def _is_of(folder: Path, description: dict[str, Any]) -> bool:
    """Whether its data were recorded; UserError where they are others."""
    path = folder / FILE
    if not path.exists():
        return False
    try:
        old = json.loads(path.read_text())
        differing = [] if old == json.loads(json.dumps(description)) else changes(old, description)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: delete it to go on with the present data, or name a new --out") from error
    if differing:
        raise UserError(
            f"{folder} has trained on other data ({_listed(differing)}): put them back, or "
            f"name a new --out; where you know that they are the same, delete {path} and repeat the command"
        )
    return True


def _listed(differing: list[str], most: int = 3) -> str:
    return "; ".join(differing[:most]) + (f"; and {len(differing) - most} more" if len(differing) > most else "")

"""What a checkpoint of a `Fit` holds, and how the training goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd._core.files import sweep
from fastkd._core.messages import UserError, note
from fastkd.train import checkpoint, same_data
from fastkd.train.distributed import own_seed
from fastkd.train.metrics import Meter, Row, read_csv
from fastkd.train.optim import set_rates

if TYPE_CHECKING:
    from fastkd.train.loop import Fit

FORMAT = 2


def write(fit: Fit, random: list[dict[str, Any]], unfinished: tuple[Meter, Any] | None) -> None:
    """A checkpoint with the random states of all processes; in the middle of an epoch with its sums."""
    state = {
        "format": FORMAT,
        "epoch": fit.epoch,
        "step": fit.step,
        "method": dict(fit.method.state_dict()),
        "network": dict(fit.method.deployable().state_dict()),  # the same storages: takes no room
        "optimizer": fit.optimizer.state_dict(),
        "schedule": fit.schedule.state_dict(),
        "random": random[0],
        "random_of_others": random[1:],
        "steps": fit.steps.state_dict(),
        "facts": fit.facts,
    }
    partial = fit.checkpoints / checkpoint.PARTIAL
    if unfinished is not None:
        total, lost = unfinished
        batches = fit.train_batches.taken, lost
        checkpoint.save(partial, state | {"meter": total.state_dict(), "batches": batches})
        return
    checkpoint.save(checkpoint.path_of(fit.checkpoints, fit.epoch), state)
    partial.unlink(missing_ok=True)
    checkpoint.prune(fit.checkpoints, fit.settings.keep)


def last(fit: Fit) -> tuple[dict[str, Any] | None, list[Row]]:
    """The last whole state, and the rows of metrics."""
    for folder in (fit.out, fit.checkpoints):
        sweep(folder)
    done = checkpoint.epochs(fit.checkpoints)
    if done and done[-1] > fit.epochs:
        raise UserError(f"{fit.folder} has run {done[-1]} epochs already: give --epochs {done[-1]} or more")
    state = checkpoint.newest(fit.checkpoints, note)
    if state is None:
        return None, []
    checkpoint.prune(fit.checkpoints, fit.settings.keep)  # killed between writing the last one and this
    return _checked(fit, state), read_csv(fit.out / "metrics.csv")


def read(fit: Fit, file: Path) -> tuple[dict[str, Any], list[Row]]:
    """The state in a file, and the rows of metrics."""
    return _checked(fit, checkpoint.load(file)), read_csv(fit.out / "metrics.csv")


def _checked(fit: Fit, state: dict[str, Any]) -> dict[str, Any]:
    """UserError for the state of another version, or of networks for other images."""
    if state.get("format") != FORMAT:
        raise UserError(f"{fit.checkpoints} holds checkpoints of another version of fastkd: use a new --out")
    same_data.check_sizes(fit.out, state["facts"], fit.facts)
    return state


def load(fit: Fit, state: dict[str, Any], rows: list[Row]) -> None:
    """The fit as it was when the state was written, with the rows of metrics up to there."""
    fit.method.load_state_dict(state["method"])
    fit.optimizer.load_state_dict(state["optimizer"])
    fit.schedule.load_state_dict(state["schedule"])
    set_rates(fit.optimizer, fit.schedule, state["epoch"])
    fit.steps.load_state_dict(state["steps"])
    fit.epoch, fit.step = state["epoch"], state["step"]
    fit.rows = [row for row in rows if row["epoch"] <= fit.epoch]
    set_random_state(fit, state)


def set_random_state(fit: Fit, state: dict[str, Any]) -> None:
    """This process's own, or a fresh one where the run was of another number of processes."""
    states = [state["random"], *state["random_of_others"]]
    if fit.world.first or len(states) == fit.world.size:
        checkpoint.set_random_state(states[fit.world.rank])
    else:
        checkpoint.seed_all(own_seed(fit.task.seed + state["step"], fit.world.rank))

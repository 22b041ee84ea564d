"""What the tests of several processes share: starting them, and runs that they and one process do alike."""

import datetime
import os
from pathlib import Path

import torch
from processes_helpers import together

from fastkd.train import Runner, TrainConfig

# Without batch normalisation; SGD, since AdamW makes a step of any gradient however near to zero.
EXACT = dict(
    teacher="plain2:width=0.25:norm=group",
    assistants=["plain2:width=0.125:norm=group"],
    student="plain2:width=0.0625:norm=group",
    num_teachers=2,
    branches=2,
    train_size=66,  # batches of 16, 16, 16, 16 and 2: the last one leaves processes without a row
    batch_size=16,
    optimizer="sgd",
    lr=0.02,
    epochs=4,
    guide_epochs=4,
    quiet=True,
    device="cpu",
)
PAPERS = {
    "dgkd": {"drop": "bernoulli"},
    "orc": {"feedback": "global", "promote": 1},
    "ctsl-mkt": {},
    "dkel": {},
    "feed-parallel": {},
}


def train(folder, method: str, **options):
    """One run in `folder`, by the processes of the group that is there."""
    own = {"options": PAPERS.get(method, {})} | options
    torch.set_num_threads(1)
    return Runner(TrainConfig(**EXACT | {"method": method, "out": str(folder)} | own), say=lambda text: None).run()


def processes(function, number: int, folder: Path, *arguments, seconds: float = 120.0) -> None:
    """function(rank, folder, *arguments) in `number` processes of one gloo group; raises what one of them raised."""
    together(_process, number, function, number, folder, arguments, seconds=seconds)


def _process(rank, function, number, folder, arguments, failures):
    torch.set_num_threads(1)
    os.environ["FASTKD_TRACEBACK"] = "1"
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=number,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        function(rank, folder, *arguments)
        torch.distributed.barrier()
    except BaseException as error:
        failures.put(f"rank {rank}: {type(error).__name__}: {error}")
        raise
    torch.distributed.destroy_process_group()

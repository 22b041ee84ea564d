"""What the tests of DistributedDataParallel in one process share."""

import contextlib

import torch


@contextlib.contextmanager
def group_of_one(folder):
    """The default process group, of this process alone; it meets itself in a file in `folder`."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def assert_states_close(actual, expected, **tolerances):
    """Every tensor of two modules' state dicts."""
    first, second = expected.state_dict(), actual.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        if torch.is_tensor(value):
            torch.testing.assert_close(second[key], value, **tolerances)

"""ORC on two processes: decisions of the global batch."""

import datetime

import torch
from methods_helpers import batch, same, snapshot, train
from orc_helpers import Mixed, bn_mlp, optimizer_of, orc, rows_of_table, table
from processes_helpers import together
from torch import nn


def worker(rank, store, failures):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    try:
        alone = [torch.distributed.new_group([one]) for one in range(2)][rank]
        promote_by_the_global_batch(rank, alone)
        train_as_one_process(rank, alone)
        leave_buffers_alone(rank)
        refuse_local_rankings()
    except BaseException as error:
        failures.put(f"rank {rank}: {type(error).__name__}: {error}")
        raise
    finally:
        torch.distributed.destroy_process_group()


def gathered(value):
    values = [torch.empty_like(value) for _ in range(2)]
    torch.distributed.all_gather(values, value.contiguous())
    return values


# Mean cross-entropies of the first, second and third network on the rows of rank 0, then on those of rank 1.
BY_RANK = ([1.0] * 6 + [3.0] * 2, [3.0] * 6 + [0.1] * 2, [2.0] * 6 + [0.5] * 2)


def promote_by_the_global_batch(rank, alone):
    """Six rows on rank 0, two on rank 1, which would promote another network and take other proportions."""
    x, y = rows_of_table(8)
    mine = slice(0, 6) if rank == 0 else slice(6, 8)
    group = torch.distributed.group.WORLD
    method = Mixed(table([1.0] * 8), [table(ces) for ces in BY_RANK], process_group=group, errors_only=False)
    list(method.phases(x[mine], y[mine]))
    local = Mixed(table([1.0] * 8), [table(ces) for ces in BY_RANK], process_group=alone, errors_only=False)
    list(local.phases(x[mine], y[mine]))
    assert method.promotions.tolist() == [1, 0, 0]
    assert local.promotions.tolist() == ([1, 0, 0] if rank == 0 else [0, 1, 0])
    # Global means 1.5, 2.275, 1.625: shares 0.231, 0.505, 0.264; rank 1's own would be 0.85, 0.05, 0.07.
    assert method.feedback.tolist() == ([0, 0, 1, 2, 0, 1] if rank == 0 else [0, 0])
    x_mixed = method.mixed.inputs
    assert x_mixed.shape == (6 if rank == 0 else 2, 1) and ((x_mixed >= x[mine].min()) & (x_mixed < 8)).all()
    assert method.share == gathered(torch.tensor(method.share, dtype=torch.float64))[1 - rank]


def train_as_one_process(rank, alone):
    """With a pivot that stands still, two ranks of one half each do what one process does with the whole batch."""
    options = {"pivot_lr": 0.0, "promote": 2, "students": 4}
    whole, parts = (orc(**options, process_group=group) for group in (alone, torch.distributed.group.WORLD))
    parts.map_learners(nn.parallel.DistributedDataParallel)
    steps = [optimizer_of(m) for m in (whole, parts)]
    for step in range(4):
        x, y = batch(rows=12, seed=step)
        mine = slice(6 * rank, 6 * rank + 6)
        train(whole, x, y, steps=1, optimizer=steps[0])
        train(parts, x[mine], y[mine], steps=1, optimizer=steps[1], chunks=1 + step % 2)
    assert torch.equal(whole.promotions, parts.promotions)
    first, second = whole.students.state_dict(), parts.students.state_dict()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=1e-10)
    moving = orc(process_group=torch.distributed.group.WORLD).map_learners(nn.parallel.DistributedDataParallel)
    train(moving, x[mine], y[mine], steps=3)
    for parameter in moving.parameters():
        assert torch.equal(*gathered(parameter.detach()))


def leave_buffers_alone(rank):
    """Statistics that differ between the ranks are not broadcast by an evaluation."""
    method = orc(bn_mlp, process_group=torch.distributed.group.WORLD)
    method.map_learners(nn.parallel.DistributedDataParallel)
    method.train()
    for student in method.students:
        student[1].running_mean += rank
    before = [snapshot(s) for s in method.students]
    phases = method.phases(*batch(seed=rank))
    next(phases)
    assert all(same(snapshot(s), state) for s, state in zip(method.students, before, strict=True))
    phases.close()


def refuse_local_rankings():
    """However the networks are made parallel: by FSDP2, or by an exchange of gradients that nobody sees."""
    made_before = orc(process_group=torch.distributed.group.WORLD)
    made_before.process_group = None
    for action in (orc, lambda: next(made_before.phases(*batch()))):
        try:
            action()
        except ValueError as error:
            assert str(error).startswith("ORC: process_group must be given where torch.distributed has"), error
        else:
            raise AssertionError("several processes without a process group were taken")


def test_two_processes(tmp_path):
    together(worker, 2, tmp_path / "store")

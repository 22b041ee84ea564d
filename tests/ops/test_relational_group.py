"""rkd_distance and rkd_angle with process_group: two processes give what one with the whole batch gives."""

import datetime
import gc

import torch
from processes_helpers import together
from relational_helpers import FUNCTIONS, embeddings

PARTS = {"even": (6, 6), "uneven": (7, 4), "one row": (5, 1), "none on one process": (6, 0), "no rows at all": (0, 0)}


def whole_batch(n):
    return embeddings("random", n, 5, 0), embeddings("random", n, 4, 1)


def one_process(function, n, reduction):
    """Loss and gradient of a layer before the embeddings, from the whole batch."""
    inputs, teacher = whole_batch(n)
    layer = torch.eye(5, dtype=torch.float64)[:, :3].contiguous().requires_grad_()
    loss = function(inputs @ layer, teacher, reduction=reduction)
    return loss.detach(), torch.autograd.grad(loss.sum(), layer)[0]


def worker(rank, store, failures):
    torch.set_num_threads(1)
    distributed = torch.distributed
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    group = distributed.group.WORLD
    try:
        for name, function in FUNCTIONS.items():
            for parts in PARTS.values():
                for reduction in ("mean", "none"):
                    compare(function, parts, rank, group, reduction)
                    compare_with_masks(function, parts, rank, group, reduction)
            compare_averaged_by_ddp(function, rank, group)
            refuse_other_widths(name, function, rank, group)
    except BaseException as error:
        failures.put(f"rank {rank}: {type(error).__name__}: {error}")
        raise
    gc.collect()  # DDP's reducer goes before the group that it speaks through
    distributed.barrier()
    distributed.destroy_process_group()


def part_of(parts, rank):
    first = sum(parts[:rank])
    return slice(first, first + parts[rank])


def compare(function, parts, rank, group, reduction):
    inputs, teacher = whole_batch(sum(parts))
    mine = part_of(parts, rank)
    layer = torch.eye(5, dtype=torch.float64)[:, :3].contiguous().requires_grad_()
    loss = function(inputs[mine] @ layer, teacher[mine], reduction=reduction, process_group=group)
    expected, expected_grad = one_process(function, sum(parts), reduction)
    assert torch.equal(loss.detach(), expected) or torch.allclose(loss.detach(), expected, rtol=1e-13)
    if sum(parts) == 0:
        return
    for create_graph in (False, True):
        (grad,) = torch.autograd.grad(loss.sum(), layer, create_graph=create_graph, retain_graph=True)
        grad = grad.detach().clone()
        torch.distributed.all_reduce(grad)
        torch.testing.assert_close(grad / 2, expected_grad, rtol=1e-10, atol=1e-13)


def compare_with_masks(function, parts, rank, group, reduction):
    """Ranks with different numbers of rows that count; the second one gives no mask."""
    inputs, teacher = whole_batch(sum(parts))
    counted = torch.arange(sum(parts)) % 3 > 0
    counted[parts[0] :] = True
    mine, student = part_of(parts, rank), inputs.clone().requires_grad_()
    mask = counted[mine] if rank == 0 else None
    rows = torch.where(counted[:, None], student, torch.nan)[mine]
    loss = function(rows, teacher[mine], mask=mask, reduction=reduction, process_group=group)
    few = inputs[counted].requires_grad_()
    expected = function(few, teacher[counted], reduction=reduction)
    torch.testing.assert_close(loss[counted] if reduction == "none" else loss, expected, rtol=1e-12, atol=1e-15)
    if sum(parts) == 0:
        return
    (expected_grad,) = torch.autograd.grad(expected.sum(), few)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    mine_counted = counted.clone()
    mine_counted[: mine.start] = mine_counted[mine.stop :] = False
    torch.testing.assert_close(grad[mine_counted] / 2, expected_grad[mine_counted[counted]], rtol=1e-9, atol=1e-13)


def compare_averaged_by_ddp(function, rank, group):
    parts = (7, 4)
    inputs, teacher = whole_batch(sum(parts))
    module = torch.nn.Linear(5, 3, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.eye(5, dtype=torch.float64)[:3])
    wrapped = torch.nn.parallel.DistributedDataParallel(module)
    mine = part_of(parts, rank)
    function(wrapped(inputs[mine]), teacher[mine], process_group=group).backward()
    torch.testing.assert_close(module.weight.grad.T, one_process(function, 11, "mean")[1], rtol=1e-10, atol=1e-13)


def refuse_other_widths(name, function, rank, group):
    try:
        function(torch.zeros(3, 4 + rank), torch.zeros(3, 4), process_group=group)
    except ValueError as error:
        assert str(error).startswith(f"{name}: student must be as wide on every process of the group"), error
    else:
        raise AssertionError("widths that differ were taken")


def test_two_processes(tmp_path, at):
    at("cpu")
    together(worker, 2, tmp_path / "store")

"""Rows of all processes of a group, differentiable, for losses that compare the rows of a batch with each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd._core.messages import wrong_type, wrong_value

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_process_group(op: str, process_group: object) -> None:
    if process_group is None:
        return
    if not torch.distributed.is_available() or not isinstance(process_group, torch.distributed.ProcessGroup):
        got = type(process_group).__name__
        raise wrong_type(op, "process_group", "None or a torch.distributed.ProcessGroup (group.WORLD)", got)


def gather_pair(
    op: str, student: Tensor, teacher: Tensor, mask: Tensor | None, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[n, D], [n, E], bool [n] of each process -> [N, D], [N, E], [N] in the order of the ranks; n may differ.

    The backward sums the gradients of all processes' losses, each of which sees all rows. Waits for the device once:
    the sizes of the others must be known to the host.
    """
    masked = 0 if mask is None else 1
    sizes = all_gather_integers([student.shape[0], masked, student.shape[1], teacher.shape[1]], student.device, group)
    for rank, (_, _, *widths) in enumerate(sizes):
        for name, width, own in zip(("student", "teacher"), widths, (student, teacher), strict=True):
            if width != own.shape[1]:
                expected = f"as wide on every process of the group ({own.shape[1]} here)"
                raise wrong_value(op, name, expected, f"{width} on rank {rank}")
    rows = [size[0] for size in sizes]
    student, teacher = gather_rows(student, rows, group), gather_rows(teacher, rows, group)
    if not any([size[1] for size in sizes]):
        return student, teacher, None
    mask = torch.ones(rows[torch.distributed.get_rank(group)], device=student.device) if mask is None else mask
    return student, teacher, gather_rows(mask.to(torch.uint8)[:, None], rows, group)[:, 0].bool()


def all_gather_integers(numbers: list[int], device: torch.device, group: ProcessGroup) -> list[list[int]]:
    """These integers of each process, in the order of the ranks. Waits for the device."""
    mine = torch.tensor(numbers, device=device)
    gathered = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, mine, group=group)
    return torch.stack(gathered).tolist()


def gather_rows(x: Tensor, rows: list[int], group: ProcessGroup) -> Tensor:
    """[n, ...] of each process -> [N, ...], differentiable; rows: the n of each process.

    Padded to the longest part: collectives need equal shapes. A zero row that was added is cut off again.
    """
    most = max(rows)
    if most == 0:
        return x
    padding = (0, 0) * (x.dim() - 1) + (0, most - x.shape[0])
    parts = _AllGather.apply(torch.nn.functional.pad(x, padding), group)
    return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])


class _AllGather(torch.autograd.Function):
    """[n, D] of each process -> [P, n, D]. The two functions are each other's backward, so any number of them works."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumMine.apply(grad, ctx.group), None


class _SumMine(torch.autograd.Function):
    """[P, n, D] of each process -> the sum over processes of what belongs to this one, [n, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)  # gloo has no reduce_scatter for every dtype
        return total[torch.distributed.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllGather.apply(grad, ctx.group), None

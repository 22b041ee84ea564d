"""The sum over more rows than one CUDA block takes: partial sums of many blocks, then their sum."""

import pytest
import torch
from multi_teacher_helpers import make

import fastkd

F = fastkd.functional


@pytest.mark.parametrize("rows, reduction", [(16384, "mean"), (16387, "sum")])
def test_losses_of_many_rows(rows, reduction, at):
    student, teachers, target = make(rows, 3, 1, device=at("simt"))
    target[torch.arange(rows) % 16 != 3] = -100  # rows that count cost a host's run of the kernels its time
    options = dict(ce_weight=1.0, reduction=reduction, return_terms=True)
    losses = F.multi_teacher_kd(student.detach(), teachers, target, **options)
    with fastkd.use_backend("reference"):
        exact = F.multi_teacher_kd(student.detach().double(), [t.double() for t in teachers], target, **options)
    for loss, expected in zip((losses[0], *losses[1]), (exact[0], *exact[1]), strict=True):
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_a_target_out_of_range_is_counted_in_any_part(at):
    student, teachers, target = make(16400, 3, 1, device=at("simt"))
    target[:] = -100
    target[9000] = 3
    with pytest.raises((IndexError, ValueError), match="index 3"):
        F.multi_teacher_kd(student, teachers, target, ce_weight=1.0)

"""multi_teacher_kd from hidden states and heads: the vocabulary's logits are made, used and dropped chunk by chunk.

    logits    z = softcap * tanh(logit_scale * (h W^T + b) / softcap), of the student and of each teacher's own head
    loss      multi_teacher_kd(z, teachers' logits, target), with the gradient of h, W and b

Checks are in _linear_inputs.py, the formula in _linear_formula.py, chunks in _linear_chunks.py, the operator and its
autograd in _linear_kernels.py; sparse teachers in topk.py and _topk_formula.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _linear_kernels as kernels
from fastkd.ops import _linear_sharded as sharded
from fastkd.ops._autograd import on_host
from fastkd.ops._formulas import LossTerms, Reduction
from fastkd.ops._gather import check_process_group
from fastkd.ops._linear_inputs import OP, Head, check_call
from fastkd.ops._multi_teacher_formula import Combine
from fastkd.ops.topk import TopK

__all__ = ["Head", "TopK", "linear_multi_teacher_kd"]


def linear_multi_teacher_kd(
    hidden: Tensor,
    weight: Tensor,
    teachers: Tensor | Head | TopK | Sequence[Tensor | tuple[Tensor, Tensor] | Head | TopK],
    target: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    temperature: float | Tensor | Sequence[float] = 1.0,
    weights: Tensor | Sequence[float] | None = None,
    kd_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    combine: Combine = "losses",
    divergence: str | Mapping[str, float | Tensor] = "forward",
    divergence_beta: float | None = None,
    vocab_size: int | None = None,
    scale_by_t2: bool = True,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    return_terms: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Any:
    """`multi_teacher_kd` of a language model's last hidden states and head, without its logits in memory.

    Rows go in chunks; the gradients of hidden, weight and bias, each only if it requires grad, are made in the forward
    (as in Liger-Kernel, flash-linear-attention and quack, for one teacher). Products are PyTorch's; the rows'
    arithmetic is the kernel of `multi_teacher_kd`; both, and the sum of the weight's gradient over chunks, are in
    float32 whatever the inputs are (float64 for float64).

    >>> hidden, weight = torch.zeros(2, 4, requires_grad=True), torch.eye(3, 4)
    >>> teacher = (torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.eye(3, 2))  # its own hidden states [2, 2] and head
    >>> loss = fastkd.functional.linear_multi_teacher_kd(hidden, weight, [teacher])
    >>> round(loss.item(), 4)
    0.2165

    Args:
        hidden: [..., H], float32, float64, float16 or bfloat16. Leading dimensions are rows.
        weight: [V, H], the head; of any of these dtypes.
        teachers: K of them, mixed freely: logits [..., V]; (hidden_k [..., H_k], weight_k [V, H_k]); `fastkd.Head`,
            with bias, softcap, logit_scale, or rows; `fastkd.TopK`. A teacher with `rows` (routing) speaks about these
            rows alone; each head is worked for its own rows only. Routing and TopK need combine="losses".
        target: class indices [...], or probabilities [..., V]. Rows of `ignore_index` count nowhere.
        bias: [V], of the student's head.
        softcap: a number > 0: logits become softcap * tanh(logits / softcap). None: they stay.
        logit_scale: multiplies the logits, before softcap.
        chunk_rows: rows of a chunk. None: as many as keep the logits of student and heads within one float32 gradient
            of the weight, at least 256.
        temperature: as in multi_teacher_kd, with another default: 1.
        weights: none = 1/K each for the K teachers of all rows, and 1 for a routed one on its rows; [K]; or [K, ...]
            per row of the student. Not normalised. A teacher of weight 0 is not read.
        vocab_size: classes from here on are padding in every network that has more: their weights are not read and get
            gradient 0. None: all have the student's V.
        divergence, divergence_beta: as in multi_teacher_kd; with TopK, and with process_group, "forward" alone.
        kd_weight, ce_weight, label_smoothing, ignore_index, mask, combine, scale_by_t2: as in multi_teacher_kd.
        reduction, num_items, return_terms: as there. The mean is over the rows that count, also those that no teacher
            speaks about.
        process_group: a torch.distributed.ProcessGroup whose processes have the same hidden states, labels and rows,
            and each some classes of all heads, biases and teachers' logits (column-parallel), in the order of their
            ranks; `target` counts all classes. The loss and the gradient of `hidden` are the same on all. Then with
            combine="losses", class indices, no TopK and no rows=, "mean" or "sum", in eager mode, in plain PyTorch.

    Returns:
        The loss in float32 (float64 for float64 inputs): a scalar, or [...] for "none"; or (loss, terms). Rows that do
        not count are left out before the products (on a GPU their products are made of zeros, not to wait for it).

    Memory beyond inputs and gradients: (1 + K / 2) * chunk_rows * V * 4 bytes for K heads. Time: that of the products.
    reduction="none" makes the gradients in the backward, from the logits made again. Second derivatives, and teachers,
    weights or temperatures that require grad, are plain PyTorch by chunks, recomputed in the backward. With the same
    number of threads the same bits, as the matrix products give them. Routing reads `rows` on the host.

    Raises:
        ValueError, TypeError: one sentence with argument, what was expected, what came. Labels, ids and rows out of
            range raise on the CPU.
    """
    check_process_group(OP, process_group)
    call = check_call(
        hidden, weight, teachers, target, bias, softcap, logit_scale, chunk_rows, temperature, weights, kd_weight,
        ce_weight, label_smoothing, ignore_index, mask, combine, vocab_size, scale_by_t2, reduction, num_items,
        return_terms, divergence, divergence_beta,
    )  # fmt: skip
    items = call.options.num_items
    if items is not None and not on_host((items,)):  # on a GPU, or differentiated
        call = call._replace(options=call.options._replace(reduction="sum", num_items=None))
    else:
        items = None
    losses = kernels.losses_of(call) if process_group is None else sharded.losses_of(call, process_group)
    if items is not None:
        losses = [loss / items for loss in losses]
    if reduction == "none":
        losses = [loss.reshape(hidden.shape[:-1]) for loss in losses]
    return (losses[0], LossTerms(*[term.detach() for term in losses[1:]])) if return_terms else losses[0]


def _why_reference(arguments: dict[str, Any]) -> str | None:
    arguments = dict(arguments)
    group = arguments.pop("process_group")
    check_process_group(OP, group)
    call = check_call(**arguments)
    if group is None:
        return kernels.why_reference(call)
    sharded.check_sharded(call)
    return sharded.REASON


_backend.register(linear_multi_teacher_kd, OP, _why_reference, lambda namespace: None)

"""The cross-entropy of one network, or of several in one pass, by the kernels of mutual_kd without any divergence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import _backend
from fastkd._core.messages import wrong_type
from fastkd.ops import _losses, mutual
from fastkd.ops import _peer_inputs as inputs
from fastkd.ops._formulas import Reduction
from fastkd.ops._inputs import check_labels
from fastkd.ops._peer_losses import Options, Tensors

OP = "cross_entropy"


def cross_entropy(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    class_dim: int = -1,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.cross_entropy of one network or of M, each row read once for loss and gradient.

    >>> logits = [torch.randn(8, 10, requires_grad=True) for _ in range(3)]
    >>> fastkd.functional.cross_entropy(logits, torch.arange(8)).shape
    torch.Size([3])

    Args:
        logits: one network's [..., C], C >= 2, or a sequence of M of one shape; float32, float64, float16 or bfloat16.
            Rows are read where they lie, never copied. (Stacked [M, ..., C] are one network's rows, not M networks.)
        target: class indices [...], an integer dtype, or probabilities [..., C] of a floating dtype. Rows equal to
            `ignore_index` count nowhere; beside probabilities, ignore_index does nothing.
        class_dim: where the logits (and probabilities) have their classes; 1 for maps [B, C, H, W], whose labels, masks
            and losses are [B, H, W].
        label_smoothing: as in torch.nn.functional.cross_entropy, in [0, 1].
        mask: bool [...]: rows where it is False count nowhere, as if their target were `ignore_index`.
        reduction: "none" (per row), "sum", or "mean" over the rows that count, at least one.
        num_items: what "mean" and "sum" divide the sum of the rows by instead: a number or a 0-d tensor. Refused for
            "none".

    Returns:
        One network: a scalar ([...] for "none"). A sequence: [M] ([M, ...]), of which `losses[m]` has a graph of its
        own, as in mutual_kd. In float32 (float64 for float64 logits). No row that counts: 0, where PyTorch has NaN.

    Raises:
        ValueError, TypeError: one sentence with argument, what was expected, what came. A target out of range: as
            mutual_kd.
    """
    tensors, options, leading = _check(
        logits, target, class_dim, label_smoothing, ignore_index, mask, reduction, num_items
    )
    losses = mutual.dispatch(OP, tensors, options, leading)
    return _losses.the_only(losses) if isinstance(logits, Tensor) else losses


def _check(
    logits: Tensor | Sequence[Tensor], target: Tensor | None, class_dim: int, label_smoothing: object,
    ignore_index: int, mask: object, reduction: Reduction, num_items: object,
) -> tuple[Tensors, Options, torch.Size]:  # fmt: skip
    one = isinstance(logits, Tensor)
    name = "logits" if one else "logits[0]"
    given = (logits,) if one else logits
    networks, _, class_dim = inputs.check_networks(OP, given, class_dim, target is not None, least=1, name=name)
    if target is None:
        raise wrong_type(OP, "target", "class indices or probabilities", None)
    whose = "the logits'" if one else inputs.WHOSE
    target, soft = check_labels(OP, target, mask, ignore_index, networks[0], class_dim, whose)
    options = Options(
        (0.0,) * len(networks) ** 2,
        kd_weight=0.0,
        ce_weight=1.0,
        cross_entropy=True,
        num_items=inputs.check_reduction(OP, reduction, num_items),
        label_smoothing=inputs.check_smoothing(OP, label_smoothing),
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return Tensors(inputs.rows_of(networks), target=target, soft=soft), options, networks[0].shape[:-1]


_backend.register(
    cross_entropy, OP, lambda arguments: mutual.why_reference(*_check(**arguments)[:2]), lambda namespace: None
)

"""`--sync-batch-norm`: batch normalisation over the global batch, while several processes train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastkd._core.messages import UserError
from fastkd.methods import Method
from fastkd.train.distributed import World
from fastkd.train.settings import Settings


def synchronises(settings: Settings, world: World) -> bool:
    """Whether the option has an effect: one process has the global batch anyway."""
    return settings.sync_batch_norm and world.size > 1


def check(settings: Settings, device: torch.device, world: World) -> None:
    """UserError on a CPU, for which torch.nn.SyncBatchNorm has no kernels."""
    if synchronises(settings, world) and device.type != "cuda":
        raise UserError(
            f"--sync-batch-norm with {world.size} processes needs GPUs, PyTorch has none for CPUs: leave it out, or "
            "take networks with :norm=group"
        )


def synchronise(method: Method) -> None:
    """Make batch normalisation torch.nn.SyncBatchNorm in all that is not frozen; before it is wrapped.

    Mean teachers among it: they run in train mode, too. Parameters, buffers and their names stay the same.
    """
    frozen = {name.partition(".")[0] for name in method.frozen_names}
    for name, part in list(method.named_children()):
        if name in frozen:
            continue
        kinds = {path: type(m) for path, m in part.named_modules(remove_duplicate=False) if isinstance(m, _BatchNorm)}
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        method.add_module(name, convert(part))
        for path, kind in kinds.items():
            converted: Any = method.get_submodule(f"{name}.{path}" if path else name)
            converted.replaces = kind


def restore(module: nn.Module) -> None:
    """Put back what `synchronise` replaced: networks that are shipped, or guide later stages, are plain."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.SyncBatchNorm) and hasattr(child, "replaces"):
                setattr(parent, name, _plain(child))


def _plain(norm: nn.SyncBatchNorm) -> nn.Module:
    tracked, kind = norm.track_running_stats, cast("type[nn.BatchNorm2d]", norm.replaces)
    plain = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, tracked).train(norm.training)
    plain._parameters.update(norm._parameters)  # the same objects, wherever they are
    plain._buffers.update(norm._buffers)
    return plain

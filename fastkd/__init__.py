"""Knowledge distillation with many networks: fused losses for PyTorch, on CPU and CUDA, and methods."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from fastkd import functional, losses
from fastkd._backend import FallbackWarning, backend_info, explain, use_backend
from fastkd._version import __version__
from fastkd.losses import (
    FeatureEnsemble,
    LinearMultiTeacherKD,
    MultiLabelKD,
    MultiTeacherKD,
    MutualKD,
    RKDAngle,
    RKDDistance,
)
from fastkd.ops.linear import Head, TopK

if TYPE_CHECKING:
    from fastkd import data, graphs, methods, models, nn, testing, train

_ON_FIRST_USE = ("data", "graphs", "methods", "models", "nn", "testing", "train")

__all__ = [
    "FallbackWarning",
    "FeatureEnsemble",
    "Head",
    "LinearMultiTeacherKD",
    "MultiLabelKD",
    "MultiTeacherKD",
    "MutualKD",
    "RKDAngle",
    "RKDDistance",
    "TopK",
    "__version__",
    "backend_info",
    "data",
    "explain",
    "functional",
    "graphs",
    "losses",
    "methods",
    "models",
    "nn",
    "testing",
    "train",
    "use_backend",
]


def __getattr__(name: str) -> ModuleType:
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"fastkd.{name}")
    raise AttributeError(f"module 'fastkd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

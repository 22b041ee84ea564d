"""The public functions, each documented where it is defined."""

from fastkd.ops.feature_ensemble import feature_ensemble
from fastkd.ops.multi_teacher import multi_teacher_kd

__all__ = ["feature_ensemble", "multi_teacher_kd"]

"""The public functions, each documented where it is defined."""

from fastkd.ops.cross_entropy import cross_entropy
from fastkd.ops.feature_ensemble import feature_ensemble
from fastkd.ops.group_stats import GroupStats, group_stats
from fastkd.ops.linear import linear_multi_teacher_kd
from fastkd.ops.multi_label import multi_label_kd
from fastkd.ops.multi_teacher import multi_teacher_kd
from fastkd.ops.multi_teacher_gradient import multi_teacher_kd_with_gradient
from fastkd.ops.mutual import mutual_kd
from fastkd.ops.ranking import hard_samples, network_scores, rank_networks
from fastkd.ops.relational import rkd_angle, rkd_distance

__all__ = [
    "GroupStats",
    "cross_entropy",
    "feature_ensemble",
    "group_stats",
    "hard_samples",
    "linear_multi_teacher_kd",
    "multi_label_kd",
    "multi_teacher_kd",
    "multi_teacher_kd_with_gradient",
    "mutual_kd",
    "network_scores",
    "rank_networks",
    "rkd_angle",
    "rkd_distance",
]

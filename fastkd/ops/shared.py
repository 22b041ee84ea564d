"""The door of this package to the layers above: what methods and modules need of the operations beside their functions.

Types of options and results; checks and collectives that a method shares with an operation. What has an underscore is
for the operations alone.
"""

from fastkd.ops._feature_maps import Norm
from fastkd.ops._formulas import LossTerms, Reduction, accumulate_dtype
from fastkd.ops._gather import all_gather_integers, check_process_group, gather_rows
from fastkd.ops._inputs import check_soft_target, check_target
from fastkd.ops._keywords import Distillation, MultiLabel, Mutual
from fastkd.ops._multi_label_inputs import Classes
from fastkd.ops._multi_teacher_formula import Activation, Combine

__all__ = [
    "Activation",
    "Classes",
    "Combine",
    "Distillation",
    "LossTerms",
    "MultiLabel",
    "Mutual",
    "Norm",
    "Reduction",
    "accumulate_dtype",
    "all_gather_integers",
    "check_process_group",
    "check_soft_target",
    "check_target",
    "gather_rows",
]

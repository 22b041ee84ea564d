"""The numbers that Python and C++ both know, as the native library exports them."""

import ctypes

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastkd import _library
from fastkd.ops import _feature_ensemble_kernels as feature_ensemble
from fastkd.ops import _multi_teacher_native as native
from fastkd.ops import _peer_groups as mutual
from fastkd.ops import _relational_kernels as relational
from fastkd.ops import _teacher_calls as calls
from fastkd.ops._divergences import KINDS
from fastkd.ops._inputs import REDUCTIONS
from fastkd.ops.feature_ensemble import NORMS
from fastkd.ops.topk import MODES


class Constant(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_int64))


def exported(operation: str) -> dict[str, int]:
    function = getattr(ctypes.CDLL(str(_library.FOLDER / "libfastkd_cpu.so")), f"fastkd_{operation}_constants")
    function.restype = ctypes.POINTER(Constant)
    constants, found = function(), {}
    while (constant := constants[len(found)]).name is not None:
        found[constant.name.decode()] = constant.value
    return found


def numbered(*choices) -> dict[str, int]:
    return {choice: number for names in choices for number, choice in enumerate(names)}


def saved_columns(soft: bool, divergence: str = "forward") -> int:
    """Of the states that a streamed row of 5 teachers keeps, as the fake kernel says it."""
    with FakeTensorMode():
        z = torch.empty(3, 7)
        kind = KINDS.index(divergence)
        numbers = ([0.2] * 5, [1.0], 0, 1.0, 0.0, 0.0, -100, True, 2, 0.0, True, False, False, kind, [], 0, [], [])
        out = torch.ops.fastkd.multi_teacher_forward(
            z, [z] * 5, None, z if soft else None, None, None, None, *numbers, True, True
        )
    return out[2].shape[1]


def sides(kind: int) -> torch.Size:
    """Of the planes of 70 embeddings."""
    with FakeTensorMode():
        x, gram = torch.empty(70, 70, dtype=torch.float64), torch.empty(70, 70, dtype=torch.float64)
        return torch.ops.fastkd.relational_sides(x, gram, None, kind, 0.0)[0].shape


def test_multi_teacher():
    assert exported("multi_teacher") == {
        "launch_teachers": calls.LAUNCH_TEACHERS,
        "on_chip_classes": native.ON_CHIP_CLASSES_DEFAULT,
        "on_chip_classes_float64": native.ON_CHIP_CLASSES[torch.float64],
        "saved_columns_5": saved_columns(soft=False),
        "saved_columns_5_soft": saved_columns(soft=True),
        "saved_columns_5_tvd": saved_columns(soft=False, divergence="tvd"),
        **numbered(native.COMBINE, REDUCTIONS, KINDS),
    }


def test_multi_label():
    assert exported("multi_label") == {
        "launch_teachers": calls.LAUNCH_TEACHERS,
        **numbered(native.COMBINE, REDUCTIONS),
    }


def test_mutual():
    assert exported("mutual") == {
        "launch_learners": mutual.LAUNCH_LEARNERS,
        "launch_networks": mutual.LAUNCH_NETWORKS,
    }


def test_feature_ensemble():
    assert exported("feature_ensemble") == {
        "launch_pairs": feature_ensemble.LAUNCH_PAIRS,
        "state_planes": feature_ensemble.STATE_PLANES,
        **numbered(NORMS),
    }


def test_relational():
    kinds = {
        "distance": relational.KIND_DISTANCE,
        "single": relational.KIND_SINGLE,
        "full": relational.KIND_FULL,
    }
    with FakeTensorMode():
        rows = torch.ops.fastkd.relational_distances(torch.empty(70, 70), None, relational.KIND_DISTANCE, 0.0)[2]
    assert exported("relational") == {
        **kinds,
        **{f"planes_{name}": sides(kind)[0] for name, kind in kinds.items()},
        "padded_70": sides(relational.KIND_FULL)[2],
        "padded_width_70": rows.shape[1],
    }


def test_topk():
    assert exported("topk") == numbered(MODES)

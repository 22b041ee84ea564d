"""Assertions for numerical code, public: "as accurate as PyTorch" instead of tolerances tuned by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Test = TypeVar("Test", bound=Callable[..., Any])
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One row of a table of cases: a name for the test's id, and the arguments.

    >>> str(fastkd.testing.Case("no labels", {"target": None}))
    'no labels'
    """

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return self.name


def over(
    cases: Sequence[Case], places: Sequence[str], dtypes: Sequence[torch.dtype] = DTYPES
) -> Callable[[Test], Test]:
    """Decorator: runs a test `(case, place, dtype)` over the whole table cases x places x dtypes.

    >>> cases = [fastkd.testing.Case("mean", {}), fastkd.testing.Case("sum", {"reduction": "sum"})]
    >>> @fastkd.testing.over(cases, places=("cpu",), dtypes=(torch.float32,))
    ... def test_loss(case, place, dtype): ...
    >>> [mark.args[0] for mark in test_loss.pytestmark]
    ['dtype', 'place', 'case']
    """
    import pytest

    def decorate(test: Test) -> Test:
        for name, values in (("dtype", dtypes), ("place", places), ("case", cases)):
            test = pytest.mark.parametrize(name, values, ids=lambda v: str(v).removeprefix("torch."))(test)
        return test

    return decorate


def assert_as_accurate(
    actual: Tensor,
    exact: Tensor,
    baseline: Tensor,
    *,
    factor: float = 2.0,
    floor: float | None = None,
    name: str = "result",
) -> None:
    """Asserts max |actual - exact| <= factor * max |baseline - exact| + floor, and the same infinities and NaNs.

    >>> exact, rounded = torch.tensor([1 / 3], dtype=torch.float64), torch.tensor([1 / 3])
    >>> fastkd.testing.assert_as_accurate(rounded, exact, baseline=rounded)
    >>> fastkd.testing.assert_as_accurate(rounded + 1e-6, exact, baseline=rounded)
    Traceback (most recent call last):
        ...
    AssertionError: result: error 1.02e-06, allowed 9.93e-08

    Args:
        actual, baseline: the result under test and PyTorch's own, same shape, in the dtype under test.
        exact: the same in float64.
        floor: absolute; default two units in the last place (of `actual`'s dtype) of the largest exact value.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)} instead of {list(exact.shape)}"
    exact = exact.double()
    _assert_same_specials(actual, exact, name)
    finite = exact.isfinite() & baseline.isfinite()
    if not bool(finite.any()):
        return
    if floor is None:
        floor = 2 * torch.finfo(actual.dtype).eps * float(exact[finite].abs().max())
    error = float((actual.double() - exact)[finite].abs().max())
    allowed = factor * float((baseline.double() - exact)[finite].abs().max()) + floor
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_grad_close(
    actual: Tensor,
    exact: Tensor,
    baseline: Tensor,
    *,
    factor: float = 2.0,
    floor: float | None = None,
    name: str = "gradient",
) -> None:
    """Asserts that a gradient is as good as the baseline's by direction (1 - cosine) and by relative L2 error.

    A zero gradient must be exactly zero. `floor` is relative; default two units in the last place of the dtype.

    >>> exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    >>> fastkd.testing.assert_grad_close(exact.float(), exact, baseline=exact.float())
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)} instead of {list(exact.shape)}"
    exact = exact.double()
    _assert_same_specials(actual, exact, name)
    finite = exact.isfinite() & baseline.isfinite()
    a, e, b = (t.double()[finite] for t in (actual, exact, baseline))
    largest = float(e.abs().max()) if e.numel() else 0.0
    if largest == 0:
        assert float(a.abs().max() if a.numel() else 0) == 0, f"{name}: not exactly zero"
        return
    a, e, b = a / largest, e / largest, b / largest  # squares of 1e-200 are 0
    norm = e.norm()
    floor = 2 * torch.finfo(actual.dtype).eps if floor is None else floor
    relative, allowed = float((a - e).norm() / norm), factor * float((b - e).norm() / norm) + floor
    assert relative <= allowed, f"{name}: relative L2 error {relative:.3g}, allowed {allowed:.3g}"
    # 1 - cosine without its cancellation, whose rounding alone is more than float64's floor.
    length = a.norm().clamp(min=torch.finfo(torch.float64).tiny)  # 0 where `actual`'s dtype is too coarse for all of it
    turned = float((a / length - e / norm).square().sum() / 2)
    assert turned <= allowed, f"{name}: 1 - cosine {turned:.3g}, allowed {allowed:.3g}"


def _assert_same_specials(actual: Tensor, exact: Tensor, name: str) -> None:
    assert bool((actual.isnan() == exact.isnan()).all()), f"{name}: NaN in other places"
    largest = torch.finfo(actual.dtype).max
    infinite = exact.isinf() | (exact.abs() > largest)
    assert bool((actual.isinf() == infinite)[~exact.isnan()].all()), f"{name}: infinite in other places"


def difficult_logits(
    shape: Sequence[int], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """Named logits [..., C] that random normal data is not: confident, large, flat, masked, with a long tail.

    >>> logits = dict(fastkd.testing.difficult_logits([2, 5]))
    >>> logits["masked"].isinf().sum(-1).tolist(), len(logits)
    ([2, 2], 9)
    """
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(tuple(shape), generator=g, dtype=torch.float64)
    confident = noise.clone()
    confident[..., 0] += 25
    masked = noise.clone()
    masked[..., ::3] = float("-inf")
    if shape[-1] > 1:
        masked[..., 1] = noise[..., 1]
    yield "confident", confident.to(dtype)
    yield "times 100", (noise * 100).to(dtype)
    yield "times 1000", (noise * 1000).to(dtype)
    yield "times 1e4", (noise * 1e4).to(dtype)
    yield "shifted by 1000", (noise + 1000).to(dtype)
    yield "flat", (noise * 1e-4).to(dtype)
    yield "long tail", (-noise.abs() * 30).to(dtype)
    yield "masked", masked.to(dtype)
    yield "masked by a finite number", masked.to(dtype).clamp(min=torch.finfo(dtype).min)

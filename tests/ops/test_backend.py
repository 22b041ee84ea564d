"""The backends: what "auto" says where plain PyTorch runs instead of a kernel, and that "native" refuses it."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
import fastkd.functional as F
from fastkd import _backend

pytestmark = pytest.mark.usefixtures("one_thread", "nothing_told_yet")


@pytest.fixture
def nothing_told_yet():
    with _backend.telling_anew():
        yield


Z = torch.randn(3, 4)


def learner() -> torch.Tensor:
    return torch.randn(3, 4, requires_grad=True)


def maps() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, requires_grad=True)


# Each operation with a call that has no kernel, and the reason that it is told.
FALLBACKS = {
    "multi_teacher_kd": (lambda: F.multi_teacher_kd(learner(), [Z, learner()]), "teachers[1] requires grad, so it"),
    "multi_label_kd": (lambda: F.multi_label_kd(learner(), [Z, learner()]), "teachers[1] requires grad, so it gets a"),
    "mutual_kd": (lambda: F.mutual_kd([Z, learner()], teachers=[learner()]), "teachers[0] requires grad, so it gets a"),
    "feature_ensemble": (lambda: F.feature_ensemble(maps(), [maps()]), "teachers[0] requires grad, so it gets a"),
    "rkd_distance": (lambda: F.rkd_distance(learner(), learner()), "teacher requires grad, so it gets a"),
    "rkd_angle": (lambda: F.rkd_angle(learner(), learner()), "teacher requires grad, so it gets a"),
    "group_stats": (lambda: torch.func.vmap(lambda z: F.group_stats([z, z]).ce)(torch.randn(2, 3, 4)), "torch.func"),
}
each = pytest.mark.parametrize("operation", FALLBACKS)


def told(call) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if w.category is fastkd.FallbackWarning]


@each
def test_auto_warns_once_of_each_operation_and_reason_at_the_users_line(operation):
    call, reason = FALLBACKS[operation]
    (warning,) = told(call)
    text = str(warning.message)
    assert text.startswith(f"{operation} runs in plain PyTorch") and reason in text and "FASTKD_WARN=0" in text
    assert warning.filename == __file__
    assert told(call) == []
    others = [told(other) for name, (other, _) in FALLBACKS.items() if name != operation]
    assert [len(warned) for warned in others] == [1] * len(others)


def test_another_reason_is_told_too():
    assert len(told(FALLBACKS["multi_teacher_kd"][0])) == 1
    (warning,) = told(lambda: torch.func.vmap(lambda z: F.multi_teacher_kd(z, [z]))(torch.randn(2, 3, 4)))
    assert "torch.func transform" in str(warning.message) and warning.filename == __file__


@each
def test_native_raises_where_it_would_fall_back(operation):
    call, reason = FALLBACKS[operation]
    with fastkd.use_backend("native"), pytest.raises(RuntimeError) as caught:
        call()
    text = str(caught.value)
    assert text.startswith(f"{operation}: the native backend was chosen") and reason in text and "\n" not in text


@each
def test_nobody_is_told_of_a_reference_that_was_chosen(operation):
    call, _ = FALLBACKS[operation]
    with fastkd.use_backend("reference"):
        assert told(call) == []
    assert len(told(call)) == 1  # and it is not taken for told


def test_where_warnings_are_errors_every_call_raises():
    call, _ = FALLBACKS["multi_teacher_kd"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastkd.FallbackWarning)
        for _ in range(2):
            with pytest.raises(fastkd.FallbackWarning):
                call()


def test_a_module_points_at_the_users_line_too():
    (warning,) = told(lambda: fastkd.MultiTeacherKD()(learner(), [learner()]))
    assert warning.filename == __file__


def test_arguments_that_are_swapped_are_told_apart_from_a_teacher_that_learns():
    (warning,) = told(lambda: F.multi_teacher_kd(learner().detach(), [learner()]))
    assert "teachers[0] requires grad and no student does (are the arguments swapped?" in str(warning.message)
    (warning,) = told(lambda: F.rkd_distance(learner().detach(), learner()))
    assert "are the arguments swapped?" in str(warning.message)
    (warning,) = told(lambda: F.multi_teacher_kd(learner(), [learner()]))
    assert "detach" in str(warning.message)


def test_a_second_derivative_is_no_fallback():
    student = learner()
    with fastkd.use_backend("native"):
        loss = F.multi_teacher_kd(student, [torch.randn(3, 4)])
        (grad,) = torch.autograd.grad(loss, student, create_graph=True)
        grad.square().sum().backward()
    assert bool(student.grad.isfinite().all()) and bool((student.grad != 0).any())


def test_nothing_is_told_while_torch_compile_traces_nor_of_fake_and_meta_tensors():
    compiled = torch.compile(lambda s, t: F.multi_teacher_kd(s, [t]), backend="eager", fullgraph=True)
    assert told(lambda: compiled(learner(), learner())) == []
    with FakeTensorMode():
        fake = learner()
        assert told(lambda: F.multi_teacher_kd(fake, [learner()])) == []
    assert told(lambda: F.multi_teacher_kd(fake, [fake])) == []
    assert told(lambda: F.multi_teacher_kd(learner().to("meta"), [learner().to("meta")])) == []
    assert len(told(lambda: F.multi_teacher_kd(learner(), [learner()]))) == 1


def test_native_refuses_under_torch_compile_too():
    with fastkd.use_backend("native"), pytest.raises(RuntimeError, match="the native backend was chosen"):
        torch.compile(lambda s, t: F.multi_teacher_kd(s, [t]), backend="eager")(learner(), learner())


def test_explain_and_backend_info_name_what_was_chosen():
    teacher = learner()
    assert fastkd.backend_info()["backend"] == "auto"
    for backend, uses in (("auto", "native"), ("native", "native"), ("reference", "reference")):
        with fastkd.use_backend(backend):
            info = fastkd.backend_info()
            assert info["backend"] == backend and info["mutual_kd"].startswith(f"cpu: {uses}")
            assert fastkd.explain(F.multi_teacher_kd, learner(), [teacher.detach()]).backend == uses
            explanation = fastkd.explain(F.multi_teacher_kd, learner(), [teacher])
            assert explanation.backend == "reference"
            assert ("the call raises" in explanation.reason) == (backend == "native")
    assert told(lambda: fastkd.explain(F.multi_teacher_kd, learner(), [teacher])) == []


SCRIPT = """
import warnings, torch, fastkd
warnings.simplefilter("always")
z = torch.randn(2, 3, requires_grad=True)
fastkd.functional.multi_teacher_kd(z, [z])
print(fastkd.backend_info()["backend"], fastkd._backend.machine.check_everywhere)
"""


@pytest.mark.parametrize(
    "settings, warned, checked",
    [
        ({"FASTKD_BACKEND": "auto", "FASTKD_CHECKS": "1"}, True, "True"),
        ({"FASTKD_WARN": "0", "FASTKD_CHECKS": "0"}, False, "False"),
    ],
)
def test_the_environment_chooses_silences_and_checks_everywhere(settings, warned, checked, monkeypatch):
    for name in ("FASTKD_BACKEND", "FASTKD_WARN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["auto", checked]
    assert ("FallbackWarning: multi_teacher_kd runs in plain PyTorch" in done.stderr) == warned


def test_pretending_ends_in_any_order():
    """Fixtures are torn down by their own order: what one pretended must not come back when another ends."""
    before = _backend.machine
    first, second = _backend.pretend(values_readable=False), _backend.pretend(stream_always=True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _backend.machine == before._replace(stream_always=True)
    second.__exit__(None, None, None)
    assert _backend.machine == before

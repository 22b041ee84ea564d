"""Which GPUs a native library can serve, and what is said of one that was left out."""

import json

import pytest
import torch

import fastkd
from fastkd import _backend, _library
from fastkd._library import Library


@pytest.mark.parametrize(
    "architectures, capability, serves",
    [
        (("90-real",), (9, 0), True),
        (("90-real",), (8, 0), False),
        (("80-real",), (8, 9), True),  # machine code runs on later minor versions of its major one
        (("86-real",), (8, 0), False),
        (("80-real",), (9, 0), False),
        (("80-virtual",), (9, 0), True),
        (("90-virtual",), (8, 9), False),
        (("90a-real",), (9, 0), True),
        (("90a-virtual",), (10, 0), False),
        (("80-real", "120-real"), (12, 1), True),
        ((), (9, 0), False),
    ],
)
def test_code_for_a_gpu(architectures, capability, serves):
    assert Library(True, architectures=architectures).has_code_for(capability) is serves


def test_a_gpu_without_code_goes_to_the_reference():
    library = Library(True, architectures=("90-real",))
    built = "the library has code for 90-real, the GPU has compute capability"
    assert _backend.why_not_gpu(library, (8, 0)) == f"{built} 8.0: build it here again"
    assert _backend.why_not_gpu(library, (7, 5)) == "the GPU has compute capability 7.5, the kernels need 8.0 or newer"
    assert _backend.why_not_gpu(library, (9, 0)) is None


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of the package, where no library is."""
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    monkeypatch.delenv("FASTKD_LIBRARY_DIR", raising=False)
    return tmp_path


@pytest.mark.parametrize("name, needs", [("libfastkd_cpu.so", "a C++20 compiler"), ("libfastkd_cuda.so", "nvcc")])
def test_a_library_that_was_left_out_says_what_the_build_said(elsewhere, name, needs):
    (elsewhere / "left_out.json").write_text(json.dumps({name: "it rained"}))
    library = _library._load(name)
    assert not library.loaded
    assert library.reason.startswith(f"{name} was not built: it rained; for the kernels ") and needs in library.reason


@pytest.mark.parametrize("note", [None, "", "[]", "{}", '{"libfastkd_cpu.so": ""}'])
def test_without_a_note_it_says_where_it_looked(elsewhere, monkeypatch, note):
    if note is not None:
        (elsewhere / "left_out.json").write_text(note)
    reason = _library._load("libfastkd_cpu.so").reason
    assert reason.startswith(f"libfastkd_cpu.so is not in {elsewhere}, where no build put it; for the kernels")
    monkeypatch.setenv("FASTKD_LIBRARY_DIR", str(elsewhere))
    assert f"{elsewhere}, which FASTKD_LIBRARY_DIR names;" in _library._load("libfastkd_cpu.so").reason


def test_explain_and_info_say_the_same(elsewhere, monkeypatch):
    said = {"libfastkd_cpu.so": "no C++ compiler was found", "libfastkd_cuda.so": "FASTKD_WITH_CUDA=0 left it out"}
    (elsewhere / "left_out.json").write_text(json.dumps(said))
    for kind, name in (("CPU", "libfastkd_cpu.so"), ("CUDA", "libfastkd_cuda.so")):
        monkeypatch.setattr(_library, kind, _library._load(name))
    logits = torch.zeros(2, 3)
    with fastkd.use_backend("auto"):
        explained = fastkd.explain(fastkd.functional.multi_teacher_kd, logits, [logits])
    assert explained.backend == "reference" and said["libfastkd_cpu.so"] in explained.reason
    assert explained.reason == fastkd.backend_info()["cpu"]
    assert said["libfastkd_cuda.so"] in fastkd.backend_info()["cuda"] or torch.cuda.is_available()


def test_info_names_the_gpus_that_the_cuda_library_serves(monkeypatch):
    monkeypatch.setattr(_library, "CUDA", Library(True, architectures=("80-real", "90-virtual")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fastkd.backend_info()["cuda"] == "CUDA kernels for 80-real, 90-virtual; no GPU here"

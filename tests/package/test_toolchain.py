"""What the build looks for, what it asks pip for, and what it says when something is wrong."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["FASTKD_WITH_CUDA", "FASTKD_REQUIRE_NATIVE", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX"]
SETTINGS += ["CUDACXX", "CUDA_HOME", "CUDA_PATH"]


@pytest.fixture
def toolchain(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    sys.modules.pop("toolchain", None)  # it remembers what it found
    yield importlib.import_module("toolchain")
    sys.modules.pop("toolchain", None)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", ["80-real", "90-real", "90-virtual"]),
        ("9.0", ["90-real"]),
        ("8.0;9.0+PTX", ["80-real", "90-real", "90-virtual"]),
        ("8.0 9.0a 12.0+PTX", ["80-real", "90a-real", "120-real", "120-virtual"]),
        ("7.5;8.6", ["86-real"]),
    ],
)
def test_architecture_list(toolchain, text, expected):
    assert toolchain.architectures(text) == expected


@pytest.mark.parametrize(
    "with_cuda, listed, gpus, expected",
    [
        ("auto", "", "", []),  # a container's build: CUDA is left out
        ("auto", "", "9.0\n9.0\n", ["90-real"]),
        ("auto", "", "8.9\n12.0\n7.5\n", ["89-real", "120-real"]),
        ("auto", "8.0", "", ["80-real"]),
        ("1", "", "9.0\n", ["80-real", "90-real", "90-virtual"]),
        ("0", "8.0", "9.0\n", []),
    ],
)
def test_what_cuda_kernels_are_built_for(toolchain, monkeypatch, tmp_path, with_cuda, listed, gpus, expected):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{gpus}'\n" if gpus else "#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("FASTKD_WITH_CUDA", with_cuda)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert toolchain.wanted_architectures() == expected


def test_an_old_nvcc_builds_what_it_knows_of_the_default(toolchain, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\nprintf 'sm_75\\nsm_80\\n'\n")
    old.chmod(0o755)
    assert toolchain.known_architectures(str(old), toolchain.architectures()) == ["80-real"]
    assert toolchain.known_architectures(str(old), ["120-real"]) == ["120-real"]


def test_the_newest_architectures_are_built_on_request(toolchain, monkeypatch):
    """By the list that docs/building.md names; all GPUs beyond those of the default take its PTX."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert toolchain.architectures() == ["80-real", "90-real", "90-virtual"]
    (listed,) = re.findall(r'TORCH_CUDA_ARCH_LIST="([^"]*12\.0[^"]*)"', (ROOT / "docs" / "building.md").read_text())
    named = toolchain.architectures(listed)
    assert {"100-real", "120-real"} < set(named) and named[-1].endswith("-virtual")
    assert set(toolchain.architectures()) - {"90-virtual"} < set(named)


@pytest.mark.parametrize("text", ["Hopper", "90", "9.0;sm_80", "7.5", "9.0+ptx"])
def test_bad_architecture_list(toolchain, text):
    with pytest.raises(toolchain.ConfigurationError, match=r"TORCH_CUDA_ARCH_LIST: expected .* got "):
        toolchain.architectures(text)


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_bad_max_jobs(toolchain, monkeypatch, value):
    monkeypatch.setenv("MAX_JOBS", value)
    with pytest.raises(toolchain.ConfigurationError, match="MAX_JOBS: expected a positive number, got "):
        toolchain.jobs()


def test_max_jobs(toolchain, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert toolchain.jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= toolchain.jobs() <= os.cpu_count()


NVCC, BROKEN, SMI = "#!/bin/sh\nexit 0\n", "#!/bin/sh\necho error: bad >&2\nexit 1\n", "#!/bin/sh\nprintf '9.0\\n'\n"


@pytest.mark.parametrize(
    "with_cuda, nvcc, gpu, expected",
    [
        ("0", NVCC, SMI, r"FASTKD_WITH_CUDA=0 left it out"),
        ("auto", NVCC, None, r"no GPU was there, and FASTKD_WITH_CUDA=1 was not set"),
        ("auto", NVCC, SMI, r""),
        ("1", NVCC, None, r""),
        ("auto", None, SMI, r"no nvcc was found \(CUDACXX, CUDA_HOME, PATH, /usr/local/cuda\)"),
        ("auto", None, None, r"no nvcc was found .*"),
        ("auto", BROKEN, SMI, r".*/nvcc does not compile CUDA C\+\+20 for 90-real \(error: bad\)"),
    ],
)
def test_why_cuda_kernels_are_left_out(toolchain, monkeypatch, tmp_path, with_cuda, nvcc, gpu, expected):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FASTKD_WITH_CUDA", with_cuda)
    for name, text in (("nvcc", nvcc), ("nvidia-smi", gpu or BROKEN)):
        if text:
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(toolchain, "nvcc_candidates", lambda: [str(tmp_path / "nvcc")] if nvcc else [])
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert re.fullmatch(expected, toolchain.without_cuda())


def clean_environment(**settings: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"FASTKD_WITH_CUDA": "1", "CUDACXX": "/bin/false"}, "FASTKD_WITH_CUDA=1, but /bin/false does not compile"),
        ({"FASTKD_WITH_CUDA": "yes"}, "FASTKD_WITH_CUDA: expected auto, 1 or 0, got 'yes'"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "TORCH_CUDA_ARCH_LIST: expected compute capabilities"),
        ({"FASTKD_REQUIRE_NATIVE": "1", "CXX": "/bin/false"}, "FASTKD_REQUIRE_NATIVE=1, but the native libraries"),
    ],
)
def test_the_build_refuses_in_one_sentence(settings, message, tmp_path):
    done = build(tmp_path, **settings)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {message}")


def test_a_build_without_a_compiler_leaves_its_reason_in_the_package(tmp_path):
    assert build(tmp_path, CXX="/bin/false").returncode == 0
    left_out = json.loads((tmp_path / "fastkd" / "left_out.json").read_text())
    reason = "/bin/false does not compile C++20 for this processor (no output)"
    assert left_out == dict.fromkeys(["libfastkd_cpu.so", "libfastkd_cuda.so"], reason)


def build(tmp_path: Path, **settings: str) -> subprocess.CompletedProcess:
    """`setup.py build_ext --inplace` of the package's bare bones."""
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "README.md").touch()
    (tmp_path / "fastkd").mkdir()
    shutil.copy(ROOT / "fastkd" / "_version.py", tmp_path / "fastkd")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tmp_path, env=clean_environment(**settings), capture_output=True, text=True)


def test_a_broken_nvcc_is_passed_over_and_a_wrapper_seen_through(toolchain, monkeypatch, tmp_path):
    real = toolchain.nvcc()
    if real.path is None:
        pytest.skip(real.reason)
    broken, wrapper = tmp_path / "broken", tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    wrapper.write_text(f'#!/bin/sh\nexec {real.path} "$@"\n')
    broken.chmod(0o755), wrapper.chmod(0o755)
    monkeypatch.setattr(toolchain, "nvcc_candidates", lambda: [str(broken), str(wrapper)])
    toolchain.nvcc.cache_clear()
    assert toolchain.nvcc().path == real.path


def isolated_requirements(tmp_path: Path, **settings: str) -> list[str]:
    """What the backend asks pip for, run as pip runs it: site-packages hidden by a sitecustomize on PYTHONPATH."""
    setuptools = Path(importlib.import_module("setuptools").__file__).parent
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, sysconfig\n"
        "hidden = {sysconfig.get_path(kind) for kind in ('purelib', 'platlib')}\n"
        "sys.path[:] = [path for path in sys.path if path not in hidden]\n"
    )
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / name).symlink_to(setuptools.parent / name)
    code = (
        "import importlib.util, sys\n"
        "assert importlib.util.find_spec('torch') is None\n"
        f"sys.path.insert(0, {str(ROOT / 'tools')!r})\n"
        "import build_backend\n"
        "print(*build_backend._requirements([]))\n"
    )
    environment = clean_environment(PYTHONPATH=str(tmp_path), PYTHONNOUSERSITE="1", **settings)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_an_isolated_build_takes_the_torch_behind_it(tmp_path):
    assert [name for name in isolated_requirements(tmp_path) if name.startswith("torch")] == []


def test_without_a_compiler_the_build_asks_for_nothing(tmp_path):
    assert isolated_requirements(tmp_path, CXX="/bin/false") == []


def test_torch_is_asked_for_where_there_is_none_or_too_old(toolchain, monkeypatch, tmp_path):
    backend = importlib.import_module("build_backend")
    monkeypatch.setattr(toolchain, "cxx", lambda: toolchain.Found("/usr/bin/c++"))
    for version, expected in (("2.10.0+cpu", True), ("2.11.0", False), ("3.0.1", False)):
        (tmp_path / "version.py").write_text(f"__version__ = '{version}'\n")
        spec = importlib.util.spec_from_file_location("torch", tmp_path / "__init__.py")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert ("torch>=2.11" in backend._requirements([])) == expected
    sys.modules.pop("build_backend")

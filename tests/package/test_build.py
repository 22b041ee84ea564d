"""The native libraries as they were built: what they need, how they were compiled, and the package without them."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from fastkd import _library

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fastkd"
CPU, CUDA = PACKAGE / "libfastkd_cpu.so", PACKAGE / "libfastkd_cuda.so"
LOADER = platform.machine().replace("_", "-")
CUDA_SOURCES = sorted((ROOT / "csrc").glob("*/*.cu"))
MAX_BYTES = 23_300_000  # streamed rows' divergences and softcaps brought CUDA's 21.7 MB 1.1, split rows of mutual 0.1
# 65536 registers a multiprocessor: at most this many leaves room for three blocks of 128 threads.
MAX_REGISTERS = 168

on_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one build, not levels")


@pytest.fixture(scope="module")
def toolchain():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield importlib.import_module("toolchain")
    finally:
        sys.path.remove(str(ROOT / "tools"))


def operations() -> list[str]:
    return re.search(r"set\(FASTKD_OPS ([^)]+)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()


def output(*command, **options) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True, **options).stdout


def tool(name: str) -> str:
    """A program on PATH, beside nvcc, or from its package on the Python path."""
    nvidia = [str(path) for entry in sys.path for path in Path(entry).glob("nvidia/*/bin")]
    path = shutil.which(name) or shutil.which(name, path=os.pathsep.join(["/usr/local/cuda/bin", *nvidia]))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.fixture(params=[CPU, CUDA], ids=["cpu", "cuda"])
def library(request, toolchain) -> Path:
    """Each library; a missing one is an error where it could have been built."""
    return require_cuda(toolchain) if request.param == CUDA else request.param


def require_cuda(toolchain) -> Path:
    if not CUDA.is_file() and torch.version.cuda is None:
        pytest.skip("this torch has no CUDA, so the CUDA library is not installed")
    if not CUDA.is_file() and toolchain.nvcc().path is None:
        pytest.skip(toolchain.nvcc().reason)
    if not CUDA.is_file() and not toolchain.wanted_architectures():
        pytest.skip("the CUDA library was left out: no GPU is here, and FASTKD_WITH_CUDA=1 was not said")
    assert CUDA.is_file(), "nvcc and a torch with CUDA are here, but libfastkd_cuda.so was not built"
    return CUDA


def test_only_torchs_stable_c_interface_is_used(library):
    undefined = output(tool("nm"), "-DC", "--undefined-only", library)
    names = [line.split(maxsplit=1)[1] for line in undefined.splitlines()]
    assert "torch_library_impl" in names  # so that an empty list cannot pass
    assert [name for name in names if re.search(r"\b(c10|at|torch|caffe2)::", name)] == []


def test_needs_torch_and_the_system_only(library):
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", output(tool("readelf"), "-d", library)))
    torch_libraries = {"libtorch_cpu.so"} | ({"libtorch_cuda.so"} if library == CUDA else set())
    assert needed & torch_libraries == torch_libraries
    others = {name.split(".so")[0] for name in needed - torch_libraries}
    assert others <= {"libstdc++", "libm", "libgcc_s", "libc", "libpthread", "libdl", "librt", f"ld-linux-{LOADER}"}


def test_size(library):
    assert library.stat().st_size < MAX_BYTES


@pytest.fixture(scope="module")
def instructions() -> dict[str, Counter]:
    """For "<op> level<n>" and for "other": counts of (kind, register), such as ("fma ps", "zmm") or ("any", "ymm")."""
    counts: dict[str, Counter] = {}
    current = counts.setdefault("other", Counter())
    for line in output(tool("objdump"), "-dC", "--no-show-raw-insn", CPU).splitlines():
        if re.match(r"[0-9a-f]+ <", line):
            level = re.search(r"level[134]\b", line)
            operation = next((op for op in operations() if f"fastkd::{op}::" in line), "core")
            current = counts.setdefault(f"{operation} {level[0]}" if level else "other", Counter())
            continue
        register = re.search(r"%([xyz]mm)", line)
        if register:
            fma = re.search(r"\tvfn?m(?:add|sub)\d+([ps][sd])", line)
            current["any", register[1]] += 1
            current[f"fma {fma[1]}" if fma else "other", register[1]] += 1
    return counts


@on_x86_64
@pytest.mark.parametrize("operation", operations())
def test_each_level_is_vectorised_for_its_processors(instructions, operation):
    """One exponential is 9 fused multiply-adds; without -fno-trapping-math none of them is packed."""
    level1, level3, level4 = (instructions[f"{operation} level{level}"] for level in (1, 3, 4))
    assert level1["any", "xmm"] > 0
    assert level1["any", "ymm"] == level1["any", "zmm"] == 0
    assert level3["fma ps", "ymm"] >= 9
    assert level3["any", "zmm"] == 0
    assert level4["fma ps", "zmm"] >= 9


@on_x86_64
def test_no_wide_instruction_outside_the_levels(instructions):
    """An inline function shared by two levels would bring AVX-512 to processors that have none."""
    assert instructions["other"]["any", "ymm"] == instructions["other"]["any", "zmm"] == 0
    assert instructions["other"]["any", "xmm"] > 0


@pytest.fixture(scope="module", params=[1, 3, 4])
def tested(request, tmp_path_factory) -> tuple[Counter, str]:
    """A CPU level's (outcome, file) of every test of the operations, all in one process, and what pytest said."""
    environment = os.environ | {"FASTKD_CPU_LEVEL": str(request.param), "OMP_NUM_THREADS": "1"}
    code = "import fastkd; print(fastkd._library.CPU.cpu_level)"
    if int(output(sys.executable, "-c", code, env=environment, cwd=ROOT)) != request.param:
        pytest.skip(f"this processor has no x86-64-v{request.param}")
    found = tmp_path_factory.mktemp("level") / "tests.xml"
    files = sorted({str(path) for op in operations() for path in (ROOT / "tests" / "ops").glob(f"test_{op}*.py")})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", "cpu"]
    done = subprocess.run(
        [*command, f"--junitxml={found}", *files], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    outcomes: Counter = Counter()
    for case in ElementTree.parse(found).getroot().iter("testcase") if found.exists() else ():
        outcome = next((name for name in ("failure", "error", "skipped") if case.find(name) is not None), "passed")
        outcomes[outcome, case.get("classname", "").rpartition(".")[2]] += 1
    assert (done.returncode == 0) == all(outcome in ("passed", "skipped") for outcome, _ in outcomes), done.stdout
    return outcomes, done.stdout[-4000:]


@pytest.mark.slow
@on_x86_64
@pytest.mark.parametrize("operation", operations())
def test_the_operations_tests_pass_at_each_level(operation, tested):
    """The processor's own level too: `make test` may have run under another FASTKD_CPU_LEVEL."""
    outcomes, said = tested
    own = Counter()
    for (outcome, file), count in outcomes.items():
        own[outcome] += count * file.startswith(f"test_{operation}")
    assert own["failure"] == own["error"] == 0, said
    assert own["passed"] >= 50, said


def test_device_code_for_every_architecture(toolchain):
    library, cuobjdump = require_cuda(toolchain), tool("cuobjdump")
    listed = {
        "real": set(re.findall(r"\.sm_(\w+)\.cubin", output(cuobjdump, "--list-elf", library))),
        "virtual": set(re.findall(r"\.sm_(\w+)\.ptx", output(cuobjdump, "--list-ptx", library))),
    }
    wanted = [architecture.split("-") for architecture in _library.CUDA.architectures]
    for kind in listed:
        assert listed[kind] == {number for number, its_kind in wanted if its_kind == kind}


def resource_usage(library: Path) -> list[tuple[str, str, dict[str, int]]]:
    """(architecture, kernel, numbers) of every kernel in the library."""
    found, architecture, kernel = [], "", ""
    for line in output(tool("cuobjdump"), "-res-usage", library).splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ")
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line:
            numbers = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
            found.append((architecture, kernel, numbers))
    return found


@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_cuda_source_needs_no_more_than_its_include_folder(source):
    """No -D: `nvcc -I csrc` alone takes each file, for a look at its code.

    Preprocessed here; `python -m benchmarks.sass` compiles them so.
    """
    flags = ["-std=c++20", "--expt-relaxed-constexpr", "-I", ROOT / "csrc", "-E"]
    text = output(tool("nvcc"), *flags, source)
    assert f"namespace fastkd::{source.parent.name}" in text
    left = set(re.findall(r"\bFASTKD_[A-Z_]+\b", re.sub(r'"[^"\n]*"', "", text)))
    assert left == set()  # a name that only the build would define


def test_kernels_have_no_stack_no_spill_and_few_registers(toolchain):
    """A spilled register lies in local memory, so it shows as a stack frame."""
    usage = resource_usage(require_cuda(toolchain))
    built = {a.removesuffix("-real") for a in _library.CUDA.architectures if a.endswith("-real")}
    assert {architecture.removeprefix("sm_") for architecture, _, _ in usage} == built
    for operation in operations():
        has_kernels = any((ROOT / "csrc" / operation).glob("*.cu"))
        assert any(operation in kernel for _, kernel, _ in usage) == has_kernels
    spilling = [entry for entry in usage if entry[2]["STACK"] or entry[2]["LOCAL"]]
    assert spilling == []
    assert [entry for entry in usage if entry[2]["REG"] > MAX_REGISTERS] == []


def test_without_libraries_the_reference_serves_and_one_warning_says_so(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fastkd", ignore=shutil.ignore_patterns("*.so", "*.json", "__pycache__"))
    code = (
        "import warnings\n"
        "import torch, fastkd\n"
        "fastkd.backend_info()\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    student, teacher = torch.randn(2, 4, 10).unbind()\n"
        "    loss = fastkd.functional.multi_teacher_kd(student, [teacher])\n"
        "    again = fastkd.functional.multi_teacher_kd(student, [teacher])\n"
        "ours = [str(w.message) for w in caught if 'fastkd' in str(w.message)]\n"
        "log_q, p = (student / 4).log_softmax(1), (teacher / 4).softmax(1)\n"
        "kl = torch.nn.functional.kl_div(log_q, p, reduction='batchmean')\n"
        "torch.testing.assert_close(loss, 16 * kl)\n"
        "assert loss == again\n"
        "assert len(ours) == 1 and 'multi_teacher_kd' in ours[0] and 'libfastkd_cpu.so' in ours[0], ours\n"
        "assert '`pip install --no-cache-dir --force-reinstall --no-deps .` in the sources' in ours[0], ours\n"
        "info = fastkd.backend_info()\n"
        "assert 'reference' in info['multi_teacher_kd'] and 'native' not in info['multi_teacher_kd'], info\n"
        "print(fastkd.__file__)\n"
    )
    where = output(sys.executable, "-W", "error", "-c", code, cwd=tmp_path)  # what imports and asks is told nothing
    assert where.strip() == str(tmp_path / "fastkd" / "__init__.py")

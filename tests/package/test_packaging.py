"""What a user installs: the source distribution, one wheel under several versions of torch, and `pip install .`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TREE = ["fastkd", "csrc", "tools", "tests", "benchmarks", "setup.py", "CMakeLists.txt", "pyproject.toml"]
TREE += ["MANIFEST.in", "Makefile", "constraints.txt", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
TREE += ["LICENSE", "CITATION.cff", "mkdocs.yml", "docs", "examples"]
SETTINGS = ["FASTKD_REQUIRE_NATIVE", "FASTKD_BACKEND", "FASTKD_CPU_LEVEL", "PYTHONPATH"]
TEST_PACKAGES = ["pytest", "pytest-benchmark", "hypothesis", "expecttest"]
NEEDED_GB = 15
BUILT = ("*.so", "left_out.json", "__pycache__")


def environment(**settings: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings


def run(*command, status: int = 0, **options) -> str:
    """stdout and stderr together; a status other than expected fails with their end."""
    options = {"env": environment(), "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    done = subprocess.run([str(part) for part in command], **options)
    assert done.returncode == status, f"{command}: status {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


def copy_tree(to: Path) -> Path:
    """The tracked sources alone, as a clone has them: no build folder, no library."""
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns(*BUILT))
        elif (ROOT / name).is_file():
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


class Venv:
    def __init__(self, folder: Path, *, sees_our_packages: bool = False):
        run(sys.executable, "-m", "venv", folder)
        self.folder, self.python = folder, folder / "bin" / "python"
        if sees_our_packages:  # as an installed torch would be seen, without installing 5 GB again
            ours = Path(torch.__file__).resolve().parents[1]
            site = next(folder.glob("lib/python*/site-packages"))
            (site / "ours.pth").write_text(f"{ours}\n")

    def pip(self, *arguments, **options) -> str:
        return run(self.python, "-m", "pip", "install", "--disable-pip-version-check", *arguments, **options)


def info(venv: Venv, **options) -> str:
    return run(venv.folder / "bin" / "fastkd", "info", **options)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    tree = copy_tree(folder / "tree")
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=tree)
    (archive,) = folder.glob("fastkd-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel_and_log(sdist, tmp_path_factory) -> tuple[Path, str]:
    """Built once, by pip in isolation, from the source distribution: so that one holds everything needed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, sdist]
    # With CUDA where the tree has it, and for one architecture, for time's sake: the libraries in the tree have all.
    with_cuda = (ROOT / "fastkd" / "libfastkd_cuda.so").is_file()
    cuda = {"TORCH_CUDA_ARCH_LIST": "9.0"} if with_cuda else {"FASTKD_WITH_CUDA": "0"}
    log = run(*command, env=environment(FASTKD_REQUIRE_NATIVE="1", **cuda))
    (wheel,) = folder.glob("*.whl")
    return wheel, log


def test_the_source_distribution_holds_the_tree(sdist):
    tree = sdist.parent / "tree"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    made = re.compile(r"\.egg-info/|^build/|\.py[cod]$|^dist/")
    wanted = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    assert sorted(name for name in wanted - names if not made.search(name)) == []


def downloads_of_torch(log: str) -> list[str]:
    return re.findall(r"(?:Collecting|Downloading|Processing|Using cached) \S*torch\S*", log)


def test_isolated_build_uses_the_installed_torch(wheel_and_log):
    _, log = wheel_and_log
    assert f"-DFASTKD_TORCH_INCLUDE={Path(torch.__file__).parent / 'include'}" in log
    assert downloads_of_torch(log) == []


def test_wheel_holds_the_package_and_nothing_else(wheel_and_log):
    wheel, _ = wheel_and_log
    assert re.fullmatch(r"fastkd-[^-]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastkd"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fastkd").rglob("*.py")}
    sources |= {str(path.relative_to(ROOT)) for path in (ROOT / "fastkd").rglob("*.yaml")}
    assert sources | {"fastkd/py.typed", "fastkd/libfastkd_cpu.so"} <= set(names)
    built_here = {f"fastkd/{path.name}" for path in (ROOT / "fastkd").glob("*.so")}
    assert {name for name in names if name.endswith(".so")} == built_here
    assert wheel.stat().st_size < 20_000_000


def test_wheel_asks_for_numpy_and_torch_alone(wheel_and_log):
    wheel, _ = wheel_and_log
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    required = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    assert [line for line in required if "extra ==" not in line] == ["numpy", "torch>=2.11"]
    extras = re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE)
    assert set(extras) == {"train", "bench", "dev", "tensorboard"}
    assert "Requires-Python: >=3.10" in metadata


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0"])
def test_the_same_wheel_under_another_torch(version, wheel_and_log, tmp_path):
    wheel, _ = wheel_and_log
    free = shutil.disk_usage(tmp_path).free / 1e9
    assert free > NEEDED_GB, f"installing torch {version} needs {NEEDED_GB} GB at {tmp_path}, {free:.0f} GB are free"
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    try:
        venv = Venv(tmp_path / "venv")
        pins = [f"{name}=={importlib.metadata.version(name)}" for name in TEST_PACKAGES]
        venv.pip("--no-cache-dir", f"torch=={version}", wheel, *pins)
        code = "import torch, fastkd; print(torch.__version__, fastkd.backend_info()['cpu'], fastkd.__file__)"
        told = run(venv.python, "-W", "error", "-c", code, cwd=tmp_path)
        assert told.startswith(version) and "CPU kernels" in told and "site-packages" in told
        # The CUDA kernels on the host are the same sources under any torch.
        tests = sorted(tmp_path.glob("tests/ops/test_multi_teacher*.py"))
        command = [venv.python, "-m", "pytest", "-q", "-m", "not slow", "-k", "not simt and not launch", *tests]
        summary = run(*command, cwd=tmp_path).strip().splitlines()[-1]
        assert int(re.search(r"(\d+) passed", summary)[1]) >= 200
        print(f"torch {version}: {summary}")
    finally:
        shutil.rmtree(tmp_path / "venv", ignore_errors=True)  # 5 GB


def test_pip_install_with_a_broken_nvcc_builds_for_the_cpu(tmp_path):
    """Plain `pip install .`, isolation on, requirements checked; FASTKD_WITH_CUDA=auto goes on without CUDA."""
    tree, venv = copy_tree(tmp_path / "tree"), Venv(tmp_path / "venv", sees_our_packages=True)
    settings = {"CUDACXX": "/bin/false", "FASTKD_WITH_CUDA": "auto", "TORCH_CUDA_ARCH_LIST": "9.0"}
    settings["FASTKD_REQUIRE_NATIVE"] = "1"
    log = venv.pip("-v", ".", cwd=tree, env=environment(**settings))
    assert downloads_of_torch(log) == []
    assert log.count("fastkd: WARNING") == 1 and "building the CPU kernels only" in log
    (site,) = venv.folder.glob("lib/python*/site-packages/fastkd")
    assert [path.name for path in site.glob("*.so")] == ["libfastkd_cpu.so"]
    code = "import fastkd; info = fastkd.backend_info(); print(fastkd.__file__, info['cpu'])"
    told = run(venv.python, "-W", "error", "-c", code, cwd=tmp_path)
    assert told.startswith(str(site)) and "CPU kernels" in told
    assert "libfastkd_cuda.so was not built: /bin/false does not compile CUDA" in info(venv, cwd=tmp_path)


def test_build_without_cuda_removes_an_older_cuda_library(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    (tree / "fastkd" / "libfastkd_cuda.so").write_text("of an earlier build")
    log = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, env=environment(FASTKD_WITH_CUDA="0"))
    assert "fastkd: WARNING" not in log
    assert [path.name for path in (tree / "fastkd").glob("*.so")] == ["libfastkd_cpu.so"]
    left_out = json.loads((tree / "fastkd" / "left_out.json").read_text())
    assert left_out == {"libfastkd_cuda.so": "FASTKD_WITH_CUDA=0 left it out"}


def test_pip_install_without_a_compiler_is_pure_python(tmp_path):
    tree, venv = copy_tree(tmp_path / "tree"), Venv(tmp_path / "venv", sees_our_packages=True)
    bare = environment(PATH=str(venv.folder / "bin"))
    for name in ("CXX", "CUDACXX"):
        bare.pop(name, None)
    log = venv.pip("-v", ".", cwd=tree, env=bare)
    assert downloads_of_torch(log) == []
    assert log.count("fastkd: WARNING: no C++ compiler was found: installing without native libraries") == 1
    assert "py3-none-any.whl" in log
    code = "import torch, fastkd; x = torch.ones(2, 3); print(fastkd.functional.multi_teacher_kd(x, [x]).item())"
    told = run(venv.python, "-c", code, cwd=tmp_path)
    assert told.count("FallbackWarning: multi_teacher_kd runs in plain PyTorch") == 1
    run(venv.python, "-W", "error", "-c", "import fastkd", cwd=tmp_path)
    assert told.strip().splitlines()[-1] == "0.0"
    assert "libfastkd_cpu.so was not built: no C++ compiler was found; for the kernels" in info(venv, cwd=tmp_path)

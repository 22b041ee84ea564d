"""`fastkd completion`, as bash uses it; `fastkd info` as a report of a fault needs it."""

import shutil
import subprocess

import pytest

from fastkd.cli import COMMANDS, main
from fastkd.cli.completion import script
from fastkd.runs import environment

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "script.sh"
    path.write_text(script(COMMANDS))
    return path


def completed(file, line: str, function: str = "_fastkd") -> list[str]:
    """What a key press offers at the end of `line`."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    lines = [f"source {file}", f"COMP_WORDS=({quoted})", f"COMP_CWORD={len(words) - 1}", function]
    code = "\n".join([*lines, 'printf "%s\\n" "${COMPREPLY[@]}"'])
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    "line, offered",
    [
        ("fastkd tr", ["train"]),
        ("fastkd co", ["compare", "completion"]),
        ("fastkd train --method dg", ["dgkd"]),
        ("fastkd train --train-s", ["--train-size"]),
        ("fastkd train --amp ", ["none", "bf16", "fp16"]),
        ("fastkd train --options.surv", ["--options.survival"]),
        ("fastkd train --config dgkd_image", ["dgkd_imagenet"]),
        ("fastkd compare --methods al", ["all"]),
        ("fastkd report --h", ["--help", "--html"]),
        ("fastkd study cifar10-16px-p", ["cifar10-16px-pilot"]),
        ("fastkd study x --job", ["--jobs"]),
        ("fastkd analyze dkel-m", ["dkel-monte-carlo"]),
        ("fastkd train --method = dg", ["dgkd"]),  # how bash hands over --method=dg
        ("fastkd train --amp =", ["none", "bf16", "fp16"]),
        ("fastkd train --method=dg", ["--method=dgkd"]),
        ("fastkd train --epochs=", []),
        ("fastkd train --epochs =", []),
        ("fastkd info ", []),
    ],
)
def test_what_is_offered(file, line, offered):
    assert completed(file, line) == offered


def test_of_python_m_fastkd_and_of_no_other_module(file):
    assert completed(file, "python -m fastkd train --method orc", "_fastkd_of_python") == ["orc"]
    assert completed(file, "python -m http ", "_fastkd_of_python || true") == []


def test_the_command_prints_it(file, capsys):
    assert main(["completion"]) == 0
    assert capsys.readouterr().out == file.read_text()
    assert main(["completion", "x"]) == 2


def test_info_has_what_a_report_of_a_fault_needs(capsys, monkeypatch):
    monkeypatch.setenv("FASTKD_CPU_LEVEL", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    for needed in (
        "fastkd ",
        "torch ",
        "python ",
        "CUDA ",
        "platform",
        "compiler",
        "numpy ",
        "cpu:",
        "multi_teacher_kd ",
    ):
        assert needed in said
    assert "FASTKD_CPU_LEVEL=1" in said and "OMP_NUM_THREADS=3" in said
    table = said.partition("\nBackends")[2].splitlines()[1:]
    assert len({len(line) - len(line.split(None, 1)[1]) for line in table}) == 1  # one column under the other


def test_a_machine_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert environment.compiler() == "none"

"""Folders that may not be written, and memory that is full: one sentence, and what can be read is used."""

import errno
import shutil

import numpy as np
import pytest
import torch
from rights_helpers import read_only
from train_helpers import assert_same, config, last_state, one_thread, rows_without_times, run  # noqa: F401

from fastkd._core.locks import NotWritable, lock, why_not_writable
from fastkd.cli import main
from fastkd.train import UserError

SMALL = (
    "--epochs 1 --train-size 60 --teacher plain2:width=0.125 --student plain2:width=0.125 --device cpu --quiet".split()
)


def words(out, *more, method="kd"):
    return ["train", "--method", method, *SMALL, "--out", str(out), *map(str, more)]


def one_line(capfd):
    error = capfd.readouterr().err
    assert error.startswith("fastkd: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_folder_for_the_run_that_may_not_be_written(tmp_path, capfd, command):
    out = tmp_path / "out"
    out.mkdir()
    call = words(out) if command == "train" else ["compare", "--methods", "ce", *SMALL, "--out", str(out)]
    with read_only(out):
        assert main(call) == 2
        assert one_line(capfd) == (
            f"fastkd: --out {out} cannot be written (Permission denied): name a folder that can be written\n"
        )
        below = [*call[:-1], str(out / "new" / "run")]
        assert main(below) == 2
        assert f"--out {out / 'new' / 'run'} cannot be made (Permission denied)" in one_line(capfd)
    assert not list(out.iterdir())


def test_a_cache_that_may_not_be_written(tmp_path, capfd):
    (tmp_path / "cache").mkdir()
    with read_only(tmp_path / "cache"):
        assert main(words(tmp_path / "run", "--cache", tmp_path / "cache")) == 2
        error = one_line(capfd)
    assert (
        f"the folder {tmp_path / 'cache'} cannot be written (Permission denied): it does not hold the trained " in error
    )
    assert "teacher plain2:width=0.125: name a --cache that can be written" in error
    (tmp_path / "file").touch()
    assert main(words(tmp_path / "run", "--resume", "--cache", tmp_path / "file")) == 2
    assert f"the folder {tmp_path / 'file'} cannot be written (Not a directory)" in one_line(capfd)


@pytest.mark.parametrize("method", ["kd", "dgkd"])
def test_a_cache_that_may_only_be_read_is_used(tmp_path, capfd, method):
    """The same bits as with one that may be written, and nothing in it is touched."""
    options = dict(method=method, guide_epochs=1, epochs=2, cache=str(tmp_path / "cache"))
    run(config(tmp_path, out=str(tmp_path / "first"), **options))
    for path in (tmp_path / "cache").rglob(".lock"):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    with read_only(tmp_path / "cache"):
        found = run(config(tmp_path, out=str(tmp_path / "second"), **options))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    assert found["teacher"].rows[-1]["test_accuracy"] > 0 and not capfd.readouterr().err
    assert_same(last_state(tmp_path / "first"), last_state(tmp_path / "second"))
    assert rows_without_times(tmp_path / "first") == rows_without_times(tmp_path / "second")


def test_an_unfinished_or_damaged_network_in_a_cache_that_may_only_be_read(tmp_path):
    options = dict(method="kd", epochs=1, cache=str(tmp_path / "cache"))
    run(config(tmp_path, out=str(tmp_path / "first"), **options))
    (file,) = (tmp_path / "cache").rglob("epoch-0001.pt")
    content = file.read_bytes()
    file.write_bytes(content[:-200])
    with read_only(tmp_path / "cache"), pytest.raises(UserError, match=r"epoch-0001.pt is damaged"):
        run(config(tmp_path, out=str(tmp_path / "second"), **options))
    file.rename(file.with_name("partial.pt"))
    with read_only(tmp_path / "cache"), pytest.raises(NotWritable, match="does not hold the trained teacher"):
        run(config(tmp_path, out=str(tmp_path / "second"), **options))


def test_a_finished_student_is_not_lost_for_a_cache_that_may_only_be_read(tmp_path, capfd):
    (tmp_path / "cache").mkdir()
    with read_only(tmp_path / "cache"):
        result = run(config(tmp_path, quiet=False, epochs=1, cache=str(tmp_path / "cache")))
    assert len(result["student"].rows) == 1
    said = capfd.readouterr().err
    assert f"the student is not put into {tmp_path / 'cache'}, which cannot be written (Permission denied)" in said


def test_kept_logits_that_may_only_be_read(tmp_path, capfd):
    options = ["--cache", tmp_path / "cache", "--logits-cache", "--variants", 1]
    assert main(words(tmp_path / "first", *options)) == 0
    logits = tmp_path / "cache" / "logits"
    with read_only(tmp_path / "cache"):
        assert main(words(tmp_path / "second", *options)) == 0
    assert_same(last_state(tmp_path / "first")["network"], last_state(tmp_path / "second")["network"])
    capfd.readouterr()
    shutil.rmtree(logits)
    with read_only(tmp_path / "cache"):
        assert main(words(tmp_path / "third", *options)) == 2
    error = one_line(capfd)
    assert f"the folder {logits} cannot be written (Permission denied): it does not hold all logits" in error


def test_lock_of_a_folder_that_may_not_be_written(tmp_path):
    with read_only(tmp_path):
        assert why_not_writable(tmp_path) == "Permission denied"
        with pytest.raises(NotWritable, match=f"the folder {tmp_path} cannot be written"), lock(tmp_path):
            pass
    assert why_not_writable(tmp_path / "new") == "" and (tmp_path / "new").is_dir()


def test_a_report_that_may_not_be_written_is_no_stopped_run(tmp_path, capfd):
    run(config(tmp_path, epochs=1))
    (tmp_path / "run" / "config.yaml").write_text("method: ce\nepochs: 1\n")
    with read_only(tmp_path / "run"):
        assert main(["report", str(tmp_path / "run")]) == 2
    error = one_line(capfd)
    assert "Permission denied" in error and "give the right to it" in error and "--resume" not in error


def raising(error):
    def function():
        raise error

    return function


KILLED = "DataLoader worker (pid 7) is killed by signal: "
FULL = {
    "torch": lambda: torch.empty(1 << 55),
    "numpy": lambda: np.empty(1 << 55, dtype=np.uint8),
    "python": lambda: bytearray(1 << 55),
    "system": raising(OSError(errno.ENOMEM, "Cannot allocate memory")),
    "loader": raising(RuntimeError(f"{KILLED}Killed. ")),
    "shared": raising(RuntimeError(f"{KILLED}Bus error. It is possible that ...")),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_memory_is_one_sentence(tmp_path, monkeypatch, capfd, what):
    """In the middle of an epoch."""
    monkeypatch.setattr("fastkd.train.loop.train_epoch", lambda *arguments: FULL[what]())
    assert main(words(tmp_path / "run", method="ce")) == 2
    error = one_line(capfd)
    assert error.startswith("fastkd: the memory is full: use a smaller --batch-size") and "--resume" in error

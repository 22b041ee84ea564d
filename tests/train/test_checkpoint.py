"""Checkpoints: whole or not there, loadable as weights only, refused when damaged."""

import contextlib
import errno
import hashlib
import io
import os
import random
import resource
import time
import zipfile

import numpy as np
import pytest
import torch

from fastkd._core import files
from fastkd._core.files import StorageError, sweep, write_atomic
from fastkd.train import UserError, checkpoint


def make_state():
    generator = torch.Generator().manual_seed(3)
    return {"epoch": 2, "network": {"w": torch.randn(64, 64, generator=generator)}, "random": checkpoint.random_state()}


def test_round_trip_weights_only(tmp_path):
    state = make_state()
    path = checkpoint.path_of(tmp_path / "checkpoints", 2)
    checkpoint.save(path, state)
    assert path.name == "epoch-0002.pt"
    loaded = torch.load(path, weights_only=True)
    assert loaded["epoch"] == 2
    assert torch.equal(loaded["network"]["w"], state["network"]["w"])
    assert torch.equal(checkpoint.load(path)["random"]["torch"], state["random"]["torch"])


def test_equal_states_give_equal_files_at_any_time(tmp_path):
    state = make_state()
    checkpoint.save(tmp_path / "epoch-0001.pt", state)
    time.sleep(1.1)  # a time stamp would have a new second
    checkpoint.save(tmp_path / "other.pt", state)
    assert (tmp_path / "epoch-0001.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()


def test_random_state_restores_all_generators():
    state = checkpoint.random_state()
    drawn = torch.rand(3), random.random(), np.random.rand(3)
    checkpoint.set_random_state(state)
    again = torch.rand(3), random.random(), np.random.rand(3)
    assert torch.equal(drawn[0], again[0]) and drawn[1] == again[1] and np.array_equal(drawn[2], again[2])


def test_state_that_was_loaded_gives_the_same_file(tmp_path):
    name, pair = "a name", (1.5, "b")
    state = {name: [name, "a " + "name"[:4], pair, pair], "w": torch.ones(2), "nested": {"b": {}, "list": [[], []]}}
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    checkpoint.save(one, state)
    checkpoint.save(other, checkpoint.load(one))
    assert one.read_bytes() == other.read_bytes()


def test_checksum_covers_every_byte_and_needs_no_second_file(tmp_path):
    path = tmp_path / "epoch-0001.pt"
    checkpoint.save(path, {"w": torch.arange(20.0)})
    content = path.read_bytes()
    assert content[-71:] == b"sha256:" + hashlib.sha256(content[:-64]).hexdigest().encode()
    assert zipfile.ZipFile(path).testzip() is None
    assert os.listdir(tmp_path) == [path.name]
    for options in ({}, {"mmap": True}):
        assert torch.equal(torch.load(path, weights_only=True, **options)["w"], torch.arange(20.0))
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(UserError, match="is damaged or no checkpoint"):
            checkpoint.load(path)


def truncate(content):
    return content[: len(content) // 2]


def lose_the_end(content):
    return content[:-1]


def lose_the_checksum(content):
    """As sound a file as plain torch.save writes."""
    return content[:-73] + b"\x00\x00"


def flip_a_weight(content):
    """One bit in the middle of the tensor's bytes: pickle and zip directory stay sound."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {
    truncate: "its checksum is missing",
    lose_the_end: "its checksum is missing",
    lose_the_checksum: "its checksum is missing",
    flip_a_weight: "its checksum is wrong",
    lambda c: b"": "it is empty",
    lambda c: b"text " * 100: "its checksum is missing",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_refused_by_name_and_the_one_before_is_used(tmp_path, damage):
    for epoch in (1, 2, 3):
        checkpoint.save(checkpoint.path_of(tmp_path, epoch), {"epoch": epoch, "w": torch.randn(4096)})
    notes = []
    assert checkpoint.newest(tmp_path, notes.append)["epoch"] == 3 and not notes
    path = checkpoint.path_of(tmp_path, 3)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(checkpoint.DamagedError) as error:
        checkpoint.load(path)
    assert str(error.value) == f"the checkpoint {path} is damaged or no checkpoint ({DAMAGES[damage]})"
    assert checkpoint.newest(tmp_path, notes.append)["epoch"] == 2
    aside = "set aside as epoch-0003.pt.damaged, the run goes on from the state before it, after epoch 2"
    assert notes == [f"{error.value}: {aside}"]
    assert checkpoint.epochs(tmp_path) == [1, 2]  # the damaged one is not counted when old ones are deleted
    for epoch in (1, 2):
        checkpoint.path_of(tmp_path, epoch).write_bytes(b"")
    with pytest.raises(checkpoint.DamagedError, match=r"no checkpoint in .* can be used; .*epoch-0002.pt .*empty"):
        checkpoint.newest(tmp_path, notes.append)
    assert checkpoint.epochs(tmp_path) == [1, 2] and len(notes) == 1


def test_newest_state_may_be_in_the_middle_of_an_epoch(tmp_path):
    notes, partial = [], tmp_path / checkpoint.PARTIAL
    assert checkpoint.newest(tmp_path / "none", notes.append) is None
    checkpoint.save(partial, {"epoch": 0, "meter": {}})
    assert "meter" in checkpoint.newest(tmp_path, notes.append)
    checkpoint.save(checkpoint.path_of(tmp_path, 1), {"epoch": 1})
    checkpoint.save(partial, {"epoch": 1, "meter": {}})
    assert "meter" in checkpoint.newest(tmp_path, notes.append)
    # Killed after the second epoch's checkpoint, before `partial` was deleted.
    checkpoint.save(checkpoint.path_of(tmp_path, 2), {"epoch": 2})
    copy = partial.read_bytes()
    assert checkpoint.newest(tmp_path, notes.append) == {"epoch": 2} and not partial.exists() and not notes
    # The epoch's is damaged: the middle of that epoch comes before its beginning.
    partial.write_bytes(copy)
    checkpoint.path_of(tmp_path, 2).write_bytes(b"x")
    assert "meter" in checkpoint.newest(tmp_path, notes.append) and "within epoch 2" in notes[0]
    partial.write_bytes(copy[:-9])
    assert checkpoint.newest(tmp_path, notes.append) == {"epoch": 1} and "after epoch 1" in notes[1]


def test_plain_state_dict_of_somebody_else(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"w": torch.ones(3)}, path)
    assert torch.equal(checkpoint.load(path, sealed=False)["w"], torch.ones(3))
    content = path.read_bytes()
    path.write_bytes(content.replace(torch.ones(3).numpy().tobytes(), torch.zeros(3).numpy().tobytes()))
    with pytest.raises(UserError, match=r"checksum of .* is wrong"):
        checkpoint.load(path, sealed=False)


def test_code_in_a_checkpoint_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    path = tmp_path / "epoch-0001.pt"
    for save in (torch.save, lambda state, path: checkpoint.save(path, state)):
        save({"w": Evil()}, path)
        for sealed in (True, False):
            with pytest.raises(UserError, match=r"damaged or no checkpoint|whole, but cannot be read"):
                checkpoint.load(path, sealed)
    assert not (tmp_path / "made").exists()


# Writing.


@contextlib.contextmanager
def largest_file(size):
    """No file of this process may grow beyond `size` bytes: the writes fail as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, number):
    path = tmp_path / "epoch-0001.pt"
    write_atomic(path, b"old")

    def full(*args):
        raise OSError(number, os.strerror(number))

    class FullFile(io.FileIO):
        write = full

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(files, "open", lambda path, mode: FullFile(path, mode), raising=False)
    with pytest.raises(StorageError, match=r"epoch-0001\.pt cannot be written, the .* --resume") as error:
        write_atomic(path, b"new")
    assert error.value.status == 1 and "\n" not in str(error.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["epoch-0001.pt"]


def test_write_beyond_the_limit_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "epoch-0001.pt"
    checkpoint.save(path, {"w": torch.zeros(10)})
    old = path.read_bytes()
    with largest_file(1 << 16), pytest.raises(StorageError, match="the file is too large"):
        checkpoint.save(path, {"w": torch.zeros(1 << 16)})
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["epoch-0001.pt"]


def test_other_failure_names_the_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as error:
        write_atomic(tmp_path / "file" / "x.pt", b"")
    assert error.value.filename == str(tmp_path / "file")


def test_what_a_killed_writer_left_is_swept(tmp_path):
    write_atomic(tmp_path / "epoch-0001.pt", b"")
    (tmp_path / ".epoch-0002.pt.77.tmp").write_bytes(b"half")
    (tmp_path / ".lock").touch()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", "epoch-0001.pt"]


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "none.pt")


def test_epochs_and_prune(tmp_path):
    assert checkpoint.epochs(tmp_path / "none") == []
    for epoch in (1, 2, 9, 10, 12345):
        checkpoint.save(checkpoint.path_of(tmp_path, epoch), {})
    (tmp_path / ".epoch-0003.pt.77.tmp").touch()
    assert checkpoint.epochs(tmp_path) == [1, 2, 9, 10, 12345]
    checkpoint.prune(tmp_path, 0)
    assert len(checkpoint.epochs(tmp_path)) == 5
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.epochs(tmp_path) == [10, 12345]

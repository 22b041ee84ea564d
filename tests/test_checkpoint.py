"""Checkpoints: whole or not there, loadable as weights only, refused when damaged."""

import os
import random
import time
import zipfile

import numpy as np
import pytest
import torch

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


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "epoch-0001.pt"
    checkpoint.write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["epoch-0001.pt"]


def truncate(content):
    return content[: len(content) // 2]


def flip_a_weight(content):
    """One bit in the middle of the tensor's bytes: pickle and zip directory stay sound."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [truncate, flip_a_weight, lambda c: b"", lambda c: b"text " * 100])
def test_damaged_file_is_refused_by_name(tmp_path, damage):
    state = {"w": torch.randn(4096)}
    for epoch in (1, 2):
        checkpoint.save(checkpoint.path_of(tmp_path, epoch), state)
    path = checkpoint.path_of(tmp_path, 2)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"epoch-0002\.pt is damaged .* --resume to go on from epoch 1") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)
    checkpoint.load(checkpoint.path_of(tmp_path, 1))


def test_code_in_a_checkpoint_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"w": Evil()}, tmp_path / "epoch-0001.pt")
    assert zipfile.is_zipfile(tmp_path / "epoch-0001.pt")
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        checkpoint.load(tmp_path / "epoch-0001.pt")
    assert not (tmp_path / "made").exists()


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

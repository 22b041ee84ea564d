"""--checkpoint.NAME: files of ours and of others are taken, or refused by their true reason."""

import importlib.util
import json
import re
import struct
import sys
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from methods_helpers import same, snapshot
from torch import nn

from fastkd.models import create
from fastkd.train import UserError, checkpoint
from fastkd.train.given import load_weights


def net(seed=0, classes=4):
    torch.manual_seed(seed)
    return create("plain2", classes, image_size=8, channels=1, width=0.1)


def prefixed(state, prefix):
    return OrderedDict((prefix + name, value) for name, value in state.items())


def within(state, part):
    """As torch.compile of a part of a network names it."""
    return {re.sub(rf"^{part}\.", f"{part}._orig_mod.", name): value for name, value in state.items()}


TAKEN = {
    "a state dict": lambda s: s,
    "ours": lambda s: {"format": 2, "epoch": 3, "method": {"student.x": torch.ones(1)}, "network": s},
    "DistributedDataParallel": lambda s: prefixed(s, "module."),
    "torch.compile": lambda s: prefixed(s, "_orig_mod."),
    "both": lambda s: prefixed(s, "module._orig_mod."),
    "both, the other way": lambda s: prefixed(s, "_orig_mod.module."),
    "a compiled part": lambda s: within(s, "features"),
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(5), **prefixed(s, "module.")},
    "Lightning": lambda s: {"state_dict": {**prefixed(s, "model."), "criterion.weights": torch.ones(3)}, "epoch": 3},
    "torchvision's references": lambda s: {"model": prefixed(s, "module."), "optimizer": {"state": {}}, "epoch": 1},
    "net": lambda s: {"net": s, "acc": 93.1},
    "nested": lambda s: {"state_dict": {"model": s}},
    "old batch normalisation": lambda s: {n: v for n, v in s.items() if not n.endswith("num_batches_tracked")},
    "half precision": lambda s: {n: v.half() if v.is_floating_point() else v for n, v in s.items()},
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", TAKEN)
def test_what_others_saved_is_taken(tmp_path, kind, old):
    network, other = net(1), net(2)
    if kind == "half precision":
        network.half().float()
    torch.save(TAKEN[kind](network.state_dict()), tmp_path / "f.pt", _use_new_zipfile_serialization=not old)
    load_weights(other, str(tmp_path / "f.pt"), "--checkpoint.teacher", "plain2")
    assert same(snapshot(other), snapshot(network))


def test_a_checkpoint_with_its_checksum_is_taken(tmp_path):
    network, other = net(1), net(2)
    checkpoint.save(tmp_path / "f.pt", {"network": dict(network.state_dict())})
    load_weights(other, str(tmp_path / "f.pt"), "--checkpoint.teacher", "plain2")
    assert same(snapshot(other), snapshot(network))


def test_prefixes_that_the_network_itself_has_stay(tmp_path):
    network = nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save(network.state_dict(), tmp_path / "f.pt")
    load_weights(nn.ModuleDict({"module": nn.Linear(2, 2)}), str(tmp_path / "f.pt"), "--checkpoint.teacher", "own")


def refused(path, network=None):
    with pytest.raises(UserError) as error:
        load_weights(network or net(), str(path), "--checkpoint.teacher", "plain2")
    text = str(error.value)
    assert "\n" not in text and "f.pt" in text
    return text


@pytest.mark.parametrize("change, reason", [
    (lambda s: {**s, "extra.weight": torch.ones(1)}, "the network has no extra.weight: name the network"),
    (lambda s: dict(list(s.items())[2:]), "it lacks "),
    (lambda s: {n + "x": v for n, v in s.items()}, r"it lacks .*in all\), the network has no "),
    (lambda s: net(classes=9).state_dict(), r"its fc.weight is \[9, \d+\], the network's \[4, \d+\] and 1 more differ"),
])  # fmt: skip
def test_a_network_that_does_not_fit(tmp_path, change, reason):
    torch.save(change(net().state_dict()), tmp_path / "f.pt")
    text = refused(tmp_path / "f.pt")
    assert re.search(rf"^--checkpoint.teacher: .*f.pt does not fit the network plain2: .*{reason}", text), text


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("content, reason", [
    (lambda: net(), "holds a pickled fastkd.models.plain.PlainCNN, which could run code"),
    (lambda: {"model": net()}, "holds a pickled fastkd.models.plain.PlainCNN"),
    (lambda: torch.ones(3), "holds Tensor instead of a state dict"),
    (lambda: {"epoch": 3, "acc": 0.5}, "holds a dict of epoch, acc instead of a state dict"),
    (lambda: {"model": {}}, "holds an empty dict instead of a state dict"),
])  # fmt: skip
def test_what_is_no_state_dict_is_told(tmp_path, content, reason, old):
    torch.save(content(), tmp_path / "f.pt", _use_new_zipfile_serialization=not old)
    assert reason in refused(tmp_path / "f.pt")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_other_files(tmp_path):
    path = tmp_path / "f.pt"
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)
    assert "is a TorchScript archive: save the state_dict()" in refused(path)
    path.write_bytes(b"\x89PNG no checkpoint")
    assert "is damaged or no checkpoint" in refused(path)
    path.write_bytes(b"")
    assert "it is empty" in refused(path)
    torch.save(net().state_dict(), path)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    assert "damaged" in refused(path)


def safetensors_file(path, state):
    """The format is eight bytes of length, JSON, and the numbers."""
    header, data = {}, b""
    for name, value in state.items():
        raw = value.contiguous().numpy().tobytes()
        kind = {torch.float32: "F32", torch.int64: "I64"}[value.dtype]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_safetensors(tmp_path, monkeypatch):
    """The package is optional: without it the reason is that it is missing; here another one stands in for it."""
    network, other, path = net(1), net(2), tmp_path / "f.pt"
    state = prefixed(network.state_dict(), "module.")
    safetensors_file(path, state)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "is a safetensors file: pip install safetensors" in refused(path)
    monkeypatch.setitem(sys.modules, "safetensors", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "safetensors.torch", SimpleNamespace(load_file=lambda path: dict(state)))
    load_weights(other, str(path), "--checkpoint.teacher", "plain2")
    assert same(snapshot(other), snapshot(network))


@pytest.mark.skipif(importlib.util.find_spec("safetensors") is None, reason="needs safetensors")
def test_safetensors_as_the_package_reads_them(tmp_path):
    network, other, path = net(1), net(2), tmp_path / "f.pt"
    safetensors_file(path, network.state_dict())
    load_weights(other, str(path), "--checkpoint.teacher", "plain2")
    assert same(snapshot(other), snapshot(network))
    path.write_bytes(path.read_bytes()[:-4])
    assert "is damaged or no safetensors file" in refused(path)

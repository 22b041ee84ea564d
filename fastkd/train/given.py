"""--checkpoint.NAME=FILE: the weights of a network from a file of ours or of others."""

from __future__ import annotations

import importlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._core.messages import UserError
from fastkd.train import checkpoint

# Under which names a checkpoint keeps its network; ours first. A module's own state dict has none of them as a dict.
HOLDERS = ("network", "state_dict", "model_state_dict", "model", "net", "module")
WRAPPERS = r"(?:module|_orig_mod)\."  # DistributedDataParallel, AveragedModel; torch.compile, around any part
SHOWN = 3  # names in a message


def load_weights(network: nn.Module, path: str, option: str, spec: str) -> None:
    """Put the weights in a file into `network`; UserError in one sentence, by `option` and the network's `spec`.

    Taken are checkpoints of ours, state dicts, those that lie in another checkpoint under one of `HOLDERS`, with the
    prefixes of wrappers, by torch.save of any version or in a safetensors file.
    """
    state = _state_in(_read(path, option), path, option)
    own = network.state_dict()
    state = _as_named(state, own)
    wrong = _difference(state, own)
    if wrong:
        fits = f"{path} does not fit the network {spec}: {wrong}"
        raise UserError(f"{option}: {fits}: name the network it was saved from")
    network.load_state_dict(state)


def _read(path: str, option: str) -> Any:
    """What the file holds."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # eight bytes of length, then JSON
        return _read_safetensors(path, option)
    if not start.startswith(b"PK") and start:  # torch.save before version 1.6, or no checkpoint at all
        return _load(path, option)
    if zipfile.is_zipfile(path) and any("/code/" in name for name in _names(path)):
        raise UserError(f"{option}: {path} is a TorchScript archive: save the state_dict() of the network in it")
    try:
        return checkpoint.load(path, sealed=False)
    except checkpoint.DamagedError as error:
        if "eights only load failed" in str(error):
            return _load(path, option)
        raise


def _names(path: str) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _load(path: str, option: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        text = " ".join(str(error).split())
        found = re.search(r"GLOBAL (\S+)|[Uu]nsupported class (\S+)", text)
        if found:
            raise UserError(
                f"{option}: {path} holds a pickled {found[1] or found[2]}, which could run code when it is loaded: "
                "save the state_dict() of the network alone"
            ) from error
        reason = text[:120] or type(error).__name__
        raise UserError(f"{option}: {path} is damaged or no checkpoint ({reason})") from error


def _read_safetensors(path: str, option: str) -> dict[str, Tensor]:
    try:
        tools = importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise UserError(f"{option}: {path} is a safetensors file: pip install safetensors") from error
    try:
        tensors: dict[str, Tensor] = tools.load_file(path)
        return tensors
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{option}: {path} is damaged or no safetensors file ({reason})") from error


def _state_in(loaded: Any, path: str, option: str) -> dict[str, Tensor]:
    """The state dict in what a file held."""
    while isinstance(loaded, Mapping):
        holder = next((name for name in HOLDERS if isinstance(loaded.get(name), Mapping)), None)
        if holder is None:
            break
        loaded = loaded[holder]
    if isinstance(loaded, Mapping) and loaded and any(isinstance(value, Tensor) for value in loaded.values()):
        return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    has = type(loaded).__name__
    if isinstance(loaded, Mapping):
        has = f"a dict of {_few(list(map(str, loaded)))}" if loaded else "an empty dict"
    raise UserError(f"{option}: {path} holds {has} instead of a state dict: save the network's state_dict()")


def _as_named(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes of wrappers where the network's own have none of them."""
    if any(re.search(rf"(?:^|\.){WRAPPERS}", name) for name in own):
        return state
    found = {re.sub(rf"(?<![^.]){WRAPPERS}", "", name): value for name, value in state.items()}
    if "n_averaged" in found and "n_averaged" not in own:  # torch.optim.swa_utils.AveragedModel counts
        del found["n_averaged"]
    # Lightning and others name the network that they hold.
    for prefix in ("model.", "net.", "network."):
        inside = {name[len(prefix) :]: value for name, value in found.items() if name.startswith(prefix)}
        if inside and not any(name.startswith(prefix) for name in own) and own.keys() <= inside.keys():
            return inside
    return found


def _difference(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """In what the names and shapes of a state differ from the network's; "" where they do not."""
    shapes = [name for name in own if name in state and state[name].shape != own[name].shape]
    if shapes:
        name, more = shapes[0], f" and {len(shapes) - 1} more differ" * (len(shapes) > 1)
        return f"its {name} is {list(state[name].shape)}, the network's {list(own[name].shape)}{more}"
    counter = ".num_batches_tracked"  # of batch normalisation; states of old versions of PyTorch have none
    missing = [name for name in own if name not in state and not name.endswith(counter)]
    unknown = [name for name in state if name not in own]
    texts = [f"it lacks {_few(missing)}"] * bool(missing) + [f"the network has no {_few(unknown)}"] * bool(unknown)
    return ", ".join(texts)


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + f" ({len(names)} in all)" * (len(names) > SHOWN)

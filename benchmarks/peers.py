"""Other libraries that compute the same, measured where they are installed and where they run; none is a dependency."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import cache

import torch

from benchmarks.baselines import fla_losses, liger_losses, torchdistill_losses

PEERS = {"torchdistill": torchdistill_losses, "liger": liger_losses, "fla": fla_losses}


def why_not(name: str, device: str) -> str | None:
    """Why this library is not measured on the device, in a few words; None where it is."""
    peer = PEERS[name]
    try:
        importlib.metadata.version(peer.DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed (pip install {peer.DISTRIBUTION})"
    if peer.NEEDS_GPU and torch.device(device).type != "cuda":
        return "needs a GPU"
    return _import_error(peer.MODULE)


@cache
def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # another library's affair, and never ours to stop at
        return f"cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    return None


def baselines(operation: str, device: str) -> dict[str, Callable]:
    """name -> function with the operation's arguments, of each library that has one and runs here."""
    offered = {name: getattr(peer, operation, None) for name, peer in PEERS.items()}
    return {name: f for name, f in offered.items() if f is not None and why_not(name, device) is None}


def report(device: str) -> dict[str, str]:
    """name -> its version, or why it is not measured."""
    said = {}
    for name, peer in PEERS.items():
        reason = why_not(name, device)
        said[name] = f"not measured: {reason}" if reason else importlib.metadata.version(peer.DISTRIBUTION)
    return said

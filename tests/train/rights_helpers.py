"""File permissions that hold for root, too: tests often run as root, which may read and write everything."""

import contextlib
import ctypes
import os
from pathlib import Path

import pytest

_VERSION = 0x20080522  # of Linux's capability sets: two words of 32 bits
_OVERRIDE = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Set(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextlib.contextmanager
def without_privileges():
    """Within the block this thread obeys the permissions of files, as any user's does."""
    if os.geteuid() != 0:
        yield
        return
    if not hasattr(ctypes.CDLL(None), "capset"):
        pytest.skip("the privileges of this process cannot be changed")
    libc, header, sets = ctypes.CDLL(None, use_errno=True), _Header(_VERSION, 0), (_Set * 2)()
    if libc.capget(ctypes.byref(header), sets):
        pytest.skip("the privileges of this process cannot be read")
    before = sets[0].effective
    sets[0].effective &= ~_OVERRIDE
    if libc.capset(ctypes.byref(header), sets):
        pytest.skip("the privileges of this process cannot be changed")
    try:
        yield
    finally:
        sets[0].effective = before
        libc.capset(ctypes.byref(header), sets)


@contextlib.contextmanager
def read_only(folder):
    """A folder in which nothing can be written or made, within the block, by a process that obeys permissions."""
    each = [Path(folder), *(path for path in Path(folder).rglob("*"))]
    before = [path.stat().st_mode for path in each]
    for path, mode in zip(each, before, strict=True):
        path.chmod(mode & ~0o222)
    try:
        with without_privileges():
            yield
    finally:
        for path, mode in zip(each, before, strict=True):
            path.chmod(mode)

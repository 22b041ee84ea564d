"""PEP 517 backend: setuptools, building against the torch of the environment that fastkd is installed into.

pip builds in an isolated environment. With torch among build-system.requires it would download a second torch, maybe
another one; without it there would be none to build against. So the host's torch is used where there is one, and asked
for only where there is none; and nothing is asked for where no compiler could use it.
"""

from __future__ import annotations

import toolchain
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)


def _requirements(base: list[str]) -> list[str]:
    needed = list(base)
    if toolchain.cxx().path is None:
        return needed
    if toolchain.torch_folder() is None:
        needed.append("torch>=" + ".".join(map(str, toolchain.OLDEST_TORCH)))
    if toolchain.cmake().path is None:
        needed.append("cmake>=3.24")
    if toolchain.ninja().path is None:
        needed.append("ninja")
    return needed


def get_requires_for_build_wheel(config_settings=None):
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))

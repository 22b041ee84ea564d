"""What a run ran on, for `fastkd info` and for reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import fastkd
from fastkd import _library


def versions() -> dict[str, str]:
    """The versions of fastkd, torch, Python and CUDA."""
    cuda = torch.version.cuda or "none"
    return {"fastkd": fastkd.__version__, "torch": torch.__version__, "python": platform.python_version(), "CUDA": cuda}


def processor() -> str:
    """The name of the CPU."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def devices() -> list[str]:
    """One line a device."""
    threads = torch.get_num_threads()
    vectors = torch.backends.cpu.get_cpu_capability()
    lines = [f"cpu: {processor()}, {threads} thread{'s' * (threads > 1)}, torch uses {vectors}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        name = f"{properties.name}, {memory:.0f} GiB, compute capability {properties.major}.{properties.minor}"
        lines.append(f"cuda:{index}: {name}")
    return lines


def describe(device: torch.device) -> str:
    """Versions and device in one line."""
    about = ", ".join(f"{name} {version}" for name, version in versions().items() if version != "none")
    line = next((line for line in devices() if line.startswith(str(device))), str(device))
    return f"{about}; {platform.system()}; {line}"


PACKAGES = ("numpy", "torchvision", "triton", "scikit-learn", "matplotlib", "jsonargparse", "tensorboard")
SETTINGS = ("FASTKD_", "CUDA_VISIBLE_DEVICES", "OMP_", "MKL_NUM_THREADS", "PYTORCH_", "TORCH_", "NCCL_")
DRIVER = Path("/proc/driver/nvidia/version")


def packages() -> dict[str, str]:
    """The versions of what fastkd works with, where it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def settings() -> dict[str, str]:
    """Variables of the environment that change what fastkd and torch do."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)}


def compiler() -> str:
    """The first line of what the C++ compiler says of itself."""
    path = shutil.which(os.environ.get("CXX", "c++"))
    if path is None:
        return "none"
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return f"{path}, {said.splitlines()[0]}" if said else path


def info() -> str:
    """The text of `fastkd info`: what a report of a fault needs."""
    about = versions() | {"platform": platform.platform(), "compiler": compiler()}
    if DRIVER.is_file():
        about["driver"] = DRIVER.read_text().splitlines()[0]
    about |= {"packages": ", ".join(f"{name} {version}" for name, version in packages().items())}
    about |= {"library": str(_library.FOLDER)}
    lines = [f"{name:<8} {value}" for name, value in about.items()]
    lines += ["", "Devices", *(f"  {line}" for line in devices())]
    lines += ["", "Settings", *(f"  {name}={value}" for name, value in settings().items())]
    facts = fastkd.backend_info()
    choices = "FASTKD_BACKEND=auto|native|reference chooses, FASTKD_WARN=0 silences fallbacks"
    lines += ["", f"Backends ({choices}, FASTKD_CPU_LEVEL=1|3|4 forces a lower CPU level)"]
    width = max(map(len, facts))
    return "\n".join([*lines, *(f"  {name:<{width}} {fact}" for name, fact in facts.items())])

"""What a run ran on, for `fastkd info` and for reports."""

from __future__ import annotations

import platform

import torch

import fastkd


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


def info() -> str:
    """The text of `fastkd info`."""
    lines = [f"{name:<8} {version}" for name, version in versions().items()]
    lines += [f"{'platform':<8} {platform.platform()}", "", "Devices", *(f"  {line}" for line in devices())]
    facts = fastkd.backend_info()
    settings = "FASTKD_BACKEND=auto|native|reference chooses, FASTKD_WARN=0 silences fallbacks"
    lines += ["", f"Backends ({settings}, FASTKD_CPU_LEVEL=1|3|4 forces a lower CPU level)"]
    lines += [f"  {name:<18} {fact}" for name, fact in facts.items()]
    return "\n".join(lines)

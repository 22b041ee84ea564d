"""What one step of distil.py costs by three forms of its loss: bytes (or tokens) a second and resident memory.

Run: python examples/lm/cost.py (a minute; Linux). With 256 classes, as distil.py, and with 32000: the same networks,
larger embeddings and heads. A step is the two teachers' hidden states and the student's forward and backward; each form
has a process of its own.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from distil import MIX, TINY, WAYS, Network, Setting, loss_of

STEPS = 5


def peak() -> int:
    return next(int(w.split()[1]) for w in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in w) * 1024


def measure(way: str, classes: int, setting: Setting) -> str:
    """A row of the table: the best of a few steps in processor time, memory above networks and batch."""
    torch.manual_seed(0)
    student, *guides = (Network(*size, setting.length, classes) for size in (setting.student, *setting.teachers))
    for guide in guides:
        guide.requires_grad_(False)  # or their heads would get gradients too
    ids, seconds = torch.randint(classes, (setting.batch, setting.length + 1)), []
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = peak()
    for _ in range(STEPS):
        begin = time.process_time()
        with torch.no_grad():
            taught = [(guide(ids[:, :-1]), guide.head.weight) for guide in guides]
        loss_of(way, student, student(ids[:, :-1]), taught, ids[:, 1:], MIX).backward()
        student.zero_grad()
        seconds.append(time.process_time() - begin)
    rate = ids[:, 1:].numel() / min(seconds)
    return f"| {classes} | {way} | {rate:.0f} | {(peak() - before) / 1e6:.0f} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[256, 32000])
    parser.add_argument("--tiny", action="store_true", help="networks of no use, to see that it works")
    parser.add_argument("--form", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.form:
        print(measure(given.form, given.classes[0], TINY if given.tiny else Setting()))
        return
    print("| classes | form | tokens a second | MB |\n| --- | --- | --- | --- |", flush=True)
    for classes in given.classes:
        for way in WAYS:
            command = [sys.executable, __file__, "--form", way, "--classes", str(classes), *["--tiny"] * given.tiny]
            environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0"}  # freed pages are given back at once
            subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()

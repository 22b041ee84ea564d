"""The command line: `fastkd train`, `compare`, `study`, `analyze`, `report`, `info`, `bench`, `completion`."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shlex
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path

from fastkd._version import __version__

USAGE = """\
usage: fastkd COMMAND [options]

Knowledge distillation with several networks.

  fastkd train     train one student by one method, and the other networks that the method needs
  fastkd compare   several methods and seeds: a table, a picture, a report
  fastkd study     methods, seeds and settings of a file: resumable, in several processes, with intervals and tests
  fastkd analyze   the papers' analyses: tables and pictures, some of them of a run
  fastkd report    report and pictures of a run, finished or not, or of several side by side
  fastkd info      versions, devices, and which backend each operation uses and why
  fastkd bench     what the fused operations gain on this machine (in the source tree)
  fastkd completion  for bash and zsh: source <(fastkd completion)

  fastkd COMMAND --help shows the options, fastkd --version the version.
  Try: fastkd train --method dgkd --epochs 30 --out runs/first
"""

COMMANDS = ("train", "compare", "study", "analyze", "report", "info", "bench", "completion")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a wrong call, 130 after Ctrl-C.

    1 for a loss that diverged, a full disk, another process of the run that is gone.

    Errors are one line on stderr; with FASTKD_TRACEBACK=1 in the environment they are raised.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except KeyboardInterrupt:
        return _interrupted(argv)
    except Exception as error:
        from fastkd.train.interrupts import Interrupted

        if isinstance(error, Interrupted):
            return _interrupted(argv)
        if _said_elsewhere(error):
            return getattr(error, "status", 2)
        message = _explain(error)
        if message is None or os.environ.get("FASTKD_TRACEBACK") == "1":
            raise
        print(f"fastkd: {' '.join(message.split())}", file=sys.stderr)
        return getattr(error, "status", 2)


def _said_elsewhere(error: Exception) -> bool:
    """Whether another process prints this error: one does, of what all find out alike."""
    from fastkd._core.messages import UserError
    from fastkd.train import distributed

    if isinstance(error, (distributed.RemoteError, distributed.LostProcess)):
        return isinstance(error, distributed.RemoteError)
    return isinstance(error, (UserError, ValueError, TypeError)) and not distributed.reports_errors()


def _dispatch(argv: list[str]) -> int:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"fastkd {__version__}")
        return 0
    from fastkd._core.messages import UserError, guess
    from fastkd.cli.options import parse

    rest = argv[1:]
    if command not in COMMANDS:
        raise UserError(f"there is no command {command!r}: {guess(command, COMMANDS)}use {', '.join(COMMANDS)}")
    if command in ("info", "completion"):
        return _printed(command, argv[1:])
    if command == "bench":
        from fastkd import _bench

        return _bench.run(argv[1:])
    if command == "report":
        from fastkd.runs import summary

        return summary.main(argv[1:], _command_line(argv))
    if command == "study":
        from fastkd.runs import study_command

        return study_command.main(argv[1:], _command_line(argv))
    if command == "analyze" and argv[1:2] == ["ablate"]:
        command, rest = "compare", _ablation(argv[2:])
    elif command == "analyze":
        from fastkd.runs import analyze

        return analyze.main(argv[1:])
    config = parse(command, rest)
    if config is None:
        return 0
    from fastkd.runs import commands

    getattr(commands, command)(config, _command_line(argv))
    return 0


QUICK = "--epochs 5 --guide-epochs 3 --eval-every 5 --seeds 0".split()  # a look at whether all of it runs


def _ablation(rest: list[str]) -> list[str]:
    """`METHOD [--quick] ...` of `fastkd analyze ablate` as options of `fastkd compare`."""
    from fastkd._core.messages import UserError
    from fastkd.runs.ablations import ABLATIONS

    if rest[:1] in (["-h"], ["--help"]):
        return ["--help"]
    if not rest or rest[0].startswith("-"):
        raise UserError(f"fastkd analyze ablate needs a method: {', '.join(ABLATIONS)}")
    quick = QUICK if "--quick" in rest else []
    return ["--ablate", rest[0], *quick, *(item for item in rest[1:] if item != "--quick")]


ABOUT = {
    "info": "Versions, devices, settings, which backend each operation uses and why: what a report of a fault needs.",
    "completion": "A script that completes commands, options and values in bash and zsh: source <(fastkd completion)",
}


def _printed(command: str, rest: list[str]) -> int:
    """The commands that take no options and print a text."""
    from fastkd._core.messages import UserError

    if rest and rest[0] not in ("-h", "--help"):
        raise UserError(f"fastkd {command} takes no options, got {rest[0]!r}")
    if rest:
        print(f"usage: fastkd {command}\n\n{ABOUT[command]}")
    elif command == "info":
        from fastkd.runs import environment

        print(environment.info())
    else:
        from fastkd.cli import completion

        print(completion.script(COMMANDS), end="")
    return 0


def _explain(error: Exception) -> str | None:
    """One sentence for an error that the user can put right, None for one that only a developer can."""
    import torch

    from fastkd._core.messages import UserError

    if isinstance(error, ArgumentError):
        return _explain_option(str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full: use a smaller --batch-size, or --device cpu"
    if _memory_is_full(error):
        return (
            "the memory is full: use a smaller --batch-size or --image-size, or fewer --workers; what was saved before "
            "is whole, --resume goes on from it"
        )
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{error.strerror}{where}: give the right to it, or name another file or folder"
        return f"{error.strerror}{where}: the run stopped; what was saved before is whole, --resume goes on from it"
    if isinstance(error, (UserError, ValueError, TypeError, FileNotFoundError, ImportError)):
        return str(error).replace("pass download=True", "add --download")
    return None


# What PyTorch says on the CPU, and of a loader's process that the system has ended for it.
_FULL: tuple[str, ...] = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory", "Cannot allocate memory")
_FULL += ("is killed by signal: Killed", "is killed by signal: Bus error", "unable to allocate shared memory")


def _memory_is_full(error: Exception) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _FULL)


def _explain_option(message: str) -> str:
    """What is wrong with an option, from the parser's message."""
    message = " ".join(message.split())
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    if unknown:
        from fastkd._core.messages import guess
        from fastkd.runs.config import CompareConfig, TrainConfig
        from fastkd.runs.plans import RECIPES

        fields = {f.name for kind in (TrainConfig, CompareConfig) for f in dataclasses.fields(kind)}
        given = unknown[1].partition("=")[0]
        known = [f"--{name.replace('_', '-')}" for name in sorted(fields)]
        known += [f"--options.{name}" for how in RECIPES.values() for name in how.arguments]
        given = given.replace("_", "-")
        own = f"--options.{given[2:].replace('-', '_')}"
        if own in known:
            return f"unknown option {given}: it is the method's, write {own}"
        return f"unknown option {given}: {guess(given, known) or 'see --help '}".rstrip()
    value = re.search(r'[Kk]ey "([\w.]+)": (?:Expected an? (.*?)\. Got value: (.*)|(.*))$', message)
    if value:
        name, expected, got, other = value.groups()
        flag = f"--{name.replace('_', '-')}"
        return f"{flag} must be {_kind(expected)}, got {got!r}" if expected else f"{flag}: {other}"
    missing = re.search(r"argument (--\S+): expected one argument", message)
    if missing:
        return f"{missing[1].replace('_', '-')} needs a value"
    return message


def _kind(text: str) -> str:
    """`<class 'int'>` or `typing.Literal['a', 'b']` in words."""
    simple = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}
    kind = re.search(r"class '(\w+)'", text)
    if kind and kind[1] in simple:
        return simple[kind[1]]
    choices = re.search(r"Literal\[(.*)\]", text)
    if choices:
        return "one of " + choices[1].replace("'", "")
    return text


def _command_line(argv: list[str]) -> str:
    """What to type to start this again."""
    started_as = "python -m fastkd" if Path(sys.argv[0]).name == "__main__.py" else "fastkd"
    return f"{started_as} {shlex.join(argv)}"


def _interrupted(argv: list[str]) -> int:
    if os.environ.get("RANK", "0") != "0":
        return 130
    again = argv if any(item.startswith("--resume") for item in argv) else [*argv, "--resume"]
    print(f"fastkd: interrupted; finished work is saved; to go on: {_command_line(again)}", file=sys.stderr)
    return 130

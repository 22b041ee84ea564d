"""`fastkd completion` in zsh: keys are pressed in a terminal, and what then stands on the line is read."""

import os
import pty
import shutil
import subprocess
import time

import pytest

from fastkd.cli import COMMANDS
from fastkd.cli.completion import script

pytestmark = pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")

TAB, TELL = "\t", "\x14"
# `tell` writes what stands on the line, and empties it; zle-line-init says that keys are read.
ZSHRC = """
PS1=
{before}
source script.sh
tell() {{ print -r -- "$BUFFER|" >> told; BUFFER= }}
zle-line-init() {{ print -r -- ready >> told; zle -D zle-line-init }}
zle -N tell; zle -N zle-line-init
bindkey -e; bindkey '^I' menu-complete '^T' tell
"""
COMPINIT = "autoload -U compinit && compinit -u -D"


class Terminal:
    def __init__(self, folder, before=COMPINIT):
        self.told = folder / "told"
        self.told.touch()
        (folder / "script.sh").write_text(script(COMMANDS))
        (folder / ".zshrc").write_text(ZSHRC.format(before=before))
        self.keys, end = pty.openpty()
        environment = os.environ | {"ZDOTDIR": str(folder), "HOME": str(folder), "TERM": "dumb"}
        streams = {"stdin": end, "stdout": subprocess.DEVNULL, "stderr": end}
        # -d: no file of /etc; a session of its own, whose terminal this one is
        self.shell = subprocess.Popen(
            ["zsh", "-d", "-i"], cwd=folder, env=environment, start_new_session=True, **streams
        )
        os.close(end)
        self.answers = 0
        assert self._answer() == "ready"

    def _answer(self) -> str:
        until = time.monotonic() + 120
        while len(lines := self.told.read_text().splitlines()) <= self.answers:
            assert self.shell.poll() is None and time.monotonic() < until, f"zsh told nothing; so far {lines}"
            time.sleep(0.02)
        self.answers += 1
        return lines[self.answers - 1]

    def line(self, typed: str, tabs: int = 1) -> str:
        """What stands there after `tabs` presses of the key behind `typed`; each goes on to the next offer."""
        os.write(self.keys, (typed + TAB * tabs + TELL).encode())
        return self._answer().removesuffix("|")

    def close(self) -> None:
        self.shell.kill()
        self.shell.wait()
        os.close(self.keys)


@pytest.fixture(scope="module")
def terminal(tmp_path_factory):
    terminal = Terminal(tmp_path_factory.mktemp("zsh"))
    yield terminal
    terminal.close()


@pytest.mark.parametrize(
    "typed, completed",
    [
        ("fastkd tr", "fastkd train "),
        ("fastkd train --method dg", "fastkd train --method dgkd "),
        ("fastkd train --method=dg", "fastkd train --method=dgkd "),
        ("fastkd train --train-s", "fastkd train --train-size "),
        ("fastkd train --options.surv", "fastkd train --options.survival "),
        ("fastkd train --config dgkd_image", "fastkd train --config dgkd_imagenet "),
        ("fastkd study cifar10-16px-p", "fastkd study cifar10-16px-pilot "),
        ("python -m fastkd tr", "python -m fastkd train "),
        ("python3 -m fastkd train --method orc", "python3 -m fastkd train --method orc "),
    ],
)
def test_what_is_completed(terminal, typed, completed):
    assert terminal.line(typed) == completed


def test_all_that_is_offered_comes_one_after_another(terminal):
    offered = {terminal.line("fastkd train --amp ", tabs).split()[-1] for tabs in (1, 2, 3, 4)}
    assert offered == {"none", "bf16", "fp16"}


def test_pythons_own_words_stay_with_zsh(terminal):
    """It knows that scripts end in .py, which is not so behind our own commands."""
    for name in ("a.txt", "b.py"):
        (terminal.told.parent / name).touch()
    assert terminal.line("python ") == "python b.py "
    assert terminal.line("fastkd info ") == "fastkd info a.txt"


def test_without_compinit_before_it(tmp_path):
    terminal = Terminal(tmp_path, before="")
    try:
        assert terminal.line("fastkd tr") == "fastkd train "
    finally:
        terminal.close()

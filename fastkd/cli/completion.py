"""`fastkd completion`: a script that completes commands, options and their values in bash, and in zsh by bashcompinit.

    source <(fastkd completion)         # in ~/.bashrc or ~/.zshrc; `python -m fastkd` is completed, too

All words are in the script, so that a key press starts no Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Iterable
from typing import Literal, get_args, get_origin, get_type_hints

from fastkd import data, models
from fastkd.cli.options import recipe_names
from fastkd.runs import analyze, study, study_command, summary
from fastkd.runs.config import CompareConfig, TrainConfig
from fastkd.runs.plans import RECIPES

SCRIPT = """\
# fastkd completion: source <(fastkd completion)
if [[ -n ${ZSH_VERSION-} ]]; then
  whence compdef >/dev/null || { autoload -U compinit && compinit; }
  autoload -U +X bashcompinit && bashcompinit
fi
_fastkd() {
  local at=1 offered=""
  [[ ${COMP_WORDS[0]} == *python* ]] && at=3
  local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} command=${COMP_WORDS[at]} start=""
  if [[ $current == "=" ]]; then  # bash takes --method=d for three words, zsh for one
    command="=" current=""
  elif [[ $before == "=" ]]; then
    command="=" before=${COMP_WORDS[COMP_CWORD - 2]}
  elif [[ $current == --*=* ]]; then
    command="=" before=${current%%=*} current=${current#*=}
    start="$before="
  fi
  if ((COMP_CWORD == at)); then
    offered="@COMMANDS@"
  else
    case "$command $before" in  # behind = stand values alone
@CASES@
    esac
  fi
  COMPREPLY=($(compgen -P "$start" -W "$offered" -- "$current"))
}
complete -o default -F _fastkd fastkd
if [[ -n ${ZSH_VERSION-} ]]; then
  # zsh knows Python's own options and modules: what is not ours goes on to what completed it before
  [[ ${_comps[python]-} == _fastkd* ]] || _fastkd_before=${_comps[python]-_python}
  _fastkd_of_python() {
    if [[ ${words[2]} == -m && ${words[3]} == fastkd ]] && ((CURRENT > 3)); then
      _bash_complete -o default -F _fastkd
    else
      ${=_fastkd_before}
    fi
  }
  compdef _fastkd_of_python python python3
else
  _fastkd_of_python() {
    [[ ${COMP_WORDS[1]} == -m && ${COMP_WORDS[2]} == fastkd ]] && ((COMP_CWORD > 2)) && _fastkd
  }
  complete -o bashdefault -o default -F _fastkd_of_python python python3
fi
"""


def script(commands: Iterable[str]) -> str:
    """The script for the shell."""
    cases = [_case(f"*' {option}'", words) for option, words in _values().items()]
    cases += [_case(f"{command}' '*", words) for command, words in _options().items()]
    return SCRIPT.replace("@COMMANDS@", _words(commands)).replace("@CASES@", "\n".join(cases))


def _case(pattern: str, words: Iterable[str]) -> str:
    return f'      {pattern}) offered="{_words(words)}" ;;'


def _words(words: Iterable[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


def _values() -> dict[str, list[str]]:
    """Option > the values that it may have, where they are known; names of networks may have options behind them."""
    networks = models.names()
    found = {"--method": list(RECIPES), "--methods": ["all", *RECIPES], "--config": recipe_names()}
    found |= {"--data": data.names(), "--student": networks, "--teacher": networks, "--assistants": networks}
    for kind in (TrainConfig, CompareConfig):
        for name, hint in get_type_hints(kind).items():
            if get_origin(hint) is Literal:
                found[_flag(name)] = [str(value) for value in get_args(hint)]
    return found


def _options() -> dict[str, list[str]]:
    """Command > its options, and the names that it takes."""
    method = [f"--options.{name}" for how in RECIPES.values() for name in how.arguments]
    common = ["--config", "--help", *dict.fromkeys(method)]
    settings = _fields(TrainConfig)
    return {
        "train": [*settings, *common],
        "compare": [*_fields(CompareConfig), *common],
        "study": [*sorted(path.stem for path in study.RECIPES.glob("*.yaml")), *_of(study_command.parser()), *settings],
        "analyze": [*analyze.ANALYSES, *_of(analyze.parser())],
        "report": _of(summary.parser()),
    }


def _fields(kind: type[TrainConfig] | type[CompareConfig]) -> list[str]:
    return [_flag(field.name) for field in dataclasses.fields(kind) if field.name not in ("options", "checkpoint")]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _of(parser: argparse.ArgumentParser) -> list[str]:
    return [word for action in parser._actions for word in action.option_strings if word.startswith("--")]

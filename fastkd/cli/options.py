"""The options of `fastkd train` and `fastkd compare`: how they are read and how --help shows them."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from pathlib import Path
from typing import Any

from fastkd import models
from fastkd._core.extras import require
from fastkd._core.messages import UserError, guess, note
from fastkd.runs.config import CompareConfig, CompareOptions, MethodOptions, TrainConfig, read_yaml
from fastkd.runs.folder import CONFIG
from fastkd.runs.plans import RECIPES
from fastkd.train.option_types import declared, is_switch
from fastkd.train.settings import DataOptions, LoopOptions, NetworkOptions, OptimizationOptions, ScaleOptions

RECIPE_FOLDER = Path(__file__).parents[1] / "recipes"
EXAMPLES = {
    "train": "fastkd train --method M --out DIR [options]",
    "compare": "fastkd compare [--methods A,B,...] [--seeds 0,1,...] [--out DIR] [options]",
}


def parse(command: str, rest: list[str]) -> Any:
    """The config of a command, or None where help or the config itself was printed."""
    config_type = TrainConfig if command == "train" else CompareConfig
    parser = _parser(command, config_type)
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    if "-h" in rest or "--help" in rest:
        print(_help(parser, command, fields), end="")
        return None
    argv = _normalise(rest, fields)
    try:
        argv = _configs_first(parser, argv)
        values = parser.parse_args(argv).as_dict()
    except SystemExit as done:  # --print_config
        if done.code:
            raise
        return None
    values.pop("config", None)
    return config_type(**values)


def _parser(command: str, config_type: type) -> Any:
    jsonargparse: Any = require("jsonargparse", "The command line")

    class Formatter(jsonargparse.DefaultHelpFormatter):  # type: ignore[misc]
        def _get_help_string(self, action: Any) -> str:
            return _with_default(action)

    parser = jsonargparse.ArgumentParser(
        prog=f"fastkd {command}", exit_on_error=False, allow_abbrev=False, formatter_class=Formatter
    )
    parser.add_argument(
        "--config",
        action=jsonargparse.ActionConfigFile,
        metavar="FILE|NAME",
        help="YAML file of options, or the name of a recipe (below); the command line overrides it",
    )
    first = MethodOptions if command == "train" else CompareOptions
    groups: list[type] = [first, OptimizationOptions, NetworkOptions, DataOptions, LoopOptions, ScaleOptions]
    for group in groups:
        parser.add_class_arguments(group)
    parser.set_defaults({name: getattr(config_type, name) for name in _own_defaults(config_type)})
    return parser


def _own_defaults(config_type: type) -> list[str]:
    """The options to which a command gives its own defaults."""
    return list(vars(config_type).get("__annotations__", {}))


def _determines(name: str) -> bool:
    """Whether an option says what is trained, or how."""
    return declared(TrainConfig)[name].role != "free"


def _normalise(rest: list[str], fields: dict[str, Any]) -> list[str]:
    """Options as the parser takes them: --train-size is --train_size, --resume is --resume=true, a,b is [a,b]."""
    result, position = [], 0
    while position < len(rest):
        item = rest[position]
        position += 1
        name, equals, value = item.partition("=")
        if not name.startswith("--"):
            result.append(item)
            continue
        name = "--" + name[2:].replace("-", "_")
        negated = name.startswith("--no_") and fields.get(name[5:])
        if negated and is_switch(negated.type) and not equals:
            result.append(f"--{name[5:]}=false")
            continue
        field = fields.get(name[2:])
        kind = str(field.type) if field else ""
        following = rest[position] if position < len(rest) else None
        if is_switch(kind) and not equals:
            given = following in ("true", "false")
            position += given
            equals, value = "=", str(following) if given else "true"
        elif kind.startswith("list"):
            if not equals and following is not None and not following.startswith("--"):
                position, equals, value = position + 1, "=", following
            if equals and not value.startswith("["):
                value = f"[{value}]"
        result.append(f"{name}{equals}{value}")
    return result


def _configs_first(parser: Any, argv: list[str]) -> list[str]:
    """Config files in front, so that the command line overrides them wherever they stand.

    A run that is resumed has its own options as the first of them.
    """
    configs, others, position = [], [], 0
    while position < len(argv):
        if argv[position] == "--config" and position + 1 < len(argv):
            configs.append(argv[position + 1])
            position += 1
        elif argv[position].startswith("--config="):
            configs.append(argv[position].partition("=")[2])
        else:
            others.append(argv[position])
        position += 1
    out = _last_value(others, "--out")
    if "--resume=true" in others and out and (Path(out) / CONFIG).is_file():
        configs.insert(0, str(Path(out) / CONFIG))
    asked = _last_value(others, "--methods")
    return [*(f"--config={_config(parser, _config_file(name), asked)}" for name in configs), *others]


def _config(parser: Any, path: str, asked: str | None) -> str:
    """What the parser is told of a config: its path, or its options where they are not as they stand there.

    asked: the value of --methods, as the parser takes it.
    """
    values = read_yaml(path)
    known = _option_names(parser)
    changed = "method" in values and "methods" in known
    values = _for_comparison(values, asked) if changed else values
    for name in values:
        if name not in known:
            raise UserError(f"the config {path} has an unknown option {name!r}: {guess(str(name), known)}see --help")
    return json.dumps(values) if changed else path


def _for_comparison(values: dict[str, Any], asked: str | None) -> dict[str, Any]:
    """The options of one method's run for `compare`: that method and ce, where no others are asked for.

    What it leaves open is as in that run. The method's options are left out where it is not one of those asked for.
    """
    method = values["method"]
    chosen = [name.strip() for name in asked.strip("[]").split(",")] if asked else list(dict.fromkeys(["ce", method]))
    values = {name: value for name, value in values.items() if name != "method"} | {"methods": chosen}
    values = {name: getattr(TrainConfig, name) for name in _own_defaults(CompareConfig) if _determines(name)} | values
    if method not in chosen and chosen != ["all"]:
        return {name: value for name, value in values.items() if name != "options"}
    names = RECIPES if chosen == ["all"] else [name for name in chosen if name in RECIPES]
    others = [name for name in names if name != method and RECIPES[name].accepted(values.get("options", {}))]
    if others:
        note(f"the options that the config has for {method} hold for {', '.join(others)}, too, where these have them")
    return values


def _config_file(name: str) -> str:
    """A file as it is named; where there is none, or a folder, the recipe of that name in the package."""
    if Path(name).exists() and not Path(name).is_dir():
        return name
    known = recipe_names()
    asked = name.removeprefix("configs/").removesuffix(".yaml")  # where they lay in the source tree
    if asked in known:
        return str(RECIPE_FOLDER / f"{asked}.yaml")
    what = f"the config {name} cannot be read, there is no such file or recipe"
    raise UserError(f"{what}: {guess(asked, known)}the recipes are {', '.join(known)}")


def recipe_names() -> list[str]:
    """Of the recipes in the package."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def _last_value(argv: list[str], name: str) -> str | None:
    found = None
    for position, item in enumerate(argv):
        if item == name and position + 1 < len(argv):
            found = argv[position + 1]
        elif item.startswith(f"{name}="):
            found = item.partition("=")[2]
    return found


def _option_names(parser: Any) -> list[str]:
    return [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]


_METAVARS = {"int": "N", "float": "X", "bool": "", "list": "A,B", "dict": "NAME=VALUE", "str": "TEXT"}


def _metavar(kind: str) -> str:
    if kind.startswith("Literal"):
        return "|".join(re.findall(r"\w+", kind.partition("[")[2]))
    return next(metavar for start, metavar in _METAVARS.items() if kind.startswith(start))


def _with_default(action: Any) -> str:
    """An option's help, with its default where there is one to tell."""
    default = action.default
    if default in (None, "", "==SUPPRESS==", False, True) or default == [] or default == {}:
        return action.help or ""
    if isinstance(default, list):
        default = ",".join(map(str, default))
    return f"{action.help} (default: {default})"


def _help(parser: Any, command: str, fields: dict[str, Any]) -> str:
    """The parser's help with hyphens, without the noise of types, and with the lists of methods and networks."""
    for action in parser._actions:
        field = fields.get(action.dest)
        if action.dest == "print_config":
            action.help = "print the options in force as YAML, and exit"
        elif field is not None:
            action.metavar = _metavar(str(field.type))
    text = parser.format_help()
    text = text[text.index("\noptions:") :]
    text = re.sub(r"--[a-z_]+", lambda match: match[0].replace("_", "-"), text)
    text = re.sub(r"(--[a-z-]+) A,B, --[a-z-]+\+ A,B", r"\1 A,B", text)
    text = re.sub(r"(--(?:options|checkpoint)) NAME", r"\1.NAME", text)
    text = re.sub(r"(--augment) +augment", "--no-augment          do not augment", text)
    lines = ["", "Methods and what --options.NAME sets in each:"]
    for name, recipe in RECIPES.items():
        values = ", ".join(f"{key}={value!r}" for key, value in recipe.arguments.items())
        lines += [f"  {name:<7}{recipe.about}" if len(name) < 7 else f"  {name}  {recipe.about}"]
        for_digits = ", ".join(f"{key}={value!r}" for key, value in recipe.digits.items())
        lines += [f"         {values or 'no options'}{f' (digits: {for_digits})' if for_digits else ''}"]
    lines += ["", f"Networks: {', '.join(models.names())}", "", f"Recipes for --config: {', '.join(recipe_names())}"]
    wrapped = [textwrap.fill(line, 100, subsequent_indent=" " * 9) if len(line) > 100 else line for line in lines]
    return "\n".join([f"usage: {EXAMPLES[command]}", text.rstrip(), *wrapped]) + "\n"

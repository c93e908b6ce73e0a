"""The flags of a run: one for each setting, by its dotted key. pydantic-settings defines them, argparse reads them."""

from __future__ import annotations

import json
import re
from argparse import ArgumentError, ArgumentParser, HelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource


@dataclass
class CommandLine:
    """What a command line says; its values are not yet checked."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Texts and lists of texts, nested as in a file."""
    config: str | None = None
    """The file or name that --config gives."""
    print_config: bool = False
    """Whether --print-config is there."""
    unknown: list[tuple[str, str]] = field(default_factory=list)
    """Flags that no setting has, and the value of each."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Flags that lack their value, or have one and need none, and argparse's word on each."""


def parse_flags(
    config_cls: type[BaseModel], fields: Mapping[str, FieldInfo], argv: Sequence[str], prog: str
) -> CommandLine:
    """Read a command line to its end, whatever is wrong with it.

    fields: the settings of config_cls by dotted key. Raises SystemExit(0) after printing for `--help`.
    """
    parser = _parser(config_cls, fields, prog)
    words, line = [_with_underscores(word, fields) for word in argv], CommandLine()
    while True:
        try:
            known, extras = parser.parse_known_args(words)
            break
        except ArgumentError as error:  # note it, leave the flag out and go on
            name = error.argument_name or ""
            names = name.split("/")  # a flag and its short form
            line.unreadable[names[-1].removeprefix("--")] = error.message
            words = [word for word in words if word.partition("=")[0] not in names]
    while extras:
        flag, equals, value = extras.pop(0).partition("=")
        if flag.startswith("--") and not equals and extras and not extras[0].startswith("--"):
            value = extras.pop(0)
        line.unknown.append((flag.removeprefix("--"), value))
    texts = vars(known)
    del texts["debug"]  # the `fcmae` command's own
    line.config, line.print_config = texts.pop("config"), texts.pop("print_config")
    for key, text in texts.items():
        section, _, name = key.rpartition(".")
        place = line.settings.setdefault(section, {}) if section else line.settings
        place[name] = _items(text) if isinstance(text, list) else text
    return line


def _parser(config_cls: type[BaseModel], fields: Mapping[str, FieldInfo], prog: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config NAME] [--KEY VALUE ...]",
        description=f"{config_cls.__doc__} Flags override the file that --config names.",
        epilog="Lists are written 0.2,1 or by repeating the flag, or as JSON. Where a setting may be left out, "
        "none does so. Dashes and underscores in a flag are the same.",
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=30),
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="NAME", help="A YAML file, or the name of a shipped one (`fcmae configs`).")
    parser.add_argument("--print-config", action="store_true", help="Print the resolved settings and exit.")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    CliSettingsSource(
        cast(type[BaseSettings], config_cls),  # it reads the fields alone, which any model has
        root_parser=parser,
        add_argument_method=_flag_adder(fields),
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )
    return parser


def _flag_adder(fields: Mapping[str, FieldInfo]) -> Callable[..., None]:
    """How a flag is shown and read, where that differs from pydantic-settings' way."""

    def add(parser: ArgumentParser, *names: str, **options: Any) -> None:
        info = fields.get(options["dest"])
        if info is None:
            return  # a whole section as one JSON text
        default = info.get_default(call_default_factory=True)
        options["help"] = info.description or ""
        if default is not None and default != []:
            text = ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
            options["help"] += f" [{text.lower() if isinstance(default, bool) else text}]"
        options["help"] = options["help"].replace("%", "%%")
        if "[" in options["metavar"]:  # a list or tuple; older releases do not repeat the flags of tuples
            options["action"] = "append"
        kind = re.sub(r"list\[(.*)]", r"\1,...", re.sub(r"tuple\[(.*)]", r"\1", options["metavar"]))
        options["metavar"] = kind if len(kind) < 40 else "NAME"  # the many variants
        if kind == "bool":
            options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
        elif default is False:  # a switch with other values beside true and false
            options |= {"nargs": "?", "const": "true"}
        if names == ("--model.init",):
            names = ("--init", *names)  # where most runs start
        parser.add_argument(*names, **options)

    return add


def _with_underscores(word: str, keys: Iterable[str]) -> str:
    flag, equals, value = word.partition("=")
    key = flag[2:].replace("-", "_")
    return f"--{key}{equals}{value}" if flag.startswith("--") and key in keys else word


def _items(texts: Sequence[str]) -> list[Any] | None:
    """The list that a flag gives: each of its texts is a JSON list, or items between commas."""
    if list(texts) == ["none"]:
        return None
    items: list[Any] = []
    for text in texts:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        items += value if isinstance(value, list) else text.split(",")
    return items

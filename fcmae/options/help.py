"""What is told of settings: `--help`, tables of the documentation, the words that a shell completes."""

from __future__ import annotations

import textwrap
from inspect import cleandoc
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from fcmae.config import RunConfig
from fcmae.config.base import Settings
from fcmae.options.fields import Also, choices_of, fields_of, is_list, items_of, kinds_of, spelling_of
from fcmae.options.files import shipped_configs
from fcmae.options.problems import description_of, shown


def usage(model: type[Settings], prog: str) -> str:
    """The text of `--help`: what the command does, and each setting with its default."""
    fields, section = fields_of(model), ""
    lines = [f"usage: {usage_line(model, prog)}", "", cleandoc(model.__doc__ or "")]
    arguments = {key: field for key, field in fields.items() if spelling_of(field).argument}
    if arguments:
        lines += ["", "arguments:", *(_row(_argument(field), field) for field in arguments.values())]
    # What is in no section goes first, in one piece.
    for key, field in [*sorted(fields.items(), key=lambda item: "." in item[0]), *fields_of(Also).items()]:
        title = "also" if key in Also.model_fields else key.rpartition(".")[0] or "settings"
        if (key in arguments and "." not in key) or spelling_of(field).hidden:
            continue
        if title != section:
            lines += ["", f"{title}:"]
            section = title
        short = f"--{spelling_of(field).short}, " if spelling_of(field).short else ""
        name = key.replace("_", "-") if title == "also" else key
        lines.append(_row(f"{short}--{name} {_metavar(field.annotation)}", field))
    notes = (
        "A flag's value means the same as in a YAML file. Write a list as 0.2,1 or 0.2 1 or [0.2, 1], or repeat the "
        "flag. To unset an optional setting, give `none`. Dashes and underscores are interchangeable."
    )
    if issubclass(model, RunConfig):
        notes = f"In brackets: what a setting is beside a recipe; without one many are chosen (--print-config). {notes}"
    return "\n".join([*lines, "", *textwrap.wrap(notes, 100)])


def usage_line(model: type[Settings], prog: str) -> str:
    """How a command is called, in a line."""
    arguments = [_argument(field) for field in fields_of(model).values() if spelling_of(field).argument]
    return " ".join([prog, *arguments, "[--config NAME] [--KEY VALUE ...]"])


def _argument(field: FieldInfo) -> str:
    text = spelling_of(field).argument + (" ..." if is_list(kinds_of(field.annotation)) else "")
    return text if field.is_required() else f"[{text}]"


def _row(left: str, field: FieldInfo) -> str:
    text = description_of(field) + (f" [{default}]" if (default := _default(field)) else "")
    first = f"  {left:27} " if len(left) < 28 else f"  {left}\n{'':30}"
    wrapped = textwrap.wrap(text, 70, break_long_words=False, break_on_hyphens=False)
    return first + f"\n{'':30}".join(wrapped)


def _default(field: FieldInfo) -> str:
    """As a flag has it; empty if there is none, or the description says it."""
    default = field.get_default(call_default_factory=True)
    if field.is_required() or default in (None, []) or "Default:" in (field.description or ""):
        return ""
    return ",".join(map(str, default)) if isinstance(default, list | tuple) else shown(default)


def _metavar(kind: Any) -> str:
    """How the values of a type are written."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _metavar(args[0])
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (Union, UnionType):
        return "|".join(dict.fromkeys(_metavar(arg) for arg in args if arg is not type(None))).replace("N|X", "X")
    if origin is list or Ellipsis in args:
        return f"{_metavar(args[0])},..."
    if origin is tuple:
        return ",".join(map(_metavar, args))
    return {int: "N", float: "X", bool: "true|false", str: "TEXT", Path: "PATH"}.get(kind, "{...}")


class Setting(NamedTuple):
    """What is to be known of a setting.

    Attributes:
        key: dotted.
        kind: how its values are written.
        default: as a file has it; empty where the description says what it is, or it must be given.
        description: what it is, in sentences.
    """

    key: str
    kind: str
    default: str
    description: str


def described(model: type[Settings]) -> list[Setting]:
    """Every setting of a command that a user may give, in order."""
    return [
        Setting(key, _metavar(field.annotation), _default(field), description_of(field))
        for key, field in fields_of(model).items()
        if not spelling_of(field).hidden
    ]


def words_of(model: type[Settings]) -> dict[str, list[str]]:
    """Every flag of a command, for the completion of its line, each with the words that its value may be, if few."""
    found: dict[str, list[str]] = {}
    for key, field in {**fields_of(model), **fields_of(Also)}.items():
        if spelling_of(field).hidden:
            continue
        kinds = kinds_of(field.annotation)
        words = sorted(choices_of([*kinds, *items_of(kinds)])) + (["true", "false"] if bool in kinds else [])
        words = [*shipped_configs()] if key == "config" else words
        found |= {f"--{name}": words for name in (spelling_of(field).short, key) if name}
    return found

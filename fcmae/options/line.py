"""A command line: its words to values by key, and back."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import yaml
from pydantic.fields import FieldInfo

from fcmae.config.base import Settings
from fcmae.options.fields import Also, choices_of, fields_of, has_parts, is_list, kinds_of, spelling_of
from fcmae.options.files import parse_yaml
from fcmae.options.help import usage_line
from fcmae.options.problems import text_of, unknown_setting

HELP = ("-h", "--help")
SWITCHED = {"true", "false", "yes", "no", "on", "off", "1", "0"}  # what a switch takes for its value
NONE = {"none", "null", "~"}


class Given(NamedTuple):
    """What a command line, or a caller, gives.

    Attributes:
        values: by dotted key, unchecked.
        unread: keys of the line whose value is missing.
        problems: what is wrong with the line, a sentence each.
    """

    values: dict[str, Any]
    unread: set[str]
    problems: list[str]


def parse(model: type[Settings], argv: Sequence[str], prog: str) -> Given:
    """Read a command line to its end.

    Args:
        model: the command's settings.
        argv: its words.
        prog: the command, as problems name it.
    """
    fields = fields_of(model)
    known = {**fields, **fields_of(Also)}
    shown = {key: field for key, field in known.items() if not spelling_of(field).hidden}
    names = {name: key for key, field in shown.items() for name in (key, spelling_of(field).short) if name}
    given: dict[str, list[str]] = {}
    words, loose, wrong, unknown = deque(argv), list[str](), dict[str, str](), list[str]()
    while words:
        word = words.popleft()
        if not _is_flag(word):
            loose.append(word)
            continue
        flag, equals, text = word.lstrip("-").partition("=")
        key, texts = names.get(flag.replace("-", "_")), [text] if equals else []
        kinds = kinds_of(known[key].annotation) if key else []
        while words and not equals and not _is_flag(words[0]) and (not texts or is_list(kinds)):
            if kinds == [bool] and words[0].lower() not in SWITCHED:
                break
            texts.append(words.popleft())
        if key is None:
            unknown.append(unknown_setting(flag, texts[0] if texts else "", fields))
        elif texts or bool in kinds:
            given.setdefault(key, []).extend(texts or ["true"])
        else:
            wrong[key] = f"{key}: needs a value"
    values = {key: _value(known[key], texts) for key, texts in given.items()}
    for key, field in fields.items():
        if loose and spelling_of(field).argument and key not in given:
            many = is_list(kinds_of(field.annotation))
            values[key], loose = (loose, []) if many else (loose[0], loose[1:])
    unknown += [f"{word}: one argument too many; {usage_line(model, prog)}" for word in loose]
    return Given(values, set(wrong), [*wrong.values(), *unknown])


def _value(field: FieldInfo, texts: list[str]) -> Any:
    """What a flag's texts say; the last one, or all where a list is asked for."""
    kinds = kinds_of(field.annotation)
    if len(texts) == 1 and (texts[0] in NONE or texts[0] in choices_of(kinds)):
        return None if texts[0] in NONE else texts[0]
    if not is_list(kinds):
        return _flow(texts[-1]) if has_parts(kinds) else texts[-1]
    items: list[Any] = []
    for text in texts:
        value = _flow(text)
        commas = spelling_of(field).commas
        items += value if isinstance(value, list) else text.split(",") if commas else [text]
    return items


def _flow(text: str) -> Any:
    """A list or mapping that is written as in YAML or JSON; other text as it is."""
    if text.startswith(("[", "{")):
        with suppress(yaml.YAMLError):
            return parse_yaml(text)
    return text


def flags(values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give these settings.

    Args:
        values: By dotted key, as `flat` has them.
    """
    words = []
    for key, value in values.items():
        items = value if isinstance(value, list) else [value]
        texts = [item if isinstance(item, str) else text_of(item) for item in items]
        if isinstance(value, list) and (not texts or texts[0] in NONE or any(set(text) & set(",[{") for text in texts)):
            texts = [yaml.safe_dump(value, default_flow_style=True, width=10**9).strip()]
        # What looks like a flag must not stand alone.
        words += [f"--{key}={text}" for text in texts] if any(map(_is_flag, texts)) else [f"--{key}", *texts]
    return words


def _is_flag(word: str) -> bool:
    return re.match("--|-[A-Za-z]", word) is not None

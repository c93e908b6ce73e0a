"""Settings against their model: what is wrong, a sentence for each key, with the value received and the remedy."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from functools import reduce
from operator import getitem
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fcmae.options.fields import Fields, choices_of, fields_of, has_parts, items_of, kinds_of

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """Settings that cannot be used: one line for each problem."""

    def __init__(self, problems: Iterable[str]) -> None:
        super().__init__("\n".join(problems))


def validate(
    model: type[Model],
    settings: Mapping[str, Any],
    wrong: Iterable[str] = (),
    context: dict[str, Any] | None = None,
    known: Set[str] | None = None,
) -> tuple[Model | None, list[str]]:
    """The settings, if they can be used, and what is wrong with them, each key once.

    What is wrong gives way to its default or example, so that the rest is checked too; a combination that involves it
    is not reported.

    Args:
        model: the command's settings.
        settings: values in their sections, unchecked.
        wrong: keys that are reported already.
        context: what validators of the model ask for.
        known: keys of which combinations are reported, where others are still to be chosen; None is all.
    """
    fields, usable, seen, problems = fields_of(model), copy.deepcopy(dict(settings)), set(wrong), list[str]()
    while True:
        try:
            return model.model_validate(usable, context=context), problems
        except ValidationError as error:
            errors = error.errors(include_url=False)
        wrong_alone = [detail for detail in errors if detail["type"] != "conflict"]  # a conflict is found again
        if not wrong_alone:
            conflicts = [(detail["ctx"]["keys"], detail["msg"]) for detail in errors]
            return None, problems + [
                f"{keys[0]}: {sentence}"
                for keys, sentence in conflicts
                if not seen.intersection(keys) and (known is None or known >= {*keys})
            ]
        for names, details in _by_setting(wrong_alone, fields).items():
            section: Any = reduce(getitem, names[:-1], usable)
            key, value = ".".join(names), section.pop(names[-1], None)
            if key in fields and fields[key].is_required():
                section[names[-1]] = (fields[key].examples or [value])[0]
                assert value is not section[names[-1]], f"{key} needs a good example"
            if key not in seen:
                kind = details[0]["type"] if len(details[0]["loc"]) == len(names) else "part"
                problems.append(_problem(key, value, kind, details, fields))
            seen.add(key)


def _by_setting(details: Iterable[ErrorDetails], fields: Fields) -> dict[tuple[str, ...], list[ErrorDetails]]:
    """What is wrong, by the names of the setting, in its sections, that it is about or inside."""
    groups: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for detail in details:
        names = tuple(map(str, detail["loc"]))
        ends = [end for end in range(1, len(names)) if ".".join(names[:end]) in fields]
        groups.setdefault(names[: ends[0]] if ends else names, []).append(detail)
    return groups


def _problem(key: str, value: Any, kind: str, details: Sequence[ErrorDetails], fields: Fields) -> str:
    if kind == "extra_forbidden":
        return unknown_setting(key, value, fields)
    if kind == "missing":
        return f"{key}: missing: {description_of(fields[key])}"
    return f"{key}: received {shown(value)}; {_allowed(key, details, fields)}"


def unknown_setting(key: str, value: Any, fields: Fields) -> str:
    """That there is no such setting, with those that may be meant.

    Args:
        key: as it was given.
        value: what it was given.
        fields: the settings that there are.
    """
    received, (section, _, name) = f"{key}: received {shown(value)}", key.rpartition(".")
    if key in fields:
        return f"{received}; in a file write `{name}:` in the section `{section}:`"
    sections = list(dict.fromkeys(known.rpartition(".")[0] for known in fields if "." in known))
    if key in sections:
        return f"{received}; {_section(key, fields)}"
    near = hint(key, fields if section else [*fields, *sections])
    if not near and section in sections:
        near = f"; {_section(section, fields)}"
    elif not near:
        near = f"; sections: {', '.join(sections)}" if sections else f"; settings: {', '.join(fields)}"
    return f"{received}; no such setting{near}"


def _section(section: str, keys: Iterable[str]) -> str:
    return f"{section} holds {', '.join(key for key in keys if key.startswith(section + '.'))}"


def _allowed(key: str, details: Sequence[ErrorDetails], fields: Fields) -> str:
    """What a key may be, from its declared bounds or from pydantic's messages."""
    if key not in fields:
        return _section(key, fields)
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{sign} {bound}"
        for limit in fields[key].metadata
        for name, sign in signs.items()
        if (bound := getattr(limit, name, None)) is not None
    ]
    if bounds and details[0]["type"].startswith(("greater_than", "less_than")):
        return f"allowed: {' and '.join(bounds)}"
    kinds, messages = kinds_of(fields[key].annotation), []
    choices = choices_of([*kinds, *items_of(kinds)])
    for detail in details:
        message = re.sub("^Input |^Value error, |, unable to .*| after validation, .*", "", detail["msg"])
        item = detail["loc"][-1]
        if isinstance(item, int):
            message = f"needs {item + 1} items" if detail["type"] == "missing" else f"each item {message}"
        inner = detail["loc"][key.count(".") + 1 :] if has_parts(kinds) else ()
        messages.append("".join(f"{name}: " for name in inner if isinstance(name, str)) + message)
        choices |= set(detail.get("ctx", {}).get("names", "").split(", "))
    return " or ".join(dict.fromkeys(messages)) + hint(str(details[0]["input"]), sorted(choices))


def hint(word: str, choices: Iterable[str]) -> str:
    """Name the choices that have all parts of the word, or the one a slip of the keys away; empty if none is near."""
    last_names = {choice.rpartition(".")[2]: choice for choice in choices if choice}
    parts = set(re.split(r"[._-]", word))
    near = [choice for choice in last_names.values() if parts <= set(re.split(r"[._]", choice))][:3]
    near = near or [
        last_names[name] for name in get_close_matches(word.rpartition(".")[2], last_names, n=1, cutoff=0.7)
    ]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def description_of(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def text_of(value: Any) -> str:
    """A value as it is written in YAML."""
    if isinstance(value, str):
        return value or "''"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {text_of(item)}' for key, item in value.items())}}}"
    return str(value)


def shown(value: Any) -> str:
    """A value as it is written in YAML, shortened to 60 characters."""
    words = text_of(value)
    return words if len(words) <= 60 else f"{words[:57]}..."

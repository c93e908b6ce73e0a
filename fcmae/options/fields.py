"""The settings of a command by dotted key: their types and spellings, and values in sections."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fcmae.config.base import Section, Spelling

Fields = dict[str, FieldInfo]


class Also(Section):
    """What every command line may give besides settings."""

    config: str | None = None
    """A YAML file of settings, or the name of a shipped one (`fcmae configs`)."""
    print_config: bool = False
    """Print all settings as a run would use them, but for those that an evaluation takes from its weights, and stop."""
    debug: bool = False
    """Show the traceback of an error."""


@cache
def fields_of(model: type[BaseModel]) -> Fields:
    """Every setting, by its dotted key."""
    found: Fields = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, Section):
            found |= {f"{name}.{key}": inner for key, inner in fields_of(kind).items()}
        else:
            found[name] = field
    return found


def spelling_of(field: FieldInfo) -> Spelling:
    """How the setting is written on a command line."""
    return next((mark for mark in field.metadata if isinstance(mark, Spelling)), Spelling())


def kinds_of(annotation: Any) -> list[Any]:
    """The types that a value may have, without None."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        args = get_args(annotation)
        args = args[:1] if get_origin(annotation) is Annotated else args
        return [kind for arg in args if arg is not type(None) for kind in kinds_of(arg)]
    return [annotation]


def is_list(kinds: Iterable[Any]) -> bool:
    """Whether a value may be a list."""
    return any(get_origin(kind) in (list, tuple) for kind in kinds)


def items_of(kinds: Iterable[Any]) -> list[Any]:
    """The types that the items of a list may have."""
    return [item for kind in kinds for arg in get_args(kind) for item in kinds_of(arg)]


def choices_of(kinds: Iterable[Any]) -> set[str]:
    """The words that a value of these types may be."""
    return {word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)}


def has_parts(kinds: Iterable[Any]) -> bool:
    """Whether a value may be a mapping."""
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)


def pairs(settings: Mapping[str, Any], fields: Fields, section: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys and values of a mapping whose sections may be mappings.

    Args:
        settings: by key, nested or dotted.
        fields: the settings that there are, which tell a section from a value that is a mapping.
        section: what keys begin with, as in "data.".
    """
    for name, value in settings.items():
        key = f"{section}{name}"
        if isinstance(value, Mapping) and any(known.startswith(f"{key}.") for known in fields):
            yield from pairs(value, fields, f"{key}.")
        else:
            yield key, plain(value)


def put(settings: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set values by dotted key in the sections of `settings`."""
    for key, value in values.items():
        *sections, name = key.split(".")
        place: Any = settings
        for section in sections:  # a non-section in a section's place stays to be reported
            place = place.setdefault(section, {}) if isinstance(place, dict) else place
        if isinstance(place, dict):
            place[name] = value


def plain(value: Any) -> Any:
    """A copy in which `none` is None, as YAML's null is, and every key and path a text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [item if isinstance(item, str) else plain(item) for item in value]
    if hasattr(value, "tolist"):  # of numpy or torch
        return plain(value.tolist())
    return None if value == "none" else os.fspath(value) if isinstance(value, os.PathLike) else value

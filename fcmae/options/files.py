"""YAML files of settings: where they are and what they hold, as texts that the settings read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from fcmae.atomic import read_bytes
from fcmae.options.fields import plain
from fcmae.options.problems import ConfigError, hint, shown

MAX_YAML = 2**18  # bytes of a file of settings: YAML is read at some 100 kB a second


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name: from fcmae/configs, or configs/ in a clone."""
    package = Path(__file__).parent.parent
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str, key: str = "--config") -> Path:
    """A YAML file by its path, or a shipped one by its name, with or without .yaml.

    Args:
        name: or path.
        key: the flag that errors name.

    Raises:
        ConfigError: If it is neither; it lists the shipped names.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111  # Path's fails of an unknown user
    if path.is_file():
        return path
    shipped = shipped_configs()
    stem = name.removesuffix(".yaml")
    if stem in shipped:
        return shipped[stem]
    raise ConfigError(
        [f"{key}: received {name}; no such file, nor one of {', '.join(shipped)}{hint(Path(stem).name, shipped)}"]
    )


class _Loader(yaml.SafeLoader):
    """Leaves every word but null as text, for the setting to read; knows mappings, lists and words, and nothing else.

    YAML would keep the last of two values of a key in silence, and take 2024-01-01 for a date, 1e-4 for a text and 010
    for 8. A few lines that refer to each other stand for terabytes, or for no end.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(None, None, f"*{event.anchor}: write the value out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "the name of a setting is a word", key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value} is given twice: leave one out", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_constructors = {  # None: what refuses every other
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.endswith((":map", ":seq", ":str", ":null"))
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """What a text in YAML holds: texts, None, and lists and mappings of them.

    Raises:
        YAMLError: If it is not YAML without aliases.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings that a YAML file holds, as texts, lists and mappings.

    Args:
        path: of the file.

    Raises:
        ConfigError: If it is no file that can be read, larger than MAX_YAML bytes, or not YAML without aliases.
    """
    try:
        content = parse_yaml(read_bytes(path, MAX_YAML).decode())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        what = getattr(error, "problem", None) or getattr(error, "strerror", None) or error
        remedy = "" if mark else "; give a text file in UTF-8 of lines `key: value`"
        raise ConfigError([f"{path}:{where} cannot be read as YAML: {' '.join(str(what).split())}{remedy}"]) from error
    if not isinstance(content, dict | None):
        raise ConfigError([f"{path}: received {shown(content)}; a configuration is lines of `key: value`"])
    return dict(plain(content or {}))

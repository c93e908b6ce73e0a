"""From YAML files and flags to the settings of a run, and back.

Flags override the file, the file overrides the defaults of `fcmae.config`. Everything that is wrong is reported
at once, a line for each problem. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fcmae.config import FREE_ON_RESUME, RunConfig
from fcmae.flags import parse_flags

Config = TypeVar("Config", bound=RunConfig)


class ConfigError(ValueError):
    """Settings that cannot be used: one line for each problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))


def load(config_cls: type[Config], argv: Sequence[str], *, prog: str) -> Config:
    """Read the settings of a run from its command line and the file that `--config` names.

    argv: the flags, e.g. ["--config", "pretrain_atto", "--out", "runs/first"]. prog: the command, for `--help`.
    Raises ConfigError with every unknown key, wrong value and impossible combination in file and flags.
    Raises SystemExit(0) after printing for `--help` and for `--print-config`.
    """
    fields = dict(_fields(config_cls))
    line = parse_flags(config_cls, fields, argv, prog)
    settings = line.settings
    problems = [f"{key}: {message}" for key, message in line.unreadable.items()]
    problems += [_unknown(key, value, fields) for key, value in line.unknown]
    if line.config is not None:
        try:
            settings = _merge(_read_yaml(find_config(line.config)), settings)
        except ConfigError as error:
            raise ConfigError([*problems, str(error)]) from error
    config, invalid = _validate(config_cls, settings, fields)
    problems += invalid.values()
    wrong = {*invalid, *line.unreadable}
    for keys, sentence in config.conflicts():
        if not wrong.intersection(keys):
            problems.append(f"{keys[0]}: {sentence}")
    if problems:
        raise ConfigError(problems)
    if line.print_config:
        print(dump(config), end="")
        raise SystemExit(0)
    return config


def read(config_cls: type[Config], path: Path) -> Config:
    """The settings that `dump` wrote to path, as they were: not checked against this machine's processes.

    Raises ConfigError if the file cannot be read or holds anything but such settings.
    """
    config, invalid = _validate(config_cls, _read_yaml(path), dict(_fields(config_cls)))
    if invalid:
        raise ConfigError([f"{path}: {problem}" for problem in invalid.values()])
    return config


class _Dumper(yaml.SafeDumper):
    """Settings one a line: lists inline."""

    def represent_sequence(
        self, tag: str, sequence: Iterable[Any], flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)


def dump(config: RunConfig) -> str:
    """The settings as YAML, which loads back equal."""
    # ASCII only: PyYAML writes some line breaks of Unicode as they are and reads them as spaces.
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)


def diff(saved: RunConfig, new: RunConfig) -> list[str]:
    """One sentence for each setting that differs and that a resumed run may not change (FREE_ON_RESUME)."""
    before, after = dict(_leaves(saved.model_dump(mode="json"))), dict(_leaves(new.model_dump(mode="json")))
    return [
        f"{key}: the run has {_shown(before.get(key))}, this command {_shown(after.get(key))}"
        for key in {**before, **after}
        if key not in FREE_ON_RESUME and before.get(key) != after.get(key)
    ]


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name: from fcmae/configs, or configs/ in a clone."""
    package = Path(__file__).parent
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """A YAML file by its path, or a shipped one by its name, with or without .yaml.

    Raises ConfigError, which lists the shipped names, if it is neither.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_configs()
    stem = name.removesuffix(".yaml")
    if stem in shipped:
        return shipped[stem]
    raise ConfigError(
        [f"--config: received {name}; no such file, nor one of {', '.join(shipped)}{_hint(Path(stem).name, shipped)}"]
    )


# YAML files


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would keep the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        what = getattr(error, "problem", None) or getattr(error, "strerror", None) or error
        raise ConfigError([f"{path}:{where} cannot be read as YAML: {' '.join(str(what).split())}"]) from error
    if not isinstance(content, dict | None):
        raise ConfigError([f"{path}: received {_shown(content)}; a configuration is lines of `key: value`"])
    return {str(key): value for key, value in (content or {}).items()}


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of both, of `above` where both have them. A non-section in a section's place stays to be reported."""
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key, {}) if isinstance(value, Mapping) else value
        merged[key] = _merge(old, value) if isinstance(old, Mapping) else old
    return merged


# Checking and wording


def _fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting, by its dotted key."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value: Any) -> Any:
    """A copy in which `none` is None, as YAML's null is, and every key a string."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return None if value == "none" else value


def _validate(
    config_cls: type[Config], settings: Mapping[str, Any], fields: Mapping[str, FieldInfo]
) -> tuple[Config, dict[str, str]]:
    """Build the settings. What cannot be used is left at its default and reported, by key."""
    usable = _plain(settings)
    try:
        return config_cls.model_validate(usable), {}
    except ValidationError as error:
        found: dict[tuple[str, ...], list[ErrorDetails]] = {}
        for detail in error.errors(include_url=False):
            names = tuple(map(str, detail["loc"]))
            ends = [end for end in range(1, len(names)) if ".".join(names[:end]) in fields]
            found.setdefault(names[: ends[0]] if ends else names, []).append(detail)
    problems = {}
    for names, details in found.items():
        section = usable
        for name in names[:-1]:
            section = section[name]
        value, key = section.pop(names[-1]), ".".join(names)
        if details[0]["type"] == "extra_forbidden":
            problems[key] = _unknown(key, value, fields)
        else:
            problems[key] = f"{key}: received {_shown(value)}; {_allowed(key, details, fields)}"
    return config_cls.model_validate(usable), problems


def _unknown(key: str, value: Any, fields: Iterable[str]) -> str:
    keys = list(fields)
    received, (section, _, name) = f"{key}: received {_shown(value)}", key.rpartition(".")
    if key in keys:
        return f"{received}; in a file write `{name}:` in the section `{section}:`"
    sections = list(dict.fromkeys(known.rpartition(".")[0] for known in keys if "." in known))
    if key in sections:
        return f"{received}; {_section(key, keys)}"
    hint = _hint(key, keys if section else [*keys, *sections])
    if not hint:
        hint = f"; {_section(section, keys)}" if section in sections else f"; sections: {', '.join(sections)}"
    return f"{received}; no such setting{hint}"


def _section(section: str, keys: Iterable[str]) -> str:
    return f"{section} holds {', '.join(key for key in keys if key.startswith(section + '.'))}"


def _allowed(key: str, details: Sequence[ErrorDetails], fields: Mapping[str, FieldInfo]) -> str:
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
    messages, choices = [], []
    for detail in details:
        message = re.sub("^Input |^Value error, |, unable to .*| after validation, .*", "", detail["msg"])
        item = detail["loc"][-1]
        if isinstance(item, int):
            message = f"needs {item + 1} items" if detail["type"] == "missing" else f"each item {message}"
        messages.append(message)
        choices += re.findall(r"'(\w+)'", message) if detail["type"] == "literal_error" else []
    return " or ".join(dict.fromkeys(messages)) + _hint(str(details[0]["input"]), choices)


def _hint(word: str, choices: Iterable[str]) -> str:
    """Name the choices that have all parts of the word, or the one a slip of the keys away; empty if none is near."""
    last_names = {choice.rpartition(".")[2]: choice for choice in choices}
    parts = set(re.split(r"[._-]", word))
    near = [choice for choice in last_names.values() if parts <= set(re.split(r"[._]", choice))][:3]
    near = near or [
        last_names[name] for name in get_close_matches(word.rpartition(".")[2], last_names, n=1, cutoff=0.7)
    ]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _shown(value: Any) -> str:
    """A value as it is written in YAML, shortened to 60 characters."""
    if isinstance(value, str):
        text = value or "''"
    elif value is None or isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(map(_shown, value))}]"
    else:
        text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

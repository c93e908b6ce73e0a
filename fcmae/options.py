"""YAML files, command lines and mappings to the settings of a command, and back.

A flag's text means what it would mean in a file, where it stands without quotes: the setting it is given to reads it.
Flags override the file, the file overrides the defaults of `fcmae.config`. Everything that is wrong is reported at
once, a line for each problem. Nothing here imports torch.
"""

from __future__ import annotations

import copy
import os
import re
import textwrap
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from difflib import get_close_matches
from functools import cache, reduce
from inspect import cleandoc
from operator import getitem
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fcmae.atomic import read_bytes
from fcmae.config import FREE_ON_RESUME, DenseConfig, RunConfig
from fcmae.config.base import Section, Settings, Spelling
from fcmae.networks.spec import NetworkSpec

Config = TypeVar("Config", bound=Settings)
Model = TypeVar("Model", bound=BaseModel)
Fields = dict[str, FieldInfo]
# From settings that are checked one by one only, and from those that were given, by dotted key: the rest, likewise.
Complete = Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
HELP = ("-h", "--help")
SWITCHED = {"true", "false", "yes", "no", "on", "off", "1", "0"}  # what a switch takes for its value
TO_CHOOSE = {"grad_accum", "chosen", "planned_s"}  # what stays to be chosen where all else is given
# What a file has for its own number of epochs, which hours replace.
OF_EPOCHS = ("epochs", "optim.warmup_epochs", "checkpoint.every_epochs", "log.eval_epochs", "log.every_steps")
NONE = {"none", "null", "~"}
MAX_YAML = 2**18  # bytes of a file of settings: YAML is read at some 100 kB a second


class ConfigError(ValueError):
    """Settings that cannot be used: one line for each problem."""

    def __init__(self, problems: Iterable[str]) -> None:
        super().__init__("\n".join(problems))


class _Also(Section):
    """What every command line may give besides settings."""

    config: str | None = None
    """A YAML file of settings, or the name of a shipped one (`fcmae configs`)."""
    print_config: bool = False
    """Print all settings as a run would use them, but for those that an evaluation takes from its weights, and stop."""
    debug: bool = False
    """Show the traceback of an error."""


def load(
    model: type[Config],
    argv: Sequence[str],
    *,
    prog: str,
    num_processes: int | None = None,
    complete: Complete | None = None,
) -> Config:
    """Read the settings of a command from its command line and the file that `--config` in it names.

    Args:
        model: The command's settings.
        argv: Its words, e.g. ["photos", "--config", "pretrain_atto", "--out", "runs/first"].
        prog: The command, for `--help`.
        num_processes: That a run is started on; None checks neither that nor what is installed here.
        complete: Chooses what was not given, where there is no file, or neither epochs nor batch_size beside it, or
            hours to fill.

    Raises:
        ConfigError: With every unknown key, wrong value and impossible combination in file and command line.
        SystemExit: With status 0, after printing for `--help` and for `--print-config`.
    """
    if any(word in HELP for word in argv):
        print(usage(model, prog))
        raise SystemExit(0)
    values, wrong, problems = _parse(model, argv, prog)
    also, invalid = _validate(_Also, {name: values.pop(name) for name in _Also.model_fields if name in values})
    problems += invalid
    file = None if also is None else also.config
    try:
        settings = {} if file is None else read_yaml(find_config(file))
    except ConfigError as error:
        raise ConfigError([*problems, str(error)]) from error
    config = _made(model, settings, values, file is not None, num_processes, complete, wrong, problems)
    if also is not None and also.print_config:
        if isinstance(config, RunConfig):  # what is printed may start a run that goes on
            config = config.model_copy(update={"overwrite": False})
        print(dump(config), end="")
        raise SystemExit(0)
    return config


def make(
    model: type[Config],
    settings: Mapping[str, Any],
    config: str | None = None,
    num_processes: int | None = None,
    complete: Complete | None = None,
) -> Config:
    """The settings of a command from Python, checked as those of its command line.

    Args:
        model: The command's settings.
        settings: Values by key; sections are mappings, or keys are dotted, as in {"data.image_size": 64}.
        config: A YAML file, or the name of a shipped one, that `settings` goes before.
        num_processes: See `load`.
        complete: See `load`.

    Raises:
        ConfigError: See `load`.
    """
    values = {} if config is None else read_yaml(find_config(config))
    return _made(model, values, flattened(model, settings), config is not None, num_processes, complete)


def _made(
    model: type[Config],
    settings: dict[str, Any],
    given: Mapping[str, Any],
    has_file: bool,
    num_processes: int | None,
    complete: Complete | None,
    wrong: Iterable[str] = (),
    problems: Sequence[str] = (),
) -> Config:
    """What is given goes before the file's, and hours before its epochs; the rest is chosen, and all is checked."""
    if given.get("hours") is not None and "epochs" not in given and "epochs" in settings:
        for key in OF_EPOCHS:
            section, _, name = key.rpartition(".")
            place = settings.get(section) if section else settings
            if isinstance(place, dict):
                place.pop(name, None)
    _put(settings, given)
    sketch, invalid = _validate(model, settings, (), {"sketch": True})
    if isinstance(sketch, RunConfig) and sketch.overwrite and "overwrite" not in given:
        problems = [*problems, "overwrite: it is in a file, and would delete the run at every start: give --overwrite"]
    if sketch is not None and not _trains(sketch):
        complete = None
    # Nothing is chosen beside a recipe, unless there are hours for which it was not yet.
    has_recipe = has_file and is_recipe(settings)
    to_fill = given.get("hours") is not None or (getattr(sketch, "hours", None) and not getattr(sketch, "chosen", None))
    chooses = complete is not None and (to_fill or not has_recipe)
    known = {key for key, _ in _pairs(settings, _fields(model))} if chooses else None
    if complete is not None and known is not None and sketch is not None and not (problems or invalid):
        keys = known - (TO_CHOOSE if flat(sketch).get("grad_accum") == "auto" else set())
        keys |= {"model.stem_stride"} if _tells_stride(settings) else set()
        _put(settings, complete(sketch, {key: value for key, value in flat(sketch).items() if key in keys}))
        known = None
    config, wrong_together = _validate(model, settings, wrong, {"num_processes": num_processes}, known)
    if config is None or problems or wrong_together:
        raise ConfigError([*problems, *dict.fromkeys([*invalid, *wrong_together])])
    if isinstance(config, RunConfig) and has_file and not chooses and (changed := given.keys() - {"out"}):
        told = {key: why for key, why in config.chosen.items() if key not in changed}  # as another run's file has it
        config = config.model_copy(update={"chosen": told, "planned_s": None})
    return config if complete is None else settled(config, complete)


def is_recipe(settings: Mapping[str, Any]) -> bool:
    """Whether settings of a file are a whole recipe, beside which nothing is chosen.

    Args:
        settings: by key, nested or dotted.
    """
    return not settings.keys().isdisjoint({"epochs", "batch_size"})


def _tells_stride(settings: Mapping[str, Any]) -> bool:
    """Whether the numbers of a network are given with its stem's stride, which is a setting of its own."""
    variant = settings.get("model", {}).get("variant")
    return "stem_stride" in (variant.model_fields_set if isinstance(variant, NetworkSpec) else str(variant))


def _trains(sketch: Settings) -> bool:
    """Whether it is of a run that trains, and says on what."""
    values = flat(sketch)
    return bool(values.get("data.path")) and not values.get("eval_only")


def settled(config: Config, complete: Complete) -> Config:
    """The settings with grad_accum chosen, where it is auto and the run trains.

    Args:
        config: Of a run.
        complete: See `load`.
    """
    values = flat(config)
    if values.get("grad_accum") != "auto" or not _trains(config):
        return config
    found = complete(config, {key: value for key, value in values.items() if key not in TO_CHOOSE})
    return config.model_copy(update=dict(found))  # what else was given and what was not stays to be seen


def flattened(model: type[Settings], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, from a mapping whose sections may be mappings.

    Raises:
        ConfigError: If one is given in both ways.
    """
    pairs = list(_pairs(settings, _fields(model)))
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ConfigError(f"{key}: given twice: leave one out" for key in twice)
    return dict(pairs)


def read(model: type[Config], path: Path) -> Config:
    """The settings that `dump` wrote, whatever this machine has and however many processes it starts.

    Raises:
        ConfigError: If the file cannot be read or holds anything but such settings.
    """
    config, problems = _validate(model, read_yaml(path))
    if config is None or problems:
        raise ConfigError(f"{path}: {problem}" for problem in problems)
    return config


class _Dumper(yaml.SafeDumper):
    """Settings one a line: lists inline."""

    def represent_sequence(
        self, tag: str, sequence: Iterable[Any], flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)


def dump(config: Settings) -> str:
    """The settings as YAML, which loads back equal; without those that an evaluation takes from its weights."""
    # ASCII only: PyYAML writes some line breaks of Unicode as they are and reads them as spaces.
    return yaml.dump(_values(config), Dumper=_Dumper, sort_keys=False, width=120)


def flat(config: Settings) -> dict[str, Any]:
    """The settings by their dotted keys, as JSON values; without those that an evaluation takes from its weights."""
    settings = _values(config)
    found = {}
    for key in _fields(type(config)):
        *sections, name = key.split(".")
        section: dict[str, Any] = reduce(getitem, sections, settings)
        if name in section:
            found[key] = section[name]
    return found


def _values(config: Settings) -> dict[str, Any]:
    settings = config.model_dump(mode="json")
    if isinstance(config, DenseConfig) and config.eval_only:
        for name in config.of_weights - config.data.model_fields_set:
            settings["data"].pop(name, None)
    return settings


def changed(config: Settings) -> dict[str, Any]:
    """The settings that have to be given to get these again: without any one of them others would come out."""
    found = {}
    for key, value in flat(config).items():
        rest = config.model_dump(mode="json")
        *sections, name = key.split(".")
        del reduce(getitem, sections, rest)[name]
        try:
            needed = type(config).model_validate(rest) != config
        except ValidationError:
            needed = True
        if needed:
            found[key] = value
    return found


def flags(values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give these settings.

    Args:
        values: By dotted key, as `flat` has them.
    """
    words = []
    for key, value in values.items():
        items = value if isinstance(value, list) else [value]
        texts = [item if isinstance(item, str) else text(item) for item in items]
        if isinstance(value, list) and (not texts or texts[0] in NONE or any(set(text) & set(",[{") for text in texts)):
            texts = [yaml.safe_dump(value, default_flow_style=True, width=10**9).strip()]
        # What looks like a flag must not stand alone.
        words += [f"--{key}={text}" for text in texts] if any(map(_is_flag, texts)) else [f"--{key}", *texts]
    return words


def diff(saved: RunConfig, new: RunConfig) -> list[str]:
    """One sentence for each setting that differs and that a resumed run may not change (FREE_ON_RESUME)."""
    before, after = flat(saved), flat(new)
    return [
        f"{key}: the run has {_shown(before.get(key))}, this command {_shown(after.get(key))}"
        for key in {**before, **after}
        if key not in FREE_ON_RESUME and _compared(key, before) != _compared(key, after)
    ]


def _compared(key: str, values: Mapping[str, Any]) -> Any:
    """A name below runs/ is completed only as long as that run is there, which one that goes on no longer needs."""
    value = values.get(key)
    return value.removeprefix("runs/") if key == "model.init" and value else value


def words_of(model: type[Settings]) -> dict[str, list[str]]:
    """Every flag of a command, for the completion of its line, each with the words that its value may be, if few."""
    found: dict[str, list[str]] = {}
    for key, field in {**_fields(model), **_fields(_Also)}.items():
        if _spelling(field).hidden:
            continue
        kinds = _kinds(field.annotation)
        words = sorted(_choices([*kinds, *_items(kinds)])) + (["true", "false"] if bool in kinds else [])
        words = [*shipped_configs()] if key == "config" else words
        found |= {f"--{name}": words for name in (_spelling(field).short, key) if name}
    return found


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
        Setting(key, _metavar(field.annotation), _default(field), _description(field))
        for key, field in _fields(model).items()
        if not _spelling(field).hidden
    ]


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name: from fcmae/configs, or configs/ in a clone."""
    package = Path(__file__).parent
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


# YAML files


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


def _parse_yaml(text: str) -> Any:
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
        content = _parse_yaml(read_bytes(path, MAX_YAML).decode())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}:" if mark else ""
        what = getattr(error, "problem", None) or getattr(error, "strerror", None) or error
        remedy = "" if mark else "; give a text file in UTF-8 of lines `key: value`"
        raise ConfigError([f"{path}:{where} cannot be read as YAML: {' '.join(str(what).split())}{remedy}"]) from error
    if not isinstance(content, dict | None):
        raise ConfigError([f"{path}: received {_shown(content)}; a configuration is lines of `key: value`"])
    return dict(_plain(content or {}))


def _plain(value: Any) -> Any:
    """A copy in which `none` is None, as YAML's null is, and every key and path a text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [item if isinstance(item, str) else _plain(item) for item in value]
    if hasattr(value, "tolist"):  # of numpy or torch
        return _plain(value.tolist())
    return None if value == "none" else os.fspath(value) if isinstance(value, os.PathLike) else value


# Command lines


def _is_flag(word: str) -> bool:
    return re.match("--|-[A-Za-z]", word) is not None


def _parse(model: type[Settings], argv: Sequence[str], prog: str) -> tuple[dict[str, Any], set[str], list[str]]:
    """Read a command line to its end: values by key, the keys that could not be read, and what is wrong."""
    fields = _fields(model)
    known = {**fields, **_fields(_Also)}
    shown = {key: field for key, field in known.items() if not _spelling(field).hidden}
    names = {name: key for key, field in shown.items() for name in (key, _spelling(field).short) if name}
    given: dict[str, list[str]] = {}
    words, loose, wrong, unknown = deque(argv), list[str](), dict[str, str](), list[str]()
    while words:
        word = words.popleft()
        if not _is_flag(word):
            loose.append(word)
            continue
        flag, equals, text = word.lstrip("-").partition("=")
        key, texts = names.get(flag.replace("-", "_")), [text] if equals else []
        kinds = _kinds(known[key].annotation) if key else []
        while words and not equals and not _is_flag(words[0]) and (not texts or _is_list(kinds)):
            if kinds == [bool] and words[0].lower() not in SWITCHED:
                break
            texts.append(words.popleft())
        if key is None:
            unknown.append(_unknown(flag, texts[0] if texts else "", fields))
        elif texts or bool in kinds:
            given.setdefault(key, []).extend(texts or ["true"])
        else:
            wrong[key] = f"{key}: needs a value"
    values = {key: _value(known[key], texts) for key, texts in given.items()}
    for key, field in fields.items():
        if loose and _spelling(field).argument and key not in given:
            many = _is_list(_kinds(field.annotation))
            values[key], loose = (loose, []) if many else (loose[0], loose[1:])
    unknown += [f"{word}: one argument too many; {_usage(model, prog)}" for word in loose]
    return values, set(wrong), [*wrong.values(), *unknown]


def _value(field: FieldInfo, texts: list[str]) -> Any:
    """What a flag's texts say; the last one, or all where a list is asked for."""
    kinds = _kinds(field.annotation)
    if len(texts) == 1 and (texts[0] in NONE or texts[0] in _choices(kinds)):
        return None if texts[0] in NONE else texts[0]
    if not _is_list(kinds):
        return _flow(texts[-1]) if _has_parts(kinds) else texts[-1]
    items: list[Any] = []
    for text in texts:
        value = _flow(text)
        commas = _spelling(field).commas
        items += value if isinstance(value, list) else text.split(",") if commas else [text]
    return items


def _flow(text: str) -> Any:
    """A list or mapping that is written as in YAML or JSON; other text as it is."""
    if text.startswith(("[", "{")):
        with suppress(yaml.YAMLError):
            return _parse_yaml(text)
    return text


# Help


def usage(model: type[Settings], prog: str) -> str:
    """The text of `--help`: what the command does, and each setting with its default."""
    lines, fields, section = [f"usage: {_usage(model, prog)}", "", cleandoc(model.__doc__ or "")], _fields(model), None
    arguments = {key: field for key, field in fields.items() if _spelling(field).argument}
    if arguments:
        lines += ["", "arguments:", *(_row(_argument(field), field) for field in arguments.values())]
    # What is in no section goes first, in one piece.
    for key, field in [*sorted(fields.items(), key=lambda item: "." in item[0]), *_fields(_Also).items()]:
        title = "also" if key in _Also.model_fields else key.rpartition(".")[0] or "settings"
        if (key in arguments and "." not in key) or _spelling(field).hidden:
            continue
        if title != section:
            lines += ["", f"{title}:"]
            section = title
        short = f"--{_spelling(field).short}, " if _spelling(field).short else ""
        shown = key.replace("_", "-") if title == "also" else key
        lines.append(_row(f"{short}--{shown} {_metavar(field.annotation)}", field))
    notes = (
        "A flag's value means the same as in a YAML file. Write a list as 0.2,1 or 0.2 1 or [0.2, 1], or repeat the "
        "flag. To unset an optional setting, give `none`. Dashes and underscores are interchangeable."
    )
    if issubclass(model, RunConfig):
        notes = f"In brackets: what a setting is beside a recipe; without one many are chosen (--print-config). {notes}"
    return "\n".join([*lines, "", *textwrap.wrap(notes, 100)])


def _usage(model: type[Settings], prog: str) -> str:
    arguments = [_argument(field) for field in _fields(model).values() if _spelling(field).argument]
    return " ".join([prog, *arguments, "[--config NAME] [--KEY VALUE ...]"])


def _argument(field: FieldInfo) -> str:
    text = _spelling(field).argument + (" ..." if _is_list(_kinds(field.annotation)) else "")
    return text if field.is_required() else f"[{text}]"


def _row(left: str, field: FieldInfo) -> str:
    text = _description(field) + (f" [{default}]" if (default := _default(field)) else "")
    first = f"  {left:27} " if len(left) < 28 else f"  {left}\n{'':30}"
    wrapped = textwrap.wrap(text, 70, break_long_words=False, break_on_hyphens=False)
    return first + f"\n{'':30}".join(wrapped)


def _description(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _default(field: FieldInfo) -> str:
    """As a flag has it; empty if there is none, or the description says it."""
    default = field.get_default(call_default_factory=True)
    if field.is_required() or default in (None, []) or "Default:" in (field.description or ""):
        return ""
    return ",".join(map(str, default)) if isinstance(default, list | tuple) else _shown(default)


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


# Fields


@cache
def _fields(model: type[BaseModel]) -> Fields:
    """Every setting, by its dotted key."""
    found: Fields = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, Section):
            found |= {f"{name}.{key}": inner for key, inner in _fields(kind).items()}
        else:
            found[name] = field
    return found


def _spelling(field: FieldInfo) -> Spelling:
    return next((mark for mark in field.metadata if isinstance(mark, Spelling)), Spelling())


def _kinds(annotation: Any) -> list[Any]:
    """The types that a value may have, without None."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        args = get_args(annotation)
        args = args[:1] if get_origin(annotation) is Annotated else args
        return [kind for arg in args if arg is not type(None) for kind in _kinds(arg)]
    return [annotation]


def _is_list(kinds: Iterable[Any]) -> bool:
    return any(get_origin(kind) in (list, tuple) for kind in kinds)


def _items(kinds: Iterable[Any]) -> list[Any]:
    """The types that the items of a list may have."""
    return [item for kind in kinds for arg in get_args(kind) for item in _kinds(arg)]


def _choices(kinds: Iterable[Any]) -> set[str]:
    """The words that a value of these types may be."""
    return {word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)}


def _has_parts(kinds: Iterable[Any]) -> bool:
    """Whether a value may be a mapping."""
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in kinds)


def _pairs(settings: Mapping[str, Any], fields: Fields, section: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys and values of a mapping whose sections may be mappings."""
    for name, value in settings.items():
        key = f"{section}{name}"
        if isinstance(value, Mapping) and any(known.startswith(f"{key}.") for known in fields):
            yield from _pairs(value, fields, f"{key}.")
        else:
            yield key, _plain(value)


def _put(settings: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set values by dotted key in the sections of `settings`."""
    for key, value in values.items():
        *sections, name = key.split(".")
        place: Any = settings
        for section in sections:  # a non-section in a section's place stays to be reported
            place = place.setdefault(section, {}) if isinstance(place, dict) else place
        if isinstance(place, dict):
            place[name] = value


# Checking and wording


def _validate(
    model: type[Model],
    settings: Mapping[str, Any],
    wrong: Iterable[str] = (),
    context: dict[str, Any] | None = None,
    known: Set[str] | None = None,
) -> tuple[Model | None, list[str]]:
    """The settings, if they can be used, and what is wrong with them, each key once.

    wrong: keys that are reported already. known: keys of which combinations are reported, where others are still to be
    chosen; None is all. What is wrong gives way to its default or example, so that the rest is checked too; a
    combination that involves it is not reported.
    """
    fields, usable, seen, problems = _fields(model), copy.deepcopy(dict(settings)), set(wrong), list[str]()
    while True:
        try:
            return model.model_validate(usable, context=context), problems
        except ValidationError as error:
            found = error.errors(include_url=False)
        if all(detail["type"] == "conflict" for detail in found):
            conflicts = [(detail["ctx"]["keys"], detail["msg"]) for detail in found]
            told = [
                f"{keys[0]}: {text}"
                for keys, text in conflicts
                if not seen.intersection(keys) and (known is None or known >= {*keys})
            ]
            return None, [*problems, *told]
        groups: dict[tuple[str, ...], list[ErrorDetails]] = {}
        for detail in [detail for detail in found if detail["type"] != "conflict"]:  # which is found again
            names = tuple(map(str, detail["loc"]))
            ends = [end for end in range(1, len(names)) if ".".join(names[:end]) in fields]
            groups.setdefault(names[: ends[0]] if ends else names, []).append(detail)
        for names, details in groups.items():
            section: Any = usable
            for name in names[:-1]:
                section = section[name]
            key, value = ".".join(names), section.pop(names[-1], None)
            if key in fields and fields[key].is_required():
                section[names[-1]] = (fields[key].examples or [value])[0]
                assert value is not section[names[-1]], f"{key} needs a good example"
            kind = details[0]["type"] if len(details[0]["loc"]) == len(names) else "part"
            if kind == "extra_forbidden":
                problem = _unknown(key, value, fields)
            elif kind == "missing":
                problem = f"{key}: missing: {_description(fields[key])}"
            else:
                problem = f"{key}: received {_shown(value)}; {_allowed(key, details, fields)}"
            problems += [] if key in seen else [problem]
            seen.add(key)


def _unknown(key: str, value: Any, fields: Fields) -> str:
    received, (section, _, name) = f"{key}: received {_shown(value)}", key.rpartition(".")
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
    kinds, messages = _kinds(fields[key].annotation), []
    choices = _choices([*kinds, *_items(kinds)])
    for detail in details:
        message = re.sub("^Input |^Value error, |, unable to .*| after validation, .*", "", detail["msg"])
        item = detail["loc"][-1]
        if isinstance(item, int):
            message = f"needs {item + 1} items" if detail["type"] == "missing" else f"each item {message}"
        inner = detail["loc"][key.count(".") + 1 :] if _has_parts(kinds) else ()
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


def text(value: Any) -> str:
    """A value as it is written in YAML."""
    if isinstance(value, str):
        return value or "''"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {text(item)}' for key, item in value.items())}}}"
    return str(value)


def _shown(value: Any) -> str:
    """The same, shortened to 60 characters."""
    words = text(value)
    return words if len(words) <= 60 else f"{words[:57]}..."

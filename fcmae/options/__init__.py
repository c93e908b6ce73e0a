"""YAML files, command lines and mappings to the settings of a command, and back.

A flag's text means what it would mean in a file, where it stands without quotes: the setting it is given to reads it.
Flags override the file, the file overrides the defaults of `fcmae.config`. Everything that is wrong is reported at
once, a line for each problem. Nothing here imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from fcmae.config import FREE_ON_RESUME, AnyRun, DenseConfig, RunConfig
from fcmae.config.base import Settings
from fcmae.networks.spec import NetworkSpec
from fcmae.options.fields import Also, fields_of, pairs, put
from fcmae.options.files import find_config, read_yaml
from fcmae.options.help import usage
from fcmae.options.line import HELP, Given, parse
from fcmae.options.problems import ConfigError, shown, validate

Config = TypeVar("Config", bound=Settings)
# From settings that are checked one by one only, and from those that were given, by dotted key: the rest, likewise.
Complete = Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]
TO_CHOOSE = {"grad_accum", "chosen", "planned_s"}  # what stays to be chosen where all else is given
# What a file has for its own number of epochs, which hours replace.
OF_EPOCHS = ("epochs", "optim.warmup_epochs", "checkpoint.every_epochs", "log.eval_epochs", "log.every_steps")


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
    given = parse(model, argv, prog)
    also, invalid = validate(Also, {name: given.values.pop(name) for name in Also.model_fields if name in given.values})
    assert also is not None  # nothing in it conflicts
    given.problems.extend(invalid)
    try:
        file = None if also.config is None else read_yaml(find_config(also.config))
    except ConfigError as error:
        raise ConfigError([*given.problems, str(error)]) from error
    config = _made(model, file, given, num_processes, complete)
    if also.print_config:
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
        num_processes, complete: See `load`.

    Raises:
        ConfigError: See `load`.
    """
    file = None if config is None else read_yaml(find_config(config))
    return _made(model, file, Given(flattened(model, settings), set(), []), num_processes, complete)


def _made(
    model: type[Config],
    file: dict[str, Any] | None,
    given: Given,
    num_processes: int | None,
    complete: Complete | None,
) -> Config:
    """The settings of a file, if there is one, and what is given beside it; the rest is chosen, and all is checked."""
    settings = _merged(file or {}, given.values)
    sketch, invalid = validate(model, settings, context={"sketch": True})
    problems, has_recipe = given.problems, file is not None and is_recipe(settings)
    if isinstance(sketch, RunConfig) and sketch.overwrite and "overwrite" not in given.values:
        problems = [*problems, "overwrite: it is in a file, and would delete the run at every start: give --overwrite"]
    if sketch is not None and not _has_images_to_train_on(sketch):
        complete = None
    # Nothing is chosen beside a recipe, unless there are hours for which it was not yet.
    to_complete = None if has_recipe and not _has_hours_to_fill(sketch, given.values) else complete
    context, known = {"num_processes": num_processes}, None
    if to_complete is not None:
        if sketch is None or problems or invalid:  # what is not chosen for that reason conflicts with nothing
            known = {key for key, _ in pairs(settings, fields_of(model))}
        else:
            put(settings, to_complete(sketch, _values_given(sketch, settings)))
    config, wrong_together = validate(model, settings, given.unread, context, known)
    if config is None or problems or wrong_together:
        raise ConfigError([*problems, *dict.fromkeys([*invalid, *wrong_together])])
    if isinstance(config, RunConfig) and file is not None and to_complete is None:
        config = _without_reasons_for_others(config, given.values)
    return config if complete is None else settled(config, complete)


def _merged(file: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given goes before the file's, and hours before its epochs."""
    if given.get("hours") is not None and "epochs" not in given and "epochs" in file:
        for key in OF_EPOCHS:
            section, _, name = key.rpartition(".")
            place = file.get(section) if section else file
            if isinstance(place, dict):
                place.pop(name, None)
    put(file, given)
    return file


def _has_images_to_train_on(sketch: Settings) -> bool:
    """Whether it is of a run that trains, and says on what."""
    return isinstance(sketch, RunConfig) and sketch.trains and bool(sketch.inputs().get("data.path"))


def _has_hours_to_fill(sketch: Settings | None, given: Mapping[str, Any]) -> bool:
    """Whether there are hours for which nothing was chosen yet, as what is in a file may have been."""
    return given.get("hours") is not None or (
        isinstance(sketch, RunConfig) and bool(sketch.hours) and not sketch.chosen
    )


def _values_given(sketch: Settings, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `sketch` that `settings` give, by dotted key."""
    values = flat(sketch)
    keys = {key for key, _ in pairs(settings, fields_of(type(sketch)))}
    keys -= TO_CHOOSE if values.get("grad_accum") == "auto" else set()
    keys |= {"model.stem_stride"} if _tells_stride(settings) else set()
    return {key: value for key, value in values.items() if key in keys}


def _without_reasons_for_others(config: AnyRun, given: Mapping[str, Any]) -> AnyRun:
    """The settings of another run's file, without its reasons for what is given beside it, and without its estimate."""
    changed = given.keys() - {"out"}
    reasons = {key: why for key, why in config.chosen.items() if key not in changed}
    return config.model_copy(update={"chosen": reasons, "planned_s": None}) if changed else config


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


def settled(config: Config, complete: Complete) -> Config:
    """The settings with grad_accum chosen, where it is auto and the run trains.

    Args:
        config: Of a run.
        complete: See `load`.
    """
    values = flat(config)
    if values.get("grad_accum") != "auto" or not _has_images_to_train_on(config):
        return config
    chosen = complete(config, {key: value for key, value in values.items() if key not in TO_CHOOSE})
    return config.model_copy(update=dict(chosen))  # what else was given and what was not stays to be seen


def flattened(model: type[Settings], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, from a mapping whose sections may be mappings.

    Raises:
        ConfigError: If one is given in both ways.
    """
    values = list(pairs(settings, fields_of(model)))
    if twice := [key for key, count in Counter(key for key, _ in values).items() if count > 1]:
        raise ConfigError(f"{key}: given twice: leave one out" for key in twice)
    return dict(values)


def read(model: type[Config], path: Path) -> Config:
    """The settings that `dump` wrote, whatever this machine has and however many processes it starts.

    Raises:
        ConfigError: If the file cannot be read or holds anything but such settings.
    """
    config, problems = validate(model, read_yaml(path))
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
    for key in fields_of(type(config)):
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


def diff(saved: RunConfig, new: RunConfig) -> list[str]:
    """One sentence for each setting that differs and that a resumed run may not change (FREE_ON_RESUME)."""
    before, after = flat(saved), flat(new)
    return [
        f"{key}: the run has {shown(before.get(key))}, this command {shown(after.get(key))}"
        for key in {**before, **after}
        if key not in FREE_ON_RESUME and _compared(key, before) != _compared(key, after)
    ]


def _compared(key: str, values: Mapping[str, Any]) -> Any:
    """A name below runs/ is completed only as long as that run is there, which one that goes on no longer needs."""
    value = values.get(key)
    return value.removeprefix("runs/") if key == "model.init" and value else value

"""Common parts of all settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from fcmae.data.geometry import MAX_SIDE

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Spelling:
    """How a command line may write a setting, besides `--its.key VALUE`.

    argument: its name as a positional argument; empty if it is not one. short: another name of its flag. commas:
    whether they separate the items of a list; names of files may contain them. hidden: not for the command line.
    """

    argument: str = ""
    short: str = ""
    commas: bool = True
    hidden: bool = False


# Settings that cannot be combined: their keys, first the one to change, and a sentence about that one.
Conflict = tuple[tuple[str, ...], str]


class Section(BaseModel):
    """Base of every group of settings: unknown keys, infinities and NaN are errors."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Settings(Section):
    """Base of the settings of a command: a combination that cannot work is refused when they are made."""

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        """Combinations of settings that cannot work.

        Args:
            num_processes: Processes of a run on this machine; None is one process, on a machine not known yet.
        """
        yield from ()

    @model_validator(mode="after")
    def _works(self, info: ValidationInfo) -> Self:
        """Raise all conflicts. The validation's context may hold num_processes, or sketch, which skips the check."""
        if (info.context or {}).get("sketch"):
            return self
        if found := list(self.conflicts((info.context or {}).get("num_processes"))):
            raise ValidationError.from_exception_data(
                type(self).__name__,
                [
                    InitErrorDetails(
                        type=PydanticCustomError("conflict", "{sentence}", {"sentence": sentence, "keys": keys}),
                        loc=tuple(keys[0].split(".")),
                        input=attrgetter(keys[0])(self),
                    )
                    for keys, sentence in found
                ],
            )
        return self


def _square(value: Any) -> Any:
    """One number is a square: 224, or [224] as a flag gives it, means [224, 224]."""
    if isinstance(value, int | str):
        return [value, value]
    return value * 2 if isinstance(value, list) and len(value) == 1 else value


def _expanded(text: str) -> str:
    if not text:
        raise ValueError("it is empty: give a path")
    found = os.path.expanduser(text)  # noqa: PTH111  # Path's fails of an unknown user
    if found.startswith("~"):
        raise ValueError(f"there is no such user: write ./{found} for a name that begins so")
    return found if "://" in found else found.rstrip("/") or found[:1]  # as a shell completes a folder's name


def _local(text: str) -> str:
    if "://" in text:
        raise ValueError(f"{text} is a URL: give a path on this machine")
    return _expanded(text)


def _of_text(change: Callable[[str], str]) -> BeforeValidator:
    """Changes the text of a path before it is one: ./~name would be ~name, which is somebody's home."""

    def changed(path: Any) -> Any:
        if not isinstance(path, str | os.PathLike):
            return path
        found = change(os.fspath(path))
        return os.path.abspath(found) if found.startswith("./~") else found  # noqa: PTH100

    return BeforeValidator(changed)


class FromFile(Section):
    """Which weights to take from a file that holds several."""

    key: str | None = Field(None, min_length=1)
    """The entry of a .pth file that holds the weights, e.g. model_ema. Default: model, or another usual one."""
    prefix: str | None = None
    """Prefix of the weights' names in a file, e.g. student. Default: detected."""


_Side = Annotated[int, Field(ge=8, le=MAX_SIDE)]
Size = Annotated[tuple[_Side, _Side], BeforeValidator(_square)]
# A path that a person writes: ~ is their home.
UserText = Annotated[str, AfterValidator(_expanded)]
UserPath = Annotated[Path, _of_text(_local)]


_OF_RUNS = ("config.yaml", "worth.json")  # of a run, and of a comparison of runs


def find_run(name: str) -> str:
    """Complete NAME to runs/NAME, unless NAME itself is a file, a run or an exported model; random: before it stays.

    Another folder of that name does not count, as it often has the images of the run.

    Args:
        name: a path, in which ~ is the user's home, or a name below runs/.

    Raises:
        ValueError: if ~ names a user that does not exist.
    """
    kind, colon, path = name.rpartition("random:")
    text = _expanded(path)
    given = Path(text)
    place = Path("runs") / given
    found = given.is_file() or any((given / file).is_file() for file in (*_OF_RUNS, "config.json", "checkpoint.json"))
    return f"{kind}{colon}{text if found or not any((place / file).is_file() for file in _OF_RUNS) else place}"


def near_runs(name: str | Path) -> str:
    """Suggest runs below runs/ with a similar name, as the end of a sentence; empty if there is none."""
    known = [str(file.parent.relative_to("runs")) for file in Path("runs").glob("**/config.yaml")]
    near = get_close_matches(str(name).removeprefix("runs/"), known, n=3)
    return f"; did you mean runs/{' or runs/'.join(near)}?" if near else ""


# A run, by its path or its name below runs/, or whatever else a setting accepts in its place.
RunText = Annotated[str, AfterValidator(find_run)]
RunPath = Annotated[Path, _of_text(find_run)]
Backend = Literal["packed", "triton", "masked", "minkowski"]
Device = Literal["auto", "cpu"]

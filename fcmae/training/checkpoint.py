"""Checkpoints: one directory a step, safetensors and JSON only, complete or absent.

    RUN/checkpoints/step-00001000/
        model.safetensors       weights
        optimizer.safetensors   AdamW's moments, named PARAMETER/MOMENT
        ema.safetensors         moving average of the weights, where there is one
        checkpoint.json         kind, format, version, step, configuration, data fingerprint, progress, checksums

A checkpoint is written in a directory beside its place and renamed into it, and renamed away before it is deleted: a
process killed at any moment leaves whole checkpoints and perhaps a temporary directory, which the next run removes.
Bytes that changed since they were written are noticed whenever a file is read.
Random states are not stored: everything random is a function of the seed and the step.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import fcmae
from fcmae.atomic import UNFINISHED, check_file, read_bytes, sha256_of, sync
from fcmae.training import own_files
from fcmae.weights.tensors import write_tensors

FORMAT = 2
READABLE = (1, FORMAT)  # 1: decoder.* beside the encoder; classifiers under timm's names
DIRECTORY = "checkpoints"
# Bytes of names that are no Unicode, as Python has them and JSON by pydantic does not; settings may have such paths.
LONE = re.compile(rb"(?<!\\ud[89ab][0-9a-f]{2})\\udc[89a-f][0-9a-f]")
META = "checkpoint.json"
MOST_BYTES = 1 << 24  # of a checkpoint.json: the settings of a run are a few thousand


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says of itself.

    Attributes:
        kind: "pretrain", "finetune" or "segment".
        step: optimizer steps taken.
        config: the run's settings.
        data_fingerprint: of the training images.
        progress: whatever else the loop needs to go on, as JSON values.
        spec: the numbers of the network; empty in those of format 1.
        format: of the checkpoint, by number.
        version: of the fcmae that wrote it.
        checksums: SHA-256 of each file beside it, by name, and of its own fields; empty in those of earlier versions.
    """

    kind: str
    step: int
    config: dict[str, Any]
    data_fingerprint: str
    progress: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    version: str = fcmae.__version__
    checksums: dict[str, str] = field(default_factory=dict)

    def own_checksum(self) -> str:
        """SHA-256 of all fields but the checksum of checkpoint.json itself."""
        others = {name: value for name, value in self.checksums.items() if name != META}
        return hashlib.sha256(json.dumps(asdict(self) | {"checksums": others}, sort_keys=True).encode()).hexdigest()


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors, flat, named PARAMETER/MOMENT."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(optimizer: torch.optim.AdamW, model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Inverse of `optimizer_state`.

    The fused AdamW checks nothing: it would read beyond the end of moments of another shape.

    Args:
        optimizer: of the model's parameters.
        model: whose parameters they are.
        state: named tensors.
        path: of their file, for errors.

    Raises:
        ValueError: if a tensor is missing, of no parameter, or of another shape or type.
    """
    learnt = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter in learnt}
    # A parameter that gets no gradient has no moments.
    moved = {flat.rpartition("/")[0] for flat in state} or parameters.keys()
    like = {
        f"{name}/{key}": parameter.new_empty((), dtype=torch.float32) if key == "step" else parameter
        for name, parameter in parameters.items()
        if name in moved
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    check_tensors(path, state, like)
    for flat, value in state.items():
        name, key = flat.rsplit("/", 1)
        # The fused AdamW keeps its step counts beside the parameters too.
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)


def check_tensors(path: Path, found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Check names, shapes and types of what was read, before anything computes with it.

    Args:
        path: of the file, for the error.
        found: what it holds.
        like: what it must hold.

    Raises:
        ValueError: in one sentence, which names the first few that are wrong.
    """
    problems = [f"{name} is missing" for name in like if name not in found]
    problems += [f"{name} belongs to nothing" for name in found if name not in like]
    for name, value in found.items():
        if (right := like.get(name)) is not None and (value.shape, value.dtype) != (right.shape, right.dtype):
            is_, needed = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (value, right))
            problems.append(f"{name} is {is_} and not {needed}")
    remedy = "give the model that the run was trained with, or another --out"
    if not problems:
        problems, remedy = not_finite(found), _instead(path.parent)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path} does not fit the run ({', '.join(problems[:3])}{more}): {remedy}")


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those with a value that is not finite, in words."""
    return [f"{name} is not finite" for name, value in tensors.items() if not value.isfinite().all()]


def save(run: Path, meta: Meta, tensors: dict[str, dict[str, Tensor]]) -> Path:
    """Write the checkpoint of a step; one that is there already stays as it is.

    Args:
        run: directory of the run.
        meta: what the checkpoint says of itself, its step too.
        tensors: a name ("model", "optimizer", "ema") to flat named tensors; each becomes NAME.safetensors.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: if it cannot be written, as where the disk is full; nothing of it is left then.
        FloatingPointError: before anything is written, if a tensor is not finite.
    """
    place = run / DIRECTORY / f"step-{meta.step:08d}"
    if place.exists():
        return place
    if bad := [f"{name}: {what}" for name, flat in tensors.items() for what in not_finite(flat)]:
        raise FloatingPointError(f"step {meta.step}: {bad[0]} ({len(bad)} tensors in all)")
    aside = place.with_name(UNFINISHED + place.name)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for name, flat in tensors.items():
            write_tensors(aside / f"{name}.safetensors", flat)
        meta = replace(meta, checksums={path.name: sha256_of(path) for path in sorted(aside.iterdir())})
        meta.checksums[META] = meta.own_checksum()
        (aside / META).write_text(json.dumps(asdict(meta), indent=2))
        for path in [*aside.iterdir(), aside]:
            sync(path)  # the rename must not reach the disk before the contents do
        aside.rename(place)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync(place.parent)
    (run / own_files.SAVED).touch()
    return place


def steps(run: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, oldest first."""
    found = {}
    for path in (run / DIRECTORY).glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return next(reversed(steps(run).values()), None)


def read_meta(checkpoint: Path) -> Meta:
    """What the checkpoint says of itself.

    Raises:
        ValueError: for a file of another format, none of ours, or one that is damaged or belongs to another directory.
    """
    path = checkpoint / META
    try:
        content = read_bytes(path, MOST_BYTES)
        known = LONE.sub(b"?", content)
        fields = from_json(known)
        # Looked at first: another format may have other fields.
        number, version = fields["format"], fields["version"]
        meta = _META.validate_json(known, strict=True, extra="forbid") if number in READABLE else None
        if meta is not None and known != content:
            meta = replace(meta, config=json.loads(content)["config"])
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{checkpoint} is not a checkpoint of fcmae: {META}: {where}: {problem['msg']}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint} is not a checkpoint of fcmae: {META}: {error}") from error
    if meta is None:
        raise ValueError(f"{path} has format {number}, this version of fcmae reads up to {FORMAT}: use fcmae {version}")
    if meta.checksums and meta.checksums.get(META) != meta.own_checksum():
        raise ValueError(f"{path} has changed since it was written: {_instead(checkpoint)}")
    if (named := re.fullmatch(r"step-(\d+)", checkpoint.name)) and int(named[1]) != meta.step:
        raise ValueError(f"{path} is of step {meta.step}, which its directory is not: {_instead(checkpoint)}")
    return meta


_META = TypeAdapter(Meta)


def _instead(checkpoint: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    others = [path for path in steps(checkpoint.parent.parent).values() if path.name != checkpoint.name]
    if others:
        return f"delete {checkpoint} to go on from an earlier one, {others[-1].name}"
    return f"restore {checkpoint} from a copy, or begin anew with another --out"


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of NAME.safetensors, on the CPU.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    path = checkpoint / f"{name}.safetensors"
    checksum = read_meta(checkpoint).checksums.get(path.name)
    try:
        check_file(path, sys.maxsize)
        if checksum is not None and sha256_of(path) != checksum:
            raise ValueError(f"{path} has changed since it was written: {_instead(checkpoint)}")
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): {_instead(checkpoint)}") from error
    except OSError as error:  # which says nothing of what it holds, unless it is not there
        remedy = _instead(checkpoint) if isinstance(error, FileNotFoundError) else "see to it, and try again"
        raise ValueError(f"{path} cannot be read ({error}): {remedy}") from error
    return tensors


def check_origin(checkpoint: Path, kind: str, data_fingerprint: str, keys: Sequence[str] = ("data.path",)) -> None:
    """Refuse a checkpoint of another kind of run, or one that was made with other images.

    Args:
        checkpoint: its directory.
        kind: of the run, "pretrain", "finetune" or "segment".
        data_fingerprint: of the run's images.
        keys: of the settings that give them.

    Raises:
        ValueError: in one sentence.
    """
    meta = read_meta(checkpoint)
    if meta.kind != kind:
        raise ValueError(f"{checkpoint} is of another kind of run, {meta.kind} and not {kind}: {_instead(checkpoint)}")
    if meta.data_fingerprint != data_fingerprint:
        raise ValueError(
            f"{' and '.join(keys)} no longer gives the images of {checkpoint}: restore them, or give another --out"
        )


def restore(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    from_format_1: Callable[[str], str],
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Load weights and optimizer state.

    Args:
        checkpoint: its directory.
        model: the run's.
        optimizer: the run's, of the model's parameters.
        from_format_1: the name in format 1 of a parameter of the model.
        scaler: of fp16, which is restored too.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    model.load_state_dict(read_state(checkpoint, "model", model, from_format_1))
    moments = _read_named(checkpoint, "optimizer", model, from_format_1)
    load_optimizer_state(optimizer, model, moments, checkpoint / "optimizer.safetensors")
    if scaler is not None:
        with reading_progress(checkpoint):
            scaler.load_state_dict(read_meta(checkpoint).progress["scaler"])


@contextmanager
def reading_progress(checkpoint: Path) -> Iterator[None]:
    """Say in a sentence that the progress in a checkpoint is not what the run needs.

    Args:
        checkpoint: its directory.

    Raises:
        ValueError: for what taking apart values of the wrong kind raises.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{checkpoint / META} has no usable progress ({error!r}): {_instead(checkpoint)}") from error


def read_state(checkpoint: Path, name: str, model: nn.Module, from_format_1: Callable[[str], str]) -> dict[str, Tensor]:
    """A state of the model in NAME.safetensors, whatever the checkpoint's format.

    Args:
        checkpoint: its directory.
        name: of the file, without its suffix.
        model: whose state it is.
        from_format_1: the name in format 1 of a parameter of the model.

    Returns:
        Tensors under the model's names and in its shapes, on the CPU.

    Raises:
        ValueError: if the file is missing or damaged, or does not fit the model.
    """
    tensors = _read_named(checkpoint, name, model, from_format_1)
    check_tensors(checkpoint / f"{name}.safetensors", tensors, model.state_dict())
    return tensors


def _read_named(
    checkpoint: Path, name: str, model: nn.Module, from_format_1: Callable[[str], str]
) -> dict[str, Tensor]:
    """The tensors of NAME.safetensors under the model's names and in its shapes."""
    tensors = read_tensors(checkpoint, name)
    if read_meta(checkpoint).format == FORMAT:
        return tensors
    found = {}
    for ours, parameter in model.named_parameters():
        theirs = from_format_1(ours)
        for key in [key for key in tensors if key == theirs or key.rpartition("/")[0] == theirs]:
            value = tensors.pop(key)
            # timm's 1x1 convolutions are Linear layers here; a moment has its parameter's shape, a step count none.
            shaped = value.view_as(parameter) if value.numel() == parameter.numel() > 1 else value
            found[ours + key.removeprefix(theirs)] = shaped
    return found | tensors


def prune(run: Path, keep: int, steps_per_epoch: int, milestone_epochs: int, good: Path | None = None) -> None:
    """Delete old checkpoints, and what writing or deleting left that was cut off.

    Args:
        run: directory of the run.
        keep: the newest checkpoints that stay, at least 1.
        steps_per_epoch: of the run.
        milestone_epochs: those at multiples of it stay too, and at multiples of what it was when they were written; 0:
            none.
        good: the last one that is known to be good, which stays too.
    """
    for path in (run / DIRECTORY).glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
    for step, path in list(steps(run).items())[:-keep]:
        every = [steps_per_epoch * epochs for epochs in (milestone_epochs, _milestone_epochs(path)) if epochs]
        if path != good and all(step % steps for steps in every):
            aside = path.with_name(UNFINISHED + path.name)
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)  # NFS keeps what another process reads; the next time it goes


def _milestone_epochs(checkpoint: Path) -> int:
    """What the setting was when a checkpoint was written."""
    with suppress(ValueError, KeyError, TypeError):
        return int(read_meta(checkpoint).config["checkpoint"]["milestone_epochs"])
    return 0


def check_space(
    run: Path, model: nn.Module, num_checkpoints: int, num_states: int = 3, *, overwrites: bool = False
) -> str:
    """Refuse to start a run whose checkpoints its disk cannot hold, and say what they take.

    Args:
        run: its directory, which need not be there yet.
        model: what is saved.
        num_checkpoints: that the run keeps.
        num_states: tensors saved of each parameter: itself, AdamW's two moments, and the moving average if there is
            one.
        overwrites: whether the checkpoints that are there are deleted first.

    Returns:
        What they take, in words.

    Raises:
        ValueError: if the disk has less room than the checkpoints that stay and the one being written.
    """
    size = num_states * 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    own = (run / DIRECTORY).resolve()  # which may be a link, to a bigger disk
    place = next(folder for folder in (own, *own.parents) if folder.exists())
    needed, free = size * (num_checkpoints + 1), shutil.disk_usage(place).free
    if overwrites:
        free += sum(file.stat().st_size for file in own.glob("*/*"))
    if needed > free:
        raise ValueError(
            f"out = {run}: {num_checkpoints + 1} checkpoints of {size / 1e6:,.0f} MB do not fit, as the disk has "
            f"{free / 1e6:,.0f} MB free: make room, give another out, or have fewer by checkpoint.keep "
            "and checkpoint.milestone_epochs"
        )
    return f"checkpoints take up to {needed / 1e6:,.0f} MB of {free / 1e9:,.1f} GB free"

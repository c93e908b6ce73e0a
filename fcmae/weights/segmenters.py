"""Segmenters in files: the encoder as a timm directory, which everything reads, and the head beside it.

DEST/
    config.json, model.safetensors   the encoder; see fcmae.weights.files
    head.safetensors                 the head, with its record in the header, which names its encoder by SHA-256
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from fcmae.anytime import Anytime, build_segmenter
from fcmae.atomic import replacing, sha256_of
from fcmae.data.maps import MAX_VALUE, Classes
from fcmae.heads import Segmenter
from fcmae.weights.convert import build_encoder
from fcmae.weights.files import HEAD, read_weights, segmenter_in, writing_weights
from fcmae.weights.record import Weights
from fcmae.weights.tensors import RECORD, digest, read_record, write_tensors

Value = Annotated[int, Field(ge=0, lt=MAX_VALUE)]


@dataclass(frozen=True)
class HeadRecord:
    """What the head's file states about it.

    Attributes:
        kind: see `build_segmenter`.
        dim: see `build_segmenter`.
        class_names: see `Classes`.
        class_values: see `Classes`.
        ignored: see `Classes`.
        encoder_sha256: of the encoder's file beside it.
        sha256: see `digest`.
        tau: see `Exits`; None for other heads.
        quantile: see `Exits`; None for other heads.
    """

    kind: Literal["pyramid", "upernet", "anytime"]
    dim: Annotated[int, Field(ge=1, le=2**16)]
    class_names: tuple[str, ...]
    class_values: tuple[Value, ...]
    ignored: Value | None
    encoder_sha256: str
    sha256: str = ""
    tau: Annotated[float, Field(ge=0, le=1)] | None = None
    quantile: Annotated[float, Field(ge=0, lt=1)] | None = None

    @property
    def classes(self) -> Classes:
        """The classes of a pixel."""
        return Classes(self.class_names, self.class_values, self.ignored)


_RECORD = TypeAdapter(HeadRecord)


def save_segmenter(dest: Path, model: Segmenter, weights: Weights, kind: str, classes: Classes) -> None:
    """Write a segmenter; its files take their places when all are on the disk.

    Args:
        dest: the directory.
        model: on any device.
        weights: describes the encoder, apart from the tensors.
        kind: of its head, see `build_segmenter`.
        classes: of a pixel.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    encoder = {name: value for name, value in state.items() if name.startswith("encoder.")}
    head = {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
    architecture = replace(weights.architecture, decoder_depth=0, decoder_dim=0, final_norm=False, num_classes=0)
    described = replace(weights, state=encoder, architecture=architecture, class_names=(), expected_output=())
    with writing_weights(dest, described, "timm") as asides, replacing(dest / HEAD) as aside:
        record = _RECORD.validate_python(
            {
                "kind": kind,
                "dim": model.head.dim,
                "class_names": classes.names,
                "class_values": classes.values,
                "ignored": classes.ignored,
                "encoder_sha256": sha256_of(asides[dest / "model.safetensors"]),
                **({"tau": model.head.tau, "quantile": model.head.quantile} if isinstance(model, Anytime) else {}),
            }
        )
        record = replace(record, sha256=digest(head, _text(record)))
        write_tensors(aside, head, {RECORD: json.dumps(asdict(record))})


def _text(record: HeadRecord) -> str:
    told = asdict(replace(record, sha256=""))
    # Leave out tau and quantile where None: the digest then matches files older than those fields.
    return json.dumps({k: v for k, v in told.items() if v is not None or k == "ignored"}, sort_keys=True)


def fits(place: Path) -> bool:
    """Whether the head, if there is one, is of the encoder beside it: a kill may come between their renames.

    Raises:
        OSError, SafetensorError, KeyError, ValueError: if they cannot be read, or the head's file is damaged.
    """
    if not (place / HEAD).exists():
        return True
    return sha256_of(place / "model.safetensors") == _read_record(place / HEAD).encoder_sha256


def _read_record(file: Path) -> HeadRecord:
    return _RECORD.validate_json(read_record(file) or "null")


def read_segmenter(path: Path) -> tuple[Segmenter, Weights, HeadRecord]:
    """A segmenter, on the CPU, with the records of its encoder's file and its head's file.

    Args:
        path: what `save_segmenter` wrote, or a run.

    Raises:
        ValueError: if there is none, or it is damaged.
    """
    place = segmenter_in(path)
    if place is None:
        raise ValueError(f"{path} holds no segmentation model: give a run of `fcmae segment`, or its best/ or last/")
    weights, file = read_weights(place), place / HEAD
    try:
        record, state = _read_record(file), load_file(file)
        if digest(state, _text(record)) != record.sha256:
            raise ValueError("its SHA-256 is another")
        if sha256_of(place / "model.safetensors") != record.encoder_sha256:
            raise ValueError("it is of another encoder than the one beside it")
        encoder = build_encoder(weights)
        num_classes = len(record.class_names)
        with torch.device("meta"):  # takes no memory before the record is known to match the file
            model = build_segmenter(encoder, record.kind, num_classes, record.dim, record.tau, record.quantile)
        model.head.load_state_dict(state, assign=True)
    except (ValidationError, SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be used ({reason}): copy or export it again") from error
    return model, weights, record

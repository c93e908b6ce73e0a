"""Weights into models: into an encoder, a classifier, an FCMAE; and from one format into another."""

from __future__ import annotations

import math
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from timm.models import adapt_input_conv
from torch import nn

from fcmae.data.index import is_of_run
from fcmae.data.source import printable
from fcmae.heads import Classifier
from fcmae.masked import FCMAE
from fcmae.networks.build import make_encoder
from fcmae.networks.encoder import StagedEncoder
from fcmae.networks.spec import ConvNeXtSpec, NetworkSpec, describe, variant_of
from fcmae.training.own_files import OF_MODELS
from fcmae.weights.directories import DIRECTORIES, reads_alike, timm_holds
from fcmae.weights.files import FILE_SUFFIXES, read_weights, save_weights, tell_encoder_alone
from fcmae.weights.formats import FORMATS, first_weight, holds, rename, to_state, unwrapped
from fcmae.weights.record import ImageRecord, Weights, encoder_output


def adapt_in_chans(weights: Weights, in_chans: int) -> Weights:
    """Adapt weights to another number of image channels, as timm does: RGB summed for 1, repeated for more.

    The decoder and the image statistics belong to the old channels: both are left out.

    Raises:
        ValueError: if the weights are not for RGB images.
    """
    if weights.architecture.in_chans == in_chans:
        return weights
    if weights.architecture.in_chans != 3:
        raise ValueError(
            f"data.in_chans = {in_chans}, but the weights are of {weights.architecture.in_chans} channels: "
            "only those of 3 (RGB) adapt to another number"
        )
    state = {name: value for name, value in weights.state.items() if not name.startswith("decoder.")}
    first = first_weight(weights.architecture.spec)
    state[first] = adapt_input_conv(in_chans, state[first])
    architecture = replace(weights.architecture, in_chans=in_chans, decoder_depth=0, decoder_dim=0)
    return replace(weights, state=state, architecture=architecture, image=ImageRecord(), expected_output=())


def start_from(model: FCMAE, weights: Weights) -> str:
    """Load the encoder, and the decoder if there is one that fits, into a new FCMAE; say what was done.

    Raises:
        ValueError: if the encoder is another network; its channels adapt from RGB.
    """
    encoder = model.encoder
    held = weights.architecture
    if held.spec != encoder.spec:
        raise ValueError(
            f"model.init is {describe(held.spec)}, but the run is {describe(encoder.spec)}: "
            "set model.variant and model.stem_stride to those of model.init"
        )
    weights = adapt_in_chans(weights, encoder.in_chans)
    text = f"encoder from {describe(held.spec)} in {weights.format}'s layout"
    if held.in_chans != encoder.in_chans:
        text += f", its stem adapted from {held.in_chans} channels to {encoder.in_chans}"
    # The norm and head of a dense model, for which an FCMAE has no place, are left out.
    found = {name: value for name, value in weights.state.items() if name.partition(".")[0] in ("encoder", "decoder")}
    own = model.state_dict()
    fits = {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in own.items()}
    if not fits:
        found = {name: value for name, value in found.items() if name.startswith("encoder.")}
    model.load_state_dict(own | found)
    if fits:
        return f"{text}; decoder too"
    why = "none" if "decoder" not in weights.origin else f"one that was {weights.origin['decoder']}"
    if held.decoder_depth:
        why = f"one of depth {held.decoder_depth} and width {held.decoder_dim} for {held.in_chans} channels"
    return f"{text}; a fresh decoder, as model.init has {why}"


def build_encoder(weights: Weights) -> StagedEncoder:
    """The encoder that the weights hold.

    Args:
        weights: with tensors of an encoder; others are left out.
    """
    architecture = weights.architecture
    encoder = make_encoder(architecture.spec, architecture.in_chans)
    encoder.load_state_dict(
        {name.removeprefix("encoder."): value for name, value in weights.state.items() if name.startswith("encoder.")}
    )
    return encoder


def build_classifier(weights: Weights) -> Classifier:
    """The classifier that the weights hold.

    Raises:
        ValueError: if they have no head.
    """
    if not weights.architecture.num_classes:
        raise ValueError("the weights have no classifier: give those of a fine-tuned model")
    model = Classifier(build_encoder(weights), weights.architecture.num_classes)
    model.load_state_dict({name: value for name, value in weights.state.items() if not name.startswith("decoder.")})
    return model


def save_classifier(dest: Path, model: nn.Module, weights: Weights) -> None:
    """Write a `Classifier` as a timm directory.

    Args:
        dest: the directory.
        model: the `Classifier`, on any device.
        weights: describes the model, apart from the tensors; decoder, norm and number of classes are the model's own.
    """
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    has_norm, num_classes = weights.architecture.spec.has_final_norm, len(state["head.bias"])
    architecture = replace(
        weights.architecture, decoder_depth=0, decoder_dim=0, final_norm=has_norm, num_classes=num_classes
    )
    save_weights(dest, replace(weights, state=state, architecture=architecture, expected_output=()), "timm")


def check(path: Path, variant: str | None = None, key: str | None = None, prefix: str | None = None) -> str:
    """Compare the encoder's output on a fixed image with the one recorded in the file, and say how well they agree.

    Args:
        path, variant, key, prefix: see `read_weights`.

    Raises:
        ValueError: if they differ by more than 1e-4 of the largest value (float32 on another machine, summed in another
            order, stays within 1e-5), or if the file has no record, as files of other libraries.
    """
    tell_encoder_alone(path)
    weights = read_weights(path, variant, key, prefix)
    if not weights.expected_output:
        raise ValueError(f"{path} does not say what to expect of it: only what `fcmae convert` and finetune write does")
    return _compare(path, weights)


def _compare(path: Path, weights: Weights) -> str:
    found, expected = (
        torch.tensor(values, dtype=torch.float64) for values in (encoder_output(weights), weights.expected_output)
    )
    allowed = 1e-4 * float(expected.abs().max())
    error = float((found - expected).abs().max()) if found.shape == expected.shape else math.inf
    if not error <= allowed:
        raise ValueError(f"{path}: the encoder's output is off by {error:.3g}, more than {allowed:.3g}: it is damaged")
    return f"{path}: the encoder's output is as expected, to {error:.1e} (allowed {allowed:.1e})"


def convert(
    source: Path,
    dest: Path | None,
    to: str = "timm",
    variant: str | None = None,
    key: str | None = None,
    prefix: str | None = None,
) -> str:
    """Write the weights of any source in another format, read them back, and describe what was done.

    Args:
        source: what `read_weights` reads.
        dest: a new path; None writes nothing and describes which tensor goes where.
        to: one of FORMATS.
        variant, key, prefix: see `read_weights`.

    Returns:
        The description, and how to use what was written.

    Raises:
        ValueError: if there is no such format, the source cannot be read, does not fit or is damaged, dest exists or
            has another kind of name than the format needs, or what is read back differs (dest is then deleted).
    """
    check_dest(dest, to)
    return write(read_sound(source, variant, key, prefix), dest, to)


def check_dest(dest: Path | None, to: str) -> None:
    """Refuse a path to which weights cannot be written.

    Args:
        dest, to: see `convert`.

    Raises:
        ValueError: if there is no such format, dest exists or has another kind of name than the format needs.
    """
    if to not in FORMATS:
        raise ValueError(f"to = {to!r}: use one of {', '.join(FORMATS)}")
    if dest is not None:
        if os.path.lexists(dest):  # also a dangling link
            raise ValueError(f"{dest} exists: give a new path, or remove it")
        if dest.name in OF_MODELS and is_of_run(dest.parent / "config.yaml"):
            raise ValueError(f"{dest} is where a run keeps its own: give another path")
        if to in DIRECTORIES and dest.suffix in FILE_SUFFIXES:
            raise ValueError(f"{dest}: the format {to} is a directory: give it another name, or --to fcmae for a file")
        if to not in DIRECTORIES and dest.suffix not in FILE_SUFFIXES:
            raise ValueError(f"{dest}: the format {to} is one file: give it a name in {', '.join(FILE_SUFFIXES)}")


def read_sound(source: Path, variant: str | None = None, key: str | None = None, prefix: str | None = None) -> Weights:
    """Read weights and check that the encoder's output is as recorded, or at least finite.

    Args:
        source: what `read_weights` reads.
        variant, key, prefix: see `read_weights`.

    Raises:
        ValueError: if they cannot be read, or are damaged.
    """
    tell_encoder_alone(source)
    weights = read_weights(source, variant, key, prefix)
    if weights.expected_output:
        _compare(source, weights)
    else:
        weights = replace(weights, expected_output=encoder_output(weights))
    if not all(map(math.isfinite, weights.expected_output)):
        raise ValueError(f"{source}: the encoder's output is not finite: its weights are of a run that broke down")
    return weights


def write(weights: Weights, dest: Path | None, to: str) -> str:
    """Write weights, read them back, and describe what was done.

    Args:
        weights: of `read_sound`.
        dest, to: see `convert`.

    Returns:
        See `convert`.

    Raises:
        ValueError: if the format cannot hold them, or what is read back differs (dest is then deleted).
    """
    spec = weights.architecture.spec
    state = to_state(weights.state, spec, to)
    lines = []
    if dest is None:
        is_renamed = isinstance(spec, ConvNeXtSpec)
        theirs = {rename(name, to) if is_renamed else name: weights.names[name] for name in weights.state}
        for name, value in state.items():
            lines.append(f"{theirs.get(unwrapped(name), 'identity')} -> {name} {tuple(value.shape)}")
    if left_out := [weights.names[name] for name in weights.state if not holds(name, to)]:
        lines.append(f"left out, as {to} has no place for them: {', '.join(left_out)}")
    origin = ", ".join(f"{name} {value}" for name, value in weights.origin.items())
    lines.append(f"{len(state)} tensors of {describe(spec)} from {weights.format}'s layout ({origin})")
    if kept := sorted({str(value.dtype).removeprefix("torch.") for value in weights.state.values()} - {"float32"}):
        lines.append(f"they are {' and '.join(kept)}, as in the source")
    if dest is None:
        return "\n".join([*map(printable, lines), "dry run: nothing was written"])
    try:
        save_weights(dest, weights, to)
        back = read_weights(dest)
        wrong = [name for name, value in back.state.items() if not torch.equal(value, weights.state[name])]
        if wrong or len(back.state) != sum(holds(name, to) for name in weights.state):
            raise ValueError(f"{dest}: what was written is not what is read back: {', '.join(wrong) or 'less'}")
    except BaseException:
        if dest.is_dir():
            shutil.rmtree(dest)
        dest.unlink(missing_ok=True)
        raise
    if to == "transformers" and weights.image.mean is not None and not reads_alike(weights):
        lines.append(
            "no preprocessor_config.json: transformers' processor divides by 255 and makes squares, and these weights "
            "may have learnt other images"
        )
    wrote = f"wrote {dest}, and read the same tensors back"
    return "\n".join([*map(printable, lines), wrote, f"use: {_how_to_use(dest, spec, to)}"])


def _how_to_use(dest: Path, spec: NetworkSpec, to: str) -> str:
    if to == "transformers":
        return f"transformers.AutoModel.from_pretrained({str(dest)!r})"
    if to == "timm" and timm_holds(spec):
        return f'timm.create_model("local-dir:{dest}", pretrained=True)'
    if to == "timm":
        return f"fcmae.load({str(dest)!r})  # timm has no such network"
    if (variant := variant_of(spec)) is None:
        return f"fcmae.load({str(dest)!r})"
    stride = f" --model.stem_stride {spec.stem_stride}" if spec.stem_stride != 4 else ""
    verb = "finetune" if spec.dense_only else "pretrain"
    return f"fcmae {verb} IMAGES --init {shlex.quote(str(dest))} --model.variant {variant}{stride}"

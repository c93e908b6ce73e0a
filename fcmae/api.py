"""Use from Python: what `import fcmae` offers, loaded when it is first used.

import fcmae

run = fcmae.pretrain("photos", "runs/first", config="pretrain_cpu", settings={"epochs": 100})
tuned = fcmae.finetune("labelled", "runs/tuned", config="finetune_cpu", init=run)
model = fcmae.load(tuned)
features = model(images)  # (B, h, w, C)
fcmae.export(run, "encoder")
fcmae.prune(tuned, "pruned.safetensors", "photos")
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from timm.models import FeatureInfo
from torch import Tensor, nn

from fcmae import finetuning, options, planning, pretraining, pruning, segmenting
from fcmae.anytime import Answer, Anytime
from fcmae.config import AnyRun, FinetuneConfig, PretrainConfig, SegmentConfig
from fcmae.config.base import find_run
from fcmae.config.commands import PruneConfig
from fcmae.data.augment import CenterCrop, Reading
from fcmae.data.cores import all_processes
from fcmae.data.maps import Classes
from fcmae.heads import Classifier, Segmenter
from fcmae.layouts import DENSE, PACKED
from fcmae.masked import FCMAE, masked_loss
from fcmae.networks.encoder import StagedEncoder
from fcmae.networks.spec import NETWORKS, NetworkSpec
from fcmae.segmentation import check_sides
from fcmae.training.launch import for_a_caller
from fcmae.training.run import Run
from fcmae.weights.convert import build_classifier, build_encoder, convert
from fcmae.weights.files import read_init, segmenter_in
from fcmae.weights.record import ImageRecord, Weights
from fcmae.weights.segmenters import read_segmenter

__all__ = [
    "Classified",
    "Features",
    "Segmented",
    "export",
    "finetune",
    "load",
    "masked_loss",
    "pretrain",
    "prune",
    "segment",
]

PathLike = str | os.PathLike[str]
Headed = TypeVar("Headed", Classifier, Segmenter)


def pretrain(
    images: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    variant: str | NetworkSpec | None = None,
    config: PathLike | None = None,
    settings: Mapping[str, Any] | PretrainConfig | None = None,
    model: FCMAE | None = None,
) -> Run:
    """Pretrain an encoder on unlabeled images, or resume the run in `out`, as `fcmae pretrain` does.

    Args:
        images: folders (searched recursively), text files that list paths, or glob patterns.
        out: the run directory.
        variant: the network; see `model.variant`.
        config: a YAML file of settings, or the name of a shipped one (`fcmae configs`). If it or
            `settings` has `epochs` or `batch_size`, the rest has its defaults. Without a file, and always with `hours`
            in `settings`, what you do not give is chosen for the images, the machine and the hours.
        settings: more settings, which override the file's: a mapping, with sections as mappings or dotted keys,
            {"epochs": 100, "data.image_size": 64}; or a `PretrainConfig`. `fcmae pretrain --help` lists them. The
            arguments above override both.
        model: of your own, which is trained, and resumed, instead of the one that `variant` and `settings` describe.
            Beside it nothing is chosen, for `hours` neither: what you do not give has its default. It ends in training
            mode, and on the device of the run.

    Returns:
        The run, finished, or stopped by a signal after a checkpoint (an interrupted notebook sends SIGINT): look at
        `finished`, or give it to `finetune` or `segment`, which refuse one that was stopped. The same call resumes it.
        It is a path that `load` and `export` accept too.

    Raises:
        ValueError: with a line for each problem with settings or images, before anything is written.
        FloatingPointError: if the loss or a gradient stops being finite.
    """
    paths = [images] if isinstance(images, str | os.PathLike) else images
    given: dict[str, Any] = {"data.path": paths, "out": out, "model.variant": variant}
    if model is not None:
        if not isinstance(model, FCMAE):
            raise ValueError(f"model: received {type(model).__name__}; give an FCMAE, see fcmae.masked.build_fcmae")
        if type(spec := model.encoder.spec) not in NETWORKS.values():
            raise ValueError(
                f"model: its encoder's spec is a {type(spec).__name__}, which no file can hold: give one of "
                f"{', '.join(known.__name__ for known in NETWORKS.values())}, or add the network (CONTRIBUTING.md)"
            )
        if variant is not None:
            raise ValueError("variant: a model of your own has its network already: leave one of the two out")
        given |= {"model.variant": spec, "model.stem_stride": spec.stem_stride}
    with for_a_caller():
        cfg = _settings(PretrainConfig, given, config, settings, chooses=model is None)
        if model is not None and cfg.hours is not None:
            raise ValueError("hours: nothing is chosen for a model of your own: give epochs")
        if model is not None and cfg.model.init is not None:
            raise ValueError("model.init: a model of your own starts as it is: load its weights yourself, leave it out")
        return pretraining.pretrain(cfg, model)


def finetune(
    labelled: PathLike,
    out: PathLike,
    *,
    init: PathLike | None = None,
    variant: str | NetworkSpec | None = None,
    config: PathLike | None = None,
    settings: Mapping[str, Any] | FinetuneConfig | None = None,
) -> Run:
    """Train a classifier on labelled images, or resume the run in `out`, as `fcmae finetune` does.

    Args:
        labelled: a folder with one sub-folder per class, or a CSV file with the columns path,label.
        out: the run directory; see `pretrain`.
        init: starting weights: a run that `pretrain` finished, a path to weights in any format that `fcmae convert`
            reads, to a run that was stopped too, or the name of a model of timm's.
        variant: the network; by default that of `init`.
        config: see `pretrain`.
        settings: see `pretrain`; or a `FinetuneConfig`.

    Returns:
        The run; see `pretrain`. Its best and its last model are in best/ and last/.

    Raises:
        ValueError: with a line for each problem with settings, images or weights, before anything is written.
        FloatingPointError: if the loss or a gradient stops being finite.
    """
    given = {"data.path": labelled, "out": out, "model.init": _start(init), "model.variant": variant}
    with for_a_caller():
        return finetuning.finetune(_settings(FinetuneConfig, given, config, settings))


def segment(
    images: PathLike,
    maps: PathLike | None,
    out: PathLike,
    *,
    init: PathLike | None = None,
    variant: str | NetworkSpec | None = None,
    config: PathLike | None = None,
    settings: Mapping[str, Any] | SegmentConfig | None = None,
) -> Run:
    """Train a network that gives every pixel a class, or resume the run in `out`, as `fcmae segment` does.

    Args:
        images: a folder of images, or a CSV file with the columns image,mask.
        maps: the folder of their label maps, which have the same names; None with a CSV file.
        out: the run directory; see `pretrain`.
        init: starting weights; see `finetune`.
        variant: the network; by default that of `init`.
        config: see `pretrain`.
        settings: see `pretrain`; or a `SegmentConfig`.

    Returns:
        The run; see `pretrain`. Its best and its last model are in best/ and last/.

    Raises:
        ValueError: with a line for each problem with settings, images, maps or weights, before anything is written.
        FloatingPointError: if the loss or a gradient stops being finite.
    """
    given = {"data.path": images, "data.maps": maps, "out": out, "model.init": _start(init), "model.variant": variant}
    with for_a_caller():
        return segmenting.segment(_settings(SegmentConfig, given, config, settings))


def _start(init: PathLike | None) -> PathLike | None:
    """Starting weights, unless they are of a run of this script that a signal stopped: what follows would not know."""
    if isinstance(init, Run) and not init.finished:
        raise ValueError(
            f"init: {init.path} was stopped by {init.stopped_by} before its end: make the call that began it again, or "
            "give its path to start from what it has"
        )
    return init


def _settings(
    model: type[AnyRun],
    given: Mapping[str, Any],
    config: PathLike | None,
    settings: Mapping[str, Any] | AnyRun | None,
    chooses: bool = True,
) -> AnyRun:
    """The settings of a run: `given` overrides `settings`, which override the file.

    The rest is chosen if there is neither a file nor a whole configuration, or hours for which nothing was chosen yet.

    Raises:
        ValueError: with a line for each problem.
    """
    if settings is None or isinstance(settings, Mapping):
        settings = settings or {}
        section = settings.get("model")
        for init in (settings.get("model.init"), section.get("init") if isinstance(section, Mapping) else None):
            _start(init)
        values = options.flattened(model, settings)
    elif isinstance(settings, model):
        values = options.flattened(model, settings.model_dump(exclude_unset=True)) | options.changed(settings)
    else:
        raise ValueError(f"settings: received {type(settings).__name__}; give a mapping or a {model.__name__}")
    values |= {key: value for key, value in given.items() if value is not None}
    processes = all_processes()
    name = None if config is None else os.fspath(config)
    if chooses and isinstance(settings, model) and (settings.hours is None or settings.chosen):
        return options.settled(options.make(model, values, name, processes), planning.complete)
    return options.make(model, values, name, processes, planning.complete if chooses else None)


class Features(nn.Module):
    """An encoder that normalises the images that it takes. It is differentiable and moves to a device like any module.

    Attributes:
        encoder: the network, on normalised images.
        normalize: the normalisation of images, applied first.
        reading: how `read` reads image files: size, and of which channels.
        feature_info: timm's description of the maps of `pyramid`: channels(), reduction() in pixels per site.
    """

    def __init__(self, encoder: StagedEncoder, reading: Reading) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalize = reading.normalize
        self.reading = reading
        dims, first = encoder.spec.dims, encoder.spec.stem_stride
        maps = [{"num_chs": d, "reduction": first << i, "module": f"stages.{i}"} for i, d in enumerate(dims)]
        self.feature_info = FeatureInfo(maps, tuple(range(len(maps))))

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of the last stage, before any norm.

        Args:
            images: (B, C, H, W), uint8, or float as `read` has it.
            mask: (B, gh, gw) bool, True = hidden, one element per patch; every image has the same number K of visible
                patches. None shows the encoder the whole images.

        Returns:
            (B, h, w, D), one site per total_stride x total_stride pixels; under a mask (B, K, b, b, D), the b x b sites
            of each visible patch, patches in row-major order.

        Raises:
            ValueError: if images or mask have another type or shape.
        """
        images = self._normalized(images)
        if mask is None:
            features: Tensor = self.encoder(images)
        else:
            features = self.encoder(images, PACKED(self._checked(mask, images), None))
        return features

    def read(self, file: PathLike | bytes) -> Tensor:
        """An image file as `fcmae predict` gives it to a classifier: its centre, at the size of the training.

        Args:
            file: a local path, or what the file holds.

        Returns:
            (C, H, W), uint8, or float32: unsigned values of up to 16 bits divided by their full range, others in the
            units that the file stores, DICOM's in its own; a batch of such of one type is what `forward` takes (uint8
            divided by 255 is float32).

        Raises:
            BadImage: if it cannot be decoded, or has other channels; a ValueError.
            OSError: if there is no such file.
        """
        content = file if isinstance(file, bytes) else Path(file).expanduser().read_bytes()
        return torch.tensor(CenterCrop(self.reading)(content, np.random.default_rng(0)).values)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Feature maps of all stages, first to last, for a detector or a segmenter, as timm's features_only gives them.

        Args:
            images: see `forward`.

        Returns:
            (B, D_i, h_i, w_i) each, half the height and width of the one before.

        Raises:
            ValueError: see `forward`.
        """
        return [f.permute(0, 3, 1, 2) for f in self.encoder.pyramid(self._normalized(images), DENSE)]

    def _normalized(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            raise ValueError(f"images: received {type(images).__name__}; give a torch tensor")
        in_chans, least, shape = self.encoder.in_chans, self.encoder.total_stride, tuple(images.shape)
        if len(shape) != 4 or shape[1] != in_chans or min(shape[2:]) < least:
            raise ValueError(f"images: received the shape {shape}; give (B, {in_chans}, H, W), H and W >= {least}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images: received {images.dtype}; give uint8, or float as `read` has it")
        normalized, dtype = self.normalize(images), next(self.encoder.parameters()).dtype
        if dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"the weights are {dtype}: keep them in float32 and compute in 16 bits by torch.autocast")
        found: Tensor = normalized.to(dtype)  # also after .double()
        return found

    def _checked(self, mask: Tensor, images: Tensor) -> Tensor:
        (B, _, H, W), stride = images.shape, self.encoder.total_stride
        if mask.dtype != torch.bool or mask.ndim != 3 or len(mask) != B:
            raise ValueError(
                f"mask: received {mask.dtype} of the shape {tuple(mask.shape)}; give bool ({B}, gh, gw), True = hidden"
            )
        _, gh, gw = mask.shape
        side = H // max(1, gh)
        if side == 0 or side % stride or (gh * side, gw * side) != (H, W):
            raise ValueError(
                f"mask: received a grid of {gh}x{gw} for images of {H}x{W}; its patches must be squares whose side is "
                f"a multiple of the total stride {stride}"
            )
        return mask


class _Headed(Features, Generic[Headed]):
    """What `Classified` and `Segmented` are: an encoder with a head, `model`, of which it is a part."""

    model: Headed

    def __init__(self, model: Headed, reading: Reading, class_names: Sequence[str]) -> None:
        super().__init__(model.encoder, reading)
        del self.encoder  # registered twice, its tensors would be twice in a state dict
        self.model = model
        self.class_names = tuple(class_names)

    @property
    def encoder(self) -> StagedEncoder:  # type: ignore[override]  # it is not set
        """The network's encoder."""
        encoder: StagedEncoder = self.model.encoder
        return encoder

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "encoder" and "model" in self._modules:  # Module.__setattr__ knows no properties
            self.model.encoder = value
        else:
            super().__setattr__(name, value)


class Classified(_Headed[Classifier]):
    """An encoder with the head of `finetune`, which normalises images itself: features, and a class for every image.

    Attributes:
        model: the network, on normalised images.
        class_names: names of its outputs.
    """

    def logits(self, images: Tensor) -> Tensor:
        """Class logits, (B, classes), whose softmax are the probabilities that `fcmae predict` writes.

        Args:
            images: see `forward`. `predict` has them from `read`, at the size that the network was trained at.

        Raises:
            ValueError: see `forward`.
        """
        found: Tensor = self.model(self._normalized(images))
        return found


class Segmented(_Headed[Segmenter]):
    """An encoder with the head of `segment`, which normalises images itself: features, and a class for every pixel.

    Attributes:
        model: the network, on normalised images.
        class_names: names of its outputs.
        classes: these names, what label maps hold for each, and what they hold where the class is unknown.
    """

    def __init__(self, model: Segmenter, reading: Reading, classes: Classes) -> None:
        super().__init__(model, reading, classes.names)
        self.classes = classes

    def maps(self, images: Tensor) -> Tensor:
        """Class logits of every pixel, (B, classes, H, W).

        With `model.head` anytime they have no gradients in evaluation mode, and in training mode come from each exit,
        (exits, B, classes, H, W).

        Args:
            images: see `forward`; H and W are multiples of the total stride.

        Raises:
            ValueError: see `forward`; or if the total stride does not divide a side.
        """
        normalized = self._normalized(images)
        check_sides("images", normalized.shape[2:], self.encoder.total_stride)
        logits: Tensor = self.model(normalized)
        return logits

    def anytime(
        self, images: Tensor, tau: float | None = None, budget: float | Sequence[float] | None = None
    ) -> Iterator[Answer]:
        """Successive answers, each better than the one before; nothing more is computed once you stop iterating.

        Args:
            images: see `forward`; one image unless there is a budget. H and W are multiples of the total stride.
            tau: see `Anytime.anytime`.
            budget: see `Anytime.anytime`.

        Yields:
            The answer after each stage; `pixels` gives its logits.

        Raises:
            ValueError: see `Anytime.anytime`; or if the model was not trained with `model.head` anytime.
        """
        if not isinstance(self.model, Anytime):
            raise ValueError("this model answers once: train one with model.head anytime, or use maps")
        yield from self.model.anytime(self._normalized(images), tau, budget)


def load(
    source: PathLike,
    *,
    key: str | None = None,
    prefix: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Features:
    """The encoder of a run or of weights in any format that `fcmae convert` reads, for features.

    Args:
        source: a run, also by its name below runs/, a checkpoint, a directory or a file; or the name of a ConvNeXt of
            timm's, which is fetched. For a fine-tuning run, its best model.
        key: the entry of a .pth file that holds the weights, such as "model_ema"; by default a usual one.
        prefix: the prefix of their names in a file, such as "student"; by default detected.
        mean: of each channel, in units of a full range of 1, of a file that does not state it, such as a state dict of
            your own.
        std: likewise; both or neither.

    Returns:
        The module, on the CPU, in evaluation mode. It normalises images as in the training of the weights. For a model
        of `finetune` a `Classified`, of `segment` a `Segmented`.

    Raises:
        ValueError: if `source` holds no such weights, states another mean and std, or none and none are given; for
            grey and RGB the published ones are then used.
    """
    place = Path(find_run(os.fspath(source)))
    if key is None and prefix is None and segmenter_in(place) is not None:
        segmenter, weights, record = read_segmenter(place)
        return Segmented(segmenter, _reading(source, weights, mean, std), record.classes).eval()
    weights = read_init(str(place), key, prefix, "source")
    reading = _reading(source, weights, mean, std)
    if weights.architecture.num_classes and weights.class_names:
        return Classified(build_classifier(weights), reading, weights.class_names).eval()
    return Features(build_encoder(weights), reading).eval()


def _reading(source: PathLike, weights: Weights, mean: Sequence[float] | None, std: Sequence[float] | None) -> Reading:
    """How images are read for weights, by what they state or else by what is given."""
    if (mean is None) != (std is None):
        raise ValueError("mean and std: received one of the two; give both or neither")
    given = dict[str, list[float]]()
    for name, values in (("mean", mean), ("std", std)):
        if values is not None:
            stated, num = getattr(weights.image, name), weights.architecture.in_chans
            if len(values) != num or (stated is not None and tuple(stated) != tuple(values)):
                raise ValueError(
                    f"{name}: received {list(values)}, and {os.fspath(source)} has {num} channels"
                    + (f", whose {name} it states as {list(stated)}: leave it out" if stated else ": give one each")
                )
            given[name] = list(values)
    try:
        image = ImageRecord.model_validate(weights.image.known() | given)
    except ValidationError as error:
        raise ValueError(f"mean and std: received {given}; give finite numbers, and a std above 0") from error
    return replace(weights, image=image).reading(os.fspath(source))


def export(
    source: PathLike, dest: PathLike, to: str = "timm", *, key: str | None = None, prefix: str | None = None
) -> str:
    """Write weights in another format, and read them back to be sure, as `fcmae convert` does.

    Args:
        source: see `load`; no name of timm's.
        dest: a new path: a directory for timm and transformers, else a file.
        to: timm, transformers, fair, minkowski or fcmae.
        key: see `load`.
        prefix: see `load`.

    Returns:
        What was written and what was left out, and how to use it, as the command prints it.

    Raises:
        ValueError: if the source cannot be read or is damaged, or `dest` exists or is not a name for that format.
    """
    return convert(Path(find_run(os.fspath(source))), Path(dest).expanduser(), to, key=key, prefix=prefix)


def prune(
    source: PathLike,
    dest: PathLike,
    images: PathLike | Sequence[PathLike],
    *,
    keep: float = 0.5,
    what: pruning.What = "hidden",
    how: pruning.How = "uniform",
    by: pruning.By = "activation",
    key: str | None = None,
    prefix: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Remove hidden channels, compensated for on images, or whole blocks, and write the rest, as `fcmae prune` does.

    Args:
        source: see `load`.
        dest: a new file, .safetensors, .pth or .pt, that `finetune`, `load` and `export` take.
        images: folders, lists or glob patterns, like those that the model is for; no labels are needed.
        keep: share of the channels or blocks to keep, between 0 and 1.
        what: remove hidden channels of the blocks, or whole blocks.
        how: keep that share of each block (or stage), or of the whole network.
        by: measure of importance: what they add to the features of the images, or the norm of their weights.
        key: see `load`.
        prefix: see `load`.
        settings: others, by the names of the command's flags, such as {"nodata": -1}.

    Returns:
        What was removed, and how to use what was written, as the command prints it.

    Raises:
        ValueError: with a line for each problem with settings, weights or images, before anything is written.
    """
    paths = [images] if isinstance(images, str | os.PathLike) else images
    given: dict[str, Any] = {"model": source, "dest": dest, "data": [os.fspath(path) for path in paths], "key": key}
    given |= {"prefix": prefix, "keep": keep, "what": what, "how": how, "by": by}
    if twice := sorted(given.keys() & (settings or {}).keys()):
        raise ValueError(f"settings: {', '.join(twice)}: leave out what is an argument")
    return pruning.prune(options.make(PruneConfig, {**given, **(settings or {})}))

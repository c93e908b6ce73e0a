"""A run's settings from its images, this machine and the available time: finds and measures what `choices` needs.

Without --config, or if `hours` is given, settings that were not given are chosen before the run starts. They are
written to the run's config.yaml with the reasons, and the same command reads them from there when it resumes.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fcmae import bench, choices, options
from fcmae.config import (
    BenchConfig,
    DenseConfig,
    FinetuneConfig,
    ImageConfig,
    PretrainConfig,
    RunConfig,
    SegmentConfig,
)
from fcmae.data.cores import all_processes, free_memory
from fcmae.data.find import find_images, find_labelled, find_mapped
from fcmae.data.index import Images, header_of
from fcmae.data.sampler import StepSampler
from fcmae.data.split import split
from fcmae.data.storage import Storage
from fcmae.data.survey import Survey, survey
from fcmae.networks.spec import ConvNeXtSpec, NetworkSpec
from fcmae.processes import OUT_OF_MEMORY, Failed, in_process
from fcmae.timing import for_a_while
from fcmae.training.micro_batches import (
    depends_on_micro_batch,
    micro_batch_size,
    settle_grad_accum,
    smaller_micro_batch,
    with_micro_batch,
)
from fcmae.training.own_files import has_numbers, is_unused, overwrites
from fcmae.training.records import last_state, processes_before

# These and what functions import load timm, which takes as long as torch: a mistake in a path is told before.
if TYPE_CHECKING:
    from fcmae.data.dataset import ImageDataset
    from fcmae.heads import Classifier, Segmenter
    from fcmae.weights.record import Weights

logger = logging.getLogger("fcmae")

# Settings that may change on resume, but identify the run if `out` is not given.
WHICH_RUN = {"data.path", "data.val_path", "data.maps", "data.val_maps", "hours"}
SHORT_S = 0.01  # to measure the memory of a step, not its time
MEMORY_SHARE = 0.7  # of the free memory, for the run as measured
SUFFIX = {"pretrain": "", "finetune": "-tuned", "segment": "-segmented"}  # of run directories, by the kind of run
Measure = Callable[[int], bench.Result]
AnyKind = PretrainConfig | FinetuneConfig | SegmentConfig


def complete(sketch: AnyKind, given: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the settings that a command on a run was not given; by dotted key.

    `bench` has those of pretraining, without grad_accum, which it finds.

    Args:
        sketch: its settings, each checked but not in combination, with `data.path`.
        given: those that were given, by dotted key.

    Raises:
        ValueError: if there are no images, none can be read, or a step does not fit into the memory.
    """
    if isinstance(sketch, BenchConfig):
        values = {} if _is_settled(sketch, given) else _completed(sketch, given)
        return {key: value for key, value in values.items() if key not in ("out", "grad_accum")}
    return _completed(sketch, given)


def _completed(sketch: AnyKind, given: Mapping[str, Any]) -> dict[str, Any]:
    """As `complete`, with the directory of the run, which has its settings already where it resumes."""
    out = _run_directory(sketch, given)
    if (saved := _saved(sketch, out)) is not None:
        return _resumed(saved, given, out)
    if _is_settled(sketch, given):
        return _grad_accum(sketch)
    _refuse_launcher()
    logger.info("looking at the images and timing steps, to choose settings")
    match sketch:
        case PretrainConfig():
            plan = _pretraining(sketch, given, out)
        case FinetuneConfig():
            plan = _finetuning(sketch, given, out)
        case SegmentConfig():
            plan = _segmentation(sketch, given, out)
    values = {choice.key: choice.value for choice in plan.made}
    return values | {
        "chosen": {choice.key: choice.why for choice in plan.made},
        "planned_s": plan.planned_s,
        "out": out,
    }


def _pretraining(sketch: PretrainConfig, given: Mapping[str, Any], out: Path) -> choices.Choices:
    images = find_images(sketch.data.path, storage=Storage.of_run(out, sketch.data.index, sketch.data.cache_gb))
    began = time.monotonic()  # the first indexing of many tar files, which later starts skip, is not counted
    device = _device(sketch)
    facts = _survey(images, given.get("data.in_chans"), sketch.data)
    weights = _starting_weights(sketch)
    smaller: NetworkSpec | None = None
    while True:
        plan = choices.Choices(given)
        choices.image_settings(plan, facts)
        choices.pretraining_network(plan, facts, device, weights.architecture.spec if weights else None, smaller)
        choices.pretraining_batch(plan, facts, device)
        hours = _machine(plan, device)
        draft = {"epochs": 1} | plan.settings | {"out": out, "seconds": _measured_s(hours), "log.trackers": "none"}
        cfg = options.make(BenchConfig, draft)
        result = _fit(plan, cfg, partial(_pretraining_step, cfg))
        num_views = (len(images) - round(len(images) * cfg.data.val_share)) * cfg.data.masks_per_image
        hours -= (time.monotonic() - began) / 3600
        smaller = choices.smaller_network(plan.settings["model.variant"])
        is_free = weights is None and "model.variant" not in given and "epochs" not in given
        if not is_free or smaller is None or choices.num_seen(hours, result.mean_images_per_s) >= num_views:
            break
    num_held_out = round(len(images) * cfg.data.val_share)
    choices.duration(plan, num_views, hours, result.mean_images_per_s, num_evaluated=num_held_out)
    return plan


def _finetuning(sketch: FinetuneConfig, given: Mapping[str, Any], out: Path) -> choices.Choices:
    assert sketch.data.path is not None
    storage = Storage.of_run(out, sketch.data.index, sketch.data.cache_gb)
    weights = _starting_weights(sketch)
    names = weights.class_names if weights and sketch.model.keep_head else ()
    images = find_labelled(sketch.data.path, names or None, key="data.path", storage=storage)
    began = time.monotonic()
    device = _device(sketch)
    plan = choices.Choices(given)
    facts = _image_settings(plan, images, sketch.data, weights)
    spec, size = (weights.architecture.spec, weights.image.size or ()) if weights else (None, ())
    choices.finetuning_settings(plan, facts, device, spec, size)
    hours = _machine(plan, device)
    cfg = options.make(FinetuneConfig, {"epochs": 1} | plan.settings | {"out": out, "log.trackers": "none"})
    result = _fit(plan, cfg, lambda at_once: _dense_step(cfg, at_once, _measured_s(hours)))
    num_held_out = round(len(images) * cfg.data.val_share)
    num_train = len(images) - num_held_out
    if cfg.data.val_path is not None:
        held_out = find_labelled(cfg.data.val_path, images.class_names, storage=storage)
        num_train, num_held_out = len(images), len(held_out)
    hours -= (time.monotonic() - began) / 3600
    most = choices.finetuning_epochs(sum(facts.class_counts))
    num_evaluated = num_held_out * _num_networks(cfg)
    choices.duration(plan, num_train, hours, result.mean_images_per_s, most, num_evaluated)
    return plan


def _segmentation(sketch: SegmentConfig, given: Mapping[str, Any], out: Path) -> choices.Choices:
    assert sketch.data.path is not None
    find = partial(find_mapped, storage=Storage.of_run(out, sketch.data.index, sketch.data.cache_gb))
    images, _ = find(sketch.data.path, sketch.data.maps)
    began = time.monotonic()
    device = _device(sketch)
    plan = choices.Choices(given)
    weights = _starting_weights(sketch)
    if sketch.data.val_path is not None:
        held_out, _ = find(sketch.data.val_path, sketch.data.val_maps, key="data.val_path")
    else:
        images, held_out = split(images, sketch.data.val_share, sketch.seed)
    facts = _image_settings(plan, images, sketch.data, weights)
    choices.segmentation_settings(plan, facts, device, weights.architecture.spec if weights else None)
    hours = _machine(plan, device)
    cfg = options.make(SegmentConfig, {"epochs": 1} | plan.settings | {"out": out, "log.trackers": "none"})
    result = _fit(plan, cfg, lambda at_once: _dense_step(cfg, at_once, _measured_s(hours)))
    hours -= (time.monotonic() - began) / 3600
    tiles = max(1.0, facts.mean_pixels / math.prod(cfg.data.image_size) / (1 - cfg.data.overlap) ** 2)
    num_evaluated = len(held_out) * tiles * _num_networks(cfg)
    most = choices.segmentation_epochs(plan, facts)
    choices.duration(plan, len(images), hours, result.mean_images_per_s, most, num_evaluated)
    return plan


def _num_networks(cfg: DenseConfig) -> int:
    """That are evaluated: a moving average too."""
    return 2 if cfg.regularization.ema_decay else 1


def _is_settled(sketch: RunConfig, given: Mapping[str, Any]) -> bool:
    """Whether only grad_accum is to be chosen."""
    return options.flat(sketch).keys() - given.keys() <= options.TO_CHOOSE | {"overwrite"}


# Where the run is


def _run_directory(sketch: RunConfig, given: Mapping[str, Any]) -> Path:
    """`out`, by default runs/NAME of the first images; with a number if NAME is taken by another run."""
    if sketch.out is not None:
        return sketch.out
    images, *_ = sketch.inputs()["data.path"]
    name = re.sub(r"[*?\[\]]", "", Path(images).absolute().stem) or "images"
    name += SUFFIX[sketch.kind]
    number, place = 1, Path("runs") / name
    if sketch.overwrite and place.exists():
        raise ValueError(f"overwrite: {place} may be another run: name the one to delete by --out")
    while place.exists() and not (is_unused(place) or _goes_on(sketch, given, place)):
        number += 1
        place = Path("runs") / f"{name}-{number}"
    return place


def _goes_on(sketch: RunConfig, given: Mapping[str, Any], place: Path) -> bool:
    """Whether the run there was started by this command, with no more settings than these, and is not finished."""
    try:
        saved = _saved(sketch, place, begun=False)
    except ValueError as error:  # another version's, or damaged
        logger.warning("the run in %s cannot go on, and a new one is begun: %s", place, str(error).partition("\n")[0])
        return False
    if saved is None or last_state(place) == "finished":
        return False
    before = options.flat(saved)
    told = {key: value for key, value in options.flat(sketch).items() if key in given}
    chosen = {key: before[key] for key in saved.chosen if key in before and key not in told}
    try:
        again = options.make(type(sketch), chosen | told | {"out": place})
    except ValueError:  # what was chosen there does not go with what is given here
        return False
    after = options.flat(again)
    differs = any(before[key] != after[key] for key in WHICH_RUN & before.keys())
    return not (differs or options.diff(saved, again))


def _saved(sketch: RunConfig, place: Path, begun: bool = True) -> RunConfig | None:
    """The settings of the run in a directory; None without one of this kind, or if it is to be deleted.

    begun: only of a run that has something to resume from. One that was cut off in its first steps chooses anew.
    """
    config = place / "config.yaml"
    if overwrites(sketch) or header_of(config)[0] != sketch.kind or (begun and not _has_begun(place)):
        return None
    return options.read(type(sketch), config)


def _resumed(cfg: RunConfig, given: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The settings that `_saved` found of a run that resumes, by dotted key, without those that are given.

    Its micro-batches keep their size, on any number of processes.
    """
    values = {key: value for key, value in options.flat(cfg).items() if key not in given} | {"out": out}
    processes = all_processes()
    before = processes_before(out) or processes
    if processes != before and "grad_accum" in values and not depends_on_micro_batch(cfg):
        most = micro_batch_size(cfg, before)
        parts = with_micro_batch(cfg.model_copy(update={"grad_accum": 1}), processes, most).num_micro_batches
        values |= {"grad_accum": parts, "chosen": cfg.chosen | {"grad_accum": f"{most} images at once, as before"}}
    return values


def _has_begun(place: Path) -> bool:
    return has_numbers(place) or any(place.glob("checkpoints/step-*"))


def _cut_off_at(cfg: RunConfig) -> float:
    """Images at once of an earlier start in this directory that was cut off in its first steps; else infinity."""
    assert cfg.out is not None
    config = cfg.out / "config.yaml"
    if overwrites(cfg) or not config.is_file() or _has_begun(cfg.out) or last_state(cfg.out) != "cut off":
        return math.inf
    return micro_batch_size(options.read(type(cfg), config), 1)


# What is found and measured


def _survey(images: Images, in_chans: int | None, data: ImageConfig) -> Survey:
    return survey(images, in_chans, max_pixels=data.max_pixels, nodata=data.nodata)


def _image_settings(plan: choices.Choices, images: Images, data: ImageConfig, weights: Weights | None) -> Survey:
    """The facts, and the choice of channels, mean and std: the weights' own, except where published weights were
    trained on photographs and the images cannot be read like these.

    weights: what the run starts from, if anything.
    """
    image = None if weights is None else weights.image
    of_weights = image.in_chans if image and weights and not weights.are_published else None
    facts = _survey(images, plan.settings.get("data.in_chans", of_weights), data)
    if image and weights and weights.are_published and choices.are_no_photographs(facts, image.in_chans, image.mean):
        image = None
    if image is not None:
        in_chans = facts.in_chans
        if image.in_chans is not None:
            in_chans = plan.take("data.in_chans", image.in_chans, "that of model.init")
        if len(image.mean or ()) == in_chans:
            return replace(facts, in_chans=in_chans)
        if in_chans != facts.in_chans:
            facts = _survey(images, in_chans, data)
    choices.image_settings(plan, facts)
    return facts


def _starting_weights(sketch: PretrainConfig | DenseConfig) -> Weights | None:
    from fcmae.weights.files import read_init

    return None if sketch.model.init is None else read_init(sketch.model.init, sketch.model.key, sketch.model.prefix)


def _device(sketch: RunConfig) -> str:
    return "cuda" if sketch.device == "auto" and torch.cuda.is_available() else "cpu"


def _machine(plan: choices.Choices, device: str) -> float:
    from fcmae.data.loader import choose_num_workers

    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return choices.machine_settings(plan, device, choose_num_workers(None, device), "bf16" if has_bf16 else "fp32")


def _refuse_launcher() -> None:
    if all_processes() > 1:
        raise ValueError(
            "hours: settings are chosen by one process: print them with it (--print-config > FILE), and start the "
            "others with --config FILE --grad_accum auto"
        )


def _measured_s(hours: float) -> float:
    return min(10.0, max(2.0, 72 * hours))  # a fiftieth of a short run


def _grad_accum(sketch: AnyKind) -> dict[str, Any]:
    """grad_accum, if nothing else is to be chosen."""
    processes, device = all_processes(), _device(sketch)
    start = settle_grad_accum(sketch, processes, device)
    if processes > 1 or depends_on_micro_batch(sketch):
        return {"grad_accum": start.grad_accum, "chosen": start.chosen}
    plan, at_once, free = choices.Choices({}), micro_batch_size(start, processes), _free_memory(device)
    if (most := _most_memory(sketch, at_once)) < MEMORY_SHARE * free and _cut_off_at(sketch) == math.inf:
        why = f"{at_once} images at once take less than {most / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
        plan.take("grad_accum", start.grad_accum, why)
    else:
        _fit(plan, sketch, lambda at_once: _step(sketch, at_once, SHORT_S, False))
    (choice,) = plan.made
    return {choice.key: choice.value, "chosen": sketch.chosen | {choice.key: choice.why}}


def _most_memory(cfg: RunConfig, at_once: int) -> float:
    """Most bytes that a step may take, workers and libraries included; infinity where only measuring tells.

    A block keeps some 20 C numbers per site for its backward pass, and nothing is assumed to be hidden.
    """
    assert isinstance(cfg, PretrainConfig | DenseConfig)
    spec = cfg.model.spec
    if cfg.model.stem_stride is None and (weights := _starting_weights(cfg)):  # which is that of the weights
        spec = weights.architecture.spec
    if not isinstance(spec, ConvNeXtSpec):
        return math.inf
    pixels, sites, parameters = math.prod(cfg.data.image_size), 0.0, 0.0
    for stage, (depth, dim) in enumerate(zip(spec.depths, spec.dims, strict=True)):
        sites += depth * dim * pixels / (spec.stem_stride << stage) ** 2
        parameters += depth * (8 * dim + spec.kernel_size**2) * dim + 8 * dim**2
    if isinstance(cfg, PretrainConfig):
        dim, depth = cfg.model.decoder_dim, cfg.model.decoder_depth
        sites += (depth + 1) * dim * pixels / spec.total_stride**2
        parameters += depth * 8 * dim**2 + dim * (spec.dims[-1] + cfg.data.in_chans * cfg.model.mask_patch**2)
    else:
        sites += 10 * pixels if isinstance(cfg, SegmentConfig) else 0  # some 400 maps of classes
    return 1.5e9 + 20 * parameters + at_once * (160 * sites + 40 * cfg.data.in_chans * pixels)


def _fit(plan: choices.Choices, cfg: RunConfig, measure: Measure) -> bench.Result:
    """Time a step, and set grad_accum so that it fits into memory.

    Raises:
        ValueError: if one image at a time does not, or a step cannot run.
    """
    device = _device(cfg)
    free, cfg = _free_memory(device), settle_grad_accum(cfg, 1, device)
    is_free, limit = "grad_accum" not in plan.settings, _cut_off_at(cfg)
    while is_free and micro_batch_size(cfg, 1) >= limit and (smaller := smaller_micro_batch(cfg, 1)) is not None:
        cfg = smaller
    while True:
        at_once = micro_batch_size(cfg, 1)
        try:
            result = measure(at_once)
            if device != "cpu" or result.memory <= MEMORY_SHARE * free:
                break
            why = f"{at_once} images at once take {result.memory / 1e9:.1f} GB of {free / 1e9:.1f} GB"
        except Failed as error:
            why = f"{at_once} images at once: {error}"
            if OUT_OF_MEMORY not in why:
                raise ValueError(f"a step does not run: {error}") from None
        if not is_free or (smaller := smaller_micro_batch(cfg, 1)) is None:
            parts = "" if is_free else "raise grad_accum, or "
            raise ValueError(
                f"a step does not run: {why}; {parts}try --model.grad_checkpointing true, a smaller data.image_size or "
                "variant"
            )
        cfg = smaller
    why = f"{at_once} images at once take {result.memory / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
    plan.take("grad_accum", cfg.num_micro_batches, why)
    return result


def _free_memory(device: str) -> int:
    """Bytes that a step may take: of the GPU, or of the machine."""
    if device == "cpu":
        return free_memory()
    return int(torch.cuda.mem_get_info()[0])


def _quietly(function: Callable[..., Any], *args: Any) -> Any:
    """What this process warns of, too, is not told again."""
    logger.setLevel(logging.ERROR)
    return function(*args)


def _pretraining_step(cfg: BenchConfig, at_once: int, from_files: bool = True) -> bench.Result:
    candidate = bench.Candidate(cfg.model.backend, cfg.precision, at_once)
    result: bench.Result = in_process(_quietly, bench.time_candidate, cfg, candidate, from_files)
    return result


def _step(cfg: AnyKind, at_once: int, measured_s: float, from_files: bool = True) -> bench.Result:
    if isinstance(cfg, PretrainConfig):
        settings = options.flat(cfg) | {"seconds": measured_s}
        return _pretraining_step(options.make(BenchConfig, settings), at_once, from_files)
    return _dense_step(cfg, at_once, measured_s)


def _dense_step(cfg: FinetuneConfig | SegmentConfig, at_once: int, measured_s: float) -> bench.Result:
    result: bench.Result = in_process(_quietly, time_training, cfg, at_once, measured_s)
    return result


def images_per_s(cfg: PretrainConfig | FinetuneConfig) -> float:
    """How many images a second a run will train on, by steps that are timed for two seconds.

    Raises:
        ValueError: if a step cannot run.
    """
    at_once = micro_batch_size(settle_grad_accum(cfg, 1, _device(cfg)), 1)
    try:
        return _step(cfg, at_once, 2.0).mean_images_per_s
    except Failed as error:
        raise ValueError(f"a step does not run: {error}") from None


def time_training(cfg: FinetuneConfig | SegmentConfig, at_once: int, duration_s: float) -> bench.Result:
    """Time steps of fine-tuning or segmentation on the user's images, at a learning rate of 0.

    Args:
        cfg: of the run.
        at_once: images computed at once.
        duration_s: how long is timed, after a warm-up.
    """
    from fcmae import finetuning, segmenting, starting
    from fcmae.data.loader import build_loader, prefetched
    from fcmae.segmentation import segmentation_loss
    from fcmae.training.launch import make_accelerator

    accelerator = make_accelerator(cfg)
    device = accelerator.device
    weights = starting.starting_weights(cfg)
    if isinstance(cfg, SegmentConfig):
        data = segmenting.find_data(cfg)
        net: Classifier | Segmenter = segmenting.build_model(cfg, weights, data.classes.names)
        reading = starting.reading_for(cfg, weights)
        train_set: ImageDataset = segmenting.build_train_set(cfg, data, reading)
        loss_of: Callable[[Tensor, Tensor], Tensor] = partial(segmentation_loss, dice=cfg.regularization.dice)
    else:
        names = weights.class_names or None if cfg.model.keep_head else None
        storage = Storage.of_run(cfg.out, cfg.data.index, cfg.data.cache_gb)
        images = find_labelled(cfg.data.path or "", names, key="data.path", storage=storage)
        assert images.class_names is not None
        net = finetuning.build_model(cfg, weights, len(images.class_names))
        reading = finetuning.build_reading(cfg, weights)
        train_set = finetuning.build_train_set(cfg, images, reading)
        loss_of = partial(finetuning.classification_loss, class_weights=None, label_smoothing=0.0)
    net = net.to(device)
    normalize = reading.normalize.to(device)
    model, optimizer = accelerator.prepare(net, starting.build_optimizer(cfg, net), device_placement=[True, False])
    order = StepSampler(len(train_set), min(at_once, len(train_set)), cfg.seed, end_step=bench.ENDLESS)
    loader = build_loader(train_set, order, num_workers=cfg.data.num_workers, device_type=device.type)
    batches = prefetched(loader, device)

    def step() -> None:
        batch = next(batches)
        loss = loss_of(model(normalize(batch.images)), batch.given_labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    for _ in range(2):
        step()
    times = for_a_while(step, duration_s, at_least=3)
    return bench.Result(bench.Candidate("dense", "", at_once), at_once, tuple(times), 0.0, bench.peak_memory(device))

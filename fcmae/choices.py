"""The rules that choose settings that nobody gave, each with its reason. Nothing is measured here.

`fcmae.planning` finds the facts, applies these rules to what was not given, and records what was chosen and why.
Published recipes are files in configs/, and what a file or a flag gives is never touched.

"Published" is FCMAE (arXiv 2301.00808, ConvNeXt V2): masks, batch, learning rate, augmentation; the longest pretraining
is that of MAE (arXiv 2111.06377). docs/results.md and docs/small_images.md compared, on photographs of 48 and 64
pixels, targets, networks, patches and crops of pretraining, and learning rates and layer decays of fine-tuning.
Starting from weights, the latter differed by less than their confidence intervals, and they do not depend on the number
of labels here. The rest is our choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from fcmae.config import IMAGENET_MEAN, IMAGENET_STD, FinetuneData
from fcmae.data.stats import rounded
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec, NetworkSpec, read_spec, variant_of

if TYPE_CHECKING:
    from fcmae.data.survey import Survey

SMALL = ConvNeXtSpec(depths=(2, 2, 6), dims=(40, 80, 160))  # three stages: for a fine grid on small images
WIDE = ConvNeXtSpec(depths=(2, 2, 8), dims=(80, 160, 320))  # the same, for many images on a GPU
# Networks to choose from, the largest first.
FAMILIES = ([VARIANTS[f"convnextv2_{name}"] for name in ("tiny", "nano", "pico", "femto", "atto")], [WIDE, SMALL])
STRIDES = {48: 2, 64: 2, 96: 4, 128: 4, 192: 4, 224: 4}  # of the stem, by sides that divide into 6, 7 or 8 patches
LARGEST = {"cpu": 128}  # sides; elsewhere the largest of STRIDES
LARGEST_CROP = {"cpu": 128, "cuda": 512}  # sides of training crops of segmentation
MAX_EPOCHS = 1600  # the longest that masked autoencoders of images were published with
LAYER_DECAY = 0.9  # when starting from weights; from scratch there is nothing to preserve
COMPILED_HOURS = 1.0  # on a GPU
SHRUNK = 8  # times, from which on it is told
VAL_SHARE = FinetuneData().val_share
TRAINING_SHARE = 0.88  # of the hours; the rest is for evaluations, pictures and checkpoints


def default_hours(device: str) -> float:
    """Hours of a run if none are given: an evening on a CPU, a night on a GPU."""
    return 2.0 if device == "cpu" else 8.0


class Choice(NamedTuple):
    """A setting that nobody gave, by its dotted key."""

    key: str
    value: Any
    why: str


class Choices:
    """Keeps given settings, and chooses the rest.

    Attributes:
        settings: by dotted key, what was given and what was chosen so far.
        made: what was chosen, in order.
        planned_s: estimated seconds of the run, with evaluations and checkpoints; None until it is known.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        # None unsets other settings; a run needs these.
        needed = ("hours", "model.stem_stride")
        self.settings = {key: value for key, value in given.items() if value is not None or key not in needed}
        self.made: list[Choice] = []
        self.planned_s: float | None = None

    def take(self, key: str, value: Any, why: str) -> Any:
        """The given value of a setting, else `value`, which is recorded as chosen.

        Args:
            key: dotted.
            value: the value to choose.
            why: the reason, for the user.
        """
        if key not in self.settings:
            self.settings[key] = value
            self.made.append(Choice(key, value, why))
        return self.settings[key]


def image_settings(choices: Choices, images: Survey) -> None:
    """How images are read: channels, mean and std.

    Args:
        choices: takes what is chosen.
        images: their facts.
    """
    in_chans = choices.take("data.in_chans", images.in_chans, "that most of the images have")
    if "data.mean" in choices.settings or "data.std" in choices.settings:
        return
    if len(images.mean) != in_chans:
        return  # the check of the settings reports what is missing
    if in_chans not in (1, 3):
        why = f"measured: {in_chans} channels have no usual values"
    elif images.is_deep:
        why = "measured: the images are not of 8 bits"
    elif far_from_usual(images.mean, images.std):
        why = "measured: far from ImageNet's"
    else:
        return
    mean, std = rounded(images.mean, images.std)
    choices.take("data.mean", mean, why)
    choices.take("data.std", std, why)


def are_no_photographs(images: Survey, in_chans: int | None, mean: Sequence[float] | None) -> bool:
    """Whether images cannot be read as published weights read theirs, which were photographs.

    Args:
        images: their facts.
        in_chans: channels of the weights' images, if known.
        mean: means of these channels, if known.
    """
    learnt_photographs = in_chans in (3, None) and (mean is None or list(mean) in (IMAGENET_MEAN, [0.5, 0.5, 0.5]))
    return learnt_photographs and (images.in_chans not in (1, 3) or images.is_deep)


def machine_settings(choices: Choices, device: str, num_workers: int, precision: str) -> float:
    """Hours, and how this machine computes.

    Args:
        choices: takes what is chosen.
        device: "cpu", or another type.
        num_workers: workers for which it has cores.
        precision: the precision in which it computes fast.

    Returns:
        The hours.
    """
    on_cpu = device == "cpu"
    hours = float(choices.take("hours", default_hours(device), "give --hours for more or less"))
    why = "the model needs the cores itself" if on_cpu else "the cores of a process, up to 8"
    choices.take("data.num_workers", num_workers, why)
    why = "the GPU has it" if precision == "bf16" else "a CPU is not faster in others" if on_cpu else "it has no bf16"
    choices.take("precision", precision, why)
    is_long = not on_cpu and hours >= COMPILED_HOURS
    why = "compiling pays in long runs, if a trial of a few steps says so" if is_long else "compiling takes minutes"
    choices.take("model.compile", "auto" if is_long else False, why)
    return hours


def far_from_usual(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether a mean is more than half a std from ImageNet's grey mean, or a std 1.5 times wider or narrower."""
    usual_mean, usual_std = sum(IMAGENET_MEAN) / 3, sum(IMAGENET_STD) / 3
    return any(
        abs(m - usual_mean) > usual_std / 2 or not 2 / 3 < s / usual_std < 3 / 2 for m, s in zip(mean, std, strict=True)
    )


def smaller_network(variant: Any) -> NetworkSpec | None:
    """The next smaller of the networks to choose from; None after the smallest, or for any other network.

    Args:
        variant: as the setting has it.
    """
    spec = _read(variant)
    return next((after for family in FAMILIES for before, after in pairwise(family) if before == spec), None)


def pretraining_network(
    choices: Choices, images: Survey, device: str, held: NetworkSpec | None, smaller: NetworkSpec | None = None
) -> None:
    """Image size, network, patches, masks and decoder: what a step costs.

    Args:
        choices: takes what is chosen.
        images: their facts.
        device: "cpu", or another type.
        held: the network of the starting weights, if there are any.
        smaller: a network to use in place of one that was too slow.
    """
    size = choices.take("data.image_size", *_image_size(images.short_side, device))
    height, width = size if isinstance(size, list | tuple) else (size, size)
    side = min(height, width)
    if held is not None:
        spec, why = held, "that of model.init"
    elif smaller is not None:
        spec, why = smaller, "a larger one would not see each image once in the time"
    elif side < 192:
        spec = WIDE if device != "cpu" and images.num >= 50_000 else SMALL
        why = "three stages: a fine grid of patches on small images"
    elif device == "cpu" or images.num < 100_000:
        spec, why = VARIANTS["convnextv2_atto"], "the smallest published one, as the images are few or the device a CPU"
    elif images.num < 1_000_000:
        spec, why = VARIANTS["convnextv2_nano"], "100,000 images and more"
    else:
        spec, why = VARIANTS["convnextv2_tiny"], "a million images and more"
    chosen = choices.take("model.variant", _written(spec), why)
    spec = _read(chosen)
    if held is None:
        stride = choices.take("model.stem_stride", _stem_stride(side), f"{side} pixels")
    else:
        stride = choices.take("model.stem_stride", held.stem_stride, "that of model.init")
    total = (stride or spec.stem_stride) << (spec.num_stages - 1)
    choices.take("model.mask_patch", *_mask_patch(height, width, total))
    choices.take("model.mask_ratio", 0.6, "as published")
    has_cells = total <= 8 or total % 8 == 0  # which HOG counts in, 8 pixels a side
    if held is None and side <= 96 and images.in_chans in (1, 3) and not images.is_deep and has_cells:
        choices.take(
            "model.target",
            "hog",
            "gradients were 4.3 points ahead of pixels on small photographs (docs/results.md); no pictures are drawn",
        )
    narrow = max(spec.dims) <= 160
    choices.take(
        "model.decoder_dim", 128 if narrow else 256 if device == "cpu" else 512, "about the encoder's last width"
    )


def _image_size(short_side: int, device: str) -> tuple[int, str]:
    largest = LARGEST.get(device, max(STRIDES))
    fitting = [side for side in STRIDES if side <= min(short_side, largest)]
    side = max(fitting, default=min(STRIDES))
    if not fitting:
        return side, f"the images' {short_side} pixels enlarged: 6 patches of 8 pixels a side"
    if side == largest and short_side > largest:
        why = f"of {short_side} pixels; {'a CPU has no time for more' if device == 'cpu' else 'as published'}"
        if (times := short_side / side) >= SHRUNK:
            why += f"; shrunk up to {times:.0f} times: for small objects cut the images into chips"
        return side, why
    return side, f"the images' shorter side is {short_side}"


def _stem_stride(side: int) -> int:
    return STRIDES[max([known for known in STRIDES if known <= side], default=min(STRIDES))]


def _mask_patch(height: int, width: int, total_stride: int) -> tuple[int, str]:
    """The multiple of the total stride that divides both sides, the shorter one into a number of patches nearest to 7,
    as published.
    """
    side, divided = min(height, width), math.gcd(height, width)
    fitting = [patch for patch in range(total_stride, side, total_stride) if patch >= 8 and divided % patch == 0]
    patch = min(fitting, key=lambda patch: abs(math.log(side / patch / 7)), default=total_stride)
    return patch, f"{height // patch} x {width // patch} patches (published: 7 x 7)"


def _written(spec: NetworkSpec) -> Any:
    """As in the setting, beside the stem's stride: a name if there is one."""
    return variant_of(spec) or spec.settings()


def _read(variant: Any) -> NetworkSpec:
    return VARIANTS[variant] if isinstance(variant, str) else read_spec(variant)


def pretraining_batch(choices: Choices, images: Survey, device: str) -> None:
    """Batch size, learning rate, and the share that is held out.

    Args:
        choices: takes what is chosen.
        images: their facts.
        device: "cpu", or another type.
    """
    share = min(0.2, max(0.01, 32 / images.num))
    share = choices.take("data.val_share", float(f"{share:.2g}"), "some 32 images for the validation loss, 1 % of many")
    num = images.num - round(images.num * share)
    # Few views on a CPU: 780 steps of 256 images gain less than 3,120 of 64, in as much time (studies/recipe.py).
    largest = 64 if device == "cpu" else 4096
    batch = min(largest, max(1, _power_of_two_below(num / (8 if device == "cpu" else 20))))
    why = "8 steps an epoch or more" if batch < largest else "small, as a CPU has few views"
    batch = _divisible(choices, batch)
    batch = choices.take(
        "batch_size", batch, why if device == "cpu" else "20 steps an epoch or more, 4,096 as published"
    )
    # Above some hundred images AdamW's best rate grows slowly: from 1e-3 to the published 2.4e-3 at 4,096.
    rate = 1e-3 * max(1.0, batch / 256) ** (math.log(2.4) / math.log(16))
    why = f"a peak of {rate:.2g} at this batch; published: 2.4e-3 at 4,096"
    choices.take("optim.base_lr", float(f"{rate * 256 / batch:.3g}"), why)


def _divisible(choices: Choices, batch: int) -> int:
    """A batch about as large that has whole images of several masks, pairs to mix, and the parts that were given."""
    given = choices.settings
    parts, pairs = given.get("grad_accum"), given.get("regularization.mixup") or given.get("regularization.cutmix")
    unit = int(given.get("data.masks_per_image", 1)) * (parts if isinstance(parts, int) else 1) * (2 if pairs else 1)
    return max(1, batch // unit) * unit


def finetuning_settings(
    choices: Choices, images: Survey, device: str, held: NetworkSpec | None, held_size: Sequence[int]
) -> None:
    """Everything of a fine-tuning but its epochs, by the number of labels and their balance.

    Args:
        choices: takes what is chosen.
        images: their facts, with class_counts.
        device: "cpu", or another type.
        held: the network of the starting weights, if there are any.
        held_size: the height and width that these were trained at, if they say.
    """
    if held_size:
        square = len(set(held_size)) == 1
        side = choices.take("data.image_size", held_size[0] if square else list(held_size), "that of model.init")
    else:
        side = choices.take("data.image_size", *_image_size(images.short_side, device))
    side = min(side) if isinstance(side, list) else side
    if held is None:
        spec = SMALL if side < 192 else VARIANTS["convnextv2_atto"]
        choices.take("model.variant", _written(spec), "from scratch: small, for few labels")
        choices.take("model.stem_stride", _stem_stride(side), f"{side} pixels")
    num = sum(images.class_counts)
    few = num < 10_000
    is_whole = choices.settings.get("data.val_path") is not None
    held_out = 0.0 if is_whole else choices.settings.get("data.val_share", VAL_SHARE)
    to_learn = max(2, int((1 - held_out) * num))
    batch = min(128 if device == "cpu" else 512, max(8, _power_of_two_below(num / 16)), _power_of_two_below(to_learn))
    batch = _divisible(choices, batch)
    batch = choices.take("batch_size", batch, f"{num:,} labels: {_count(max(1, to_learn // batch))} an epoch or more")
    rate = 1e-3
    choices.take("optim.base_lr", float(f"{rate * 256 / batch:.3g}"), f"a peak of {rate:g}, for few labels and many")
    if held is not None:
        choices.take("optim.layer_decay", LAYER_DECAY, "for few labels and many: layers near the images change less")
    choices.take("model.drop_path_rate", 0.1, "as published for the smallest networks")
    choices.take("data.crop_scale", [0.35, 1.0], "objects are not to be cut off" if few else "many labels")
    augments = images.in_chans in (1, 3) and not images.has_deep and side >= 96 and num >= 1000
    if augments:
        choices.take("data.auto_augment", "rand-m9-mstd0.5-inc1", "as published, 8-bit images of 96 pixels and more")
    else:
        choices.take("data.auto_augment", None, "made for 8-bit photographs; here they are small, few, deep or banded")
    choices.take("data.random_erasing", 0.0 if few else 0.25, "fewer than 10,000 labels" if few else "as published")
    choices.take("data.crop_pct", 1.0, "the whole shorter side, as pretraining has it")
    smallest, largest = min(images.class_counts), max(images.class_counts)
    if largest >= 3 * smallest:
        why = f"classes have {smallest:,} to {largest:,} images"
        choices.take("regularization.class_weights", "balanced", why)


def segmentation_settings(choices: Choices, images: Survey, device: str, held: NetworkSpec | None) -> None:
    """Everything of a segmentation but its epochs, by the number of images and their size.

    Args:
        choices: takes what is chosen.
        images: to learn from.
        device: "cpu", or another type.
        held: the network of the starting weights, if there are any.
    """
    largest = LARGEST_CROP[device]
    small = min(images.short_side, largest) < 192
    if held is None:
        spec = SMALL if small else VARIANTS["convnextv2_atto"]
        spec = _read(choices.take("model.variant", _written(spec), "from scratch: small, for few label maps"))
        stride = choices.take("model.stem_stride", spec.stem_stride, "as published") << (spec.num_stages - 1)
    else:
        spec, stride = held, held.total_stride
    side = max(1, min(images.short_side, largest) // stride) * stride
    if images.short_side > largest:
        why = "a CPU has no time for larger crops" if device == "cpu" else "crops as published"
    else:
        why = f"the images' shorter side is {images.short_side}, the total stride {stride}"
    choices.take("data.image_size", side, why)
    batch = _divisible(choices, min(16, _power_of_two_below(images.num)))
    batch = choices.take("batch_size", batch, "as published, or as there are images")
    rate, why = (5e-4, "small networks") if max(spec.dims) <= 320 else (1e-4, "as published for tiny and larger")
    choices.take("optim.base_lr", float(f"{rate * 256 / batch:.3g}"), f"a peak of {rate:g} at this batch: {why}")
    if held is not None:
        choices.take("optim.layer_decay", LAYER_DECAY, "for few labels and many: layers near the images change less")
    choices.take("model.drop_path_rate", 0.1, "as published for the smallest networks")
    if device == "cpu":
        choices.take("data.overlap", 0.25, "whole images in fewer tiles, as a CPU has little time")


def segmentation_epochs(choices: Choices, images: Survey) -> float:
    """Most epochs that are useful on label maps, if there is time: every pixel 100 times, and 2,000 steps.

    Args:
        choices: those of `segmentation_settings`.
        images: to learn from.
    """
    size, batch = choices.settings["data.image_size"], choices.settings["batch_size"]
    side: int = min(size) if isinstance(size, list | tuple) else size
    return float(max(100 * max(1.0, images.short_side / side) ** 2, 2000 / max(1, images.num // batch)))


def finetuning_epochs(num_labels: int) -> int:
    """Most epochs that are useful on labels, if there is time: 100 of few labels, 30 of a hundred thousand."""
    return 100 if num_labels <= 5_000 else 50 if num_labels <= 50_000 else 30


def num_seen(hours: float, images_per_s: float) -> float:
    """Views of images that a run computes in the hours, at the measured speed."""
    return images_per_s * hours * 3600 * TRAINING_SHARE


def duration(
    choices: Choices,
    num_images: int,
    hours: float,
    images_per_s: float,
    most: float = MAX_EPOCHS,
    num_evaluated: float = 0,
) -> None:
    """Choose epochs, warm-up, and how often to save, evaluate and log, for the given hours.

    Args:
        choices: takes what is chosen.
        num_images: training images, each counted once per mask.
        hours: hours that the run may take.
        images_per_s: measured speed, with images counted as in batch_size.
        most: most epochs that are useful.
        num_evaluated: images, or tiles of them, that an evaluation computes.
    """
    batch = choices.settings["batch_size"]
    num_images = max(1, num_images // batch) * batch  # what fills no batch waits for another epoch
    epochs = min(most, max(num_seen(hours, images_per_s), batch) / num_images)
    epochs = float(f"{epochs:.3g}") if epochs < 10 else round(epochs)
    why = f"{epochs * num_images:,.0f} views at {images_per_s:,.0f} images/s"
    epochs = choices.take("epochs", epochs, why if epochs < most else f"{why}; more is of no use")
    seconds = epochs * num_images / images_per_s
    choices.planned_s = round(seconds / TRAINING_SHARE, 1)
    warmup = min(40, epochs / 20)
    choices.take("optim.warmup_epochs", float(f"{warmup:.3g}"), "a twentieth of the run, 40 at the most")
    every = epochs / max(1, seconds / 600)
    choices.take("checkpoint.every_epochs", float(f"{every:.3g}"), "every ten minutes or so")
    looks = max(5, min(20, seconds / 180))  # evaluations, of which a verdict on the features needs four
    # Evaluation is some three times as fast as training, and in total may take a tenth of its time.
    looks = max(1, min(looks, 0.3 * epochs * num_images / max(1, num_evaluated)))
    choices.take("log.eval_epochs", float(f"{max(epochs / looks, 1e-3):.3g}"), f"about {looks:.0f} times in the run")
    lines = epochs * num_images / batch / max(1.0, seconds / 10)
    choices.take("log.every_steps", max(1, min(50, round(lines))), "a line every ten seconds or so")


def _count(steps: int) -> str:
    return "a step" if steps == 1 else f"{min(16, steps)} steps"


def _power_of_two_below(value: float) -> int:
    return 1 << int(math.log2(value)) if value >= 1 else 1

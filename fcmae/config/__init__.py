"""Settings of runs; `commands` has those of the other commands, and `base` the common parts.

Each command has one model, validated as a whole when it is made from a file, flags or Python.
Nothing here imports torch, so that `--help` and rejected settings answer at once, and nothing reads the environment.
`fcmae.options` fills these models from YAML files and command lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fcmae.config.base import Backend, Conflict, Device, RunText, Section, Settings, Size, Spelling, UserPath, UserText
from fcmae.data.geometry import MAX_CHANNELS, MAX_PIXELS
from fcmae.masking import num_visible
from fcmae.networks.spec import (
    LISTED,
    VARIANTS,
    NetworkSpec,
    describe,
    read_spec,
    variant_named,
    variant_of,
    variants_near,
)

if TYPE_CHECKING:
    from typing_extensions import Self

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# The grey average of the above: a grey photograph copied into three channels keeps its statistics.
GREY_MEAN, GREY_STD = [0.449], [0.226]


def usual_statistics(in_chans: int) -> tuple[list[float], list[float]]:
    """Mean and std of photographs: one per channel for 3 channels, else one for all; a full range of values is 1."""
    return (IMAGENET_MEAN, IMAGENET_STD) if in_chans == 3 else (GREY_MEAN, GREY_STD)


def check_launch(cfg: Settings, num_processes: int) -> None:
    """Check what depends on the launch: the number of processes, and what is installed on this machine.

    Args:
        cfg: Settings of pretraining or fine-tuning.
        num_processes: Processes that share the batch.

    Raises:
        ValueError: With a line for each problem.
    """
    if found := list(cfg.conflicts(num_processes)):
        raise ValueError("\n".join(f"{keys[0]}: {sentence}" for keys, sentence in found))


def _no_items(value: Any) -> Any:
    return [] if value is None else value


def _network(value: Any) -> str | NetworkSpec:
    if isinstance(value, Mapping | NetworkSpec):
        return read_spec(value)
    try:
        return variant_named(str(value))
    except ValueError as error:
        sentence = "should be {names}, or the numbers of a network such as {example}"
        names, example = ", ".join(variants_near(str(value)) or LISTED), "{depths: [2, 2, 4], dims: [40, 80, 160]}"
        raise PydanticCustomError("network", sentence, {"names": names, "example": example}) from error


def _numbers(network: str | NetworkSpec) -> Any:
    return network if isinstance(network, str) else network.settings()


Network = Annotated[str | NetworkSpec, PlainValidator(_network), PlainSerializer(_numbers)]
Span = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]
Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]


class ImageConfig(Section):
    """Where the images are and how they are read; shared by all runs."""

    image_size: Size = (224, 224)
    """Height and width of the network's input, in pixels; a single number means a square."""
    in_chans: int = Field(3, ge=1, le=MAX_CHANNELS)
    """Channels of the images: 1 grey, 3 RGB, any other number for multi-band TIFF and .npy."""
    mean: list[float] | None = None
    """Per-channel mean, with a format's full range scaled to 1. Default: ImageNet's (3 channels) or its grey average
    (1)."""
    std: list[Annotated[float, Field(gt=0)]] | None = None
    """Per-channel standard deviation, in the same units."""
    hflip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip in training; 0 where left and right differ in meaning."""
    vflip: float = Field(0.0, ge=0, le=1)
    """Probability of a vertical flip in training, such as 0.5 for images seen from above."""
    val_share: float = Field(0.01, ge=0, lt=1)
    """Share of the images held out for validation, drawn with the run's seed."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Share of unreadable files above which the run stops."""
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    """Largest image that is read, in pixels of up to 12 bytes; the limit shrinks for images with more bytes per pixel.
    Larger images are skipped, except tiled or striped TIFFs, from which crops of at most this size are read."""
    nodata: float | None = Field(None, allow_inf_nan=False)
    """The stored value that marks missing data, such as 0 or -9999, for files that do not state it (GDAL_NODATA); for
    palette images, the index of a colour. With unsigned integers, a pixel is missing only if all its bands have this
    value. Missing values enter neither the statistics nor the pretraining loss; the network sees the mean instead. In
    `segment`, a pixel without any valid band has no class. If you do not give it, fine-tuning takes the value of the
    starting weights, if they have one."""
    index: Literal["run", "beside"] = "run"
    """Where the index of each tar file is stored: in the run directory (run), or next to the tar file, where all runs
    can use it (beside)."""
    cache_gb: float = Field(0, ge=0)
    """Gigabytes of images from URLs to cache in the run directory, the most recently used ones; an object larger than
    1/64 of this is not kept. The images at the URLs must not change."""
    num_workers: int | None = Field(None, ge=0)
    """Processes that decode images, for each training process. Default: 1 on CPU, up to 8 on a GPU."""

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and std in effect: one per channel, or one for all."""
        mean, std = usual_statistics(self.in_chans)
        return self.mean or mean, self.std or std


class PretrainData(ImageConfig):
    path: Annotated[list[UserText], Spelling("IMAGES", commas=False)] = Field([])
    """Folders (searched recursively), tar files, text files that list paths, or glob patterns, local or by URL (s3://,
    https:// and others). No labels are needed."""
    crop_scale: Span = (0.2, 1.0)
    """Share of the image's area that a training crop covers, smallest and largest."""
    masks_per_image: int = Field(1, ge=1)
    """Masks applied to each decoded crop within a step. With n masks, n times fewer images are decoded; batch_size
    counts an image once for each of its masks."""


class FinetuneData(ImageConfig):
    path: Annotated[UserText | None, Spelling("IMAGES")] = None
    """A folder with one sub-folder per class, a CSV file with the columns path,label, or tar files with labels."""
    val_path: UserText | None = None
    """Held-out images, in the same form. Default: a stratified share (val_share) of `path`."""
    crop_scale: Span = (0.08, 1.0)
    """Share of the image's area that a training crop covers, smallest and largest."""
    val_share: float = Field(0.2, ge=0, lt=1)
    """Share of each class held out when no val_path is given, drawn with the run's seed."""
    crop_pct: float = Field(0.875, gt=0, le=1)
    """Share of the shorter side that the evaluation's centre crop keeps."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment policy for 1 and 3 channels, or none."""
    random_erasing: float = Field(0.25, ge=0, le=1)
    """Probability of erasing a rectangle of a training image."""


class SegmentData(ImageConfig):
    path: Annotated[UserText | None, Spelling("IMAGES")] = None
    """A folder of images (searched recursively) or a tar file of them, or a CSV file with the columns image,mask; local
    or by URL."""
    maps: Annotated[UserText | None, Spelling(short="maps")] = None
    """A folder or tar file of label maps named like the images: single-channel PNG, TIFF or .npy, 8 or 16 bit or with a
    palette. Leave it out with a CSV file."""
    val_path: UserText | None = None
    """Held-out images, in the same form. Default: a share (val_share) of `path`."""
    val_maps: UserText | None = None
    """Label maps of the held-out images, in the same form as `maps`."""
    class_names: list[Annotated[str, Field(min_length=1)]] = Field([])
    """Names of the classes. Default: the values from 0 to the largest in a sample of the maps."""
    class_values: list[Annotated[int, Field(ge=0, lt=2**16)]] = Field([])
    """The value in the maps for each class, such as 0 255. Default: 0, 1, 2 and so on."""
    ignore_value: int | None = Field(255, ge=0, lt=2**16)
    """The value in the maps that marks pixels of unknown class, or none. They are ignored in training and scoring."""
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    """Range of the random factor by which a training crop is enlarged: smallest and largest."""
    color_jitter: float = Field(0.0, ge=0, le=1)
    """Largest relative change of a training crop's brightness, contrast and (with 3 channels) saturation; 0 for
    none."""
    val_share: float = Field(0.2, ge=0, lt=1)
    """Share of the images held out when no val_path is given, drawn with the run's seed."""
    overlap: float = Field(0.5, ge=0, le=0.9)
    """Share of a tile's side by which it overlaps the next, when whole images are evaluated tile by tile."""


class EncoderConfig(Section):
    """The encoder and its starting weights; shared by all runs."""

    variant: Network | None = None
    """The network. Default: that of `init`."""
    init: Annotated[RunText | None, Spelling(short="init")] = Field(None, min_length=1)
    """Starting weights: a run, a checkpoint, weights in any format that `fcmae convert` reads, or a model of timm's by
    name, which is fetched. What they lack or what does not fit, such as a decoder or a head, starts from scratch.
    Default: all from scratch."""
    key: Annotated[str | None, Spelling(short="key")] = Field(None, min_length=1)
    """The entry that holds the weights in a .pth file given as `init`, e.g. model_ema. Default: model, or another usual
    one."""
    prefix: Annotated[str | None, Spelling(short="prefix")] = None
    """Prefix of the weights' names in the `init` file, e.g. student. Default: detected."""
    license: str | None = Field(None, min_length=1)
    """Licence of the weights, which is passed on to the run and its exports. Default: the one that `init` states."""
    stem_stride: int | None = Field(None, ge=1, validate_default=True)
    """Stride of the stem; 1 or 2 for small images. With four stages, the total stride is 8 times this. Default: the
    variant's, which is 4 as published; in fine-tuning, that of `init`."""
    drop_path_rate: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth in the encoder: the rate of its last block, up to which the rates rise linearly."""
    grad_checkpointing: bool = False
    """Recompute the encoder's blocks in the backward pass: less memory, more time."""
    compile: bool | Literal["auto", "cudagraphs"] = False
    """Whether to torch.compile the model: true, false, auto (in runs of more than ten minutes, times a few steps both
    ways, also on resume) or cudagraphs (GPU kernels are recorded once and replayed)."""

    @field_validator("stem_stride")
    @classmethod
    def _agrees(cls, value: int | None, info: ValidationInfo) -> int | None:
        variant = info.data.get("variant")
        if not isinstance(variant, NetworkSpec) or "stem_stride" not in variant.model_fields_set:
            return value
        if value not in (None, variant.stem_stride):
            raise ValueError(f"the numbers in model.variant say {variant.stem_stride}: leave one of the two out")
        return variant.stem_stride

    @model_validator(mode="after")
    def _have_a_file(self) -> Self:
        for name in ("key", "prefix"):
            if self.init is None and getattr(self, name):
                sentence = "it tells of the weights that init names: give --init"
                raise PydanticCustomError("conflict", sentence, {"keys": (f"model.{name}", "model.init")})
        return self

    @model_validator(mode="after")
    def _spell_once(self) -> Self:
        """Give each network one spelling: its name if it has one, and no stride, which is a setting of its own."""
        if isinstance(self.variant, NetworkSpec):
            # Built again, as it may have been built from the strings of a file.
            plain = read_spec(self.variant.model_dump(exclude={"stem_stride"}))
            self.variant = variant_of(plain) or plain
        return self


def _spec(variant: str | NetworkSpec, stem_stride: int | None) -> NetworkSpec:
    spec = VARIANTS[variant] if isinstance(variant, str) else variant
    return spec if stem_stride is None else spec.model_copy(update={"stem_stride": stem_stride})


class PretrainModel(EncoderConfig):
    variant: Network = "convnextv2_atto"
    """The encoder: the name of a variant (its last word is enough), or the numbers of a network: depths and dims, and
    kernel_size, hidden and use_grn where they differ from the usual ones."""
    freeze_encoder_steps: int = Field(0, ge=0)
    """Steps at the start in which only the decoder is trained."""
    backend: Backend = "packed"
    """How the sparse encoder computes: packed (fast), triton (packed, with kernels for NVIDIA GPUs), masked (dense) or
    minkowski. A resumed run may switch."""
    grn_scope: Literal["image", "batch"] = "image"
    """What the encoder's GRN pools over: image; or batch (the images that a process computes at once), to continue a
    run of the released PyTorch code, which pooled over 64: set grad_accum to batch_size / (64 * processes). A resumed
    run pools over as many as before. When continuing such a run, the optimizer's state starts anew, and GRN's
    parameters and the mask token no longer decay."""
    mask_patch: int = Field(32, ge=4)
    """Side of a mask patch in pixels: a multiple of the total stride."""
    mask_ratio: float = Field(0.6, gt=0, lt=1)
    """Share of the patches that is hidden."""
    decoder_depth: int = Field(1, ge=1)
    """Number of decoder blocks."""
    decoder_dim: int = Field(512, ge=8)
    """Width of the decoder."""
    target: Literal["pixels", "hog"] = "pixels"
    """What is predicted for a hidden patch: its pixels, as published; or hog, histograms of oriented gradients as in
    MaskFeat, which did better on small photographs (docs/small_images.md). No reconstructions are drawn for hog."""
    normalize_target: bool = True
    """Standardise each target patch of pixels by its own mean and variance."""

    @property
    def spec(self) -> NetworkSpec:
        """The encoder's numbers, with the stem stride in effect."""
        return _spec(self.variant, self.stem_stride)

    @model_validator(mode="after")
    def _settle_stem(self) -> Self:
        self.stem_stride = self.spec.stem_stride
        return self

    @model_validator(mode="after")
    def _settle_target(self) -> Self:
        self.normalize_target &= self.target == "pixels"
        return self


class DenseModel(EncoderConfig):
    """An encoder under a head; which encoder may be left to `init`."""

    keep_head: bool = False
    """Start from the head of `init` too: of a classifier, e.g. after `fcmae prune`, whose classes are then used; of a
    segmentation model, which must be as these settings make it."""

    @property
    def spec(self) -> NetworkSpec | None:
        """The network's numbers, with the stem's stride if it is given; None without a variant."""
        return None if self.variant is None else _spec(self.variant, self.stem_stride)

    @model_validator(mode="after")
    def _settle_stem(self) -> Self:
        if self.spec is not None and self.init is None:
            self.stem_stride = self.spec.stem_stride
        return self


class FinetuneModel(DenseModel):
    head_init_scale: float | None = Field(None, gt=0)
    """Factor on the classifier's initial weights. Default: .001 with `init`, 1 from scratch."""


class SegmentModel(DenseModel):
    head: Literal["pyramid", "upernet", "anytime"] = "pyramid"
    """The segmentation head: pyramid, a light feature pyramid; upernet, UPerNet; or anytime, an exit after each stage,
    so that later stages compute only the patches that are still uncertain."""
    head_dim: int | None = Field(None, ge=8)
    """Channels of the head. Default: 128 for pyramid, 512 for upernet, 32 for anytime."""
    tau: float | None = Field(None, ge=0, le=1)
    """For anytime: a patch exits when the largest class probability at its least confident site is above this; at 1
    none exits. Default: .998; with eval_only, that of `init`."""
    quantile: float | None = Field(None, ge=0, lt=1)
    """For anytime: the share of a patch's sites that may be less confident than tau. Default: 0; with eval_only, that
    of `init`."""


class Optim(Section):
    """AdamW with a half-cosine learning rate after a linear warm-up."""

    base_lr: float = Field(1.5e-4, gt=0)
    """Peak learning rate for 256 images per step; the one used is base_lr * batch_size / 256."""
    min_lr: float = Field(0.0, ge=0)
    """Final learning rate of the cosine schedule (absolute), reached one step after the last."""
    warmup_epochs: float = Field(40, ge=0)
    """Epochs of linear warm-up."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay; biases, norms, GRN and the mask token are exempt."""
    betas: Betas = (0.9, 0.95)
    """AdamW's decay rates."""
    clip_grad: float | None = Field(None, gt=0)
    """Norm to which the gradient is clipped."""


class FinetuneOptim(Optim):
    base_lr: float = Field(2e-4, gt=0)
    """Peak learning rate for 256 images per step; the one used is base_lr * batch_size / 256."""
    min_lr: float = Field(1e-6, ge=0)
    """Final learning rate of the cosine schedule (absolute), reached one step after the last."""
    warmup_epochs: float = Field(0, ge=0)
    """Epochs of linear warm-up."""
    betas: Betas = (0.9, 0.999)
    """AdamW's decay rates."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate from each layer to the one below it."""
    layer_decay_mode: Literal["single", "group"] = "single"
    """What counts as a layer: each block (single), or 12 groups of three blocks as for base and larger (group)."""


ClassWeights = Literal["balanced"] | list[Annotated[float, Field(ge=0)]] | None


class Regularization(Section):
    """What keeps a classifier from overfitting."""

    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the target spread over all classes."""
    mixup: float = Field(0.0, ge=0)
    """Beta parameter of mixup, 0 for none."""
    cutmix: float = Field(0.0, ge=0)
    """Beta parameter of cutmix, 0 for none."""
    class_weights: ClassWeights = None
    """Weights of the classes in the loss: a list (classes in alphabetical order, or by size if all are numbers), or
    balanced (inverse to their frequency)."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of the weights' moving average (EMA), 0 for none; after n steps, (n - 1) / (n + 8) as long as that is less.
    The average is evaluated beside the weights themselves."""


class SegmentOptim(FinetuneOptim):
    base_lr: float = Field(1.6e-3, gt=0)
    """Peak learning rate for 256 images per step; the one used is base_lr * batch_size / 256."""
    warmup_epochs: float = Field(1, ge=0)
    """Epochs of linear warm-up."""


class SegmentRegularization(Section):
    """Terms of the segmentation loss, and averaging of the weights."""

    class_weights: ClassWeights = None
    """Weights of the classes in the loss: a list, or balanced (inverse to their share of the pixels)."""
    dice: float = Field(0.0, ge=0)
    """Weight of the Dice loss, added to the cross-entropy; 0 for none."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of the weights' moving average (EMA), 0 for none; after n steps, (n - 1) / (n + 8) as long as that is less.
    The average is evaluated beside the weights themselves."""


class CheckpointConfig(Section):
    every_epochs: float = Field(1.0, gt=0)
    """Epochs between checkpoints; a fraction is allowed."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints to keep; the last one known to be good is kept too."""
    milestone_epochs: int = Field(0, ge=0)
    """Interval in epochs at which a checkpoint is kept for good; 0 for never."""


class MonitorConfig(Section):
    """What is measured of the encoder at each evaluation."""

    num_images: int = Field(256, ge=0)
    """Number of images, held-out ones first, on which each block's cosine distance, effective rank and dead and
    saturated channels are measured; 0 for none."""
    labelled: UserText | None = Field(None, min_length=1)
    """Labelled images: a folder with one sub-folder per class or a CSV file with the columns path,label. A quarter of
    them (of 2,000 if there are more) is classified by its 20 nearest neighbours among the rest; nothing is trained on
    the labels."""


class LogConfig(Section):
    every_steps: int = Field(10, ge=1)
    """Steps between lines of train.log and metrics.jsonl."""
    eval_epochs: float = Field(1.0, gt=0)
    """Epochs between evaluations (validation loss, monitors and reconstructions, or accuracy)."""
    trackers: Annotated[list[str], BeforeValidator(_no_items)] = Field(["tensorboard"])
    """accelerate's trackers, by name (tensorboard, wandb, mlflow, ...), or none."""


class RunConfig(Settings):
    """Settings that all kinds of run share."""

    kind: ClassVar[Literal["pretrain", "finetune", "segment"]]
    out: UserPath | None = None
    """The run directory: everything a run writes goes here. Running the same command again resumes it. Where settings
    are chosen for you, runs/NAME of the images by default, with -tuned or -segmented appended for those commands."""
    overwrite: bool = False
    """Delete the run in `out` and start anew. This holds for one start only: when SLURM or torchrun restarts the
    command, the run resumes."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Random seed of the weights, the order of the images, the crops and the masks."""
    epochs: int | float = Field(800, gt=0)
    """Passes over the training images; a fraction is allowed."""
    batch_size: int = Field(4096, ge=1)
    """Images per step, over all processes and micro-batches."""
    grad_accum: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Micro-batches into which a process's share of the batch is divided (gradient accumulation). auto: as many as
    needed to fit into memory, measured before the first step. With several processes nothing is measured: each process
    computes at most 64 images at once on a CPU and 256 on a GPU, or up to four times that if the batch cannot be
    divided evenly into smaller parts of reasonable size."""
    hours: float | None = Field(None, gt=0)
    """How long the run may take. Without a recipe, or if you give this, all settings that you do not give, `epochs`
    among them, are chosen for the images, the machine and these hours. The default is printed at the start."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Precision: auto is bf16 on a GPU that has it, else fp32. tf32 is fp32 whose products a GPU rounds to 10 bits.
    GRN's norms, LayerNorm and the loss are always fp32."""
    device: Device = "auto"
    """auto takes a GPU when there is one."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    chosen: Annotated[dict[str, str], Spelling(hidden=True)] = Field(default_factory=dict)
    """Settings that were chosen automatically, each with the reason; written by `fcmae.planning`."""
    planned_s: Annotated[float | None, Spelling(hidden=True)] = None
    """Estimated seconds of the whole run, from the speed measured before it; written by `fcmae.planning`."""

    if TYPE_CHECKING:  # each kind of run has its own
        data: ImageConfig
        model: EncoderConfig
        optim: Optim

    @property
    def num_checkpoints(self) -> int:
        """Checkpoints that the run has at its end, the last good one among them, if it is older than those it keeps."""
        own = self.checkpoint
        return own.keep + 1 + (int(self.epochs // own.milestone_epochs) if own.milestone_epochs else 0)

    @property
    def trains(self) -> bool:
        """Whether it takes a step; with eval_only it does not."""
        return True

    @property
    def num_micro_batches(self) -> int:
        """grad_accum as a number: 1 as long as it is auto, which is settled before a run begins."""
        return 1 if self.grad_accum == "auto" else self.grad_accum

    def inputs(self) -> dict[str, list[str]]:
        """Paths that a run reads, by the settings that name them."""
        return {}

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        if self.out is None:
            yield ("out",), "missing: the run directory, e.g. --out runs/first"
        if self.device == "cpu" and self.precision in ("fp16", "tf32"):
            yield ("precision", "device"), f"{self.precision} needs a GPU and device is cpu: use auto, fp32 or bf16"
        processes = num_processes or 1
        parts = processes * self.num_micro_batches
        if self.batch_size < processes:
            yield ("batch_size",), f"{self.batch_size} is smaller than the {processes} processes: give each an image"
        elif self.batch_size % parts:
            yield (
                ("batch_size", "grad_accum"),
                f"{self.batch_size} is not a multiple of processes x grad_accum = {processes} x "
                f"{self.num_micro_batches}: the nearest is {max(1, round(self.batch_size / parts)) * parts}",
            )
        if self.model.compile == "cudagraphs" and self.device == "cpu":
            yield ("model.compile", "device"), "cudagraphs needs a GPU and device is cpu: use true or auto"
        if self.model.compile == "cudagraphs" and self.num_micro_batches > 1:
            # The gradients of one micro-batch lie in memory that the next one's graph overwrites.
            yield (
                ("model.compile", "grad_accum"),
                f"cudagraphs needs grad_accum 1, not {self.num_micro_batches}: use true or auto",
            )


AnyRun = TypeVar("AnyRun", bound=RunConfig)


def _total_stride(spec: NetworkSpec) -> str:
    return f"the total stride {spec.total_stride} ({spec.total_stride // spec.stem_stride} x stem_stride)"


def _image_conflicts(data: ImageConfig, *, known_statistics: bool = False) -> Iterator[Conflict]:
    """known_statistics: mean and std may be absent for any number of channels, as the starting weights have them."""
    for name, values in (("mean", data.mean), ("std", data.std)):
        keys = (f"data.{name}", "data.in_chans")
        if values is None and data.in_chans not in (1, 3) and not known_statistics:
            yield keys, f"missing for in_chans = {data.in_chans}: compute it with `fcmae stats`"
        if values is not None and len(values) != data.in_chans:
            yield keys, f"{values} has {len(values)} values, in_chans = {data.in_chans} needs {data.in_chans}"
    if (data.mean is None) != (data.std is None) and (data.in_chans in (1, 3) or known_statistics):
        given, absent = ("std", "mean") if data.mean is None else ("mean", "std")
        yield (f"data.{absent}", f"data.{given}"), f"missing beside data.{given}: give both or neither"
    name = "scale" if isinstance(data, SegmentData) else "crop_scale"
    smallest, largest = getattr(data, name)
    if smallest > largest:
        yield (f"data.{name}",), f"{[smallest, largest]} is not in rising order"


def _nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"


class PretrainConfig(RunConfig):
    """Pretrain a ConvNeXt V2 (or V1) encoder on unlabeled images, by predicting what a mask hides.

    Without a recipe (a file with epochs or batch_size), settings you do not give are chosen for the
    images, the machine and the hours; --print-config shows them. `fcmae configs` lists recipes.

    Example: fcmae pretrain photos --hours 4
    """

    kind: ClassVar = "pretrain"
    data: PretrainData = Field(default_factory=PretrainData)
    model: PretrainModel = Field(default_factory=PretrainModel)
    optim: Optim = Field(default_factory=Optim)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)

    def inputs(self) -> dict[str, list[str]]:
        found = {"data.path": self.data.path}
        single = {"model.init": self.model.init, "monitor.labelled": self.monitor.labelled}
        return found | {key: [path] for key, path in single.items() if path}

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        yield from super().conflicts(num_processes)
        if not self.data.path:
            yield ("data.path",), "missing: a folder of images, e.g. --data.path photos"
        yield from _image_conflicts(self.data)
        parts = (num_processes or 1) * self.num_micro_batches
        if not self.batch_size % parts and self.batch_size % (unit := parts * self.data.masks_per_image):
            yield (
                ("batch_size", "data.masks_per_image", "grad_accum"),
                f"{self.batch_size} is not a multiple of masks_per_image x processes x grad_accum = {unit}: "
                f"use {_nearest_multiples(self.batch_size, unit)}",
            )
        if self.model.backend == "triton" and self.device == "cpu":
            yield ("model.backend", "device"), "triton needs a GPU and device is cpu: use packed"
        if num_processes and self.model.backend == "minkowski" and find_spec("MinkowskiEngine") is None:
            yield (
                ("model.backend",),
                "minkowski needs MinkowskiEngine, which is not installed: build it with `make minkowski` or use packed",
            )
        spec, patch, size = self.model.spec, self.model.mask_patch, self.data.image_size
        if spec.dense_only:
            yield ("model.variant",), f"{describe(spec)} {spec.dense_only}: fine-tune it, or pretrain convnextv2_atto"
        if patch % spec.total_stride:
            yield (
                ("model.mask_patch", "model.stem_stride", "model.variant"),
                f"{patch} is not a multiple of {_total_stride(spec)}: "
                f"use {_nearest_multiples(patch, spec.total_stride)}",
            )
        uneven = [side for side in dict.fromkeys(size) if side % patch]
        for side in uneven:
            yield (
                ("data.image_size", "model.mask_patch"),
                f"{side} is not a multiple of mask_patch {patch}: use {_nearest_multiples(side, patch)}",
            )
        num_patches = (size[0] // patch) * (size[1] // patch)
        if num_patches == 1 and not uneven:
            yield (
                ("data.image_size", "model.mask_patch"),
                f"{list(size)} is a single patch of {patch} pixels: nothing is left visible when it is hidden",
            )
        elif num_patches and num_visible(num_patches, self.model.mask_ratio) < 1:
            yield (
                ("model.mask_ratio", "data.image_size", "model.mask_patch"),
                f"{self.model.mask_ratio} leaves none of {num_patches} patches visible: "
                f"at most {int((1 - 1 / num_patches) * 1000) / 1000:g}",  # rounded down, so that it may be used
            )
        if self.model.freeze_encoder_steps and self.model.init is None:
            yield (
                ("model.freeze_encoder_steps", "model.init"),
                f"{self.model.freeze_encoder_steps} freezes an encoder that has learnt nothing: give model.init",
            )


class DenseConfig(RunConfig):
    """Settings that runs on labelled images share."""

    eval_only: bool = False
    """Evaluate `model.init` on the held-out images and stop."""

    # Of data: what eval_only takes from model.init, where it is not given.
    of_weights: ClassVar = frozenset({"image_size", "in_chans", "crop_pct", "ignore_value"})
    _images: ClassVar[str] = "a folder of class folders or a CSV file, e.g. --data.path labelled"

    if TYPE_CHECKING:
        data: FinetuneData | SegmentData
        model: DenseModel
        optim: FinetuneOptim
        regularization: Regularization | SegmentRegularization

    @property
    def trains(self) -> bool:
        return not self.eval_only

    def inputs(self) -> dict[str, list[str]]:
        single = {"data.path": self.data.path, "data.val_path": self.data.val_path, "model.init": self.model.init}
        return {key: [path] for key, path in single.items() if path}

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        yield from super().conflicts(num_processes)
        data, model = self.data, self.model
        if not data.path and not (self.eval_only and data.val_path):
            yield ("data.path", "eval_only", "data.val_path"), f"missing: {self._images}"
        yield from _image_conflicts(data, known_statistics=model.init is not None)
        if model.spec and model.stem_stride and min(data.image_size) < model.spec.total_stride:
            yield (
                ("data.image_size", "model.stem_stride", "model.variant", "model.init"),
                f"{list(data.image_size)} is smaller than {_total_stride(model.spec)}",
            )
        if data.val_path is None and data.val_share == 0:
            yield (
                ("data.val_share", "data.val_path"),
                "0 leaves nothing to evaluate on: give a share or data.val_path",
            )
        if isinstance(weights := self.regularization.class_weights, list) and not any(weights):
            yield ("regularization.class_weights",), "all are 0, so that nothing would be learnt: give one above 0"
        if model.variant is None and model.init is None:
            yield (
                ("model.variant", "model.init"),
                "missing: name a variant, e.g. convnextv2_atto, or give model.init",
            )
        if self.eval_only and model.init is None:
            yield ("model.init", "eval_only"), "missing: eval_only evaluates the weights it names"


class FinetuneConfig(DenseConfig):
    """Train a classifier on labelled images, from pretrained weights or from scratch, or evaluate one.

    Without a recipe (a file with epochs or batch_size), settings you do not give are chosen for the
    images, the machine and the hours; --print-config shows them. `fcmae configs` lists recipes.

    Example: fcmae finetune labelled --init runs/photos --hours 1
    """

    kind: ClassVar = "finetune"
    epochs: int | float = Field(100, gt=0)
    """Passes over the training images; a fraction is allowed."""
    batch_size: int = Field(1024, ge=1)
    """Images per step, over all processes and micro-batches."""
    data: FinetuneData = Field(default_factory=FinetuneData)
    model: FinetuneModel = Field(default_factory=FinetuneModel)
    optim: FinetuneOptim = Field(default_factory=FinetuneOptim)
    regularization: Regularization = Field(default_factory=Regularization)

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        yield from super().conflicts(num_processes)
        data = self.data
        if data.auto_augment and data.in_chans not in (1, 3) and not self.eval_only:
            yield (
                ("data.auto_augment", "data.in_chans"),
                f"{data.auto_augment} needs 1 or 3 channels, not {data.in_chans}: set it to none",
            )
        model = self.model
        if model.keep_head and (model.init is None or model.head_init_scale is not None):
            yield (
                ("model.keep_head", "model.init", "model.head_init_scale"),
                "it takes the classifier that init has: give --init, and no head_init_scale",
            )
        images = self.batch_size // (num_processes or 1) // self.num_micro_batches
        if (self.regularization.mixup or self.regularization.cutmix) and images % 2:
            yield (
                ("batch_size", "grad_accum", "regularization.mixup", "regularization.cutmix"),
                f"{self.batch_size} gives {images} images a part, and mixup and cutmix pair them: use an even number",
            )


class SegmentConfig(DenseConfig):
    """Train a network that gives every pixel a class, from pretrained weights or from scratch, or evaluate one.

    Without a recipe (a file with epochs or batch_size), settings you do not give are chosen for the
    images, the machine and the hours; --print-config shows them. `fcmae configs` lists recipes.

    Example: fcmae segment tiles/images --maps tiles/maps --init runs/photos --hours 1
    """

    kind: ClassVar = "segment"
    _images: ClassVar[str] = "a folder of images or a CSV file, e.g. --data.path tiles/images"

    epochs: int | float = Field(50, gt=0)
    """Passes over the training images; a fraction is allowed."""
    batch_size: int = Field(16, ge=1)
    """Images per step, over all processes and micro-batches."""
    data: SegmentData = Field(default_factory=SegmentData)
    model: SegmentModel = Field(default_factory=SegmentModel)
    optim: SegmentOptim = Field(default_factory=SegmentOptim)
    regularization: SegmentRegularization = Field(default_factory=SegmentRegularization)

    def inputs(self) -> dict[str, list[str]]:
        single = {"data.maps": self.data.maps, "data.val_maps": self.data.val_maps}
        return super().inputs() | {key: [path] for key, path in single.items() if path}

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        yield from super().conflicts(num_processes)
        if self.model.keep_head and self.model.init is None:
            yield ("model.keep_head", "model.init"), "it takes the head that init has: give --init"
        for name in ("tau", "quantile"):
            if getattr(self.model, name) is not None and self.model.head != "anytime" and not self.eval_only:
                yield (f"model.{name}", "model.head"), f"it is for anytime, and model.head is {self.model.head}"
        data = self.data
        for name, maps, images in (("maps", data.maps, data.path), ("val_maps", data.val_maps, data.val_path)):
            is_table = (images or "").lower().endswith(".csv")
            if images and not is_table and not maps:
                yield (f"data.{name}",), f"missing: the folder of the label maps of {images}"
            if is_table and maps:
                yield (f"data.{name}",), f"{maps} is left, as {images} names the maps itself: leave one out"
        if data.val_maps and not data.val_path:
            yield ("data.val_path", "data.val_maps"), f"missing: the images of the label maps {data.val_maps}"
        names, values = data.class_names, data.class_values
        if len(set(names)) < len(names):
            yield ("data.class_names",), f"{names} has a name twice: give each class its own"
        if len(set(values)) < len(values):
            yield ("data.class_values",), f"{values} has a value twice: give each class its own"
        if names and values and len(names) != len(values):
            yield (
                ("data.class_values", "data.class_names"),
                f"{len(values)} values of {len(names)} classes: give one a class",
            )
        if data.ignore_value is not None and data.ignore_value in (values or range(len(names))):
            yield (
                ("data.ignore_value", "data.class_values", "data.class_names"),
                f"{data.ignore_value} is the value of a class: set it to none or another number",
            )


Stage = Literal["backend", "precision", "images", "compile"]


class BenchConfig(PretrainConfig):
    """Time a pretraining run on this machine and print the fastest way to compute it.

    The settings are those of `fcmae pretrain`, plus --seconds and --vary; --out and the images may be left out.

    Example: fcmae bench photos --config pretrain_cpu
    """

    seconds: float = Field(3.0, gt=0)
    """Only for bench: how long each candidate is timed, after its warm-up."""
    vary: Annotated[list[Stage], BeforeValidator(_no_items)] = Field(list(get_args(Stage)))
    """Only for bench: settings whose values are varied, in this order, each with the best values found before; or none.
    images: how many are computed at once, which grad_accum sets."""

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        for keys, sentence in super().conflicts(num_processes):
            if keys not in (("out",), ("data.path",)):
                yield keys, sentence
        if self.hours is not None and not (self.data.path or self.chosen):
            yield ("hours",), f"hours = {self.hours:g}: what fits into them is chosen for images: give some"


# Settings that change where or how fast a run computes but not what it computes: a resumed run may change them. (Under
# another grad_accum, sums are rounded in another order, and mixup and drop path are drawn for other micro-batches.)
# The images themselves are compared by the fingerprint of the file index, so that a folder may move.
FREE_ON_RESUME = frozenset(
    {
        "out",
        "overwrite",
        "grad_accum",
        "hours",
        "chosen",
        "planned_s",
        "device",
        "data.path",
        "data.val_path",
        "data.maps",
        "data.val_maps",
        "data.index",
        "data.cache_gb",
        "data.num_workers",
        "data.max_bad_share",
        "model.license",
        "model.backend",
        "model.compile",
        "model.grad_checkpointing",
        "checkpoint.every_epochs",
        "checkpoint.keep",
        "checkpoint.milestone_epochs",
        "log.every_steps",
        "log.eval_epochs",
        "log.trackers",
        "monitor.labelled",
    }
)

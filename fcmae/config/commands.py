"""The settings of the commands that are not runs: what is done with models and images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from fcmae.config.base import (
    Backend,
    Conflict,
    Device,
    FromFile,
    RunPath,
    RunText,
    Settings,
    Size,
    Spelling,
    UserPath,
    UserText,
)
from fcmae.data.geometry import MAX_PIXELS
from fcmae.networks.spec import variant_named


def _stage(word: Any) -> Any:
    if word == "all":
        raise ValueError("features of one stage are written: give its number, or last")
    return -1 if word == "last" else word


def _stages(words: Any) -> Any:
    if words in (None, "all", ["all"]):
        return None
    words = words if isinstance(words, list | tuple) else [words]
    for word in words:
        if word != "last" and not str(word).removeprefix("-").isdecimal():
            raise ValueError(f"{word!r} is neither a number nor last: use such as 3 4, last or all")
    return [-1 if word == "last" else word for word in words]


def _repository(name: str) -> str:
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]{1,96}", name, re.ASCII):
        raise ValueError("give USER/NAME, of letters, digits, points, - and _")
    return name


Variant = Annotated[str, AfterValidator(variant_named)]


class ReadingConfig(Settings):
    """How images are read for a model, and where it computes."""

    image_size: Size | None = None
    """Height and width of the network's input, in pixels; a single number means a square. Default: the model's own."""
    batch_size: int = Field(64, ge=1)
    """Images per batch."""
    num_workers: int | None = Field(None, ge=0)
    """Processes that decode images. Default: as many as help."""
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    """Largest image that is read, in pixels of up to 12 bytes."""
    nodata: float | None = Field(None, allow_inf_nan=False)
    """The stored value that marks missing data, for files that do not state it. Default: that of the weights."""
    device: Device = "auto"
    """auto takes a GPU when there is one."""


class ImagesConfig(ReadingConfig):
    """Images with or without labels."""

    images: Annotated[list[UserText] | None, Spelling(commas=False)] = Field(None, min_length=1)
    """Images, folders, lists, shards or glob patterns, local or by URL."""
    data: UserText | None = None
    """Labelled images: a folder with one sub-folder per class, a CSV file with the columns path,label, or shards with
    labels; local or by URL."""

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        if (self.images is None) == (self.data is None):
            yield ("images", "data"), "give either images or data: the images without or with labels"


Models = Annotated[list[RunText], Field(min_length=1, examples=[["runs/first"]]), Spelling("MODEL", commas=False)]
Stages = Annotated[tuple[int, ...] | None, BeforeValidator(_stages)]


class EvaluateConfig(ReadingConfig, FromFile):
    """Measure with kNN, linear and few-label probes how well frozen features separate classes.

    Example: fcmae evaluate runs/first random:runs/first pixels:32 --data labelled
    """

    models: Models
    """Runs, checkpoints, exported models, names of timm models, or one of these after random: for the same network
    untrained. Also baselines without a network, on the same crops: pixels:32, the image averaged to 32 x 32 pixels
    (pixels:1 is the mean colour); histogram:8, a colour histogram with 8 bins per channel."""
    data: UserText = Field(examples=["labelled"])
    """Labelled images: a folder with one sub-folder per class, a CSV file with the columns path,label, or shards with
    labels; local or by URL."""
    test: UserText | None = None
    """Images to test on, in the same form. Default: a stratified share (test_share) of `data`."""
    test_share: float = Field(0.2, gt=0, lt=1)
    """Share of each class to test on."""
    probes: list[Literal["knn", "linear", "few-shot"]] = Field(["knn", "linear"], min_length=1)
    """Classifiers that predict the classes from the features."""
    labels: list[str] = Field(["1%", "10%"], min_length=1)
    """For few-shot: numbers of images per class, or shares of the training images."""
    draws: int = Field(5, ge=1)
    """For few-shot: how many times labels are drawn."""
    stages: Stages = (-1,)
    """Encoder stages whose output is used: numbers from 1, last, or all. Default: last."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of all random draws."""
    out: UserPath | None = None
    """Where results go. Default: RUN/evaluation, for RUN and random:RUN."""
    overwrite: bool = False
    """Replace earlier results."""

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        for key in ("labels", "draws"):
            is_given = getattr(self, key) != type(self).model_fields[key].default
            if is_given and "few-shot" not in self.probes:
                yield (key, "probes"), "it is for few-shot: give --probes knn linear few-shot too, or leave it out"


class WorthConfig(Settings, FromFile):
    """Find out whether pretraining is worth it: fine-tune from each start and from scratch, with paired seeds.

    It first prints how long it will take. The same command resumes a comparison that was stopped, and with more
    --seeds extends one.

    Example: fcmae worth labelled photos --hours 4 --init runs/other --labels 1% 10% 100%
    """

    data: Annotated[UserText, Spelling("LABELLED")] = Field(examples=["labelled"])
    """Labelled images: a folder with one sub-folder per class, a CSV file with the columns path,label, or shards with
    labels; local or by URL."""
    unlabelled: Annotated[list[UserText], Spelling("UNLABELLED", commas=False)] = Field([])
    """Images that the pretraining learns from: folders, lists, shards, glob patterns or URLs. Default: the labelled
    training images."""
    test: UserText | None = None
    """Images to test on, in the form of LABELLED. Default: a stratified share (test_share) of LABELLED."""
    test_share: float = Field(0.2, gt=0, lt=1)
    """Share of each class to test on."""
    hours: float | None = Field(None, gt=0)
    """Hours of pretraining to do first, as one of the starts. Default: no pretraining."""
    pretraining: str | None = None
    """Settings of the pretraining: a YAML file, or the name of a shipped one (`fcmae configs`). Default: chosen."""
    init: Annotated[list[RunText], Spelling(commas=False)] = Field([])
    """Weights to start from: runs, checkpoints, anything that `fcmae convert` reads, or names of timm's models; the
    flag may be repeated."""
    labels: list[str] = Field(["1%", "10%", "100%"], min_length=1)
    """How many labels to train on: shares of the training images, or numbers of images per class."""
    seeds: int = Field(5, ge=1)
    """Repetitions of each fine-tuning, each with other labels (of all of them, the same), another order and another
    head, as every start has them."""
    epochs: int | float | None = Field(None, gt=0)
    """Epochs of each fine-tuning, the same for every start. Default: chosen by the number of labels."""
    finetuning: str | None = None
    """Settings of the fine-tunings, given like `pretraining`: what a file without epochs and batch_size leaves out is
    chosen. From scratch, layer_decay is 1. Default: chosen."""
    controls: list[str] = Field(["pixels:32", "histogram:8", "pixels:1"])
    """Baselines without a network (see `fcmae evaluate`): linear classifiers on the same labels; or []."""
    image_size: Size | None = None
    """Height and width of the networks' input, in pixels; a single number means a square. Default: the weights' own, or
    chosen."""
    num_workers: int | None = Field(None, ge=0)
    """Processes that decode images. Default: as many as help."""
    device: Device = "auto"
    """auto takes a GPU when there is one."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the draw of test images and of the pretraining, and the first of the fine-tunings' seeds."""
    out: UserPath | None = None
    """Where all runs and results go. Default: runs/NAME-worth, NAME from LABELLED."""

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        if not (self.hours or self.pretraining or self.init):
            yield (
                ("hours", "init", "pretraining"),
                "missing: what is to be compared with scratch: --hours H of pretraining, or --init WEIGHTS",
            )
        elif (self.key or self.prefix) and not self.init:
            yield ("key" if self.key else "prefix", "init"), "it tells of the files that init names: give --init"
        elif self.unlabelled and not (self.hours or self.pretraining):
            yield ("unlabelled", "hours"), "they are for a pretraining: give --hours H, or leave them out"
        if self.seed + self.seeds > 2**32:
            yield ("seed", "seeds"), f"{self.seed} + seeds = {self.seeds} are more than {2**32}: use less"


class EmbedConfig(ImagesConfig, FromFile):
    """Write features of images, a map of them, and pictures of nearest neighbours.

    Example: fcmae embed runs/first --data labelled --neighbours photo.jpg --out embedded
    """

    model: Annotated[RunText, Spelling("MODEL")] = Field(examples=["runs/first"])
    """A run, a checkpoint, an exported model, the name of a timm model, or one of these after random:, untrained."""
    out: UserPath = Field(examples=["embedded"])
    """Where results go."""
    map: Literal["tsne", "umap"] | None = "tsne"
    """How the map is made, or none; umap needs umap-learn."""
    neighbours: Annotated[list[UserText], Spelling(commas=False)] = Field([])
    """Images whose 8 nearest neighbours are drawn."""
    parquet: bool = False
    """Write one Parquet file instead of .npy and .csv."""
    stage: Annotated[int, BeforeValidator(_stage)] = -1
    """Encoder stage whose output is used: a number from 1, or last. Default: last."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Random seed of the map."""
    overwrite: bool = False
    """Replace earlier results."""


class AnalyzeConfig(ImagesConfig, FromFile):
    """Compare the channels of ConvNeXts: diversity, dead channels, effective rank, GRN, class selectivity.

    Only class selectivity needs labels.

    Example: fcmae analyze runs/v1 runs/v2 random:runs/v2 --images photos --out compared
    """

    models: Models
    """Networks with stages: runs, checkpoints, exported models, timm's ConvNeXts, or one of these after random:,
    untrained."""
    max_images: int = Field(1000, ge=1)
    """Most images to use; of more, this many are taken, evenly spread."""
    out: UserPath | None = None
    """Where figures go. Default: RUN/analysis, for RUN and random:RUN."""
    overwrite: bool = False
    """Replace earlier results."""


class PredictConfig(ReadingConfig, FromFile):
    """Classify images with a fine-tuned model, or write their label maps with a model of `fcmae segment`.

    The label map of an image named .tif or .tiff is a TIFF with the same georeferencing; that of any other is a PNG.
    The exit status is 1 if some of the images cannot be read; each is named.

    Example: fcmae predict runs/tuned photos --csv labels.csv
    """

    model: Annotated[RunPath, Spelling("MODEL")] = Field(examples=["runs/tuned"])
    """A run of fine-tuning or segmentation, or its exported model."""
    images: Annotated[list[UserText], Spelling("IMAGES", commas=False)] = Field(min_length=1, examples=[["photos"]])
    """Images, folders, lists, shards or glob patterns, local or by URL."""
    csv: UserPath | None = None
    """For a classifier: a new file to which the predictions are written too."""
    out: UserPath | None = None
    """For segmentation: a new folder for the label maps, which are named like the images."""
    probabilities: bool = False
    """For segmentation: also write NAME.probabilities.tif beside each map, with one 32-bit band per class."""
    overlap: float = Field(0.5, ge=0, le=0.9)
    """For segmentation: share of a tile's side by which it overlaps the next."""
    tau: float | None = Field(None, ge=0, le=1)
    """For an anytime model: a patch exits when its confidence is above this. Default: the model's."""
    budget: float | None = Field(None, gt=0, le=1)
    """For an anytime model, instead of tau: the share of the patches that later stages compute."""
    limit_ms: float | None = Field(None, gt=0)
    """For an anytime model: time limit per image, shared by its tiles, after which only first stages begin."""

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        if self.tau is not None and self.budget is not None:
            yield ("tau", "budget"), "give one of them: a budget takes the place of tau"


class ConvertConfig(Settings, FromFile):
    """Convert weights from any format to another, by default from a run to timm.

    Example: fcmae convert runs/first encoder
    """

    source: Annotated[RunPath, Spelling("SRC")] = Field(examples=["runs/first"])
    """A run, a checkpoint, a timm or transformers directory, or a .safetensors or .pth file of any format, including
    the released sparse and dense checkpoints."""
    dest: Annotated[UserPath | None, Spelling("DEST")] = None
    """Where to write it: a new path."""
    to: Literal["fcmae", "timm", "fair", "transformers", "minkowski"] = "timm"
    """timm and transformers: a directory; the others: a file that ends in .safetensors, .pth or .pt."""
    variant: Variant | None = None
    """The network that the source must hold, e.g. convnextv2_atto, or its last word alone. Default: detected."""
    dry_run: bool = False
    """Print which tensor goes where, and write nothing."""
    check: bool = False
    """Compare the source's output on a fixed image with the output stored in it, and stop."""

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        if self.dest is None and not (self.dry_run or self.check):
            yield ("dest", "dry_run", "check"), "DEST is missing: name a new path, or give --dry_run or --check"


class PruneConfig(ReadingConfig, FromFile):
    """Remove hidden channels of a ConvNeXt, and compensate for them by statistics of images, or whole blocks.

    Example: fcmae prune runs/tuned pruned.safetensors --data photos --keep .5
    """

    model: Annotated[RunPath, Spelling("MODEL")] = Field(examples=["runs/tuned"])
    """A run, a checkpoint, an exported model, or anything else that `fcmae convert` reads. The decoder of a pretraining
    run stays as it was."""
    dest: Annotated[UserPath, Spelling("DEST")] = Field(examples=["pruned.safetensors"])
    """A new file, .safetensors, .pth or .pt, for `finetune`, `predict`, `evaluate` and `convert`."""
    data: Annotated[list[UserText], Spelling(commas=False)] = Field(min_length=1, examples=[["photos"]])
    """Images like those the model is for: folders, lists or glob patterns. No labels are needed."""
    keep: float = Field(0.5, gt=0, lt=1)
    """Share of the hidden channels, or of the blocks, to keep."""
    what: Literal["hidden", "blocks"] = "hidden"
    """What to remove: hidden channels of the blocks' MLPs, or whole blocks, of which each stage keeps at least one."""
    how: Literal["uniform", "global"] = "uniform"
    """uniform keeps that share in each block (for blocks, in each stage); global keeps the most important ones of the
    whole network."""
    by: Literal["norm", "activation"] = "activation"
    """How importance is measured. norm: by the norm of the weights (for blocks, of LayerScale, which V1 has);
    activation: by what a channel or block adds to the features of the images."""
    max_images: int = Field(256, ge=1)
    """Most images to use; of more, this many are taken, evenly spread."""


class ExportConfig(Settings, FromFile):
    """Export a model: as an ONNX file, checked with onnxruntime, or as a repository for the Hugging Face hub.

    Example: fcmae export runs/tuned model.onnx --normalize
    """

    model: Annotated[RunPath, Spelling("MODEL")] = Field(examples=["runs/tuned"])
    """A run, a checkpoint, an exported model, or anything else that `fcmae convert` reads."""
    dest: Annotated[UserPath, Spelling("DEST")] = Field(examples=["model.onnx"])
    """A new path: a file that ends in .onnx, or a folder for hub."""
    to: Literal["onnx", "hub"] = "onnx"
    """hub: a folder of timm's files and a model card, written from the run."""
    output: Literal["logits", "pooled", "pyramid"] | None = None
    """Output of an ONNX file: logits of the classes, features averaged over the image (pooled), or the features of
    every stage (pyramid), both before any norm. Default: logits if there is a classifier, else pooled."""
    normalize: bool = False
    """Have the ONNX file take images as they are read (8 and 16 bits scaled to 0..1) and normalise them itself.
    Default: it takes normalised images."""
    images: Annotated[list[UserText], Spelling(commas=False)] = Field([])
    """Images to check an ONNX file on: files, folders, lists or glob patterns. Default: those of the run, if
    they lie on this machine, or synthetic ones."""

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        given = [key for key in ("output", "normalize", "images") if getattr(self, key)]
        if self.to == "hub" and given:
            yield (given[0], "to"), "it is of ONNX files: leave it out for hub"


class PushConfig(Settings, FromFile):
    """Upload a model to the Hugging Face hub, with a card written from its run.

    Example: fcmae push runs/tuned me/cells
    """

    model: Annotated[RunPath, Spelling("MODEL")] = Field(examples=["runs/tuned"])
    """A run, a checkpoint, an exported model, or anything else that `fcmae convert` reads."""
    repo: Annotated[str, AfterValidator(_repository), Spelling("REPO")] = Field(examples=["me/cells"])
    """The repository, as USER/NAME; NAME alone means the account your token belongs to."""
    public: bool = False
    """Let everybody read the repository. Default: it is private."""
    overwrite: bool = False
    """Add to an existing repository; what it had stays in its history."""


class ReportConfig(Settings):
    """Write one HTML page on runs: settings, curves, reconstructions, scores and what they mean.

    Example: fcmae report runs/first runs/tuned runs/scratch --out report.html
    """

    runs: Annotated[list[RunPath], Spelling("RUN", commas=False)] = Field(min_length=1, examples=[["runs/first"]])
    """Directories of runs of pretraining or fine-tuning, or of comparisons by `fcmae worth`."""
    out: UserPath | None = None
    """The page. Default: RUN/report.html, for one run."""
    open: bool = False
    """Open the page in a browser, if there is one."""


class StatusConfig(Settings):
    """Show how far a run is, whether it works and what to do next; or list the runs below a folder.

    Example: fcmae status runs/first
    """

    run: Annotated[RunPath, Spelling("RUN")] = Path("runs")
    """The directory of a run, its name below runs/, or a folder of runs."""


class RoadmapConfig(Settings):
    """List the steps from ResNet to ConvNeXt: what each changes and costs, and its accuracy where published.

    Multiply-adds and parameters are counted at 224 x 224 pixels and 1,000 classes. `fcmae finetune --model.variant
    roadmap/inverted` trains the network after a step.

    Example: fcmae roadmap roadmap-200
    """

    regime: Annotated[Literal["roadmap", "roadmap-200", "roadmap-small"], Spelling("REGIME")] = "roadmap"
    """ResNet-50 to ConvNeXt-T, ResNet-200 to ConvNeXt-B, or a small one for small images."""
    ours: UserPath | None = None
    """The JSON file of studies/roadmap.py, to add the accuracy of its runs."""


class StatsConfig(Settings):
    """Print the images' mean and std, as lines for a configuration file.

    Example: fcmae stats photos
    """

    path: Annotated[list[UserText], Spelling("IMAGES", commas=False)] = Field(min_length=1, examples=[["photos"]])
    """Folders, lists or glob patterns."""
    in_chans: int | None = Field(None, ge=1)
    """Channels of the images. Default: those that most of them have."""
    max_images: int = Field(2000, ge=1)
    """Most images to read."""
    num_workers: int | None = Field(None, ge=0)
    """Processes that decode images. Default: one per core, up to 8."""
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    """Largest image that is read, in pixels of up to 12 bytes."""
    nodata: float | None = Field(None, allow_inf_nan=False)
    """The stored value that marks missing data, for files that do not state it."""


class DoctorConfig(Settings):
    """Show what this machine has for pretraining, what it lacks and how to fix it.

    Example: fcmae doctor --quick
    """

    out: UserPath = Path()
    """Where runs will be written."""
    quick: bool = False
    """Skip the trials of torch.compile, processes and MinkowskiEngine."""
    as_json: Annotated[bool, Spelling(short="json")] = False
    """Print JSON."""


class VerifyConfig(Settings):
    """Check that every backend computes the same on this machine, and time them.

    Example: fcmae verify --backend packed minkowski --device cuda
    """

    backend: list[Backend] | None = Field(None, min_length=1)
    """Backends to check. Default: those that can run here."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the backends run."""


class ConfigsConfig(Settings):
    """List the configurations that come with fcmae.

    Example: fcmae configs
    """


class CompletionConfig(Settings):
    """Print the script with which a shell completes fcmae commands: source it in the shell's startup file.

    Example: fcmae completion bash
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], Spelling("SHELL")] = "bash"
    """The kind of shell."""


class SchemaConfig(Settings):
    """Print the JSON schema of a command's settings, with which editors check and complete YAML files.

    Example: fcmae schema pretrain
    """

    command: Annotated[str, Spelling("COMMAND")] = "pretrain"
    """The command, which may be any."""

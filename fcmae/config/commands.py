"""The settings of the commands that are no runs: what is done with models and images."""

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


class Reading(Settings):
    """How images are read for a model, and where it computes."""

    image_size: Size | None = None
    """Height and width the network sees, in pixels; one number is a square. Default: the model's own."""
    batch_size: int = Field(64, ge=1)
    """Images at a time."""
    num_workers: int | None = Field(None, ge=0)
    """Processes that decode images. Default: as many as help."""
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    """Pixels of the largest image that is read, of up to 12 bytes each."""
    nodata: float | None = Field(None, allow_inf_nan=False)
    """The stored value that stands for missing ones, where files do not say it. Default: that of the weights."""
    device: Device = "auto"
    """auto takes a GPU when there is one."""


class Source(Reading):
    """Images with or without labels."""

    images: Annotated[list[UserText] | None, Spelling(commas=False)] = Field(None, min_length=1)
    """Images, folders, lists, shards or glob patterns; URLs of them too."""
    data: UserText | None = None
    """Labelled images: a folder with one sub-folder a class, a CSV file with the columns path,label, or shards with
    labels; or the URL of one."""

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        if (self.images is None) == (self.data is None):
            yield ("images", "data"), "give either images or data: the images without or with labels"


Models = Annotated[list[RunText], Field(min_length=1, examples=[["runs/first"]]), Spelling("MODEL", commas=False)]
Stages = Annotated[tuple[int, ...] | None, BeforeValidator(_stages)]


class EvaluateConfig(Reading, FromFile):
    """Tell by kNN, linear and few-label probes how well frozen features separate classes.

    Example: fcmae evaluate runs/first random:runs/first pixels:32 --data labelled
    """

    models: Models
    """Runs, checkpoints, exported models, names of timm's models, or random: before one of these, for the same network
    untrained. And what needs no network, of the same crops: pixels:32, the image averaged to 32 x 32 pixels (pixels:1
    is the mean colour); histogram:8, of colours in 8 steps a channel."""
    data: UserText = Field(examples=["labelled"])
    """Labelled images: a folder with one sub-folder a class, a CSV file with the columns path,label, or shards with
    labels; or the URL of one."""
    test: UserText | None = None
    """Images to test on, of the same form. Default: a stratified share (test_share) of `data`."""
    test_share: float = Field(0.2, gt=0, lt=1)
    """Share of each class to test on."""
    probes: list[Literal["knn", "linear", "few-shot"]] = Field(["knn", "linear"], min_length=1)
    """What tells the classes apart by the features."""
    labels: list[str] = Field(["1%", "10%"], min_length=1)
    """Of few-shot: images a class, or a share of the training images."""
    draws: int = Field(5, ge=1)
    """Of few-shot: how often labels are drawn."""
    stages: Stages = (-1,)
    """Which outputs: numbers from 1, last, or all. Default: last."""
    seed: int = Field(0, ge=0)
    """Of all that is drawn."""
    out: UserPath | None = None
    """Where results go. Default: RUN/evaluation, for RUN and random:RUN."""
    overwrite: bool = False
    """Replace earlier results."""


class WorthConfig(Settings, FromFile):
    """Tell whether pretraining is worth it: fine-tune from each start and from scratch, with paired seeds.

    Before it starts it says how long it will take. The same command goes on where it was stopped, and with more --seeds
    adds to what is there.

    Example: fcmae worth labelled photos --hours 4 --init runs/other --labels 1% 10% 100%
    """

    data: Annotated[UserText, Spelling("LABELLED")] = Field(examples=["labelled"])
    """Labelled images: a folder with one sub-folder a class, a CSV file with the columns path,label, or shards with
    labels; or the URL of one."""
    unlabelled: Annotated[list[UserText], Spelling("UNLABELLED", commas=False)] = Field([])
    """Images that the pretraining learns from: folders, lists, shards, glob patterns or URLs. Default: the labelled
    training images."""
    test: UserText | None = None
    """Images to test on, of the form of LABELLED. Default: a stratified share (test_share) of LABELLED."""
    test_share: float = Field(0.2, gt=0, lt=1)
    """Share of each class to test on."""
    hours: float | None = Field(None, gt=0)
    """Pretrain for so long first, and start from that. Default: no pretraining."""
    pretraining: str | None = None
    """Settings of the pretraining: a YAML file, or the name of a shipped one (`fcmae configs`). Default: chosen."""
    init: Annotated[list[RunText], Spelling(commas=False)] = Field([])
    """Weights to start from: runs, checkpoints, or all that `fcmae convert` reads; the flag may be repeated."""
    labels: list[str] = Field(["1%", "10%", "100%"], min_length=1)
    """How many labels are learnt from: shares of the training images, or numbers of images a class."""
    seeds: int = Field(5, ge=1)
    """How often each is done: with other labels, another order and another head, the same for every start."""
    epochs: int | float | None = Field(None, gt=0)
    """Passes of a fine-tuning over its labels, whatever it starts from. Default: by their number."""
    finetuning: str | None = None
    """Settings of the fine-tunings, like those of the pretraining; from scratch layer_decay is 1. Default: chosen."""
    controls: list[str] = Field(["pixels:32", "histogram:8", "pixels:1"])
    """What needs no network, see `fcmae evaluate`, by linear classifiers on the same labels; or []."""
    image_size: Size | None = None
    """Height and width the networks see, in pixels; one number is a square. Default: the weights' own, or chosen."""
    num_workers: int | None = Field(None, ge=0)
    """Processes that decode images. Default: as many as help."""
    device: Device = "auto"
    """auto takes a GPU when there is one."""
    seed: int = Field(0, ge=0)
    """Of the test images, of the pretraining, and the first of the seeds."""
    out: UserPath | None = None
    """Where all runs and results go. Default: runs/NAME-worth, NAME of LABELLED."""

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


class EmbedConfig(Source, FromFile):
    """Write features of images, a map of them, and pictures of nearest neighbours.

    Example: fcmae embed runs/first --data labelled --neighbours photo.jpg --out embedded
    """

    model: Annotated[RunText, Spelling("MODEL")] = Field(examples=["runs/first"])
    """A run, a checkpoint, an exported model, a name of timm's models, or random: before one of these."""
    out: UserPath = Field(examples=["embedded"])
    """Where results go."""
    map: Literal["tsne", "umap"] | None = "tsne"
    """How the map is made, or none; umap needs umap-learn."""
    neighbours: Annotated[list[UserText], Spelling(commas=False)] = Field([])
    """Images whose 8 nearest are shown."""
    parquet: bool = False
    """One Parquet file in place of .npy and .csv."""
    stage: Annotated[int, BeforeValidator(_stage)] = -1
    """Which output: a number from 1, or last. Default: last."""
    seed: int = Field(0, ge=0)
    """Of the map."""
    overwrite: bool = False
    """Replace earlier results."""


class AnalyzeConfig(Source, FromFile):
    """Compare what the channels of ConvNeXts do: diversity, dead ones, effective rank, GRN, class selectivity.

    Labels are for class selectivity.

    Example: fcmae analyze runs/v1 runs/v2 random:runs/v2 --images photos --out compared
    """

    models: Models
    """ConvNeXts: runs, checkpoints, exported models, names of timm's models, or random: before one of these."""
    max_images: int = Field(1000, ge=1)
    """Of more images, that many are taken, evenly spread."""
    out: UserPath | None = None
    """Where figures go. Default: RUN/analysis, for RUN and random:RUN."""
    overwrite: bool = False
    """Replace earlier results."""


class PredictConfig(Reading, FromFile):
    """Classify images with a fine-tuned model, or write their label maps with one of `fcmae segment`.

    A label map is a TIFF that lies where its image does on earth, where that is a TIFF, and else a PNG.

    Example: fcmae predict runs/tuned photos --csv labels.csv
    """

    model: Annotated[RunPath, Spelling("MODEL")] = Field(examples=["runs/tuned"])
    """A run of fine-tuning or segmentation, or its exported model."""
    images: Annotated[list[UserText], Spelling("IMAGES", commas=False)] = Field(min_length=1, examples=[["photos"]])
    """Images, folders, lists, shards or glob patterns; URLs of them too."""
    csv: UserPath | None = None
    """Of a classifier: a new file, for the predictions too."""
    out: UserPath | None = None
    """Of segmentation: a new folder, for the label maps, under the images' names."""
    probabilities: bool = False
    """Of segmentation: write NAME.probabilities.tif beside each map, a band of 32-bit numbers a class."""
    overlap: float = Field(0.5, ge=0, le=0.9)
    """Of segmentation: share of a tile's side that it has in common with the next."""
    tau: float | None = Field(None, ge=0, le=1)
    """Of an anytime model: a patch leaves when it is surer. Default: the model's."""
    budget: float | None = Field(None, gt=0, le=1)
    """Of an anytime model, in place of tau: the share of the patches that later stages compute."""
    limit_ms: float | None = Field(None, gt=0)
    """Of an anytime model: no stage of an image but the first begins after this time, which its tiles share."""

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        yield from super().conflicts(num_processes)
        if self.tau is not None and self.budget is not None:
            yield ("tau", "budget"), "give one of them: a budget takes the place of tau"


class ConvertConfig(Settings, FromFile):
    """Turn weights of any format into any other, from a run to timm by default.

    Example: fcmae convert runs/first encoder
    """

    source: Annotated[RunPath, Spelling("SRC")] = Field(examples=["runs/first"])
    """A run, a checkpoint, a timm or transformers directory, or a .safetensors or .pth file of any format, the released
    sparse and dense checkpoints too."""
    dest: Annotated[UserPath | None, Spelling("DEST")] = None
    """Where to write it: a new path."""
    to: Literal["fcmae", "timm", "fair", "transformers", "minkowski"] = "timm"
    """timm and transformers: a directory; the others: a file that ends in .safetensors, .pth or .pt."""
    variant: Variant | None = None
    """What the source must be of, e.g. convnextv2_atto, or its last word alone. Default: found out."""
    dry_run: bool = False
    """Print what goes where and write nothing."""
    check: bool = False
    """Compare the source's output on a fixed image with the one stored in it, and stop."""

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        if self.dest is None and not (self.dry_run or self.check):
            yield ("dest", "dry_run", "check"), "DEST is missing: name a new path, or give --dry_run or --check"


class PruneConfig(Reading, FromFile):
    """Remove hidden channels or whole blocks of a ConvNeXt, and make up for them on images.

    Example: fcmae prune runs/tuned pruned.safetensors --data photos --keep .5
    """

    model: Annotated[RunPath, Spelling("MODEL")] = Field(examples=["runs/tuned"])
    """A run, a checkpoint, an exported model, or all else that `fcmae convert` reads. Of a pretraining run the decoder
    stays as it was."""
    dest: Annotated[UserPath, Spelling("DEST")] = Field(examples=["pruned.safetensors"])
    """A new file, .safetensors, .pth or .pt, for `finetune`, `predict`, `evaluate` and `convert`."""
    data: Annotated[list[UserText], Spelling(commas=False)] = Field(min_length=1, examples=[["photos"]])
    """Images like those it is for: folders, lists or glob patterns. No labels are needed."""
    keep: float = Field(0.5, gt=0, lt=1)
    """Share of the hidden channels, or of the blocks, that stays."""
    what: Literal["hidden", "blocks"] = "hidden"
    """Hidden channels of the blocks' MLPs; or whole blocks, of which each stage keeps one."""
    how: Literal["uniform", "global"] = "uniform"
    """That share of each block (of each stage, for blocks); or of the whole network, where it matters most."""
    by: Literal["norm", "activation"] = "activation"
    """What tells what matters. norm: the norm of its weights (for blocks LayerScale, which V1 has); activation: what it
    adds to the features of the images."""
    max_images: int = Field(256, ge=1)
    """Of more images, that many are taken, evenly spread."""


class ExportConfig(Settings, FromFile):
    """Write a model for others: an ONNX file, checked by onnxruntime, or a repository for the Hugging Face hub.

    Example: fcmae export runs/tuned model.onnx --normalize
    """

    model: Annotated[RunPath, Spelling("MODEL")] = Field(examples=["runs/tuned"])
    """A run, a checkpoint, an exported model, or all else that `fcmae convert` reads."""
    dest: Annotated[UserPath, Spelling("DEST")] = Field(examples=["model.onnx"])
    """A new path: a file that ends in .onnx, or a folder for hub."""
    to: Literal["onnx", "hub"] = "onnx"
    """hub: a folder of timm's files and a model card, written from the run."""
    output: Literal["logits", "pooled", "pyramid"] | None = None
    """What an ONNX file gives: logits of the classes, features averaged over the image, or the features of every stage,
    the last two before any norm. Default: logits if there is a classifier, else pooled."""
    normalize: bool = False
    """Whether an ONNX file takes images as they are read, those of 8 and 16 bits in 0..1, and normalises them. Default:
    they come normalised."""
    images: Annotated[list[UserText], Spelling(commas=False)] = Field([])
    """Images to check an ONNX file on: files, folders, lists or glob patterns. Default: those of the run, or made-up
    ones."""

    def conflicts(self, num_processes: int | None = None) -> Iterator[Conflict]:
        given = [key for key in ("output", "normalize", "images") if getattr(self, key)]
        if self.to == "hub" and given:
            yield (given[0], "to"), "it is of ONNX files: leave it out for hub"


class PushConfig(Settings, FromFile):
    """Upload a model to the Hugging Face hub, with a card written from its run.

    Example: fcmae push runs/tuned me/cells
    """

    model: Annotated[RunPath, Spelling("MODEL")] = Field(examples=["runs/tuned"])
    """A run, a checkpoint, an exported model, or all else that `fcmae convert` reads."""
    repo: Annotated[str, AfterValidator(_repository), Spelling("REPO")] = Field(examples=["me/cells"])
    """The repository: USER/NAME, or NAME for whom the token is of."""
    public: bool = False
    """Everybody may read it. Default: it is private."""
    overwrite: bool = False
    """Add to a repository that is there; what it had stays in its history."""


class ReportConfig(Settings):
    """Write one HTML page on runs: settings, curves, reconstructions, scores, and what they say.

    Example: fcmae report runs/first runs/tuned runs/scratch --out report.html
    """

    runs: Annotated[list[RunPath], Spelling("RUN", commas=False)] = Field(min_length=1, examples=[["runs/first"]])
    """Directories of pretraining or fine-tuning, or of what `fcmae worth` compares."""
    out: UserPath | None = None
    """The page. Default: RUN/report.html, for one run."""
    open: bool = False
    """Show it in a browser, where there is one."""


class StatusConfig(Settings):
    """Tell where a run stands, whether it works and what to do next; or list the runs below a folder.

    Example: fcmae status runs/first
    """

    run: Annotated[RunPath, Spelling("RUN")] = Path("runs")
    """The directory of a run, its name below runs/, or a folder of runs."""


class RoadmapConfig(Settings):
    """List the steps from ResNet to ConvNeXt: what each changes, costs and gave where it was published.

    Multiply-adds and parameters are counted at 224 x 224 pixels and 1,000 classes. `fcmae finetune --model.variant
    roadmap/inverted` trains the network after a step.

    Example: fcmae roadmap roadmap-200
    """

    regime: Annotated[Literal["roadmap", "roadmap-200", "roadmap-small"], Spelling("REGIME")] = "roadmap"
    """ResNet-50 to ConvNeXt-T, ResNet-200 to ConvNeXt-B, or a small one for small images."""
    ours: UserPath | None = None
    """The JSON file of studies/roadmap.py, for what its runs gave."""


class StatsConfig(Settings):
    """Print the images' mean and std, as lines for a configuration.

    Example: fcmae stats photos --in_chans 4
    """

    path: Annotated[list[UserText], Spelling("IMAGES", commas=False)] = Field(min_length=1, examples=[["photos"]])
    """Folders, lists or glob patterns."""
    in_chans: int = Field(3, ge=1)
    """Channels of the images."""
    max_images: int = Field(2000, ge=1)
    """Of more images, that many are read."""
    num_workers: int | None = Field(None, ge=0)
    """Processes that decode images. Default: one a core, up to 8."""
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    """Pixels of the largest image that is read, of up to 12 bytes each."""
    nodata: float | None = Field(None, allow_inf_nan=False)
    """The stored value that stands for missing ones, where files do not say it."""


class DoctorConfig(Settings):
    """Tell what this machine has for pretraining, what it lacks and how to mend it.

    Example: fcmae doctor --quick
    """

    out: UserPath = Path()
    """Where runs are to be written."""
    quick: bool = False
    """Try neither torch.compile, processes nor MinkowskiEngine."""
    as_json: Annotated[bool, Spelling(short="json")] = False
    """Print JSON."""


class VerifyConfig(Settings):
    """Check that every backend computes the same on this machine, and time them.

    Example: fcmae verify --backend packed minkowski --device cuda
    """

    backend: list[Backend] | None = Field(None, min_length=1)
    """What to check. Default: those that can run here."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where they run."""


class ConfigsConfig(Settings):
    """List the configurations that come with fcmae.

    Example: fcmae configs
    """


class CompletionConfig(Settings):
    """Print the script by which a shell completes our commands: source it where the shell starts.

    Example: fcmae completion bash
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], Spelling("SHELL")] = "bash"
    """Of which kind."""


class SchemaConfig(Settings):
    """Print the JSON schema of a command's settings, by which editors check and complete YAML files.

    Example: fcmae schema pretrain
    """

    command: Annotated[str, Spelling("COMMAND")] = "pretrain"
    """Whose settings: any command's."""

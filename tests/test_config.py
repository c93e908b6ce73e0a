import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fcmae import options
from fcmae.config import (
    FREE_ON_RESUME,
    GREY_MEAN,
    GREY_STD,
    IMAGENET_MEAN,
    BenchConfig,
    FinetuneConfig,
    FinetuneModel,
    ImageConfig,
    PretrainConfig,
    PretrainData,
    PretrainModel,
    SegmentConfig,
    check_launch,
)
from fcmae.config.commands import AnalyzeConfig, ConvertConfig, EmbedConfig, EvaluateConfig, PredictConfig
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec
from fcmae.options.problems import ConfigError


def pretrain(**sections: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({"out": "run", "batch_size": 64, "data": {"path": ["photos"]}, **sections})


def finetune(**sections: Any) -> FinetuneConfig:
    needed = {"out": "run", "data": {"path": "x"}, "model": {"variant": "convnextv2_atto"}}
    return FinetuneConfig.model_validate({**needed, **sections})


def segment(**sections: Any) -> SegmentConfig:
    data = {"path": "images", "maps": "maps"} | sections.pop("data", {})
    needed = {"out": "run", "data": data, "model": {"variant": "convnextv2_atto"}}
    return SegmentConfig.model_validate({**needed, **sections})


def conflicts(make: Callable[..., object], **sections: Any) -> list[tuple[str, str]]:
    """Key and sentence of each impossible combination."""
    with pytest.raises(ValidationError) as caught:
        make(**sections)
    details = caught.value.errors()
    assert all(detail["type"] == "conflict" for detail in details), details
    found = [(".".join(map(str, detail["loc"])), detail["msg"]) for detail in details]
    assert [key for key, _ in found] == [detail["ctx"]["keys"][0] for detail in details]
    return found


def keys(make: Callable[..., object], **sections: Any) -> list[str]:
    return [key for key, _ in conflicts(make, **sections)]


def test_defaults_are_the_published_pretraining_recipe() -> None:
    config = PretrainConfig(out=Path("run"), data=PretrainData(path=["photos"]))
    assert (config.epochs, config.batch_size, config.model.mask_ratio, config.model.mask_patch) == (800, 4096, 0.6, 32)
    assert (config.optim.base_lr, config.optim.betas, config.optim.warmup_epochs) == (1.5e-4, (0.9, 0.95), 40)


def test_settings_made_by_hand_are_checked_whole() -> None:
    with pytest.raises(ValueError, match=r"missing: the run directory, e.g. --out runs/first"):
        PretrainConfig()
    with pytest.raises(ValueError, match="250 is not a multiple of mask_patch 32: use 224 or 256"):
        PretrainConfig(out=Path("run"), data=PretrainData(path=["photos"], image_size=(250, 256)))


def test_out_and_images_are_all_that_the_defaults_lack() -> None:
    assert keys(PretrainConfig) == ["out", "data.path"]
    assert keys(FinetuneConfig) == ["out", "data.path", "model.variant"]
    assert BenchConfig().out is None


@pytest.mark.parametrize("value", [224, "224", [224], ["224"], [224, 224]])
def test_one_number_is_a_square(value: object) -> None:
    assert ImageConfig.model_validate({"image_size": value}).image_size == (224, 224)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, -1])
def test_a_learning_rate_is_finite_and_positive(value: float) -> None:
    with pytest.raises(ValidationError, match="base_lr"):
        pretrain(optim={"base_lr": value})


def test_statistics_default_to_imagenets_and_its_grey_average() -> None:
    assert ImageConfig().statistics()[0] == IMAGENET_MEAN
    assert ImageConfig(in_chans=1).statistics() == (GREY_MEAN, GREY_STD)
    assert ImageConfig(in_chans=1, mean=[0.2], std=[0.1]).statistics() == ([0.2], [0.1])


@pytest.mark.parametrize(
    ("sections", "key", "sentence"),
    [
        ({"data": {"mean": [0.1, 0.2, 0.3]}}, "data.std", "give both or neither"),
        ({"model": {"mask_patch": 48}, "data": {"image_size": 192}}, "model.mask_patch", "use 32 or 64"),
        ({"data": {"image_size": 200}}, "data.image_size", "use 192 or 224"),
        ({"data": {"image_size": [224, 16]}}, "data.image_size", "16 is not a multiple of mask_patch 32: use 32"),
        ({"data": {"image_size": 32}}, "data.image_size", "single patch"),
        ({"model": {"mask_ratio": 0.98}}, "model.mask_ratio", "leaves none of 49 patches visible: at most 0.979"),
        ({"data": {"crop_scale": [1, 0.2]}}, "data.crop_scale", "rising order"),
        ({"data": {"std": [0.2] * 3, "mean": [0.5]}}, "data.mean", "has 1 values, in_chans = 3 needs 3"),
        ({"batch_size": 65, "grad_accum": 2}, "batch_size", "the nearest is 64"),
        (
            {"batch_size": 68, "grad_accum": 2, "data": {"masks_per_image": 4}},
            "batch_size",
            "grad_accum = 8: use 64 or 72",
        ),
        ({"batch_size": 65, "grad_accum": 2, "data": {"masks_per_image": 4}}, "batch_size", "the nearest is 64"),
        ({"device": "cpu", "precision": "fp16"}, "precision", "needs a GPU"),
        ({"device": "cpu", "precision": "tf32"}, "precision", "needs a GPU"),
        ({"device": "cpu", "model": {"compile": "cudagraphs"}}, "model.compile", "needs a GPU"),
        ({"grad_accum": 2, "model": {"compile": "cudagraphs"}}, "model.compile", "needs grad_accum 1"),
        ({"device": "cpu", "model": {"backend": "triton"}}, "model.backend", "needs a GPU"),
    ],
)
def test_impossible_combinations_are_named_with_a_remedy(sections: dict[str, object], key: str, sentence: str) -> None:
    data = sections.pop("data", {})
    assert isinstance(data, dict)
    ((found, text),) = conflicts(pretrain, data={"path": ["photos"], **data}, **sections)
    assert found == key and sentence in text


def test_a_machine_is_asked_at_launch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = pretrain(model={"backend": "minkowski"})
    with pytest.raises(ValueError, match=r"^model.backend: .* build it with `make minkowski` or use packed$"):
        check_launch(config, 1)
    check_launch(pretrain(), 1)


def test_the_largest_ratio_that_is_named_leaves_a_patch_visible() -> None:
    for size in range(64, 449, 32):
        data = {"path": ["x"], "image_size": size}
        ((_, text),) = conflicts(pretrain, data=data, model={"mask_ratio": 0.9999})
        pretrain(data=data, model={"mask_ratio": float(text.rpartition("at most ")[2])})


def test_more_bands_need_statistics_of_their_own() -> None:
    assert keys(pretrain, data={"path": ["x"], "in_chans": 4}) == ["data.mean", "data.std"]
    pretrain(data={"path": ["x"], "in_chans": 4, "mean": [0.1] * 4, "std": [1] * 4})


def test_a_batch_holds_an_image_for_each_process() -> None:
    with pytest.raises(ValueError, match=r"^batch_size: 4 is smaller than the 8 processes: give each an image$"):
        check_launch(pretrain(batch_size=4), 8)
    with pytest.raises(ValueError, match=r"^batch_size: 12 is not a multiple of processes x grad_accum = 8 x 1: the"):
        check_launch(pretrain(batch_size=12), 8)
    check_launch(pretrain(batch_size=8), 8)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"model": {}}, "model.variant"),
        ({"eval_only": True}, "model.init"),
        ({"data": {"path": "x", "val_share": 0}}, "data.val_share"),
        ({"data": {"path": "x", "in_chans": 4, "mean": [0.1] * 4, "std": [1] * 4}}, "data.auto_augment"),
        ({"data": {"path": "x", "image_size": 16}}, "data.image_size"),
        ({"batch_size": 6, "grad_accum": 2, "regularization": {"cutmix": 1}}, "batch_size"),
        ({"regularization": {"class_weights": [0, 0]}}, "regularization.class_weights"),
    ],
)
def test_impossible_fine_tuning_is_named(settings: dict[str, object], key: str) -> None:
    assert keys(finetune, **settings) == [key]


def test_evaluation_alone_needs_no_training_images() -> None:
    finetune(eval_only=True, model={"init": "runs/tuned"}, data={"val_path": "held-out"})


def test_mixup_needs_an_even_part_of_each_process() -> None:
    mixed = {"mixup": 0.8}
    with pytest.raises(ValueError, match=r"^batch_size: 6 gives 3 images a part, and mixup and cutmix pair them"):
        check_launch(finetune(batch_size=6, regularization=mixed), 2)
    check_launch(finetune(batch_size=8, regularization=mixed), 2)


# Networks


@pytest.mark.parametrize(
    ("word", "name"), [("atto", "convnextv2_atto"), ("xlarge", "convnext_xlarge"), ("convnext_tiny", "convnext_tiny")]
)
def test_the_last_word_of_a_variant_is_enough(word: str, name: str) -> None:
    assert (PretrainModel(variant=word).variant, PretrainModel(variant=word).spec) == (name, VARIANTS[name])


def test_which_weights_of_a_file_are_meant_is_said_alike_by_every_command_that_reads_some() -> None:
    given = ["--key", "model_ema", "--prefix", "student"]
    lines = {
        PretrainConfig: ["x", "--out", "y", "--init", "a.pth"],
        FinetuneConfig: ["x", "--out", "y", "--init", "a.pth"],
        ConvertConfig: ["a.pth", "b"],
        PredictConfig: ["a.pth", "x"],
        EvaluateConfig: ["a.pth", "--data", "x"],
        AnalyzeConfig: ["a.pth", "--images", "x"],
        EmbedConfig: ["a.pth", "--images", "x", "--out", "y"],
    }
    for model, words in lines.items():
        cfg = options.load(model, [*words, *given], prog="fcmae")
        found = cfg.model if isinstance(cfg, PretrainConfig | FinetuneConfig) else cfg
        assert (found.key, found.prefix) == ("model_ema", "student"), model
    for key in ("key", "prefix"):
        with pytest.raises(ConfigError, match=rf"^model\.{key}: it tells of the weights .*: give --init$"):
            options.load(FinetuneConfig, ["x", "--out=y", "--model.variant=atto", f"--model.{key}=mit"], prog="fcmae")


@pytest.mark.parametrize(("word", "sentence"), [("ato", "use convnextv2_atto"), ("resnet50", "use one of convnextv2_")])
def test_a_mistyped_variant_of_weights_brings_the_nearest(word: str, sentence: str) -> None:
    assert ConvertConfig(source="a", dest="b", variant="atto").variant == "convnextv2_atto"
    with pytest.raises(ValidationError, match=f"'{word}' is no variant: {sentence}"):
        ConvertConfig(source="a", dest="b", variant=word)


def test_a_network_may_be_given_by_its_numbers() -> None:
    numbers = {"depths": [2, 2, 4], "dims": ["40", "80", "160"], "kernel_size": 5}
    spec = ConvNeXtSpec(depths=(2, 2, 4), dims=(40, 80, 160), kernel_size=5, stem_stride=2)
    model = PretrainModel.model_validate({"variant": numbers, "stem_stride": 2})
    assert (model.spec, model.stem_stride) == (spec, 2)
    inside = PretrainModel.model_validate({"variant": numbers | {"stem_stride": "2"}})
    assert inside == model == PretrainModel(variant=spec) == PretrainModel(variant=spec, stem_stride=2)
    assert model.model_dump()["variant"] == {"depths": [2, 2, 4], "dims": [40, 80, 160], "kernel_size": 5}


def test_the_numbers_of_a_published_network_are_its_name() -> None:
    numbers = VARIANTS["convnextv2_atto"].model_dump()
    as_text = {"depths": ["2", "2", "6", "2"], "dims": ["40", "80", "160", "320"]}
    widths = [["160"] * 2, ["320"] * 2, ["640"] * 6, ["1280"] * 2]
    for given in (numbers, as_text, as_text | {"hidden": widths, "stem_stride": "1"}):
        model = FinetuneModel.model_validate({"variant": given})
        assert model.variant == "convnextv2_atto"
        assert model.stem_stride == (1 if given.get("hidden") else 4)


def test_the_stride_of_the_stem_is_said_once() -> None:
    numbers = {"depths": [1, 1], "dims": [8, 8], "stem_stride": 2}
    with pytest.raises(ValidationError, match=r"the numbers in model.variant say 2: leave one of the two out"):
        PretrainModel.model_validate({"variant": numbers, "stem_stride": 4})


def test_the_stride_of_the_stem_is_filled_in_where_it_is_known() -> None:
    assert PretrainModel().stem_stride == PretrainModel(init="run").stem_stride == 4
    assert FinetuneModel(variant="convnextv2_atto").stem_stride == 4
    begun = FinetuneModel(variant="convnextv2_atto", init="run")
    assert begun.stem_stride is None and begun.spec == VARIANTS["convnextv2_atto"]
    assert FinetuneModel(init="run").spec is None


def test_the_total_stride_is_that_of_the_network() -> None:
    two_stages = {"variant": {"depths": [1, 1], "dims": [8, 8]}, "stem_stride": 3}
    pretrain(model=two_stages | {"mask_patch": 12}, data={"path": ["x"], "image_size": 48})
    ((key, text),) = conflicts(pretrain, model=two_stages | {"mask_patch": 8}, data={"path": ["x"], "image_size": 64})
    assert (key, text) == (
        "model.mask_patch",
        "8 is not a multiple of the total stride 6 (2 x stem_stride): use 6 or 12",
    )
    finetune(model=two_stages, data={"path": "x", "image_size": 8})
    assert keys(finetune, model=two_stages | {"stem_stride": 5}, data={"path": "x", "image_size": 8}) == [
        "data.image_size"
    ]


@pytest.mark.parametrize(
    "variant",
    ["convnextv2_nowhere", "", 3, [2, 2], {"depths": [1, 1]}, {"depths": [1, 1], "dims": [8, 8, 8]}, {"dim": 3}],
)
def test_what_is_no_network_is_refused(variant: object) -> None:
    with pytest.raises(ValidationError):
        PretrainModel.model_validate({"variant": variant})


# Other commands


def test_images_come_with_labels_or_without() -> None:
    for kind in (partial(AnalyzeConfig, models=["run"]), partial(EmbedConfig, model="run", out=Path("out"))):
        assert keys(kind) == keys(kind, images=["x"], data="y") == ["images"]
        kind(images=["x"])
        kind(data="y")


@pytest.mark.parametrize(
    ("words", "stages"), [("all", None), (["all"], None), (["3", "last"], (3, -1)), ("last", (-1,)), (2, (2,))]
)
def test_stages_are_numbers_last_or_all(words: object, stages: tuple[int, ...] | None) -> None:
    values = {"models": ["run"], "data": "x"}
    assert EvaluateConfig.model_validate({**values, "stages": words}).stages == stages
    with pytest.raises(ValidationError, match="'fourth' is neither a number nor last: use such as 3 4, last or all"):
        EvaluateConfig.model_validate({**values, "stages": ["fourth"]})


def test_one_stage_is_embedded() -> None:
    values = {"model": "run", "data": "x", "out": "y"}
    assert EmbedConfig.model_validate({**values, "stage": "last"}) == EmbedConfig.model_validate(values)
    with pytest.raises(ValidationError, match="features of one stage are written: give its number, or last"):
        EmbedConfig.model_validate({**values, "stage": "all"})


def test_settings_that_a_resumed_run_may_change_exist() -> None:
    known = {*options.flat(pretrain()), *options.flat(finetune()), *options.flat(segment())}
    assert known >= FREE_ON_RESUME


def test_a_tilde_is_the_home_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    run = options.make(PretrainConfig, {"data.path": ["~/a", "b"], "out": "~/r", "monitor.labelled": "~/l"})
    assert (run.data.path, str(run.out), run.monitor.labelled) == (["/home/ada/a", "b"], "/home/ada/r", "/home/ada/l")
    predicted = PredictConfig(model=Path("~/m"), images=["~"], csv=Path("~/x.csv"))
    assert (str(predicted.model), predicted.images, str(predicted.csv)) == (
        "/home/ada/m",
        ["/home/ada"],
        "/home/ada/x.csv",
    )
    with pytest.raises(
        ValueError, match=r"model: received ~nobody-here/m; there is no such user: write ./~nobody-here"
    ):
        options.make(PredictConfig, {"model": "~nobody-here/m", "images": ["a"]})
    predicted = options.make(PredictConfig, {"model": "./~nobody-here/m", "images": ["./~a"]})
    assert (predicted.model, predicted.images) == (Path("~nobody-here/m").absolute(), ["./~a"])
    assert options.make(PredictConfig, options.flat(predicted)) == predicted


@pytest.mark.parametrize(
    ("sections", "key", "sentence"),
    [
        ({"data": {"maps": None}}, "data.maps", "missing: the folder of the label maps of images"),
        ({"data": {"val_path": "held"}}, "data.val_maps", "missing: the folder of the label maps of held"),
        ({"data": {"val_maps": "held"}}, "data.val_path", "missing: the images of the label maps held"),
        ({"model": {"init": "a"}, "data": {"in_chans": 2, "mean": [1, 2]}}, "data.std", "give both or neither"),
        ({"model": {"init": "a"}, "data": {"in_chans": 2, "std": [1, 2]}}, "data.mean", "give both or neither"),
        ({"data": {"path": None}}, "data.path", "a folder of images or a CSV file"),
        ({"data": {"scale": [2, 1]}}, "data.scale", "[2.0, 1.0] is not in rising order"),
        ({"data": {"class_names": ["sea", "sea"]}}, "data.class_names", "has a name twice"),
        ({"data": {"class_values": [1, 1]}}, "data.class_values", "has a value twice"),
        (
            {"data": {"class_names": ["a", "b"], "class_values": [1, 2, 3]}},
            "data.class_values",
            "3 values of 2 classes",
        ),
        ({"data": {"class_values": [0, 255]}}, "data.ignore_value", "255 is the value of a class"),
        ({"data": {"class_names": ["a", "b"], "ignore_value": 1}}, "data.ignore_value", "1 is the value of a class"),
        ({"data": {"val_share": 0}}, "data.val_share", "0 leaves nothing to evaluate on"),
        ({"model": {}}, "model.variant", "missing: name a variant"),
        ({"eval_only": True}, "model.init", "missing: eval_only evaluates"),
    ],
)
def test_segmentation_that_cannot_work_is_refused(sections: dict[str, Any], key: str, sentence: str) -> None:
    ((found, said),) = conflicts(segment, **sections)
    assert found == key and sentence in said


def test_a_csv_file_needs_no_folder_of_maps() -> None:
    assert segment(data={"path": "list.csv", "maps": None}).data.maps is None

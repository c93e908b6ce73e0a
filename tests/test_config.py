import sys

import pytest
from pydantic import ValidationError

from fcmae.config import (
    FREE_ON_RESUME,
    GREY_MEAN,
    GREY_STD,
    IMAGENET_MEAN,
    FinetuneConfig,
    ImageConfig,
    PretrainConfig,
    RunConfig,
)


def pretrain(**sections: object) -> PretrainConfig:
    return PretrainConfig.model_validate({"out": "run", "batch_size": 64, **sections})


def first_keys(config: RunConfig) -> list[str]:
    return [keys[0] for keys, _ in config.conflicts()]


def sentences(config: RunConfig) -> str:
    return "\n".join(f"{keys[0]}: {sentence}" for keys, sentence in config.conflicts())


def test_defaults_are_the_published_pretraining_recipe() -> None:
    config = PretrainConfig()
    assert (config.epochs, config.batch_size, config.model.mask_ratio, config.model.mask_patch) == (800, 4096, 0.6, 32)
    assert (config.optim.base_lr, config.optim.betas, config.optim.warmup_epochs) == (1.5e-4, (0.9, 0.95), 40)


def test_out_and_images_are_all_that_the_defaults_lack() -> None:
    assert first_keys(PretrainConfig()) == ["out", "data.path"]
    assert first_keys(FinetuneConfig()) == ["out", "data.path", "model.variant"]


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
    found = sentences(pretrain(data={"path": ["photos"], **data}, **sections))
    assert found.startswith(f"{key}: ") and sentence in found and "\n" not in found


def test_an_engine_that_is_not_installed_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    assert "build it with `make minkowski`" in sentences(pretrain(model={"backend": "minkowski"}))


def test_the_largest_ratio_that_is_named_leaves_a_patch_visible() -> None:
    for size in range(64, 449, 32):
        text = sentences(pretrain(data={"path": ["x"], "image_size": size}, model={"mask_ratio": 0.9999}))
        ratio = float(text.rpartition("at most ")[2])
        assert not first_keys(pretrain(data={"path": ["x"], "image_size": size}, model={"mask_ratio": ratio}))


def test_more_bands_need_statistics_of_their_own() -> None:
    bands = pretrain(data={"path": ["x"], "in_chans": 4})
    assert first_keys(bands) == ["data.mean", "data.std"]
    assert not first_keys(pretrain(data={"path": ["x"], "in_chans": 4, "mean": [0.1] * 4, "std": [1] * 4}))


def test_a_batch_holds_an_image_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert "4 is smaller than the 8 processes" in sentences(pretrain(batch_size=4, data={"path": ["x"]}))
    assert not first_keys(pretrain(batch_size=8, data={"path": ["x"]}))


def finetune(**settings: object) -> FinetuneConfig:
    sections = {"data": {"path": "x"}, "model": {"variant": "convnextv2_atto"}, **settings}
    return FinetuneConfig.model_validate({"out": "run", **sections})


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"model": {}}, "model.variant"),
        ({"eval_only": True}, "model.init"),
        ({"data": {"path": "x", "val_share": 0}}, "data.val_share"),
        ({"data": {"path": "x", "in_chans": 4, "mean": [0.1] * 4, "std": [1] * 4}}, "data.auto_augment"),
        ({"data": {"path": "x", "image_size": 16}}, "data.image_size"),
        ({"batch_size": 6, "grad_accum": 2, "regularization": {"cutmix": 1}}, "batch_size"),
    ],
)
def test_impossible_fine_tuning_is_named(settings: dict[str, object], key: str) -> None:
    assert first_keys(finetune(**settings)) == [key]


def test_evaluation_alone_needs_no_training_images() -> None:
    model = {"init": "runs/tuned"}
    assert not first_keys(finetune(eval_only=True, model=model, data={"val_path": "held-out"}))


def test_mixup_needs_an_even_part_of_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert first_keys(finetune(batch_size=6, regularization={"mixup": 0.8})) == ["batch_size"]
    assert not first_keys(finetune(batch_size=8, regularization={"mixup": 0.8}))


def test_settings_that_a_resumed_run_may_change_exist() -> None:
    known = set[str]()
    for config in (PretrainConfig(), FinetuneConfig()):
        for name, value in config.model_dump().items():
            known |= {f"{name}.{key}" for key in value} if isinstance(value, dict) else {name}
    assert known >= FREE_ON_RESUME

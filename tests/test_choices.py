"""Rules for what a run is not given: what they choose, what they leave alone, and that they fit together."""

from __future__ import annotations

from typing import Any

import pytest

from fcmae import choices
from fcmae.choices import Choices
from fcmae.config import FinetuneConfig, PretrainConfig, SegmentConfig
from fcmae.data.survey import Survey
from fcmae.networks.spec import ConvNeXtSpec
from fcmae.options import make

USUAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def images(num: int = 1000, short_side: int = 224, in_chans: int = 3, **changed: Any) -> Survey:
    usual = {"is_deep": False, "has_deep": changed.get("is_deep", False), "mean_pixels": short_side**2, **USUAL}
    return Survey(num, short_side, in_chans, **(usual | changed))


def pretraining(
    facts: Survey, device: str = "cpu", given: dict[str, Any] | None = None, speed: float = 100, hours: float = 1
) -> PretrainConfig:
    """The settings of a run, through all rules."""
    plan = Choices(given or {})
    choices.image_settings(plan, facts)
    choices.pretraining_network(plan, facts, device, None)
    choices.pretraining_batch(plan, facts, device)
    choices.duration(plan, facts.num, hours, speed)
    return make(PretrainConfig, plan.settings | {"data.path": ["photos"], "out": "out", "planned_s": plan.planned_s})


def test_how_much_large_images_are_shrunk_is_told() -> None:
    for short_side, told in ((4000, "; shrunk up to 31 times: for small objects cut the images into chips"), (900, "")):
        plan = Choices({})
        choices.pretraining_network(plan, images(short_side=short_side), "cpu", None)
        (why,) = (choice.why for choice in plan.made if choice.key == "data.image_size")
        assert why == f"of {short_side} pixels; a CPU has no time for more{told}"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("num", [2, 50, 990, 10_000, 10**7])
@pytest.mark.parametrize("short_side", [8, 28, 64, 100, 150, 200, 4000])
def test_whatever_the_images_the_settings_fit_together(device: str, num: int, short_side: int) -> None:
    cfg = pretraining(images(num, short_side), device)
    side = cfg.data.image_size[0]
    assert 6 <= side // cfg.model.mask_patch <= 8
    assert cfg.batch_size <= num
    assert side <= max(48, short_side)


@pytest.mark.parametrize(
    ("num", "masks", "parts"), [(1000, 3, "auto"), (13, 2, "auto"), (1000, 100, "auto"), (999, 2, 3)]
)
def test_a_batch_has_whole_images_of_several_masks_each_and_the_given_parts(
    num: int, masks: int, parts: int | str
) -> None:
    cfg = pretraining(images(num), given={"data.masks_per_image": masks, "grad_accum": parts})
    unit = masks * (1 if parts == "auto" else int(parts))
    assert cfg.batch_size % unit == 0 and cfg.batch_size <= max(64, unit)


def test_a_batch_of_given_parts_has_pairs_to_mix() -> None:
    plan = Choices({"grad_accum": 5, "regularization.mixup": 0.8})
    choices.finetuning_settings(plan, images(class_counts=(5000, 5000)), "cpu", None, ())
    assert plan.settings["batch_size"] == 120


def test_what_is_given_stays_and_the_rest_fits_it() -> None:
    given = {"data.image_size": [160, 160], "batch_size": 7, "optim.base_lr": 1.0, "epochs": 3}
    cfg = pretraining(images(), given=given)
    assert (cfg.data.image_size, cfg.batch_size, cfg.optim.base_lr, cfg.epochs) == ((160, 160), 7, 1.0, 3)
    assert 160 % cfg.model.mask_patch == 0
    assert cfg.optim.warmup_epochs == pytest.approx(3 / 20)


def test_what_a_run_needs_cannot_be_given_as_nothing() -> None:
    given = {"hours": None, "model.stem_stride": None, "data.val_path": None}
    assert Choices(given).settings == {"data.val_path": None}


def test_hours_and_steps_are_of_whole_batches() -> None:
    facts = images(num=31, short_side=64)
    plan = Choices({})
    choices.segmentation_settings(plan, facts, "cpu", None)
    assert plan.settings["batch_size"] == 16
    most = choices.segmentation_epochs(plan, facts)
    assert most == 2000  # of one step each
    choices.duration(plan, facts.num, 1, 10.0, most)
    seen = plan.settings["epochs"] * 16
    assert seen == pytest.approx(choices.num_seen(1, 10.0), rel=0.01)
    assert plan.planned_s == pytest.approx(3600, rel=0.01)


def test_a_given_network_gets_patches_of_whole_strides() -> None:
    cfg = pretraining(images(), given={"model.variant": "convnextv2_nano", "model.stem_stride": 2})
    assert cfg.model.mask_patch % 16 == 0


def test_small_photographs_alone_are_pretrained_on_gradients() -> None:
    assert pretraining(images(short_side=64)).model.target == "hog"
    assert pretraining(images(short_side=64, in_chans=1, mean=(0.45,), std=(0.22,))).model.target == "hog"
    for other in (images(), images(short_side=64, is_deep=True)):
        assert pretraining(other).model.target == "pixels"
    assert pretraining(images(short_side=64), given={"model.target": "pixels"}).model.target == "pixels"


@pytest.mark.parametrize(("stem_stride", "target"), [(1, "hog"), (2, "hog"), (3, "pixels"), (4, "hog")])
def test_gradients_are_chosen_only_where_their_cells_fill_a_patch(stem_stride: int, target: str) -> None:
    cfg = pretraining(images(short_side=96), given={"model.stem_stride": stem_stride})
    assert cfg.model.target == target


@pytest.mark.parametrize(
    ("device", "hours", "found"), [("cpu", 9, False), ("cuda", 0.5, False), ("cuda", 9, "auto"), ("cuda", None, "auto")]
)
def test_how_the_machine_computes_is_chosen_with_its_reason(
    device: str, hours: float | None, found: bool | str
) -> None:
    plan = Choices({} if hours is None else {"hours": hours})
    assert choices.machine_settings(plan, device, 5, "bf16") == (hours or 8)
    chosen = {choice.key: choice.value for choice in plan.made if choice.why}
    assert (chosen["data.num_workers"], chosen["precision"], chosen["model.compile"]) == (5, "bf16", found)
    given = Choices({"data.num_workers": 0, "precision": "fp32", "model.compile": True})
    choices.machine_settings(given, device, 5, "bf16")
    assert [choice.key for choice in given.made] == ["hours"]


def test_a_run_that_is_not_told_takes_two_hours_on_a_cpu() -> None:
    assert choices.machine_settings(Choices({}), "cpu", 5, "fp32") == 2


def test_the_hours_are_filled_and_no_more() -> None:
    cfg = pretraining(images(5000), speed=100, hours=2)
    assert cfg.epochs == pytest.approx(2 * 3600 * 100 * choices.TRAINING_SHARE / 5000, rel=0.02)
    assert cfg.planned_s == pytest.approx(2 * 3600, rel=0.01)
    assert pretraining(images(50), speed=1000, hours=24).planned_s == pytest.approx(1600 * 48 / 1000 / 0.88, rel=0.01)
    assert pretraining(images(10**6), speed=100, hours=0.1).epochs < 1
    assert pretraining(images(50), speed=1000, hours=24).epochs == choices.MAX_EPOCHS


def test_the_learning_rate_is_the_published_one_at_the_published_batch() -> None:
    cfg = pretraining(images(10**7), "cuda")
    assert cfg.batch_size == 4096
    assert cfg.optim.base_lr == pytest.approx(1.5e-4, rel=0.01)


@pytest.mark.parametrize(
    ("changed", "is_measured"),
    [
        ({}, False),
        ({"mean": (0.1, 0.1, 0.1)}, True),
        ({"std": (0.05, 0.05, 0.05)}, True),
        ({"is_deep": True}, True),
        ({"in_chans": 4, "mean": (0.4,) * 4, "std": (0.2,) * 4}, True),
    ],
)
def test_statistics_are_those_of_the_images_where_the_usual_ones_are_wrong(
    changed: dict[str, Any], is_measured: bool
) -> None:
    facts = images(**changed)
    cfg = pretraining(facts)
    assert (cfg.data.mean is not None) == is_measured
    if is_measured:
        assert cfg.data.statistics() == (list(facts.mean), list(facts.std))


@pytest.mark.parametrize(("size", "patch"), [([448, 544], 32), ([512, 608], 32), ([448, 672], 32), ([448, 896], 64)])
def test_patches_divide_both_sides_of_oblong_images(size: list[int], patch: int) -> None:
    assert pretraining(images(), given={"data.image_size": size}).model.mask_patch == patch


def test_statistics_that_are_given_are_left_alone() -> None:
    cfg = pretraining(images(is_deep=True), given={"data.mean": [0, 0, 0], "data.std": [1, 1, 1]})
    assert cfg.data.statistics() == ([0, 0, 0], [1, 1, 1])


def tuning(facts: Survey, held: ConvNeXtSpec | None = None, side: int | None = None, **given: Any) -> FinetuneConfig:
    plan = Choices(given)
    choices.image_settings(plan, facts)
    choices.finetuning_settings(plan, facts, "cpu", held, [] if side is None else [side, side])
    choices.duration(plan, facts.num, 1, 100, choices.finetuning_epochs(sum(facts.class_counts)))
    init = {} if held is None else {"model.init": "run"}
    return make(FinetuneConfig, plan.settings | init | {"data.path": "labelled", "out": "out"})


def test_a_batch_is_no_more_than_what_is_left_to_learn_from() -> None:
    few = images(12, class_counts=(6, 6))
    for given, most in (({}, 9), ({"data.val_share": 0.5}, 6), ({"data.val_path": "held"}, 12)):
        assert tuning(few, **given).batch_size <= most
    assert tuning(few, **{"data.val_share": 0.5}).batch_size == 4


def test_classes_are_balanced_where_one_has_three_times_the_images_of_another() -> None:
    assert tuning(images(class_counts=(30, 10))).regularization.class_weights == "balanced"
    assert tuning(images(class_counts=(29, 10))).regularization.class_weights is None


def test_fine_tuning_takes_network_and_size_of_its_weights() -> None:
    cfg = tuning(images(class_counts=(500, 500)), choices.SMALL, 64)
    assert (cfg.model.variant, cfg.data.image_size, cfg.optim.layer_decay) == (None, (64, 64), 0.9)
    scratch = tuning(images(class_counts=(500, 500)))
    assert scratch.model.spec is not None and scratch.optim.layer_decay == 1


def segmenting(
    facts: Survey, device: str = "cpu", held: ConvNeXtSpec | None = None, num_evaluated: float = 0, hours: float = 1
) -> SegmentConfig:
    plan = Choices({})
    choices.image_settings(plan, facts)
    choices.segmentation_settings(plan, facts, device, held)
    choices.duration(plan, facts.num, hours, 100, choices.segmentation_epochs(plan, facts), num_evaluated)
    init = {} if held is None else {"model.init": "run"}
    return make(SegmentConfig, plan.settings | init | {"data.path": "x", "data.maps": "y", "out": "out"})


@pytest.mark.parametrize(
    ("short_side", "device", "side"), [(150, "cpu", 128), (100, "cpu", 96), (2000, "cuda", 512), (20, "cpu", 16)]
)
def test_crops_of_label_maps_are_as_large_as_images_and_device_allow(short_side: int, device: str, side: int) -> None:
    cfg = segmenting(images(short_side=short_side), device)
    assert cfg.data.image_size == (side, side)
    assert cfg.model.spec is not None and not side % cfg.model.spec.total_stride
    assert segmenting(images(short_side=short_side), device, choices.SMALL).data.image_size == (side, side)


def test_label_maps_are_learnt_from_as_long_as_it_is_of_use() -> None:
    assert segmenting(images(480, short_side=128), hours=9).epochs == 100
    assert segmenting(images(480, short_side=1280), hours=99).epochs == 10_000  # a crop is a hundredth of an image
    few = segmenting(images(6, short_side=128))
    assert (few.batch_size, few.epochs) == (4, 2000)  # steps, as two images wait for the next epoch
    assert few.optim.layer_decay == 1 and segmenting(images(6), held=choices.SMALL).optim.layer_decay == 0.9


def test_evaluations_take_a_tenth_of_the_time_of_training() -> None:
    cfg = segmenting(images(480, short_side=128), num_evaluated=4800)
    evaluations = cfg.epochs / cfg.log.eval_epochs
    assert evaluations * 4800 / 3 == pytest.approx(cfg.epochs * 480 / 10, rel=0.01)
    assert segmenting(images(480, short_side=128), num_evaluated=10**7).log.eval_epochs == cfg.epochs


@pytest.mark.parametrize(
    ("facts", "augments"),
    [
        (images(class_counts=(5000, 5000)), True),
        (images(class_counts=(50, 50)), False),
        (images(class_counts=(5000, 5000), is_deep=True), False),
        (images(class_counts=(5000, 5000), has_deep=True), False),
        (images(class_counts=(5000, 5000), short_side=64), False),
    ],
)
def test_photographs_alone_are_augmented_as_photographs(facts: Survey, augments: bool) -> None:
    assert (tuning(facts).data.auto_augment is not None) == augments


def test_every_choice_has_a_reason() -> None:
    plan = Choices({})
    choices.image_settings(plan, images(is_deep=True))
    choices.pretraining_network(plan, images(), "cuda", None)
    choices.pretraining_batch(plan, images(), "cuda")
    choices.duration(plan, 1000, 1, 100)
    assert len(plan.made) >= 14 and all(choice.why for choice in plan.made)
    assert len({choice.key for choice in plan.made}) == len(plan.made)


def test_a_checkpoint_is_saved_every_ten_minutes_however_long_an_epoch_is() -> None:
    plan = choices.Choices({"batch_size": 64})
    plan.take("batch_size", 64, "given")
    choices.duration(plan, 1_000_000, 8, 50.0)
    epochs = float(plan.settings["epochs"])
    every_s = plan.settings["checkpoint.every_epochs"] * 1_000_000 / 50
    assert epochs > 1 and every_s == pytest.approx(600, rel=0.1)


@pytest.mark.parametrize(("num", "batch", "why"), [(8, 4, "a step"), (20, 8, "2 steps"), (1024, 64, "12 steps")])
def test_a_batch_of_few_labels_is_no_more_than_there_are_to_learn_from(num: int, batch: int, why: str) -> None:
    plan = choices.Choices({})
    choices.finetuning_settings(plan, images(num, class_counts=(num // 2, num // 2)), "cpu", None, [])
    assert plan.settings["batch_size"] == batch
    assert (
        next(choice.why for choice in plan.made if choice.key == "batch_size")
        == f"{num:,} labels: {why} an epoch or more"
    )

"""The summary says what the numbers show, and no more."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reported import LAYERS, evaluation, finetune_run, pretrain_run, write_lines

from fcmae.evaluation.runs import RunFiles, read_run
from fcmae.evaluation.verdicts import is_collapsing, is_working, standard_error, trend, was_worth_it


def read(*paths: Path) -> list[RunFiles]:
    return [read_run(path, path.name) for path in paths]


def test_a_trend_needs_more_than_noise() -> None:
    noise = np.random.default_rng(0).standard_normal(100) * 0.01
    assert trend((1 - np.arange(100) / 100 + noise).tolist()) == " and is still falling"
    assert trend((1 + np.arange(100) / 100 + noise).tolist()) == "; of late it has been rising"
    assert trend((1 + noise).tolist()) == "; of late it has not changed by more than its noise"
    assert trend([3, 2, 1]) == ""


def test_a_loss_below_that_of_mean_colours_is_learning(tmp_path: Path) -> None:
    verdict = is_working(read(pretrain_run(tmp_path / "run")))
    assert verdict.state == "good" and verdict.answer == "✓ Yes"
    assert "by epoch 6 of 6" in verdict.sentences[0]
    assert verdict.sentences[0].endswith("Painting every patch in its own mean colour scores 1.")


def test_a_loss_near_that_of_mean_colours_is_not_yet(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    write_lines(path, [{"step": 1, "epoch": 0.1, "loss": 1.0}, {"step": 2, "epoch": 0.2, "loss": 0.99}])
    verdict = is_working(read(path))
    assert verdict.state == "unknown"
    assert verdict.sentences == [
        "The loss went from 1 to 0.99 by epoch 0.2 of 6. Painting every patch in its own mean colour scores 1, so next "
        "to nothing is learnt yet."
    ]


def test_a_run_that_has_only_begun_is_too_early_to_judge(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    write_lines(path, [])
    assert is_working(read(path)).sentences == ["Nothing is logged yet."]
    assert is_working(read(path)).state == "unknown"


def test_a_device_that_waits_for_data_wants_a_look(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    write_lines(path, [line | ({"data_wait_share": 0.6, "data_wait_s": 9} if "loss" in line else {}) for line in lines])
    verdict = is_working(read(path))
    assert verdict.state == "attention"
    assert any("Data starves the device" in sentence for sentence in verdict.sentences)


@pytest.mark.parametrize(("score", "state"), [(0.9, "good"), (0.55, "attention")])
def test_a_classifier_works_if_it_is_better_than_a_guess(tmp_path: Path, score: float, state: str) -> None:
    # Two standard errors of guessing on 100 images of two classes are .1.
    verdict = is_working(read(finetune_run(tmp_path / "run", score)))
    assert verdict.state == state
    assert verdict.sentences[0] == f"Balanced accuracy is {score:.3f} on 100 held-out images; a guess scores 0.500."


def test_a_guess_is_among_the_classes_that_held_out_images_are_of(tmp_path: Path) -> None:
    """One answer to all has a balanced accuracy of a half where two of ten classes are held out."""
    (run,) = read(finetune_run(tmp_path / "run", 0.5))
    verdict = is_working([replace(run, counts=run.counts | {"classes": 10}, class_counts=[50, 50] + [0] * 8)])
    assert verdict.state == "attention" and "a guess scores 0.500" in verdict.sentences[0]


@pytest.mark.parametrize(
    ("loss", "val_loss", "state"),
    [([0.0851, 0.085], [], "unknown"), ([0.08, 0.05], [0.08, 0.12], "unknown"), ([0.08, 0.05], [0.06], "good")],
)
def test_a_loss_that_hardly_falls_or_rises_on_held_out_images_is_no_yes(
    tmp_path: Path, loss: list[float], val_loss: list[float], state: str
) -> None:
    path = pretrain_run(tmp_path / "run", model__target="hog", model__normalize_target="false")
    lines: list[dict[str, float]] = [{"step": i, "epoch": i, "loss": value} for i, value in enumerate(loss)]
    lines += [{"step": 2 + i, "epoch": 2 + i, "val_loss": value} for i, value in enumerate(val_loss)]
    write_lines(path, lines)
    assert is_working(read(path)).state == state


def test_healthy_features_show_no_sign_of_collapse(tmp_path: Path) -> None:
    verdict = is_collapsing(read(pretrain_run(tmp_path / "run")))
    assert verdict.state == "good"
    assert "lowest in stages.3.0: 0.420" in verdict.sentences[0]


def test_collapse_is_told_in_the_words_of_the_monitor(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    lines = [
        {"step": i, "epoch": i, **{f"cosine_distance/{layer}": 0.4 / i**2 for layer in LAYERS}} for i in range(1, 9)
    ]
    write_lines(path, lines)
    verdict = is_collapsing(read(path))
    assert verdict.state == "attention"
    assert verdict.sentences[0].startswith("Features collapse: ")


def test_few_evaluations_are_no_judgement_and_none_says_how_to_measure(tmp_path: Path) -> None:
    verdict = is_collapsing(read(pretrain_run(tmp_path / "short", num_epochs=2)))
    assert verdict.state == "unknown" and "evaluation 2" in verdict.sentences[-1]
    path = pretrain_run(tmp_path / "none")
    write_lines(path, [])
    assert "monitor.num_images" in is_collapsing(read(path)).sentences[0]


def test_collapse_is_no_question_for_classifiers(tmp_path: Path) -> None:
    assert is_collapsing(read(finetune_run(tmp_path / "run", 0.9))).sentences == []


def tuned(folder: Path, given: list[float], scratch: list[float]) -> list[RunFiles]:
    runs = [finetune_run(folder / f"given-{i}", s, init="first", seed=i) for i, s in enumerate(given)]
    return read(*runs, *(finetune_run(folder / f"scratch-{i}", s, seed=i) for i, s in enumerate(scratch)))


@pytest.mark.parametrize(
    ("given", "scratch", "state"),
    [
        ([0.8, 0.9, 0.85], [0.6, 0.7, 0.65], "good"),
        ([0.8, 0.65, 0.9], [0.6, 0.7, 0.5], "attention"),
        ([0.5, 0.5, 0.5], [0.6, 0.7, 0.5], "attention"),
        ([0.8, 0.9], [0.6, 0.7], "unknown"),  # so by chance once in six times
        ([0.8], [0.6], "unknown"),  # seeds may turn it round
        ([0.5], [0.6], "unknown"),
    ],
)
def test_given_weights_help_if_every_run_beats_every_one_from_scratch(
    tmp_path: Path, given: list[float], scratch: list[float], state: str
) -> None:
    verdict = was_worth_it(tuned(tmp_path, given, scratch))
    assert verdict.state == state
    (sentence,) = verdict.sentences
    assert f"{np.mean(given):.3f} (" in sentence and f"{np.mean(scratch):.3f} (" in sentence
    assert ("other seeds" in sentence) == (len(given) < 3)


def test_segmentations_are_compared_by_their_mean_iou(tmp_path: Path) -> None:
    runs = [
        replace(run, kind="segment", lines=[line | {"miou": line["top1"]} for line in run.lines if "top1" in line])
        for run in tuned(tmp_path, [0.8, 0.9, 0.85], [0.6, 0.7, 0.65])
    ]
    verdict = was_worth_it(runs)
    assert verdict.state == "good"
    assert verdict.sentences[0].startswith("Trained on 20 images, the last mean IoU is 0.850 (0.800, 0.900, 0.850) ")
    assert was_worth_it([runs[0], *tuned(tmp_path / "other", [], [0.6])], else_how=False).sentences == []


def test_what_is_started_from_is_compared_one_by_one_and_other_rates_are_named(tmp_path: Path) -> None:
    runs = [finetune_run(tmp_path / name, score, init=name) for name, score in (("mine", 0.9), ("theirs", 0.5))]
    scratch = finetune_run(tmp_path / "scratch", 0.6)
    config = scratch / "config.yaml"
    config.write_text(re.sub("(base_lr|layer_decay): .*", r"\1: 0.5", config.read_text()))
    verdict = was_worth_it(read(*runs, scratch))
    assert verdict.state != "good" and len(verdict.sentences) == 2
    for sentence, name, score in zip(verdict.sentences, ("mine", "theirs"), ("0.900", "0.500"), strict=True):
        assert f"is {score} ({score}) from {name} and 0.600 (0.600) from scratch." in sentence
        assert " They differ in optim.base_lr too." in sentence


def test_the_same_run_again_is_no_second_run(tmp_path: Path) -> None:
    runs = [finetune_run(tmp_path / f"given-{i}", 0.8, init="first") for i in range(3)]
    verdict = was_worth_it(read(*runs, *(finetune_run(tmp_path / f"scratch-{i}", 0.6) for i in range(3))))
    assert verdict.state == "unknown" and "0.800 (0.800) from given weights" in verdict.sentences[0]
    assert "on the same data.val_path, may turn it round; `fcmae worth` runs them." in verdict.sentences[0]


def test_a_run_of_the_same_seed_with_other_settings_is_left_out_by_name(tmp_path: Path) -> None:
    given, scratch = tuned(tmp_path, [0.8], [0.6])
    other = finetune_run(tmp_path / "scratch-of-another-rate", 0.9)
    config = other / "config.yaml"
    config.write_text(f"{config.read_text()}\noptim: {{base_lr: 0.5}}\n".replace("optim:\n", "optim_was:\n"))
    (sentence,) = was_worth_it([given, scratch, *read(other)]).sentences
    assert "0.600 (0.600) from scratch" in sentence
    assert "another run of the same start and seed has other settings: " in sentence and "another-rate" in sentence


def test_runs_of_other_budgets_are_not_compared(tmp_path: Path) -> None:
    given, scratch = tuned(tmp_path, [0.8], [0.6])
    config = scratch.path / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 3", "epochs: 2"))
    assert was_worth_it([given, *read(scratch.path)]).sentences[0].startswith("Not measured yet")


def test_the_error_of_a_balanced_accuracy_is_that_of_its_small_classes() -> None:
    # Recalls of 20 and of 980 images near .5: variances .0125 and .000255; the mean of two has a quarter of their sum.
    assert standard_error(0.5, [20, 980]) == pytest.approx(((0.0125 + 0.25 / 980) / 4) ** 0.5)
    assert standard_error(0.5, [50, 50, 0]) == pytest.approx((0.25 / 100) ** 0.5)


def test_runs_that_are_scored_on_other_images_are_not_compared(tmp_path: Path) -> None:
    given, scratch = tuned(tmp_path, [0.8], [0.6])
    (scratch.path / "val_files.json").write_text('{"paths": ["/a", "/b"], "labels": [0, 1], "class_names": ["a", "b"]}')
    assert was_worth_it([given, *read(scratch.path)]).sentences[0].startswith("Not measured yet")


@pytest.mark.parametrize(("score", "untrained", "state"), [(0.8, 0.6, "good"), (0.62, 0.6, "attention")])
def test_probes_are_held_against_those_of_an_untrained_network(
    tmp_path: Path, score: float, untrained: float, state: str
) -> None:
    path = pretrain_run(tmp_path / "run")
    evaluation(path / "evaluation" / "run", "runs/run", score)
    evaluation(path / "evaluation" / "random-run", "random:runs/run", untrained)
    verdict = was_worth_it(read(path))
    assert verdict.state == state
    (sentence,) = verdict.sentences
    assert f"score {score:.3f}" in sentence and f"An untrained network scores {untrained:.3f}" in sentence


def test_probes_of_an_earlier_step_say_so_and_judge_nothing(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    for name, score in (("run", 0.62), ("random-run", 0.6)):
        evaluation(path / "evaluation" / name, name.replace("-", ":"), score)
        file = path / "evaluation" / name / "evaluation.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 10 if name == "run" else None}))
    verdict = was_worth_it(read(path))
    assert verdict.state == "unknown" and "That was at step 10 of 60: evaluate it again." in verdict.sentences[0]


@pytest.mark.parametrize(("stage", "counts"), [(3, True), (2, False)])
def test_the_last_stage_is_that_of_the_network(tmp_path: Path, stage: int, counts: bool) -> None:
    path = pretrain_run(tmp_path / "run", model__variant="{depths: [1, 1, 1], dims: [8, 8, 8]}")
    evaluation(path / "evaluation" / "run", "runs/run", 0.8, stage=stage, num_stages=3)
    evaluation(path / "evaluation" / "random-run", "random:runs/run", 0.6, stage=stage, num_stages=3)
    assert (was_worth_it(read(path)).state == "good") == counts


def test_probes_alone_answer_nothing(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    evaluation(path / "evaluation", "run", 0.9)
    verdict = was_worth_it(read(path))
    assert verdict.state == "unknown"
    assert verdict.sentences[0].endswith("What an untrained network scores was not measured.")


def test_an_evaluation_that_lacks_its_scores_is_passed_over(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    (path / "evaluation").mkdir()
    (path / "evaluation" / "evaluation.json").write_text('{"model": "run", "results": [{"probe": "linear"}]}')
    assert was_worth_it(read(path)).sentences[0].startswith("Not measured yet")


def test_neighbours_watched_while_training_are_told_and_decide_nothing(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    write_lines(path, [{"step": i, "epoch": i / 2, "knn_balanced_accuracy": i / 10} for i in (1, 2, 5)])
    verdict = was_worth_it(read(path))
    assert verdict.state == "unknown"
    assert verdict.sentences[1:] == [
        "While training, nearest neighbours had a balanced accuracy of 0.100 at epoch 0.5 and 0.500 at epoch 2.5."
    ]


def test_several_runs_are_named_and_the_worst_decides(tmp_path: Path) -> None:
    good, bad = finetune_run(tmp_path / "good", 0.9), finetune_run(tmp_path / "bad", 0.5)
    verdict = is_working(read(good, bad))
    assert verdict.state == "attention"
    assert {sentence.partition(":")[0] for sentence in verdict.sentences} == {"good", "bad"}


def test_runs_of_other_networks_are_not_compared(tmp_path: Path) -> None:
    given, scratch = tuned(tmp_path, [0.8], [0.6])
    for run, network in ((given, "convnextv2_atto"), (scratch, "convnextv2_nano")):
        starts = json.loads((run.path / "environment.json").read_text())
        starts[-1]["network"] = network
        (run.path / "environment.json").write_text(json.dumps(starts))
    assert was_worth_it(read(given.path, scratch.path)).sentences[0].startswith("Not measured yet")


def test_a_run_that_is_under_way_is_not_compared_with_one_that_is_done(tmp_path: Path) -> None:
    given, scratch = tuned(tmp_path, [0.8], [0.6])
    lines = [json.loads(line) for line in (scratch.path / "metrics.jsonl").read_text().splitlines()]
    write_lines(scratch.path, [line for line in lines if line["epoch"] < 3])
    assert was_worth_it(read(given.path, scratch.path)).sentences[0].startswith("Not measured yet")


@pytest.mark.parametrize(("miou", "state"), [(0.9, "good"), (0.3, "attention")])
def test_a_segmentation_works_if_it_is_better_than_one_class_everywhere(
    tmp_path: Path, miou: float, state: str
) -> None:
    (run,) = read(finetune_run(tmp_path / "run", 0.9))
    # Two true classes, of which the larger has 9 in 10 pixels, and a third that is predicted somewhere.
    lines = [{"step": 5, "epoch": 3.0, "loss": 0.1, "miou": miou, "largest_class_miou": 0.45}]
    verdict = is_working([replace(run, kind="segment", lines=lines, counts={})])
    assert (
        verdict.state == state
        and f"Mean IoU is {miou:.3f}; the largest class everywhere scores 0.450." in verdict.sentences[0]
    )

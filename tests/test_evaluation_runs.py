"""A run is read in whatever state it is; what cannot be read is said and hinders nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reported import evaluation, finetune_run, pretrain_run

import fcmae
from fcmae.evaluation.runs import curve, read_run, took_s


def test_settings_are_told_apart_from_their_defaults(tmp_path: Path) -> None:
    run = read_run(pretrain_run(tmp_path / "run", seed=3), "run")
    assert (run.kind, run.version, run.problems) == ("pretrain", fcmae.__version__, [])
    assert run.settings["optim.betas"] == [0.9, 0.95] and "optim.betas" not in run.changed
    assert run.changed["seed"] == 3
    assert run.changed["data.image_size"] == [16, 16]
    assert run.changed["log.trackers"] == []


def test_images_are_counted_as_the_run_divided_them(tmp_path: Path) -> None:
    pretrained = read_run(pretrain_run(tmp_path / "run"), "run")
    assert pretrained.counts == {"to learn from": 40, "held out": 10}
    tuned = read_run(finetune_run(tmp_path / "tuned", 0.7), "tuned")
    assert tuned.counts == {"to learn from": 20, "held out": 100, "classes": 2}
    assert tuned.held_out == read_run(finetune_run(tmp_path / "other", 0.1, seed=1), "other").held_out is not None


def test_a_curve_has_the_numbers_of_metrics_jsonl(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    found = curve(read_run(path, "run"), "loss", "loss")
    assert found is not None
    expected = [(line["step"], line["epoch"], line["loss"]) for line in lines if "loss" in line]
    assert list(zip(found.steps, found.epochs, found.values, strict=True)) == expected
    assert curve(read_run(path, "run"), "nothing", "nothing") is None


def test_what_is_not_finite_is_left_out_of_a_curve(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    (path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "x": NaN}\n{"step": 2, "epoch": 2, "x": 5.0}\n')
    found = curve(read_run(path, "run"), "x", "x")
    assert found is not None and found.values == [5.0]


def test_a_run_that_has_only_begun_has_no_lines(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    for name in ("metrics.jsonl", "files.json", "environment.json"):
        (path / name).unlink()
    run = read_run(path, "run")
    assert (run.lines, run.starts, run.counts, run.problems) == ([], [], {}, [])


def test_half_a_last_line_is_left_out(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    before = read_run(path, "run").lines
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 62, "ep')
    assert read_run(path, "run").lines == before


@pytest.mark.parametrize("text", [None, "", "seed: 1\n", "# fcmae pretrain\n", "# fcmae dream 0.1.0\n", "\x00\xff"])
def test_a_directory_that_is_no_run_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match="holds no run of fcmae: give the directory that --out named"):
        read_run(tmp_path, "run")


@pytest.mark.parametrize("content", ["{", "[1, 2]", "\xff"])
def test_what_cannot_be_read_is_a_sentence(tmp_path: Path, content: str) -> None:
    path = pretrain_run(tmp_path / "run")
    evaluation(path / "evaluation", "run", 0.5)
    (path / "evaluation" / "evaluation.json").write_text(content, encoding="latin-1")
    (path / "environment.json").write_text("{}")
    (path / "files.json").write_text("{}")
    run = read_run(path, "run")
    assert run.evaluations == {} and run.starts == []
    assert len(run.problems) == 3
    assert "run `fcmae evaluate` again" in "".join(run.problems)


def test_settings_of_another_version_are_shown_as_they_are(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    config = path / "config.yaml"
    config.write_text(config.read_text() + "warp:\n  speed: 9\n")
    run = read_run(path, "run")
    assert run.settings["warp"] == run.changed["warp"] == {"speed": 9}
    assert run.settings["seed"] == 0
    assert "warp" in run.problems[0]
    config.write_text(config.read_text() + "  : : [\n")
    assert read_run(path, "run").settings == {}


def test_evaluations_of_untrained_networks_come_last(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run")
    for number, model in enumerate(("random:run", "run", "random:other", "other")):
        evaluation(path / "evaluation" / str(number), model, 0.5)
    models = [found["model"] for found in read_run(path, "run").evaluations.values()]
    assert models == ["run", "other", "random:run", "random:other"]


def test_the_time_of_a_run_has_its_evaluations_in_it(tmp_path: Path) -> None:
    path = pretrain_run(tmp_path / "run", batch_size=10)
    lines = [
        {"step": 4, "epoch": 1, "images_per_s": 20.0, "upkeep_s": 3.0},
        {"step": 6, "epoch": 2, "images_per_s": 5.0},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert took_s(read_run(path, "run")) == 4 * 10 / 20 + 3 + 2 * 10 / 5  # the second line is of an older version

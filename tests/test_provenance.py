from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_data_index import touch

from fcmae.data.index import Images
from fcmae.provenance import Seen, learnt_without_labels, run_of, seen_by


def test_a_model_is_of_the_run_that_made_it_and_of_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/config.yaml", "a/best/model.safetensors", "a/checkpoints/step-1/model.safetensors", "b/x")
    touch(tmp_path, "a/b-timm/model.safetensors")
    run = tmp_path / "a"
    for inside in (".", "best", "best/model.safetensors", "checkpoints/step-1", "checkpoints/step-1/model.safetensors"):
        assert run_of(run / inside) == run
    assert run_of(run / "b-timm") is None
    monkeypatch.chdir(run)
    assert run_of(Path("../b")) is None and run_of(Path("best")) == run and run_of(Path("convnext_atto")) is None


def test_labels_that_a_model_began_with_are_among_those_that_it_has_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {name: touch(tmp_path, f"images/{name}.jpg") for name in "abcp"}

    def run(name: str, kind: str, init: str | None, *, labels: bool = True, day: int = 1) -> Path:
        place = tmp_path / name
        touch(place, "last/model.safetensors")
        (place / "config.yaml").write_text(f"# fcmae {kind} 0.1.0\nmodel:\n  init: {init or 'null'}\n")
        starts = [{"directory": str(tmp_path), "time": f"2026-01-0{day}T00:00:00+00:00"}]
        (place / "environment.json").write_text(json.dumps(starts))
        Images.of_files(images[name], *(([0], ["x"]) if labels else ())).save(place / "files.json")
        return place

    run("a", "finetune", None)
    run("b", "segment", "a")
    run("c", "finetune", str(tmp_path / "b" / "last"))
    run("p", "pretrain", "c", labels=False)
    monkeypatch.chdir("/")
    every = sorted([*images["c"], *images["b"], *images["a"]])
    shown = Images.of_files([*every, *images["p"]])
    assert sorted(seen_by(tmp_path / "c").labels_of(shown)) == every
    seen = seen_by(tmp_path / "p" / "last")
    assert (
        sorted(seen.labels_of(shown)) == every and learnt_without_labels(tmp_path / "p" / "last").names() == images["p"]
    )
    run("a", "finetune", "c")  # which cannot be, and ends nevertheless
    assert sorted(seen_by(tmp_path / "b").labels_of(shown)) == every
    run("a", "finetune", None, day=2)  # trained anew, after b began with what was there
    assert sorted(seen_by(tmp_path / "c").labels_of(shown)) == sorted([*images["c"], *images["b"]])
    (tmp_path / "b" / "environment.json").unlink()
    run("a", "finetune", None)
    (tmp_path / "b" / "config.yaml").write_text(f"# fcmae finetune 0.1.0\nmodel:\n  init: {tmp_path / 'a'}\n")
    assert sorted(seen_by(tmp_path / "c").labels_of(shown)) == every  # as it is not known when b began
    (tmp_path / "b" / "config.yaml").write_bytes(b"# \xe9\n[")  # another program's
    (tmp_path / "b" / "environment.json").write_text("[" * 100_000)
    assert sorted(seen_by(tmp_path / "c").labels_of(shown)) == sorted([*images["c"], *images["b"]])
    run("c", "finetune", "p")  # of a pretraining that was begun with only labels count
    seen = seen_by(tmp_path / "c")
    assert seen.labels_of(shown) == images["c"] and len(learnt_without_labels(tmp_path / "c")) == 0


def test_a_model_beside_a_copied_config_is_of_the_run_that_it_names(tmp_path: Path) -> None:
    names = touch(tmp_path, "images/a.jpg")
    touch(tmp_path, "run/config.yaml", "shared/config.yaml")
    Images.of_files(names, [0], ["x"]).save(tmp_path / "run" / "files.json")
    record = json.dumps({"origin": {"run": str(tmp_path / "run"), "step": 1}})
    save_file({"x": torch.zeros(1)}, tmp_path / "shared" / "model.safetensors", {"fcmae": record})
    assert seen_by(tmp_path / "shared").labels_of(Images.of_files(names)) == names


def test_images_are_seen_with_labels_or_without_or_not_known(tmp_path: Path) -> None:
    touch(tmp_path, "run/config.yaml", "run/last/model.safetensors", "elsewhere/model.safetensors")
    run, names = tmp_path / "run", touch(tmp_path, "images/a.jpg", "images/b.jpg")
    assert seen_by(run) == Seen()
    Images.of_files(names).save(run / "files.json")
    for model in (run, run / "last", run / "last" / "model.safetensors"):
        seen = seen_by(model)
        assert learnt_without_labels(model).names() == names and not seen.labelled and len(seen.chose) == 0
    touch(run, "maps.json")
    seen = seen_by(run / "last")
    assert (
        seen.labels_of(Images.of_files(names)) == names
        and len(learnt_without_labels(run / "last")) == len(seen.chose) == 0
    )
    (run / "maps.json").unlink()
    Images.of_files(names, [0, 1], ["x", "y"]).save(run / "files.json")
    seen = seen_by(run / "last")
    assert (
        seen.labels_of(Images.of_files(names)) == names
        and len(learnt_without_labels(run / "last")) == len(seen.chose) == 0
    )
    for model in (tmp_path / "elsewhere", tmp_path / "nothing", "convnextv2_atto"):
        assert seen_by(model) == Seen()

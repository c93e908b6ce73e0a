from __future__ import annotations

from pathlib import Path

import pytest
from test_data_index import touch

from fcmae.data.index import Images
from fcmae.provenance import run_of, seen_by


def test_a_model_is_of_the_run_that_made_it_and_of_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/config.yaml", "a/best/model.safetensors", "a/checkpoints/step-1/model.safetensors", "b/x")
    touch(tmp_path, "a/b-timm/model.safetensors")
    run = tmp_path / "a"
    for inside in (".", "best", "best/model.safetensors", "checkpoints/step-1", "checkpoints/step-1/model.safetensors"):
        assert run_of(run / inside) == run
    assert run_of(run / "b-timm") is None
    monkeypatch.chdir(run)
    assert run_of(Path("../b")) is None and run_of(Path("best")) == run and run_of(Path("convnext_atto")) is None


def test_images_are_seen_with_labels_or_without_or_not_known(tmp_path: Path) -> None:
    touch(tmp_path, "run/config.yaml", "run/last/model.safetensors", "elsewhere/model.safetensors")
    run, names = tmp_path / "run", touch(tmp_path, "images/a.jpg", "images/b.jpg")
    assert [len(images) for images in seen_by(run)] == [0, 0, 0]
    Images.of_files(names).save(run / "files.json")
    for model in (run, run / "last", run / "last" / "model.safetensors"):
        seen = seen_by(model)
        assert seen.unlabelled.names() == names and len(seen.labelled) == len(seen.chose) == 0
    touch(run, "maps.json")
    seen = seen_by(run / "last")
    assert seen.labelled.names() == names and len(seen.unlabelled) == len(seen.chose) == 0
    (run / "maps.json").unlink()
    Images.of_files(names, [0, 1], ["x", "y"]).save(run / "files.json")
    seen = seen_by(run / "last")
    assert seen.labelled.names() == names and len(seen.unlabelled) == len(seen.chose) == 0
    for model in (tmp_path / "elsewhere", tmp_path / "nothing", "convnextv2_atto"):
        assert [len(images) for images in seen_by(model)] == [0, 0, 0]

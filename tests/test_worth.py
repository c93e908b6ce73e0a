"""Should I pretrain: what is drawn, chosen and run, that it goes on where it was stopped, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import forget_accelerator, kill_self
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fcmae.training.steps
from fcmae import choices, cli, planning, worth
from fcmae.config import FinetuneConfig, PretrainConfig
from fcmae.data.find import find_labelled
from fcmae.data.index import Images
from fcmae.evaluation import evaluate, paired, probes
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import ConvNeXtSpec
from fcmae.options import read
from fcmae.training.records import read_metrics, record_end, record_start
from fcmae.weights.files import read_weights
from fcmae.worth import Job

SPEC = ConvNeXtSpec(depths=(1, 1), dims=(8, 16), stem_stride=2)
CONVNEXT = ConvNeXtSpec(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10))
TUNING = """\
epochs: 1
batch_size: 4
data: {image_size: 16, auto_augment: none, random_erasing: 0}
optim: {base_lr: 0.05, layer_decay: 0.8}
"""
PRETRAINING = """\
epochs: 2
batch_size: 8
data: {image_size: 16}
model: {variant: {depths: [1, 1], dims: [8, 16]}, stem_stride: 2, mask_patch: 8, decoder_dim: 8}
optim: {warmup_epochs: 0.5}
monitor: {num_images: 0}
log: {trackers: none}
"""
TINY = ["--labels", "50%", "--controls", "pixels:2", "--device", "cpu", "--num_workers", "0"]
WORDS = ["worth", "labelled", "--pretraining", "pre.yaml", "--finetuning", "tune.yaml", "--seeds", "2", *TINY]
OUT = Path("runs/labelled-worth")


pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear classifiers are hardly trained."""
    monkeypatch.setattr(probes, "MIN_STEPS", 20)


def test_the_time_that_is_told_is_that_of_the_runs_that_are_left(tmp_path: Path) -> None:
    jobs = [Job(tmp_path / "runs/pretrained", "pretrained", None, 0, 5400.0)]
    jobs += [Job(tmp_path / f"runs/scratch-10pct-{seed}", "scratch", "10%", seed, 200.0) for seed in range(3)]
    jobs += [Job(tmp_path / f"runs/scratch-100pct-{seed}", "scratch", "100%", seed, 20.0) for seed in range(3)]
    done = tmp_path / "runs" / "scratch-10pct-0"
    done.mkdir(parents=True)
    record_start(done, cpu=True)
    (done / "train.log").touch()
    record_end(done, "finished")
    plan: Any = {"amounts": [{"labels": "10%", "epochs": 60.0}, {"labels": "100%", "epochs": 8.5}]}
    assert not jobs[1].is_done  # whose score the disk has lost
    (done / "metrics.jsonl").write_text(json.dumps({"step": 9, "epoch": 60.0, "top1": 0.5}) + "\n")
    assert jobs[1].is_done
    rows = [line.split() for line in worth._estimate(plan, jobs, tmp_path).splitlines()]
    told = [[cell for cell in row if cell != "|"] for row in rows]
    assert ["pretrained", "pretraining", "1", "1.5", "h"] in told
    assert ["scratch", "10%", "3", "60", "10", "min"] in told and ["scratch", "100%", "3", "8.5", "1", "min"] in told
    assert "6 of 7 runs are to be done, about 1.6 h, and the controls" in " ".join(rows[-1])
    # Of one that was stopped what it has done does not count.
    begun = tmp_path / "runs" / "pretrained"
    begun.mkdir()
    (begun / "config.yaml").write_text("epochs: 8\ndata: {path: [photos]}\nout: there\n")
    (begun / "metrics.jsonl").write_text(json.dumps({"step": 60, "epoch": 6.0, "loss": 1.0}) + "\n")
    assert jobs[0].seconds_left == 5400 / 4
    assert "about 30 min, and the controls" in worth._estimate(plan, jobs, tmp_path)


def write_folder(folder: Path) -> Path:
    """Labelled noise of 16 pixels, ten images of each of two classes, and files of settings; the current directory."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "labelled" / name).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 200 + 50 * (name == "dog"), (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "labelled" / name / f"{i}.png")
    (folder / "tune.yaml").write_text(TUNING)
    (folder / "pre.yaml").write_text(PRETRAINING)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(write_folder(tmp_path))
    return tmp_path


def run(*words: str) -> int:
    try:
        return cli.main(list(words))
    finally:
        forget_accelerator()


def write_init(path: Path) -> Path:
    torch.manual_seed(1)
    save_file({f"encoder.{name}": value for name, value in Encoder(SPEC, 3).state_dict().items()}, path)
    return path


def images(num: int = 20) -> Images:
    return Images.of_files([f"/{i:02}.png" for i in range(num)], [i % 2 for i in range(num)], ["a", "b"])


# What is drawn and chosen


def test_labels_are_drawn_by_seed_as_many_of_each_class_and_come_back_from_their_file(tmp_path: Path) -> None:
    found = [worth.drawn(images(), "3", seed) for seed in (0, 0, 1)]
    assert found[0].tolist() == found[1].tolist() != found[2].tolist()
    subset = images().subset(found[0])
    assert subset.labels is not None and np.bincount(subset.labels).tolist() == [3, 3]
    worth.write_labels(tmp_path / "new" / "3-0.csv", subset)
    assert find_labelled(str(tmp_path / "new" / "3-0.csv")).fingerprint() == subset.fingerprint()
    assert len(worth.drawn(images(), "100%", 5)) == 20


def stopping_at(monkeypatch: pytest.MonkeyPatch, calls: set[int], action: Callable[[], None]) -> None:
    """Have `action` called at the beginning of some steps, counted over all runs."""
    seed_step, count = fcmae.training.steps.seed_step, 0

    def counted(*args: Any) -> None:
        nonlocal count
        count += 1
        seed_step(*args)
        if count in calls:
            action()

    monkeypatch.setattr(fcmae.training.steps, "seed_step", counted)


def test_a_run_that_breaks_down_has_no_score_and_the_others_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_down() -> None:
        raise FloatingPointError("the loss is nan")

    stopping_at(monkeypatch, {5}, break_down)  # in the second run of fine-tuning
    for tried, num_done in ((1, 4), (2, 5)):
        assert run(*WORDS) == 0
        said, found = capsys.readouterr().out, json.loads((OUT / "worth.json").read_text())
        assert found["num_done"] == num_done
        scored = {(score["arm"], score["seed"]) for score in found["scores"]}
        is_there = tried == 2
        assert (("pretrained", 0) in scored) == is_there and ("pretrained", 1) in scored
        assert ("pretrained-50pct-0 has no score: " in said) == (not is_there)
        told = [note for note in found["notes"] if "pretrained-50pct-0 failed and has no score: see " in note]
        assert bool(told) == (not is_there)


def test_what_was_stopped_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name, calls in (("whole", set()), ("stopped", {1, 4, 5})):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(write_folder(tmp_path / name))
        with monkeypatch.context() as patch:
            stopping_at(patch, calls, kill_self(signal.SIGTERM))
            statuses = [run(*WORDS) for _ in range(len(calls) + 1)]
        assert statuses == [143] * len(calls) + [0]
        found[name] = json.loads((OUT / "worth.json").read_text())
        assert found[name].pop("directory") == str(Path.cwd())
    assert found["whole"] == found["stopped"]
    assert "stopped by SIGTERM: the same command goes on" in capsys.readouterr().out
    whole = found["whole"]
    assert (whole["num_done"], whole["num_runs"], whole["num_train"], whole["num_test"]) == (5, 5, 16, 4)
    assert {(s["arm"], s["seed"]) for s in whole["scores"]} == {
        (arm, seed) for arm in ("pixels:2", "scratch", "pretrained") for seed in (0, 1)
    }
    # The runs are ordinary ones: paired by labels, order and head, and fair to scratch.
    for seed in (0, 1):
        started, scratch = (read(FinetuneConfig, OUT / f"runs/{arm}-50pct-{seed}/config.yaml") for arm in
                            ("pretrained", "scratch"))  # fmt: skip
        assert started.data == scratch.data and started.seed == scratch.seed == seed
        assert started.data.path == str(OUT / f"labels/50pct-{seed}.csv")
        assert (started.epochs, started.optim.base_lr, started.optim.layer_decay) == (1, 0.05, 0.8)
        assert scratch.optim == started.optim.model_copy(update={"layer_decay": 1.0})
        assert started.model.spec == scratch.model.spec == SPEC
        assert (started.model.init, scratch.model.init) == (str(OUT / "runs/pretrained"), None)
        run_dir = OUT / f"runs/scratch-50pct-{seed}"
        assert not list(run_dir.rglob("*.safetensors")) and (run_dir / "last" / "predictions.csv").is_file()
        # The test images are looked at once, at the end.
        assert sum("top1" in line for line in read_metrics(run_dir / "metrics.jsonl")) == 1
    labels = [(OUT / f"labels/50pct-{seed}.csv").read_text() for seed in (0, 1)]
    assert labels[0] != labels[1]
    tested = set(find_labelled(str(OUT / "labels/test.csv")).names())
    assert not tested & set((OUT / "labels/unlabelled.txt").read_text().splitlines())
    assert not tested & {line.rpartition(",")[0] for text in labels for line in text.splitlines()}
    assert read(PretrainConfig, OUT / "runs/pretrained/config.yaml").epochs == 2
    # More seeds are added to what is there.
    before = (OUT / "runs/scratch-50pct-0/train.log").read_text()
    words = ["3" if word == "2" else word for word in WORDS]
    assert run(*words) == 0 and (OUT / "runs/scratch-50pct-0/train.log").read_text() == before
    assert "7 of 7 runs; " in capsys.readouterr().out
    assert len(json.loads((OUT / "worth.json").read_text())["scores"]) == 9
    assert run(*words, "--test_share", "0.3") == 2
    assert "holds a comparison with other settings (test_share)" in capsys.readouterr().err
    # It is one line among the runs, and a chapter of a report.
    for words in (["status"], ["status", "labelled-worth"], ["report", "labelled-worth"]):
        assert run(*words) == 0
    told = capsys.readouterr().out
    assert "7 of 7 runs" in told and "scratch-50pct-0" not in told and "7 of 7 runs are done" in told
    page = (OUT / "report.html").read_text()
    assert "labelled-worth (is pretraining worth it?)" in page and "labelled-worth/pretrained (pretraining)" in page
    Path("labelled/cat/0.png").unlink()
    assert run(*WORDS) == 2
    assert "holds a comparison on other images than labelled has now" in capsys.readouterr().err


def test_weights_are_a_start_beside_scratch_of_their_own_network_and_their_licence_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = timm.create_model("convnext_atto", num_classes=0)
    timm.models.save_for_hf(network, folder / "dino", safe_serialization=True)
    config = json.loads((folder / "dino" / "config.json").read_text())
    config["pretrained_cfg"] |= {"license": "dinov3-license", "input_size": [3, 32, 32]}
    (folder / "dino" / "config.json").write_text(json.dumps(config))
    write_init(folder / "own.safetensors")
    (folder / "tune.yaml").write_text(TUNING.replace("image_size: 16, ", ""))
    words = ["worth", "labelled", "--init", "dino", "own.safetensors", "--finetuning", "tune.yaml", *TINY]
    assert run(*words, "--seeds", "1", "--image_size", "32") == 0
    found = paired.read(OUT, [])
    assert found is not None
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert list(arms) == ["pixels:2", "scratch", "scratch-2", "dino", "own.safetensors"]
    assert (arms["dino"]["license"], arms["dino"]["against"]) == ("dinov3-license", "scratch")
    assert (arms["own.safetensors"]["license"], arms["own.safetensors"]["against"]) == (None, "scratch-2")
    tuned = read(FinetuneConfig, OUT / "runs/dino-50pct-0/config.yaml")
    assert tuned.model.license == "dinov3-license" and tuned.data.image_size == (32, 32)
    assert read(FinetuneConfig, OUT / "runs/scratch-50pct-0/config.yaml").model.license is None
    said = capsys.readouterr().out
    assert "The weights of dino have the licence dinov3-license." in said
    assert "The class with the fewest test images has 2: one of them is 25.0 points." in said
    assert found["num_tested"] == 2


def test_without_files_of_settings_they_are_chosen_as_for_a_run_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = load_file(write_init(folder / "own.safetensors"))
    two = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in own.items()}
    torch.save({"model": own, "model_ema": two}, folder / "two.pth")
    words = ["worth", "labelled", "--init", "two.pth", *TINY, "--seeds", "1", "--epochs", "2"]
    assert run(*words, "--out", "elsewhere", "--key", "model_ema", "--prefix", "student") == 0
    started, scratch = (read(FinetuneConfig, Path(f"elsewhere/runs/{arm}-50pct-0/config.yaml")) for arm in
                        ("two.pth", "scratch"))  # fmt: skip
    assert (started.model.key, started.model.prefix) == ("model_ema", "student")
    assert (scratch.model.key, scratch.model.prefix) == (None, None)
    assert (started.optim.layer_decay, scratch.optim.layer_decay) == (choices.LAYER_DECAY, 1.0)
    assert started.epochs == scratch.epochs == 2 and "data.crop_scale" in started.chosen
    assert "3 of 3" not in capsys.readouterr().out


def test_what_a_file_that_is_no_recipe_leaves_out_is_chosen(folder: Path) -> None:
    write_init(folder / "own.safetensors")
    (folder / "mine.yaml").write_text("data: {hflip: 0}\n")
    words = ["worth", "labelled", "--init", "own.safetensors", *TINY, "--seeds", "1", "--finetuning", "mine.yaml"]
    assert run(*words, "--epochs", "2", "--out", "elsewhere") == 0
    started = read(FinetuneConfig, Path("elsewhere/runs/own.safetensors-50pct-0/config.yaml"))
    assert (started.data.hflip, started.optim.layer_decay) == (0, choices.LAYER_DECAY)
    assert started.optim.base_lr != FinetuneConfig.model_fields["optim"].get_default(call_default_factory=True).base_lr
    assert "optim.base_lr" in started.chosen and "data.hflip" not in started.chosen


def test_what_needs_no_network_is_computed_of_the_labels_that_are_learnt_from_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract, counts = worth.extract, list[int]()

    def counted(backbone: Any, images: Images, *rest: Any, **more: Any) -> Any:
        counts.append(len(images))
        return extract(backbone, images, *rest, **more)

    monkeypatch.setattr(worth, "extract", counted)
    write_init(folder / "own.safetensors")
    words = ["worth", "labelled", "--init", "own.safetensors", "--finetuning", "tune.yaml", *TINY[2:], "--seeds", "2"]
    found = {}
    for amounts in ("2", "2,100%"):
        assert run(*words, "--labels", amounts, "--out", amounts) == 0
        scores = json.loads((Path(amounts) / "worth.json").read_text())["scores"]
        found[amounts] = [score for score in scores if (score["arm"], score["labels"]) == ("pixels:2", "2")]
    assert found["2"] == found["2,100%"] and len(found["2"]) == 2  # by whatever way they were found
    drawn = {line for seed in (0, 1) for line in Path(f"2/labels/2-{seed}.csv").read_text().splitlines()[1:]}
    assert counts == [len(drawn), 4, 16, 4] and len(drawn) < 16


# What is refused


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "hours: missing: what is to be compared with scratch: --hours H of pretraining, or --init WEIGHTS"),
        (["photos", "--init", "own.safetensors"], "unlabelled: they are for a pretraining: give --hours H"),
        (["--init", "nowhere"], "init = nowhere does not exist"),
        (["--init", "own.safetensors", "own.safetensors"], "init = own.safetensors is given twice"),
        (["--init", "own.safetensors", "--labels", "many"], "labels: 'many' is neither a share such as 1%"),
        (["--init", "own.safetensors", "--controls", "colours"], "model = 'colours': give a number from 1 to 256"),
        (["--init", "own.safetensors", "--finetuning", "none.yaml"], "none.yaml; no such file"),
        (
            ["--init", "own.safetensors", "--out", "labelled/w"],
            "out = labelled/w lies in data = labelled, where images",
        ),
        (
            ["**/*.png", "--hours", "1", "--out", "labelled/../w"],
            "out = labelled/../w lies in unlabelled = ., where images",
        ),
        (["--init", "own.safetensors", "--out", "given"], "out = given is not empty and holds no comparison"),
        (["--init", "labelled/cat/0.png"], "0.png"),
        (["--init", "labelled", "--key", "model_ema"], "key, prefix: they name what is inside a file"),
        (["photos", "--hours", "1", "--key", "model_ema"], "key: it tells of the files that init names: give --init"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_sentence(
    folder: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_init(folder / "own.safetensors")
    (folder / "given" / "mine").mkdir(parents=True)
    assert run("worth", "labelled", *words) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and sentence in errors[0]
    assert not (OUT / "worth.json").exists()


def test_a_launcher_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(*WORDS) == 2
    assert "worth is one process, and WORLD_SIZE = 2: start it without a launcher" in capsys.readouterr().err


# Licences


def test_a_licence_stays_with_what_transformers_saves_again(tmp_path: Path) -> None:
    state = {f"encoder.{name}": value for name, value in Encoder(CONVNEXT, 3).state_dict().items()}
    save_file(state, tmp_path / "theirs.safetensors", {"license": "cc-by-nc-4.0"})
    assert run("convert", str(tmp_path / "theirs.safetensors"), str(tmp_path / "hf"), "--to", "transformers") == 0
    again = load_file(tmp_path / "hf" / "model.safetensors")
    save_file(again, tmp_path / "hf" / "model.safetensors")  # without our record, and with what config.json has
    assert read_weights(tmp_path / "hf").license == "cc-by-nc-4.0"


@pytest.mark.parametrize("source", ["config", "tag", "card", "header", "name", "none"])
def test_weights_say_their_licence_where_others_write_it(tmp_path: Path, source: str) -> None:
    network = timm.create_model("convnext_atto", num_classes=0)
    path = tmp_path / "weights"
    if source in ("header", "name"):
        path = tmp_path / ("x.safetensors" if source == "header" else "convnextv2_atto_1k_224_fcmae.pt")
        if source == "header":
            save_file(network.state_dict(), path, {"license": "cc-by-nc-4.0"})
        else:
            torch.save({"model": network.state_dict()}, path)
    else:
        timm.models.save_for_hf(network, path, safe_serialization=True)
        config = json.loads((path / "config.json").read_text())
        for key in ("license", "tag"):
            config["pretrained_cfg"].pop(key, None)
        if source == "config":
            config["pretrained_cfg"]["license"] = "cc-by-nc-4.0"
        elif source == "tag":
            config |= {"architecture": "convnextv2_atto"}
            config["pretrained_cfg"]["tag"] = "fcmae"
            network = timm.create_model("convnextv2_atto", num_classes=0)
            save_file(network.state_dict(), path / "model.safetensors")
        elif source == "card":
            (path / "README.md").write_text("---\nlicense: other\nlicense_name: cc-by-nc-4.0\n---\n# license: mine\n")
        (path / "config.json").write_text(json.dumps(config))
    assert read_weights(path).license == (None if source == "none" else "cc-by-nc-4.0")


def test_a_licence_goes_with_runs_their_resumes_exports_and_report(folder: Path) -> None:
    state = {f"encoder.{name}": value for name, value in Encoder(SPEC, 3).state_dict().items()}
    save_file(state, folder / "theirs.safetensors", {"license": "cc-by-nc-4.0"})
    words = ["pretrain", "labelled", "--config", "pre.yaml", "--init", "theirs.safetensors", "--out", "first"]
    words += ["--device", "cpu", "--data.num_workers", "0"]
    assert run(*words) == 0
    assert read(PretrainConfig, Path("first/config.yaml")).model.license == "cc-by-nc-4.0"
    # A run that goes on knows it too, whether or not the file is still there.
    Path("theirs.safetensors").unlink()
    assert run(*words) == 0
    assert read(PretrainConfig, Path("first/config.yaml")).model.license == "cc-by-nc-4.0"
    words = ["finetune", "labelled", "--config", "tune.yaml", "--init", "first", "--out", "tuned", *words[-4:]]
    assert run(*words, "--log.trackers", "none") == 0
    exported = json.loads(Path("tuned/best/config.json").read_text())
    assert exported["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
    for to, name in (("transformers", "hub"), ("fcmae", "own.safetensors"), ("fair", "fair.pth")):
        assert run("convert", "tuned", name, "--to", to) == 0
        assert read_weights(Path(name)).license == "cc-by-nc-4.0"
    assert json.loads(Path("hub/config.json").read_text())["license"] == "cc-by-nc-4.0"
    with safe_open("own.safetensors", framework="pt") as file:
        assert file.metadata()["license"] == "cc-by-nc-4.0"
    assert run("report", "tuned") == 0
    assert "cc-by-nc-4.0, of the starting weights" in Path("tuned/report.html").read_text()
    # What the user says goes before what files say.
    assert run(*words[:-6], "--out", "mine", *words[-4:], "--log.trackers", "none", "--model.license", "mit") == 0
    assert read_weights(Path("mine")).license == "mit"


def test_a_name_that_is_no_unicode_is_told_of_before_anything_is_compared(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_init(folder / "own.safetensors")
    some = next((folder / "labelled").glob("*/*.png"))
    some.rename(some.parent / os.fsdecode(b"\xff.png"))
    assert run("worth", "labelled", "--init", "own.safetensors") == 2
    assert r"\udcff.png has a name that is no UTF-8" in capsys.readouterr().err


OTHER_PLAN = '{"settings": {}, "images": "", "arms": [{}], "amounts": [], "counts": {}, "seconds": {}}'


@pytest.mark.parametrize("content", ["{}", "{", "[]", OTHER_PLAN])
def test_a_damaged_plan_is_named(folder: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_init(folder / "own.safetensors")
    OUT.mkdir(parents=True)
    (OUT / "plan.json").write_text(content)
    assert run("worth", "labelled", "--init", "own.safetensors") == 2
    assert f"{OUT / 'plan.json'} is damaged, or of another version" in capsys.readouterr().err


def test_seeds_are_not_added_on_other_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_init(folder / "own.safetensors")
    words = ["worth", "labelled", "--init", "own.safetensors", "--finetuning", "tune.yaml", *TINY, "--seeds"]
    assert run(*words, "1") == 0
    state = load_file(folder / "own.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, folder / "own.safetensors")
    assert run(*words, "2") == 2
    assert "own.safetensors has other weights than when the comparison in" in capsys.readouterr().err


def test_weights_that_change_meanwhile_are_not_compared_as_one_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, finetune = load_file(write_init(folder / "own.safetensors")), worth.finetune

    def then_changed(cfg: FinetuneConfig) -> Any:
        made = finetune(cfg)
        save_file({name: value + 1 for name, value in state.items()}, folder / "own.safetensors")
        return made

    monkeypatch.setattr(worth, "finetune", then_changed)
    words = ["worth", "labelled", "--init", "own.safetensors", "--finetuning", "tune.yaml", *TINY, "--seeds", "1"]
    assert run(*words) == 2
    assert "and of a run that goes on a checkpoint" in capsys.readouterr().err
    assert [path.name for path in (OUT / "runs").iterdir()] == ["scratch-50pct-0"]


@pytest.mark.parametrize(
    ("what", "labelled", "status", "said"),
    [
        ("all", True, 2, "init = seen has learnt from 4 of the 4 test images with their labels: give weights that"),
        ("train", True, 0, "seen has learnt from 16 of the labels already, however few a row of the table says."),
        ("all", False, 0, "4 of the test images are among those of the pretraining of seen, without labels."),
    ],
)
def test_what_given_weights_have_seen_is_told(
    what: str, labelled: bool, status: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_init(folder / "own.safetensors")
    (folder / "seen").mkdir()
    assert run("convert", "own.safetensors", "seen/best") == 0
    (folder / "seen" / "config.yaml").write_text("# fcmae finetune\n")
    train, _ = evaluate.find_data("labelled", None, 0.2, 0)
    listed = train if what == "train" else find_labelled("labelled")
    (listed if labelled else Images.of_files(listed.names())).save(folder / "seen" / "files.json")
    words = ["worth", "labelled", "--init", "seen", "--finetuning", "tune.yaml", *TINY, "--seeds", "1"]
    assert run(*words) == status
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_test_images_that_chose_the_best_weights_are_told_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_init(folder / "own.safetensors")
    assert run("convert", "own.safetensors", "seen/best") == 0
    (folder / "seen" / "config.yaml").write_text("# fcmae finetune\n")
    train, held_out = evaluate.find_data("labelled", None, 0.2, 0)
    train.save(folder / "seen" / "files.json")
    held_out.save(folder / "seen" / "val_files.json")
    lines = [json.dumps({"step": step, "epoch": 1.0 * step, "balanced_accuracy": 0.5}) for step in (1, 2)]
    (folder / "seen" / "metrics.jsonl").write_text("\n".join(lines))
    words = ["worth", "labelled", "--init", "seen", "--finetuning", "tune.yaml", *TINY, "--seeds", "1"]
    assert run(*words) == 0
    said = capsys.readouterr().out
    assert f"{len(held_out)} of the test images chose the weights of seen: its scores are too high" in said
    assert "Each start is of one pretraining: intervals are over draws of labels and fine-tuning." in said


def test_a_control_that_images_are_too_small_for_is_told_before_the_plan(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_init(folder / "own.safetensors")
    words = ["worth", "labelled", "--init", "own.safetensors", "--finetuning", "tune.yaml", "--seeds", "1", *TINY]
    assert run(*words, "--controls", "pixels:64") == 2
    assert (
        "they have fewer than 64 pixels a side): give another image size, or a smaller number"
        in capsys.readouterr().err
    )
    assert run(*words) == 0  # the same place: nothing was planned


def test_seeds_are_not_added_by_other_recipes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_init(folder / "own.safetensors")
    words = ["worth", "labelled", "--init", "own.safetensors", "--finetuning", "tune.yaml", *TINY, "--seeds"]
    assert run(*words, "1") == 0
    recipe = folder / "tune.yaml"
    recipe.write_text("# the same\n" + recipe.read_text())
    assert run(*words, "2") == 0
    recipe.write_text(recipe.read_text() + "\nseed: 3\n")
    assert run(*words, "3") == 2
    assert "finetuning = tune.yaml has other settings than when the comparison in" in capsys.readouterr().err


def test_lists_of_the_user_are_never_written_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_init(folder / "own.safetensors")
    mine = Path("study/labels/train.csv")
    mine.parent.mkdir(parents=True)
    rows = [f"../../labelled/{name}/{i}.png,{name},mine" for name in ("cat", "dog") for i in range(10)]
    mine.write_text("\n".join(["path,label,note", *rows]) + "\n")
    before = mine.read_text()
    words = ["worth", str(mine), "--init", "own.safetensors", "--finetuning", "tune.yaml", *TINY, "--out", "study"]
    assert run(*words) == 2 and mine.read_text() == before
    assert "out = study is not empty and holds no comparison" in capsys.readouterr().err


def test_a_comparison_that_was_stopped_before_it_was_planned_is_planned_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_init(folder / "own.safetensors")
    words = ["worth", "labelled", "--init", "own.safetensors", "--finetuning", "tune.yaml", *TINY, "--seeds", "1"]

    def stop(cfg: Any) -> float:
        (OUT / "runs" / "scratch" / "index").mkdir(parents=True)  # as shards are indexed
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(planning, "images_per_s", stop)
        assert run(*words) == 130
    assert not (OUT / "worth.json").exists()
    assert run(*words) == 0 and (OUT / "worth.json").is_file()


def test_images_that_have_moved_are_told_of_before_anything_is_trained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_init(folder / "own.safetensors")
    words = ["worth", "labelled", "--init", "own.safetensors", "--finetuning", "tune.yaml", *TINY, "--seeds"]
    assert run(*words, "1") == 0
    moved = folder.with_name("moved")
    folder.rename(moved)
    monkeypatch.chdir(moved)
    assert run(*words, "2") == 2
    assert "holds a comparison on images that lay elsewhere: move them back" in capsys.readouterr().err
    moved.rename(folder)


def test_fewer_labels_than_a_batch_are_a_batch_that_can_be_mixed_and_divided(folder: Path) -> None:
    write_init(folder / "own.safetensors")
    (folder / "tune.yaml").write_text(
        TUNING.replace("batch_size: 4", "batch_size: 64") + "regularization: {mixup: 0.8}\n"
    )
    words = ["worth", "labelled", "--init", "own.safetensors", "--finetuning", "tune.yaml", *TINY[2:], "--seeds", "1"]
    assert run(*words, "--labels", "70%") == 0  # 11 of 16 labels
    made = read(FinetuneConfig, OUT / "settings" / "scratch-70pct.yaml")
    assert made.batch_size == 8
    # As many files may be bad as of all 20.
    assert made.data.max_bad_share == pytest.approx(0.01 * 20 / (12 + 4))


def test_a_comparison_that_was_moved_goes_on_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stopping_at(patch, {1}, kill_self(signal.SIGTERM))
        assert run(*WORDS) == 143
    (folder / "runs").rename(folder / "elsewhere")
    place = Path("elsewhere/labelled-worth")
    begun = len((place / "runs/pretrained/train.log").read_text())
    with monkeypatch.context() as patch:
        stopping_at(patch, {4}, kill_self(signal.SIGTERM))  # of what is pretrained
        assert run(*WORDS, "--out", str(place)) == 143
    assert len((place / "runs/pretrained/train.log").read_text()) > begun
    assert (place / "runs/pretrained-50pct-0/checkpoints").exists()
    place = place.rename("third")
    (place / "runs/pretrained-50pct-1").mkdir()  # as of one that had no checkpoint yet
    shutil.copy(place / "runs/pretrained-50pct-0/config.yaml", place / "runs/pretrained-50pct-1")
    assert run(*WORDS, "--out", str(place)) == 0
    found = json.loads((place / "worth.json").read_text())
    assert found["num_done"] == 5 and not (folder / "runs").exists()
    for name in ("pretrained-50pct-1", "scratch-50pct-0"):  # whose last line the disk has lost, after its models
        (place / "runs" / name / "metrics.jsonl").write_text("")
    assert run(*WORDS, "--out", str(place)) == 0
    again = json.loads((place / "worth.json").read_text())
    assert again["num_done"] == 5 and again["scores"] == found["scores"]


def test_baselines_weigh_the_classes_as_the_networks_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_init(folder / "own.safetensors")
    fit_linear, seen = worth.fit_linear, list[Any]()

    def noted(*given: Any, **more: Any) -> Any:
        seen.append(more["class_weights"])
        return fit_linear(*given, **more)

    monkeypatch.setattr(worth, "fit_linear", noted)
    for number in range(5, 10):
        Path(f"labelled/dog/{number}.png").unlink()
    words = ["worth", "labelled", "--init", "own.safetensors", "--finetuning", "tune.yaml", *TINY[2:], "--seeds", "1"]
    weighted = TUNING + "regularization: {class_weights: balanced}\n"
    for number, recipe in enumerate((TUNING, weighted)):
        (folder / "tune.yaml").write_text(recipe)
        assert run(*words, "--labels", "100%", "--out", str(number)) == 0
    assert seen[0] is None and seen[1].tolist() == [0.75, 1.5]  # of 8 cats and 4 dogs to learn from

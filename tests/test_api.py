"""Use from Python: the same runs, checks and sentences as from the command line, one run after another."""

from __future__ import annotations

import copy
import csv
import importlib
import os
import pkgutil
import random
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import timm
import torch
from accelerate import Accelerator
from conftest import randomize
from PIL import Image
from runs import TINY, assert_same, config, final_state, write_images
from test_weights_convert import write_checkpoint

import fcmae
from fcmae import api, cli, finetuning, masked, planning, pretraining, segmenting, starting
from fcmae.api import Classified, Features
from fcmae.config import FinetuneConfig, PretrainConfig
from fcmae.data.augment import Reading, seeded
from fcmae.heads import Classifier
from fcmae.layouts import Masked
from fcmae.masked import build_fcmae, patchify
from fcmae.networks.convnext import Encoder
from fcmae.networks.layers import Block
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec
from fcmae.options import read
from fcmae.training.run import Run
from fcmae.weights.files import read_weights

pytestmark = pytest.mark.usefixtures("one_thread", "forgotten", "undrawn")
TINY_NUMBERS = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}
SPEC = ConvNeXtSpec(depths=(1, 1, 2, 1), dims=(8, 8, 16, 16))
SMALL: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 4,
    "device": "cpu",
    "data": {"image_size": 64, "num_workers": 0},
    "log.trackers": [],
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos"), 9)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labelled")
    for seed, name in enumerate(("cat", "dog")):
        write_images(root / name, 4, seed)
    return root


# What `import fcmae` is


def test_import_brings_nothing_heavy_until_it_is_used() -> None:
    code = (
        "import sys; before = set(sys.modules); import fcmae; found = set(sys.modules) - before\n"
        "assert not {'torch', 'numpy', 'pydantic', 'yaml', 'timm', 'fcmae.api'} & found, found\n"
        "assert {'pretrain', 'finetune', 'load', 'export', 'prune', 'masked_loss'} <= set(dir(fcmae))\n"
        "assert callable(fcmae.pretrain) and 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_everything_it_names_is_there_and_nothing_else() -> None:
    for name in fcmae.__all__:
        assert getattr(fcmae, name) is getattr(api, name, fcmae.__version__)
    with pytest.raises(AttributeError, match="module 'fcmae' has no attribute 'train'"):
        fcmae.train  # noqa: B018
    with pytest.raises(ImportError):
        exec("from fcmae import train")
    assert fcmae.masked_loss is masked.masked_loss


def test_no_module_takes_the_place_of_a_function() -> None:
    for module in pkgutil.walk_packages(fcmae.__path__, "fcmae."):
        if module.name.rpartition(".")[2] not in ("minkowski", "triton"):  # of what need not be installed
            importlib.import_module(module.name)
    for name in ("pretrain", "finetune", "load", "export", "prune", "masked_loss"):
        assert callable(getattr(fcmae, name)), name


# A notebook


def test_a_notebook_from_images_to_features(photos: Path, labelled: Path, tmp_path: Path) -> None:
    run = fcmae.pretrain(photos, tmp_path / "pretrained", variant=SPEC, config=runs.DEFAULTS, settings=SMALL)
    assert (run.path, run.kind, run.finished, run.status) == (tmp_path / "pretrained", "pretrain", True, 0)
    assert run.metrics()[-1]["step"] == 2
    # In the same process, in another precision.
    tuned = fcmae.finetune(
        labelled, tmp_path / "tuned", init=run, config=runs.DEFAULTS, settings=SMALL | {"precision": "bf16"}
    )
    assert "in bf16" in (tuned.path / "train.log").read_text()
    assert {"top1", "val_loss"} <= tuned.metrics()[-1].keys()

    model = fcmae.load(tuned)
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    assert model(images).shape == (2, 2, 3, 16)
    mask = torch.tensor([[[False, True, True], [True, False, True]]] * 2)
    assert model(images, mask).shape == (2, 2, 1, 1, 16)
    assert [tuple(f.shape) for f in model.pyramid(images)] == [
        (2, 8, 16, 24),
        (2, 8, 8, 12),
        (2, 16, 4, 6),
        (2, 16, 2, 3),
    ]

    fcmae.export(run, tmp_path / "encoder")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        ours = fcmae.load(tmp_path / "encoder")
        for mine, other in zip(ours.pyramid(images), theirs(ours.normalize(images)), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="exists: give a new path"):
        fcmae.export(run, tmp_path / "encoder")


def test_a_script_of_two_processes_makes_one_run_after_another(photos: Path, tmp_path: Path) -> None:
    lines = [
        "import fcmae",
        f"small, defaults = {SMALL!r}, {str(runs.DEFAULTS)!r}",
        f"first = fcmae.pretrain({str(photos)!r}, 'first', variant={TINY_NUMBERS!r}, config=defaults, settings=small)",
        f"second = fcmae.pretrain({str(photos)!r}, 'second', variant={TINY_NUMBERS!r}, "
        "config=defaults, settings=small | {'model.init': first, 'precision': 'bf16'})",
        "assert first.finished and second.finished",
    ]
    (tmp_path / "script.py").write_text("\n".join(lines))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    done = subprocess.run(
        launch, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 steps of 4 images on 2 x cpu in fp32") == 1
    assert done.stderr.count("2 steps of 4 images on 2 x cpu in bf16") == 1


def test_a_run_from_python_is_that_of_the_command(photos: Path, tmp_path: Path) -> None:
    assert cli.main(["pretrain", *runs.flags(photos, tmp_path / "command")]) == 0
    cfg = config(photos, tmp_path / "elsewhere")
    made = fcmae.pretrain(photos, tmp_path / "python", settings=cfg)
    assert_same(final_state(made.path), final_state(tmp_path / "command"))
    # Each finds what the other has finished.
    assert cli.main(["pretrain", *runs.flags(photos, tmp_path / "python")]) == 0
    again = fcmae.pretrain(str(photos), str(tmp_path / "command"), settings=cfg)
    assert again.finished and "resuming after step 6" in (again.path / "train.log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused on a CPU is not on a GPU")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_leaves_the_caller_s_own_training_as_it_was(
    precision: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    own = Accelerator(cpu=True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    settings = SMALL | {"device": "auto", "precision": precision}
    train = partial(
        fcmae.pretrain, photos, tmp_path / "a", variant=TINY_NUMBERS, config=runs.DEFAULTS, settings=settings
    )
    try:
        if precision == "fp32":
            train()
        else:
            with pytest.raises(ValueError, match="precision = fp16 needs a GPU"):
                train()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert (own.mixed_precision, own.device.type) == ("bf16", "cpu") and own.sync_gradients
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_a_run_leaves_what_the_caller_draws_as_it_was(photos: Path, tmp_path: Path) -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002

    with seeded([3]):
        expected = draws()
    with seeded([3]):
        fcmae.pretrain(photos, tmp_path / "out", settings=config(photos, tmp_path))
        assert draws() == expected


def test_a_run_leaves_the_precisions_that_the_caller_has_set_one_by_one(photos: Path, tmp_path: Path) -> None:
    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv)
    before = [place.fp32_precision for place in places]
    try:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = "tf32", "ieee"
        own = [place.fp32_precision for place in places]
        fcmae.pretrain(photos, tmp_path / "out", settings=config(photos, tmp_path))
        assert [place.fp32_precision for place in places] == own
    finally:
        for place, kept in zip(places, before, strict=True):
            place.fp32_precision = kept


def test_a_run_leaves_torch_s_words_for_tf32_in_agreement(photos: Path, tmp_path: Path) -> None:
    """Where they contradict each other torch raises as it exports a model."""
    before = torch.backends.cudnn.allow_tf32
    for value in (True, False):
        torch.backends.cudnn.allow_tf32 = value
        try:
            fcmae.pretrain(photos, tmp_path / str(value), settings=config(photos, tmp_path))
            assert torch.backends.cudnn.allow_tf32 is value
        finally:
            torch.backends.cudnn.allow_tf32 = before


def test_a_run_outside_the_main_thread_leaves_signals_alone(photos: Path, tmp_path: Path) -> None:
    found: list[Run | BaseException] = []

    def work() -> None:
        try:
            found.append(fcmae.pretrain(photos, tmp_path / "out", settings=config(photos, tmp_path)))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [Run(tmp_path / "out", "pretrain")]


def test_hours_are_refused_beside_a_model_of_one_s_own(photos: Path, tmp_path: Path) -> None:
    net = build_fcmae(Encoder(ConvNeXtSpec(depths=(1, 1), dims=(4, 8), stem_stride=4), 3), 8)
    with pytest.raises(ValueError, match="hours: nothing is chosen for a model of your own: give epochs"):
        fcmae.pretrain(photos, tmp_path / "out", model=net, settings={"hours": 1, "data.image_size": 64})


def test_a_model_of_one_s_own_is_trained_with_default_settings(photos: Path, tmp_path: Path) -> None:
    net = build_fcmae(Encoder(ConvNeXtSpec(depths=(1, 1), dims=(4, 8), stem_stride=4), 3), 8)
    before = copy.deepcopy(net.state_dict())
    settings = {"data.image_size": 48, "epochs": 1, "batch_size": 4, "device": "cpu", "optim.warmup_epochs": 0}
    settings["model.mask_patch"] = 8  # of a stride that the network of the settings alone does not have
    run = fcmae.pretrain(photos, tmp_path / "out", model=net, settings=settings)
    assert run.finished
    assert not all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert fcmae.load(run).encoder.spec.dims == (4, 8)
    assert read(PretrainConfig, tmp_path / "out" / "config.yaml").chosen.keys() == {"grad_accum"}


def test_a_model_of_one_s_own_has_no_settings_beside_it(photos: Path, tmp_path: Path) -> None:
    net = build_fcmae(Encoder(SPEC, 3), 8)
    given = {"settings": {"data.image_size": 64, "epochs": 1, "batch_size": 4, "model.init": "run"}}
    with pytest.raises(ValueError, match=r"model\.init: a model of your own starts as it is"):
        fcmae.pretrain(photos, tmp_path / "out", model=net, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="variant: a model of your own has its network already"):
        fcmae.pretrain(photos, tmp_path / "out", model=net, variant="atto")
    with pytest.raises(ValueError, match="model: received Linear; give an FCMAE"):
        fcmae.pretrain(photos, tmp_path / "out", model=torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_is_not_what_its_numbers_say_is_told_of(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Mine(Encoder):
        pass

    settings = {"data.image_size": 64, "epochs": 1, "batch_size": 4, "device": "cpu", "data.num_workers": 0}
    extended = Encoder(SPEC, 3)
    extended.extra = torch.nn.Parameter(torch.zeros(1))
    for number, encoder in enumerate((Encoder(SPEC, 3), Mine(SPEC, 3), extended)):
        caplog.clear()
        fcmae.pretrain(photos, tmp_path / str(number), model=build_fcmae(encoder, 8), settings=settings)
        assert ("load, export and init make a plain" in caplog.text) == (number > 0)
        if encoder is extended:
            with pytest.raises(ValueError, match=r"extra: encoder\.extra"):
                fcmae.load(tmp_path / str(number))
        else:
            assert type(fcmae.load(tmp_path / str(number)).encoder) is Encoder


def test_an_encoder_of_other_widths_and_depths_than_its_numbers_say_is_watched(photos: Path, tmp_path: Path) -> None:
    encoder = Encoder(SPEC, 3)
    encoder.stages[0].append(Block(SPEC.dims[0], hidden=5))
    settings = {"data.image_size": 64, "epochs": 1, "batch_size": 4, "device": "cpu", "data.num_workers": 0}
    run = fcmae.pretrain(photos, tmp_path / "out", model=build_fcmae(encoder, 8), settings=settings)
    assert f"cosine_distance/stages.0.{len(encoder.stages[0]) - 1}" in run.metrics()[-1]


def test_a_spec_that_no_file_can_hold_is_refused(photos: Path, tmp_path: Path) -> None:
    class Mine(ConvNeXtSpec):
        pass

    net = build_fcmae(Encoder(SPEC, 3), 8)
    net.encoder.spec = Mine.model_validate(SPEC.model_dump())
    with pytest.raises(ValueError, match="its encoder's spec is a Mine, which no file can hold: give one of Con"):
        fcmae.pretrain(photos, tmp_path / "out", model=net)


def test_a_model_that_is_handed_in_is_trained_as_one_that_is_new(photos: Path, tmp_path: Path) -> None:
    """Whatever mode it was in, whatever gradients it held, and whatever the notebook has set for all that follows."""
    settings = {"data.image_size": 64, "epochs": 1, "batch_size": 4, "device": "cpu", "model.drop_path_rate": 0.5}
    settings |= {"data.num_workers": 0, "optim.warmup_epochs": 0}
    found = []
    for name in ("new", "used"):
        torch.manual_seed(0)
        net = build_fcmae(Encoder(SPEC, 3, drop_path_rate=0.5), 8)
        if name == "used":
            net.eval()
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, torch.nan)
        with torch.set_grad_enabled(name == "new"), torch.device("cpu" if name == "new" else "meta"):
            fcmae.pretrain(photos, tmp_path / name, model=net, settings=settings)
            assert torch.is_grad_enabled() == (name == "new")
        assert net.training
        found.append(net.state_dict())
    assert_same(*found)


def test_an_encoder_that_replaces_that_of_a_classifier_is_used() -> None:
    model = Classified(Classifier(Encoder(SPEC), 2), Reading(3, (64, 64)), ("a", "b"))
    names = list(model.state_dict())
    model.encoder = other = Encoder(SPEC)
    assert model.encoder is other and model.model.encoder is other and list(model.state_dict()) == names


def test_what_a_signal_stopped_does_not_start_another_run(labelled: Path, tmp_path: Path) -> None:
    stopped = Run(tmp_path / "run", "pretrain", finished=False, stopped_by="SIGTERM")
    for start in (fcmae.finetune, partial(fcmae.segment, maps=labelled)):
        with pytest.raises(ValueError, match=r"init: .*run was stopped by SIGTERM before its end: make the call that"):
            start(labelled, out=tmp_path / "out", init=stopped)
    for settings in ({"model.init": stopped}, {"model": {"init": stopped}}):
        with pytest.raises(ValueError, match="was stopped by SIGTERM before its end"):
            fcmae.finetune(labelled, out=tmp_path / "out", settings=settings)
    with pytest.raises(ValueError, match="does not exist"):
        fcmae.finetune(labelled, out=tmp_path / "out", init=stopped.path)  # if one wants it


def test_two_runs_at_once_in_a_process_are_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(photos, tmp_path)
    filters = list(warnings.filters)

    def second(*_: object) -> None:
        with pytest.raises(ValueError, match="another run is going on in this process: wait for its end"):
            fcmae.pretrain(photos, tmp_path / "second", settings=settings)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "pretrain", second)
        fcmae.pretrain(photos, tmp_path / "first", settings=settings)
    assert fcmae.pretrain(photos, tmp_path / "first", settings=settings).finished
    assert warnings.filters == filters


# Settings


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings that runs would start with."""
    found: list[Any] = []
    monkeypatch.setattr(pretraining, "pretrain", lambda cfg, net: found.append(cfg))
    monkeypatch.setattr(finetuning, "finetune", found.append)
    monkeypatch.setattr(segmenting, "segment", found.append)
    monkeypatch.setattr(planning, "_grad_accum", lambda cfg: {"grad_accum": 1})
    return found


def test_arguments_go_before_settings_and_these_before_the_file(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("epochs: 7\nseed: 1\nmodel: {variant: pico, decoder_depth: 2}\n")
    settings = {"seed": 2, "model": {"variant": "nano"}, "data.hflip": 0.25, "data": {"crop_scale": (0.5, 1)}}
    fcmae.pretrain(["a", Path("b")], tmp_path, variant="femto", config=tmp_path / "own.yaml", settings=settings)
    fcmae.finetune("c", "out", init=Run(Path("run"), "pretrain"), config="finetune_cpu", settings={"epochs": 3})
    fcmae.pretrain(
        "d",
        "out",
        config=runs.DEFAULTS,
        settings={"epochs": 1, "optim.clip_grad": None, "monitor": {"labelled": Path("x")}},
    )
    arrays = {"epochs": 1, "data": {"mean": np.full(3, 0.5), "std": np.ones(3)}}
    fcmae.pretrain("e", "out", config=runs.DEFAULTS, settings=arrays)
    assert asked.pop().data.mean == [0.5] * 3
    first, second, third = asked
    assert (first.data.path, first.out, first.epochs, first.seed) == (["a", "b"], tmp_path, 7, 2)
    assert (first.model.variant, first.model.decoder_depth) == ("convnextv2_femto", 2)
    assert (first.data.hflip, first.data.crop_scale) == (0.25, (0.5, 1))
    assert (second.data.path, second.model.init, second.epochs) == ("c", "run", 3)
    assert second.batch_size != FinetuneConfig.model_fields["batch_size"].default
    assert (third.optim.clip_grad, third.monitor.labelled) == (None, "x")


def test_a_configuration_made_by_hand_is_taken_whole(asked: list[Any], tmp_path: Path) -> None:
    cfg = config(Path("photos"), Path("out"), data__hflip=0.25, model__variant=TINY)
    fcmae.pretrain("other", tmp_path, settings=cfg)
    data = cfg.data.model_copy(update={"path": ["other"]})
    assert asked[0] == cfg.model_copy(update={"out": tmp_path, "data": data, "grad_accum": 1})
    # That a value was given, though it is the usual one, counts in evaluation alone.
    data = {"path": "x", "image_size": 224}
    made = FinetuneConfig.model_validate({"out": "o", "eval_only": True, "model": {"init": "run"}, "data": data})
    fcmae.finetune("y", "o", settings=made)
    assert "image_size" in asked[1].data.model_fields_set and "crop_pct" not in asked[1].data.model_fields_set


def test_nothing_is_chosen_of_what_only_evaluates_wherever_that_stands(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "eval.yaml").write_text("eval_only: true\nmodel: {init: run}\n")
    fcmae.finetune(tmp_path, tmp_path / "out", config=tmp_path / "eval.yaml")
    fcmae.segment(tmp_path, tmp_path / "out", tmp_path, config=tmp_path / "eval.yaml")
    for cfg in asked:
        assert cfg.eval_only and not cfg.chosen
        assert cfg.data.model_fields_set <= {"path", "maps"} and "batch_size" not in cfg.model_fields_set


def test_hours_in_whole_settings_have_the_rest_chosen(
    photos: Path, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sketches = []

    def choose(sketch: PretrainConfig, given: dict[str, Any]) -> dict[str, Any]:
        sketches.append(given)
        return {"epochs": 3, "batch_size": 8, "grad_accum": 1, "chosen": {"epochs": "a test"}}

    monkeypatch.setattr("fcmae.planning.complete", choose)
    settings = PretrainConfig.model_validate({"hours": 0.5, "out": "o", "data": {"path": ["x"], "hflip": 0.25}})
    fcmae.pretrain(photos, tmp_path, settings=settings)
    assert (asked[0].epochs, asked[0].batch_size, asked[0].data.hflip) == (3, 8, 0.25)
    assert "epochs" not in sketches[0] and sketches[0]["data.hflip"] == 0.25
    # What was chosen once stays.
    fcmae.pretrain(photos, tmp_path, settings=asked[0].model_copy(update={"epochs": 7}))
    assert asked[1].epochs == 7 and len(sketches) == 1


def test_all_mistakes_are_told_at_once_in_the_sentences_of_the_command(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"epochs": 0, "data": {"image_sise": 3}, "data.hflip": "often", "nothing": 1}
    with pytest.raises(ValueError) as error:
        fcmae.pretrain(photos, tmp_path / "out", settings=wrong)
    words = ["--epochs", "0", "--data.image_sise", "3", "--data.hflip", "often", "--nothing", "1"]
    assert cli.main(["pretrain", str(photos), "--out", str(tmp_path / "out"), *words]) == 2
    lines = [line.removeprefix("fcmae: error: ") for line in capsys.readouterr().err.splitlines()]
    assert sorted(str(error.value).splitlines()) == sorted(lines)
    assert len(lines) == 4 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": {"data.hflip": 0.1, "data": {"hflip": 0.2}}}, "data.hflip: given twice: leave one out"),
        ({"settings": FinetuneConfig}, "settings: received .*; give a mapping or a PretrainConfig"),
        ({"settings": {"model": "atto"}}, "model: received atto; model holds"),
        ({"config": "nowhere"}, "--config: received nowhere; no such file, nor one of"),
        ({"variant": "convnextv3"}, "model.variant: received convnextv3; "),
    ],
)
def test_what_python_can_get_wrong_is_told_in_a_sentence(
    photos: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    if arguments.get("settings") is FinetuneConfig:
        arguments = {
            "settings": FinetuneConfig.model_validate({"out": "o", "data": {"path": "x"}, "model": {"init": "r"}})
        }
    with pytest.raises(ValueError, match=message):
        fcmae.pretrain(photos, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_processes_are_counted(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="4 is not a multiple of processes x grad_accum = 3 x 1"):
        fcmae.pretrain(photos, tmp_path / "out", config=runs.DEFAULTS, settings=SMALL)


# Features


@pytest.fixture
def model() -> Features:
    encoder = Encoder(SPEC, in_chans=2)
    randomize(encoder, std=0.2)
    return Features(encoder, Reading(2, (32, 64), 1.0, (0.3, 0.6), (0.2, 0.4))).eval()


def test_images_are_normalised_as_they_come(model: Features) -> None:
    pixels = torch.randint(256, (2, 2, 32, 64), dtype=torch.uint8)
    mean, std = torch.tensor([0.3, 0.6]).view(2, 1, 1), torch.tensor([0.2, 0.4]).view(2, 1, 1)
    expected = model.encoder((pixels / 255 - mean) / std)
    torch.testing.assert_close(model(pixels), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(pixels / 255), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.pyramid(pixels)[-1], model(pixels).permute(0, 3, 1, 2))


def test_features_have_the_precision_of_the_module(model: Features) -> None:
    images = torch.randint(256, (2, 2, 64, 64), dtype=torch.uint8)
    expected, found = model(images), copy.deepcopy(model).double()(images)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)
    for half in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=rf"the weights are {half}: keep them in float32 and .* torch.autocast"):
            copy.deepcopy(model).to(half)(images)


def test_features_under_a_mask_are_those_of_visible_patches_and_have_gradients(model: Features) -> None:
    images = torch.rand(2, 2, 64, 192, requires_grad=True)
    mask = torch.tensor([[[True, False, False]], [[False, True, False]]])  # patches of 64 pixels
    found = model(images, mask)  # (2, 2, 2, 2, 16)
    whole = model.encoder(model.normalize(images), Masked(mask))  # (2, 2, 6, 16)
    expected = torch.stack(
        [torch.stack([whole[i, :, 2 * j : 2 * j + 2] for j in columns]) for i, columns in enumerate(([1, 2], [0, 2]))]
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    found.square().sum().backward()
    assert images.grad is not None
    seen = images.grad.abs().amax((1, 2)).unflatten(1, (3, 64)).amax(2) > 0
    assert torch.equal(seen, ~mask[:, 0])


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (
            (1, 3, 32, 32),
            torch.float32,
            r"images: received the shape \(1, 3, 32, 32\); give \(B, 2, H, W\), H and W >= 32",
        ),
        ((2, 32, 32), torch.float32, r"images: received the shape \(2, 32, 32\)"),
        ((1, 2, 32, 31), torch.float32, r"images: received the shape \(1, 2, 32, 31\)"),
        ((1, 2, 32, 32), torch.int64, "images: received torch.int64; give uint8, or float"),
    ],
)
def test_images_that_the_encoder_cannot_take_are_refused(
    model: Features, shape: tuple[int, ...], dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match="images: received ndarray; give a torch tensor"):
        model(np.zeros(shape))  # type: ignore[arg-type]
    for use in (model, model.pyramid):
        with pytest.raises(ValueError, match=message):
            use(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 2, 2), r"mask: received torch.float32 of the shape \(1, 2, 2\); give bool \(1, gh, gw\)"),
        (torch.zeros(2, 2, 2, dtype=torch.bool), r"give bool \(1, gh, gw\)"),
        (
            torch.zeros(1, 4, 4, dtype=torch.bool),
            "a grid of 4x4 for images of 64x64; .* a multiple of the total stride 32",
        ),
        (torch.zeros(1, 2, 1, dtype=torch.bool), "its patches must be squares"),
        (torch.zeros(1, 0, 0, dtype=torch.bool), "a grid of 0x0"),
        (torch.ones(1, 2, 2, dtype=torch.bool), "mask leaves no patch visible"),
    ],
)
def test_masks_that_do_not_fit_are_refused(model: Features, mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 2, 64, 64), mask)


def test_images_that_see_different_numbers_of_patches_are_refused(model: Features) -> None:
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[0, 0] = mask[1, 0, 0] = True
    with pytest.raises(ValueError, match=r"mask leaves \[2, 3\] patches visible: every image needs the same number"):
        model(torch.zeros(2, 2, 64, 64), mask)


def test_load_refuses_what_holds_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        fcmae.load(tmp_path / "nowhere")


def test_load_and_export_take_the_weights_that_are_named(tmp_path: Path) -> None:
    state = Encoder(VARIANTS["convnextv2_atto"]).state_dict()
    torch.save({"net": {f"{who}.{name}": value for who in "ab" for name, value in state.items()}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="has weights under 'net': name one with --key"):
        fcmae.load(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="name one with --prefix"):
        fcmae.load(tmp_path / "a.pth", key="net")
    told = fcmae.export(tmp_path / "a.pth", tmp_path / "out", key="net", prefix="b")
    assert str(tmp_path / "out") in told
    for loaded in (fcmae.load(tmp_path / "a.pth", key="net", prefix="a"), fcmae.load(tmp_path / "out")):
        assert all(torch.equal(value, state[name]) for name, value in loaded.encoder.state_dict().items())


def test_weights_of_one_s_own_loop_are_loaded_with_the_statistics_that_are_given(tmp_path: Path) -> None:
    def mean_of_patches(images: torch.Tensor, hidden: torch.Tensor, patch: int, known: None) -> torch.Tensor:
        return patchify(images, patch).flatten(0, 1)[hidden][:, :5]

    net = build_fcmae(Encoder(SPEC, in_chans=5), 8, target=mean_of_patches)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"decoder\.pred.* needs .* \(prefix = encoder leaves it out\)"):
        fcmae.load(tmp_path / "net.pth")
    with pytest.raises(ValueError, match="does not say the mean and std of its 5 channels"):
        fcmae.load(tmp_path / "net.pth", prefix="encoder")
    with pytest.raises(ValueError, match=r"std: received \[1\], and .*net.pth has 5 channels: give one each"):
        fcmae.load(tmp_path / "net.pth", prefix="encoder", mean=[0] * 5, std=[1])
    with pytest.raises(ValueError, match="mean and std: received one of the two; give both or neither"):
        fcmae.load(tmp_path / "net.pth", prefix="encoder", mean=[0.1] * 5)
    for std in (0.0, float("nan")):
        with pytest.raises(ValueError, match=r"mean and std: received .*; give finite numbers, and a std above 0"):
            fcmae.load(tmp_path / "net.pth", prefix="encoder", mean=[0.1] * 5, std=[std] * 5)
    loaded = fcmae.load(tmp_path / "net.pth", prefix="encoder", mean=[0.1] * 5, std=[2] * 5)
    images = torch.rand(1, 5, 64, 64)
    torch.testing.assert_close(loaded(images), net.encoder((images - 0.1) / 2))


def test_an_image_is_read_as_predict_reads_it(labelled: Path, tmp_path: Path) -> None:
    """A file of 40 x 56 pixels and a network of 32 x 32: resized, and cropped to .9 of it."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    data = {"image_size": 32, "crop_pct": 0.9, "num_workers": 0}
    settings = SMALL | {"data": data, "log.eval_epochs": 1, "model.stem_stride": 1}
    run = fcmae.finetune(
        labelled, tmp_path / "run", variant=ConvNeXtSpec.model_validate(TINY_NUMBERS), settings=settings
    )
    model = fcmae.load(run)
    assert isinstance(model, Classified) and model.reading.image_size == (32, 32) and model.reading.crop_pct == 0.9
    with torch.no_grad():
        expected = model.logits(model.read(tmp_path / "a.png")[None]).softmax(1)[0]
    table = tmp_path / "found.csv"
    assert cli.main(["predict", str(run.path), str(tmp_path / "a.png"), "--csv", str(table), "--device", "cpu"]) == 0
    (row,) = csv.DictReader(table.read_text().splitlines())
    found = [float(row[f"p({name})"]) for name in model.class_names]
    assert found == pytest.approx(expected.tolist(), abs=1e-4)
    assert torch.equal(model.read((tmp_path / "a.png").read_bytes()), model.read(str(tmp_path / "a.png")))
    with pytest.raises(ValueError, match=r"mean: received \[0, 0, 0\].* whose mean it states as .*: leave it out"):
        fcmae.load(run, mean=[0, 0, 0], std=[1, 1, 1])


def test_paths_are_those_that_a_person_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As to the commands: home is ~, and a run may be named without its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_checkpoint(tmp_path / "runs" / "first")
    (tmp_path / "runs" / "first" / "config.yaml").write_text("# a run\n")
    expected = fcmae.load(tmp_path / "runs" / "first").encoder.state_dict()
    fcmae.export("first", "~/out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    for name in ("first", "~/runs/first", "~/out"):
        found = fcmae.load(name).encoder.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_runs_start_from_the_weights_that_are_named(tmp_path: Path) -> None:
    state = Encoder(SPEC).state_dict()
    torch.save({"net": {f"{who}.{name}": value for who in "ab" for name, value in state.items()}}, tmp_path / "a.pth")
    model = {"init": str(tmp_path / "a.pth"), "key": "net", "prefix": "b"}
    sizes = {"variant": SPEC, "mask_patch": 32, "decoder_dim": 8}
    given = {"out": "x", "data": {"path": ["x"]}, "model": {**model, **sizes}}
    cfg = PretrainConfig.model_validate(given)
    net = pretraining.build_model(cfg)
    (done,), _ = pretraining.start(cfg, net)
    assert done.startswith("encoder from ")
    assert all(torch.equal(value, state[name]) for name, value in net.encoder.state_dict().items())
    tuning = FinetuneConfig.model_validate({"out": "x", "data": {"path": "x"}, "model": model})
    found = starting.starting_weights(tuning).state
    assert all(torch.equal(found[f"encoder.{name}"], value) for name, value in state.items())


def test_loaded_features_are_ready_to_be_looked_at_or_trained(photos: Path, tmp_path: Path) -> None:
    run = fcmae.pretrain(photos, tmp_path / "out", settings=config(photos, tmp_path, epochs=1))
    model = fcmae.load(run)
    assert not model.training and all(p.requires_grad for p in model.parameters())
    state = {f"encoder.{name}": value for name, value in model.encoder.state_dict().items()}
    assert_same(state, {k: v for k, v in read_weights(run.path).state.items() if k.startswith("encoder.")})

"""The objectives that are compared: targets against numpy and scipy, the parts in the loop, what reads such runs."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from numpy.typing import NDArray
from runs import assert_same, final_state, flags, losses, tensors, write_images
from scipy.fft import dctn
from torch import Tensor, nn

from fcmae import cli
from fcmae.data.augment import Reading
from fcmae.data.normalize import Normalize
from fcmae.evaluation.models import Backbone, stage_maps
from fcmae.layouts import DENSE, MakeLayout, make_layout
from fcmae.masked import FCMAE, Target, hog, masked_loss
from fcmae.masking import random_mask
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import ConvNeXtSpec
from fcmae.weights.files import read_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
import objectives

SPEC = ConvNeXtSpec(depths=(1, 2, 1), dims=(4, 6, 8), stem_stride=2)  # total stride 8
VARIANT = "{depths: [1, 1, 1], dims: [8, 8, 8]}"  # as a command line gives it
HIDDEN = torch.tensor([0, 1, 5, 8, 11])  # of two images of 2 x 3 patches


def patches_of(images: Tensor, patch: int) -> list[NDArray[np.float64]]:
    """The hidden ones, (C, patch, patch) each."""
    found = []
    for number in HIDDEN.tolist():
        image, (row, column) = number // 6, divmod(number % 6, 3)
        rows, columns = slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch)
        found.append(images[image, :, rows, columns].double().numpy())
    return found


def standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((values - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-6))


# Targets


@pytest.mark.parametrize("side", [2, 4])
def test_low_resolution_is_the_mean_of_pixels_standardised(side: int) -> None:
    images = torch.randn(2, 3, 16, 24)
    found = objectives.low_resolution(images, HIDDEN, 8, side=side)
    for values, patch in zip(found, patches_of(images, 8), strict=True):
        small = patch.reshape(3, side, 8 // side, side, 8 // side).mean((2, 4)).transpose(1, 2, 0)
        np.testing.assert_allclose(values.numpy(), standardised(small).ravel(), atol=1e-4)
    with pytest.raises(ValueError, match="a patch of 8 pixels cannot be averaged to 3 x 3"):
        objectives.low_resolution(images, HIDDEN, 8, side=3)


def test_frequencies_are_scipys_cosine_transform_weighted() -> None:
    images = torch.randn(2, 3, 16, 24)
    found = objectives.frequencies(images, HIDDEN, 8).view(5, 8, 8, 3)
    squares = np.add.outer(np.arange(8.0) ** 2, np.arange(8.0) ** 2)
    weights = np.sqrt(0.5 + 0.5 * squares / squares.mean())
    for values, patch in zip(found, patches_of(images, 8), strict=True):
        expected = dctn(standardised(patch.transpose(1, 2, 0)), axes=(0, 1), norm="ortho") * weights[..., None]
        np.testing.assert_allclose(values.numpy(), expected, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(objectives.frequencies(images, HIDDEN, 8).view_as(found), found)


def make_teacher(
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    kept: Path | None = None,
    std: float = 0.25,
    scale: float = 0.3,
) -> tuple[objectives.Teacher, Encoder]:
    """Of total stride 8, for images of that size and half their contrast."""
    encoder = Encoder(SPEC).eval().requires_grad_(False)
    randomize(encoder, std=scale)
    reading = Reading(3, size, 1.0, (0.5,) * 3, (0.5,) * 3)
    backbone = Backbone("teacher", encoder, reading, {})
    monkeypatch.setattr(objectives, "load_backbone", lambda source, in_chans: backbone)
    return objectives.Teacher("teacher", Normalize([0.5] * 3, [std] * 3), kept), encoder


def test_a_teachers_features_are_standardised_at_hidden_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, encoder = make_teacher(monkeypatch, (16, 24))
    images = torch.randn(2, 3, 16, 24)
    found = teacher(images, HIDDEN, 8)
    features = encoder(images / 2).flatten(0, 2).double().numpy()[HIDDEN]
    mean, std = features.mean(1, keepdims=True), np.sqrt(features.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found.numpy(), (features - mean) / std, atol=1e-4)
    assert not found.requires_grad


def test_a_teacher_of_another_size_answers_on_the_grid_of_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, _ = make_teacher(monkeypatch, (32, 32))  # a grid of 4 x 4, where the patches are 2 x 3
    images = torch.randn(2, 3, 16, 24)
    images[1] = images[0]
    every = teacher(images, torch.arange(12), 8)
    assert every.shape == (12, SPEC.dims[-1])
    assert torch.equal(every[:6], every[6:])


def test_a_teacher_looks_once_at_an_image_that_comes_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept, every, seen = tmp_path / "features.sqlite", torch.arange(18), list[int]()
    images = torch.randn(3, 3, 16, 24)
    images[2] = images[0]

    def look(model: nn.Module, batch: Tensor) -> list[Tensor]:
        seen.append(len(batch))
        return stage_maps(model, batch)

    plain, _ = make_teacher(monkeypatch, (16, 24))
    expected = plain(images, every, 8)
    monkeypatch.setattr(objectives, "stage_maps", look)
    first, _ = make_teacher(monkeypatch, (16, 24), kept)
    found = first(images[:1], every[:6], 8)
    np.testing.assert_allclose(found.numpy(), expected[:6].numpy(), atol=2e-3)
    assert torch.equal(first(images[:1], HIDDEN[:2], 8), found[HIDDEN[:2]])
    assert seen == [1]
    again, _ = make_teacher(monkeypatch, (16, 24), kept)  # another run
    np.testing.assert_allclose(again(images, every, 8).numpy(), expected.numpy(), atol=2e-3)
    assert torch.equal(again(images, every, 8)[:6], found)
    assert seen == [1, 1]  # of three the second alone is new
    # Another grid, other statistics, other weights.
    again(images[:1], torch.arange(24), 4)
    for changed in ({"std": 0.5}, {"scale": 0.2}):
        other, _ = make_teacher(monkeypatch, (16, 24), kept, **changed)
        assert not torch.equal(other(images[:1], every[:6], 8), found)
    assert seen == [1, 1, 1, 1, 1]


# The decoder of all stages


def multiscale(layout: MakeLayout, target: Target, num_values: int) -> FCMAE:
    torch.manual_seed(0)
    encoder = Encoder(SPEC, 2)
    model = FCMAE(encoder, objectives.MultiScale(encoder, num_values, 12), layout, target).double()
    randomize(model, std=0.1)
    return model


@pytest.mark.parametrize("grid", [(3, 2), (6, 4)])  # a mask patch of four sites, or of one
def test_multi_scale_is_the_same_packed_and_masked_in_values_and_gradients(grid: tuple[int, int]) -> None:
    images = torch.randn(2, 2, 48, 32, dtype=torch.float64)
    mask = torch.from_numpy(random_mask(grid, 3, [(0, 0, i) for i in range(2)]))
    found = []
    for backend in ("packed", "masked"):
        model = multiscale(partial(make_layout, backend), hog, 18)
        loss = masked_loss(model, images, mask, 3, target=model.target)
        loss.backward()
        found.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    packed, masked = found
    for name, value in masked.items():
        assert value is not None, name
        assert name == "loss" or value.ne(0).any(), name
        torch.testing.assert_close(packed[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_multi_scale_sums_strided_convolutions_of_every_stage() -> None:
    model = multiscale(partial(make_layout, "masked"), hog, 18)
    stages = model.encoder.pyramid(torch.randn(2, 2, 16, 24, dtype=torch.float64))
    decoder = model.decoder
    expected = torch.zeros(())
    convs = [*decoder.below, decoder.proj]
    for stage, norm, conv, stride in zip(stages, decoder.norms, convs, (4, 2, 1), strict=True):
        x = F.layer_norm(stage, stage.shape[-1:], norm.weight, norm.bias, 1e-6).permute(0, 3, 1, 2)
        expected = expected + F.conv2d(x, conv.weight, conv.bias, stride=stride)
    torch.testing.assert_close(decoder.project(stages, DENSE), expected.permute(0, 2, 3, 1))


def test_hidden_pixels_cannot_reach_what_multi_scale_predicts() -> None:
    model = multiscale(partial(make_layout, "packed"), hog, 18)
    mask = torch.from_numpy(random_mask((2, 3), 2, [(0, 0, 0)]))
    images = torch.randn(1, 2, 16, 24, dtype=torch.float64)
    changed = torch.where(mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None], 7.0, images)
    assert torch.equal(model(images, mask)[0], model(changed, mask)[0])


# Runs


def test_the_average_moves_with_the_optimizer_and_only_while_it_is_asked_to() -> None:
    encoder = Encoder(SPEC)
    net = objectives.Averaged(FCMAE(encoder, objectives.MultiScale(encoder, 9, 8)))
    trained = [p for p in net.parameters() if p.requires_grad]
    assert len(trained) + len(list(encoder.parameters())) == len(list(net.parameters()))
    optimizer = torch.optim.SGD(trained, lr=0.1)
    with objectives.averaging(net):
        optimizer.step()
        optimizer.step()
    optimizer.step()
    assert int(net.averaged.n_averaged) == 2


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def run(parts: str, images: Path, out: Path, *words: str, **changed: object) -> Path:
    """A run of 9 steps, in this process."""
    settings = {"model__variant": VARIANT, "model__stem_stride": 2, **changed}
    assert objectives.main([parts, "pretrain", *words, *flags(images, out, **settings)]) == 0
    return out


@pytest.mark.usefixtures("one_thread")
def test_every_step_moves_the_average_and_a_resumed_run_goes_on_with_it(images: Path, tmp_path: Path) -> None:
    options = {"epochs": 2, "checkpoint__keep": 9, "checkpoint__every_epochs": 1 / 3, "grad_accum": 2}
    out, network = tmp_path / "out", {"model__variant": VARIANT, "model__stem_stride": 2}
    run("ema", images, out, **options)
    assert cli.main(["pretrain", *flags(images, tmp_path / "plain", **network, **options)]) == 0
    assert losses(tmp_path / "plain") == losses(out)
    places = [out / "checkpoints" / f"step-{step:08d}" for step in range(1, 7)]
    steps, name = list(map(tensors, places)), "stages.1.0.pwconv1.weight"
    weights = [step[f"model:encoder.{name}"].double().numpy() for step in steps]
    average = weights[0]
    for number in range(1, 6):
        average = average + 9 / (10 + number) * (weights[number] - average)
        np.testing.assert_allclose(steps[number][f"model:averaged.module.{name}"].numpy(), average, atol=1e-6)
    assert not np.allclose(average, weights[-1], atol=1e-4)
    # What reads the run takes the weights, and `average` writes the average.
    read = read_weights(out).state
    assert torch.equal(read[f"encoder.{name}"], steps[-1][f"model:encoder.{name}"])
    assert "decoder.pred.weight" in read
    dest = tmp_path / "average.safetensors"
    assert objectives.main(["ema", "average", str(out), str(dest)]) == 0
    written = read_weights(dest)
    np.testing.assert_allclose(written.state[f"encoder.{name}"].numpy(), average, atol=1e-6)
    assert "average" in written.origin
    for place in places[3:]:
        shutil.rmtree(place)
    run("ema", images, out, **options)
    assert_same(final_state(out), steps[-1])


@pytest.mark.usefixtures("one_thread")
def test_a_run_is_one_that_the_commands_read(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_teacher(monkeypatch, (16, 16))
    short = {"epochs": 1, "log__eval_epochs": 1}
    for parts, words, pictured in (
        ("multiscale", [], True),
        ("multiscale+hog+ema", [], False),
        ("lowres", [], False),
        ("lowres2", [], False),
        ("frequency", [], False),
        ("teacher", ["--teacher", "teacher"], False),
        ("teacher", ["--teacher", "teacher", "--kept", str(tmp_path / "kept.sqlite")], False),
    ):
        out = run(
            parts,
            images,
            tmp_path / "-".join([parts, *words[2:3]]),
            *words,
            **short,
            precision="bf16" if parts == "frequency" else "fp32",
        )
        assert (out / "reconstructions").exists() == pictured, parts
        assert (out / "loss.png").exists()
        found, saved = read_weights(out).state, final_state(out)
        assert all(torch.equal(value, saved[f"model:{name}"]) for name, value in found.items())
        fits = parts == "frequency"
        assert any(name.startswith("decoder.") for name in found) == fits, parts
        assert sum(name.startswith("encoder.") for name in found) > 40
    assert "left out, as its settings do not describe them: averaged.n_averaged" in caplog.text
    assert cli.main(["convert", str(tmp_path / "multiscale+hog+ema"), str(tmp_path / "timm")]) == 0
    assert read_weights(tmp_path / "timm").architecture.decoder_depth == 0
    again = run("hog", images, tmp_path / "again", model__init=tmp_path / "multiscale", optim__base_lr=1e-30, **short)
    was, now = final_state(tmp_path / "multiscale"), final_state(again)
    assert all(torch.equal(now[name], was[name]) for name in was if name.startswith("model:encoder."))


def test_what_cannot_be_combined_is_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.touch()
    for words, message in (
        (["hog+lowres", "pretrain"], "hog and lowres are targets, and a run has one"),
        (["hogg", "pretrain"], "'hogg' is no part: use one of multiscale, ema, teacher, hog"),
        (["teacher", "pretrain"], "the part teacher and --teacher MODEL go together"),
        (["hog", "pretrain", "--teacher", "x"], "the part teacher and --teacher MODEL go together"),
        (["hog", "pretrain", "--kept", "x"], "--kept x is for the features of a teacher: give --teacher MODEL too"),
        (["hog", "pretrain", "--epohcs=1"], "epohcs"),
        (["ema", "average", "run", str(taken)], "average takes a run and a new file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            objectives.main(words)
        assert message in capsys.readouterr().err
    make_teacher(monkeypatch, (16, 16))
    taken.write_bytes(b"no database" * 99)
    with pytest.raises(SystemExit, match="2"):
        objectives.main(["teacher", "pretrain", "--teacher", "x", "--kept", str(taken), *flags(images, tmp_path / "x")])
    assert f"--kept {taken} cannot be used (file is not a database): give another file" in capsys.readouterr().err
    plain = tmp_path / "plain"
    assert cli.main(["pretrain", *flags(images, plain, epochs=1)]) == 0
    with pytest.raises(SystemExit, match="2"):
        objectives.main(["ema", "average", str(plain), str(tmp_path / "average.safetensors")])
    assert "has no average of its encoder" in capsys.readouterr().err

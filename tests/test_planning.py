"""Runs that are told nothing but their images: what is found out, what a resume keeps, where they go."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from chaos.images import tiff
from conftest import requires_time
from PIL import Image
from runs import TIMED, TINY, forget_accelerator, start, write_colors, write_images

import fcmae
from fcmae import api, bench, choices, cli, options, planning
from fcmae.config import IMAGENET_MEAN, IMAGENET_STD, BenchConfig, FinetuneConfig, PretrainConfig, SegmentConfig
from fcmae.data import cores
from fcmae.data.decode import read_crop
from fcmae.data.find import find_images
from fcmae.data.source import BadImage
from fcmae.data.survey import survey
from fcmae.heads import Classifier
from fcmae.networks.convnext import Encoder
from fcmae.networks.spec import VARIANTS, ConvNeXtSpec
from fcmae.options import load, read
from fcmae.pretraining import pretrain
from fcmae.processes import OUT_OF_MEMORY, Failed
from fcmae.weights.files import read_init, save_weights
from fcmae.weights.formats import Architecture
from fcmae.weights.record import ImageRecord, Weights

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import first_hour

Write = Callable[[Path, np.random.Generator], None]


def photo(path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path.with_suffix(".jpg"))


def alpha(path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(rng.integers(0, 256, (40, 60, 4), dtype=np.uint8)).save(path.with_suffix(".png"))


def grey(path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(rng.integers(0, 256, (40, 60), dtype=np.uint8)).save(path.with_suffix(".png"))


def deep(path: Path, rng: np.random.Generator) -> None:
    tifffile.imwrite(path.with_suffix(".tif"), rng.integers(0, 4096, (40, 60), dtype=np.uint16))


def bands(path: Path, rng: np.random.Generator) -> None:
    pixels = rng.random((40, 60, 5), dtype=np.float32)
    tifffile.imwrite(path.with_suffix(".tif"), pixels, photometric="minisblack", planarconfig="contig")


@pytest.mark.parametrize(
    ("extra", "in_chans"),
    [((0,), 4), ((0, 0), 5), ((1,), 3), ((2,), 3), ((0, 2), 4), ((2, 0), 4), ((0, 0, 2), 5)],
)
@pytest.mark.parametrize("max_pixels", [2400, 2000])
def test_bands_behind_colours_count_and_alpha_does_not(
    tmp_path: Path, extra: tuple[int, ...], in_chans: int, max_pixels: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a TIFF tagged RGB: its samples behind the colours are 0 for a band, 1 and 2 for alpha."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3 + len(extra)), dtype=np.uint8)
    kind = {"photometric": "rgb", "planarconfig": "contig", "tile": (16, 16), "extrasamples": extra}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **kind)
    found = survey(find_images([str(tmp_path)]), max_pixels=max_pixels)
    assert (found.in_chans, len(found.mean)) == (in_chans, in_chans)
    assert not caplog.records
    bands = [i for i in range(3 + len(extra)) if i < 3 or not extra[i - 3]]
    with (tmp_path / "a.tif").open("rb") as file:
        for which in (bands, [0, 1, 2], list(range(3 + len(extra)))):
            file.seek(0)
            part = read_crop(file, len(which), lambda *_: (3, 5, 20, 25), None, max_pixels=max_pixels).values
            np.testing.assert_array_equal(part.transpose(1, 2, 0), pixels[3:23, 5:30, which])


@pytest.mark.parametrize("shape", [(40, 60, 4), (4, 40, 60)])
def test_a_channel_of_more_than_8_bits_that_its_writer_calls_alpha_is_told(
    tmp_path: Path, shape: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """As tifffile writes an array of four channels where nothing says what they are."""
    values = np.random.default_rng(0).integers(0, 2**16, shape, dtype=np.uint16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tifffile.imwrite(tmp_path / "a.tif", values)
    found = survey(find_images([str(tmp_path)]))
    assert found.in_chans == 3
    said = "a.tif has a channel behind its colours that it calls alpha, or nothing, and that is not read: if it is"
    assert f"{said} data, in_chans = 4 reads it" in caplog.text
    caplog.clear()
    assert survey(find_images([str(tmp_path)]), 4).in_chans == 4
    assert not caplog.records


@pytest.mark.parametrize(
    ("extra", "in_chans"), [((0, 2), 2), ((0, 0, 2), 3), ((0, 0, 0, 2), 4), ((2,), 1), ((0, 0), 3), ((0, 1), 2)]
)
@pytest.mark.parametrize("max_pixels", [2400, 2000])
def test_alpha_behind_bands_tagged_grey_is_no_band(
    tmp_path: Path, extra: tuple[int, ...], in_chans: int, max_pixels: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 1 + len(extra)), dtype=np.uint8)
    kind = {"photometric": "minisblack", "planarconfig": "contig", "tile": (16, 16), "extrasamples": extra}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **kind)
    found = survey(find_images([str(tmp_path)]), max_pixels=max_pixels)
    assert (found.in_chans, len(found.mean)) == (in_chans, in_chans)
    with (tmp_path / "a.tif").open("rb") as file:
        part = read_crop(file, in_chans, lambda *_: (3, 5, 20, 25), None, max_pixels=max_pixels).values
        np.testing.assert_array_equal(part.transpose(1, 2, 0), pixels[3:23, 5:30, :in_chans])
        if in_chans == 2:  # neither grey nor colours
            file.seek(0)
            with pytest.raises(BadImage, match="2 channels, in_chans is 3"):
                read_crop(file, 3, lambda *_: (3, 5, 20, 25), None, max_pixels=max_pixels)


def inks(path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(rng.integers(0, 256, (40, 60, 4), dtype=np.uint8)).convert("CMYK").save(path.with_suffix(".tif"))


def unsaid(path: Path, rng: np.random.Generator) -> None:
    """RGB and a fourth sample of which nothing is said."""
    tags = {256: (60,), 257: (40,), 258: (8,) * 4, 262: (2,), 273: (8,), 277: (4,), 278: (40,), 279: (60 * 40 * 4,)}
    content = tiff({tag: ("I", values) for tag, values in tags.items()}, rng.bytes(60 * 40 * 4))
    path.with_suffix(".tif").write_bytes(content)


@pytest.mark.parametrize(
    ("write", "in_chans", "is_deep"),
    [
        (photo, 3, False),
        (alpha, 3, False),
        (grey, 1, False),
        (deep, 1, True),
        (bands, 5, True),
        (inks, 3, False),
        (unsaid, 3, False),
    ],
)
def test_a_survey_finds_channels_depth_and_size(tmp_path: Path, write: Write, in_chans: int, is_deep: bool) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        write(tmp_path / f"{number}.x", rng)
    found = survey(find_images([str(tmp_path)]))
    assert (found.in_chans, found.is_deep, found.short_side, found.num) == (in_chans, is_deep, 40, 3)
    assert found.has_deep == is_deep
    assert len(found.mean) == len(found.std) == in_chans


def test_a_survey_goes_by_what_most_images_are(tmp_path: Path) -> None:
    for number, shape in enumerate(((40, 40, 3), (40, 44, 3), (400, 400))):
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / f"{number}.png")
    found = survey(find_images([str(tmp_path)]))
    assert (found.in_chans, found.short_side) == (3, 40)


def test_a_survey_does_not_take_label_maps_for_images(tmp_path: Path) -> None:
    for number in range(4):
        bands = np.zeros((40, 40, 5), np.uint16)
        tifffile.imwrite(tmp_path / f"{number}.tif", bands, photometric="minisblack", planarconfig="contig")
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / f"{number}.png")
    found = find_images([str(tmp_path)])
    sentence = r"of 8 images 4 have 1 channels, as .*0\.png, 4 have 5 channels, as .*0\.tif: list those of one kind"
    with pytest.raises(ValueError, match=sentence):
        survey(found)
    assert survey(found, in_chans=5).in_chans == 5
    assert survey(find_images([str(tmp_path / "*.tif")])).in_chans == 5


def test_bands_behind_colours_are_no_other_kind_of_image(tmp_path: Path) -> None:
    for number in range(6):
        shape = (40, 40, 3 + number % 2)
        tifffile.imwrite(tmp_path / f"{number}.tif", np.zeros(shape, np.uint8), photometric="rgb")
    write = partial(tifffile.imwrite, photometric="rgb", data=np.zeros((40, 40, 3), np.uint8))
    write(tmp_path / "6.tif")
    assert survey(find_images([str(tmp_path)])).in_chans == 3  # which three of seven have one more of


def test_a_survey_tells_of_a_single_deep_image(tmp_path: Path) -> None:
    for number, write in enumerate((grey, grey, deep)):
        write(tmp_path / f"{number}.x", np.random.default_rng(number))
    found = survey(find_images([str(tmp_path)]))
    assert (found.is_deep, found.has_deep) == (False, True)


def test_a_survey_tells_of_two_units(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = np.random.default_rng(0).integers(0, 4000, (4, 40, 40), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "counts.tif", values, photometric="minisblack", planarconfig="separate")
    survey(find_images([str(tmp_path)]))
    assert not caplog.records
    tifffile.imwrite(
        tmp_path / "share.tif", values.astype(np.float32) / 10000, photometric="minisblack", planarconfig="separate"
    )
    survey(find_images([str(tmp_path)]))
    sentence = (
        r"may be in two units: 1 of 2, such as .*share.tif, hold values as stored .*, such as .*counts.tif, shares of"
    )
    assert re.search(sentence, caplog.text)


def test_a_survey_passes_over_what_cannot_be_read(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert survey(find_images([str(tmp_path)])).num == 5
    with pytest.raises(ValueError, match=r"none of 1 images can be read; .*broken.jpg"):
        survey(find_images([str(tmp_path / "broken.jpg")]))


SMALL = ["--model.variant", TINY, "--model.stem_stride", "1", "--model.decoder_dim", "8", "--device", "cpu"]
SMALL += ["--data.num_workers", "0", "--log.trackers", "none", "--monitor.num_images", "0"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps are not timed; the numbers of images at once that would have been."""
    asked: list[int] = []

    def step(cfg: Any, at_once: int, *rest: Any) -> bench.Result:
        asked.append(at_once)
        return bench.Result(bench.Candidate("packed", "fp32", at_once), at_once, (at_once / 10,), 0.0, 10**9)

    monkeypatch.setattr(planning, "_pretraining_step", step)
    monkeypatch.setattr(planning, "_dense_step", step)
    monkeypatch.setattr(planning, "free_memory", lambda: 8 * 10**9)
    return asked


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 13 images in the current directory."""
    monkeypatch.chdir(tmp_path)
    return write_images(tmp_path / "photos")


def test_a_folder_alone_makes_a_run_that_records_and_keeps_its_choices(
    photos: Path, measured: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "photos", "--hours", "0.001", *SMALL]
    assert cli.main(words) == 0
    forget_accelerator()
    said = capsys.readouterr().out
    assert "photos: pretrain, finished at step" in said and "trained for" in said
    assert "\nnext:\n  fcmae evaluate runs/photos random:runs/photos --data LABELLED\n" in said
    assert "\n  fcmae convert runs/photos photos-timm\n" in said
    saved = read(PretrainConfig, Path("runs/photos/config.yaml"))
    assert saved.epochs < 10 and "epochs" in saved.chosen and "data.num_workers" not in saved.chosen
    log = Path("runs/photos/train.log").read_text()
    assert "not given, so chosen" in log and saved.chosen["batch_size"] in log
    # It is finished: the same command begins another.
    assert cli.main(words) == 0
    forget_accelerator()
    assert Path("runs/photos-2/config.yaml").exists()
    assert len(measured) == 2


def test_a_run_that_was_killed_in_its_first_step_starts_anew_in_its_place(photos: Path, measured: list[int]) -> None:
    words = ["photos", "--hours", "0.001", *SMALL, "--batch_size", "8"]
    first = load(PretrainConfig, words, prog="x", complete=planning.complete)
    run = Path("runs/photos")
    start_run(run, first)
    (run / "metrics.jsonl").unlink()
    (run / "environment.json").write_text("[{}]")
    (run / "train.log").write_text("2026-01-01 00:00:00 3 steps of 8 images on 1 x cpu in fp32\n")
    assert load(PretrainConfig, [*words, "--seed", "1"], prog="x", complete=planning.complete).out != run
    again = load(PretrainConfig, words, prog="x", complete=planning.complete)
    assert again.out == run and (first.grad_accum, again.grad_accum, measured[-1]) == (1, 2, 4)
    assert pretrain(again).finished
    forget_accelerator()
    assert "the last start ended without a word" in (run / "train.log").read_text()


def test_a_start_that_left_an_index_alone_is_gone_on_with_in_its_place(photos: Path, measured: list[int]) -> None:
    words = ["photos", "--hours", "0.001", *SMALL]
    Path("runs/photos/index").mkdir(parents=True)
    assert load(PretrainConfig, words, prog="x", complete=planning.complete).out == Path("runs/photos")
    Path("runs/photos/mine.txt").touch()
    assert load(PretrainConfig, words, prog="x", complete=planning.complete).out == Path("runs/photos-2")


def start_run(run: Path, cfg: PretrainConfig) -> None:
    """What a run leaves that is killed after it has written its first line of numbers."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"# fcmae pretrain {fcmae.__version__}\n{fcmae.options.dump(cfg)}")
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.5}\n')
    (run / "environment.json").write_text("[]")


def test_a_run_of_another_version_in_the_place_does_not_stop_a_new_one(photos: Path, measured: list[int]) -> None:
    words = ["photos", "--hours", "0.001", *SMALL]
    start_run(Path("runs/photos"), load(PretrainConfig, words, prog="x", complete=planning.complete))
    with Path("runs/photos/config.yaml").open("a") as file:
        file.write("setting_of_tomorrow: 1\n")
    assert load(PretrainConfig, words, prog="x", complete=planning.complete).out == Path("runs/photos-2")


def test_a_run_that_was_cut_off_goes_on_with_what_was_chosen(photos: Path, measured: list[int]) -> None:
    words = ["photos", "--hours", "0.001", *SMALL]
    first = load(PretrainConfig, words, prog="x", complete=planning.complete)
    assert first.out == Path("runs/photos")
    run = Path("runs/photos")
    start_run(run, first)
    again = load(PretrainConfig, words, prog="x", complete=planning.complete)
    assert again == first and len(measured) == 1
    other = load(PretrainConfig, [*words, "--seed", "1"], prog="x", complete=planning.complete)
    assert other.out == Path("runs/photos-2")
    # Nor is it gone on with by a command with less settings: of another length, seed or start.
    fewer = load(PretrainConfig, ["photos", *SMALL], prog="x", complete=planning.complete)
    assert fewer.out == Path("runs/photos-2")
    # What may change on resume makes no other run of it.
    for more in (["--data.cache_gb", "1"], ["--checkpoint.keep", "3"]):
        assert load(PretrainConfig, [*words, *more], prog="x", complete=planning.complete).out == run
    with pytest.raises(
        ValueError, match=r"^overwrite: runs/photos may be another run: name the one to delete by --out"
    ):
        load(PretrainConfig, [*words, "--overwrite"], prog="x", complete=planning.complete)


def test_a_file_of_settings_leaves_nothing_to_choose_unless_hours_are_given(photos: Path, measured: list[int]) -> None:
    words = ["photos", "--config", "pretrain_cpu", "--out", "out"]
    cfg = load(PretrainConfig, words, prog="x", complete=planning.complete)
    assert {*cfg.chosen} == {"grad_accum"} and (cfg.batch_size, cfg.grad_accum) == (64, 1) and not measured
    cfg = load(PretrainConfig, [*words, "--hours", "1", "--batch_size", "4"], prog="x", complete=planning.complete)
    assert "data.val_share" in cfg.chosen and "data.image_size" not in cfg.chosen
    # Flags go before the file: the hours before its epochs.
    assert cfg.epochs == 1600 and "epochs" in cfg.chosen
    # And with them what the file has for its own epochs.
    assert {"optim.warmup_epochs", "checkpoint.every_epochs", "log.eval_epochs"} <= cfg.chosen.keys()
    file = Path("mine.yaml")
    file.write_text("{epochs: 800, batch_size: 4, optim: {warmup_epochs: 39}, log: {eval_epochs: 7}}")
    mine = ["photos", "--config", "mine.yaml", "--out", "out", "--hours", "1"]
    cfg = load(PretrainConfig, [*mine, "--log.eval_epochs", "9"], prog="x", complete=planning.complete)
    assert (cfg.optim.warmup_epochs, cfg.log.eval_epochs) == (40, 9)
    file.write_text("{batch_size: 4, optim: {warmup_epochs: 39}}")
    assert load(PretrainConfig, mine, prog="x", complete=planning.complete).optim.warmup_epochs == 39
    assert (
        load(PretrainConfig, [*words, "--hours", "1", "--epochs", "3"], prog="x", complete=planning.complete).epochs
        == 3
    )


def test_the_rest_is_chosen_beside_a_file_that_is_no_recipe(photos: Path, measured: list[int]) -> None:
    """As `fcmae stats` writes it."""
    Path("stats.yaml").write_text("data: {in_chans: 3, mean: [0.1, 0.2, 0.3], std: [0.1, 0.1, 0.1]}\n")
    words = ["photos", "--config", "stats.yaml", *SMALL]
    cfg = load(PretrainConfig, words, prog="x", complete=planning.complete)
    assert cfg.data.mean == [0.1, 0.2, 0.3] and "data.mean" not in cfg.chosen and cfg.out == Path("runs/photos")
    assert {"epochs", "batch_size", "data.image_size"} <= cfg.chosen.keys()
    given = load(PretrainConfig, [*words, "--batch_size", "4", "--out", "o"], prog="x", complete=planning.complete)
    assert given.epochs == 800 and given.chosen.keys() == {"grad_accum"}


def test_a_file_of_what_was_chosen_is_taken_as_it_is_by_any_number_of_processes(
    photos: Path, measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = load(PretrainConfig, ["photos", "--hours", "1", *SMALL], prog="x", complete=planning.complete)
    (tmp_path / "chosen.yaml").write_text(fcmae.options.dump(chosen))
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["--config", str(tmp_path / "chosen.yaml")]
    assert load(PretrainConfig, words, prog="x", complete=planning.complete) == chosen
    assert len(measured) == 1


def test_images_at_once_are_halved_until_they_fit(
    photos: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    def step(cfg: Any, at_once: int) -> bench.Result:
        measured.append(at_once)
        if at_once == 8:
            raise Failed(OUT_OF_MEMORY)
        memory = (10 if at_once > 2 else 1) * 10**9
        return bench.Result(bench.Candidate("packed", "fp32", at_once), 8, (1.0,), 0.0, memory)

    monkeypatch.setattr(planning, "_pretraining_step", step)
    words = ["photos", "--batch_size", "8", *SMALL]
    cfg = load(PretrainConfig, words, prog="x", complete=planning.complete)
    assert (measured, cfg.grad_accum) == ([8, 4, 2], 4)
    with pytest.raises(
        ValueError, match=r"a step does not run: 8 images at once: out of memory; raise grad_accum, or try"
    ):
        load(PretrainConfig, [*words, "--grad_accum", "1"], prog="x", complete=planning.complete)


RECIPE = ["photos", "--config", "pretrain_atto", "--out", "out", "--device", "cpu", "--batch_size", "4096"]


def test_a_recipe_is_computed_in_parts_that_are_measured_to_fit(
    photos: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    def step(cfg: Any, at_once: int, *rest: Any) -> bench.Result:
        measured.append(at_once)
        return bench.Result(bench.Candidate("packed", "fp32", at_once), 1, (1.0,), 0.0, at_once * 10**8)

    monkeypatch.setattr(planning, "_pretraining_step", step)
    cfg = load(PretrainConfig, RECIPE, prog="x", complete=planning.complete)
    assert (measured, cfg.grad_accum) == ([64, 32], 128)
    assert cfg.chosen == {"grad_accum": "32 images at once take 3.2 GB of 8.0 GB free"}
    with pytest.raises(SystemExit):
        cli.main(["pretrain", *RECIPE, "--print-config"])
    assert "\ngrad_accum: 128\n" in capsys.readouterr().out
    # From Python, with settings made by hand.
    made = PretrainConfig(out=Path("out"), batch_size=4096, device="cpu", data={"path": ["photos"]})  # type: ignore[arg-type]
    assert made.grad_accum == "auto"
    assert api._settings(PretrainConfig, {}, None, made).grad_accum == 128
    # A run that is resumed keeps its own.
    start_run(Path("out"), cfg.model_copy(update={"grad_accum": 256}))
    measured.clear()
    assert load(PretrainConfig, RECIPE, prog="x", complete=planning.complete).grad_accum == 256 and not measured


@pytest.mark.parametrize(
    ("before", "now", "parts", "settings"),
    [
        ((16, 1), 4, 4, []),
        ((1, 16), 32, 1, []),  # 16 parts of 32 processes do not divide the batch
        ((16, 1), 16, 1, []),
        ((4, 16), 1, 16, ["--model.grn_scope", "batch"]),  # GRN is another one over other parts: it is refused later
        ((16, 1), 4, 2, ["--grad_accum", "2"]),
    ],
)
def test_a_run_goes_on_in_parts_as_large_as_before_on_any_number_of_processes(
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: tuple[int, int],
    now: int,
    parts: int,
    settings: list[str],
) -> None:
    words = [*RECIPE, "--batch_size", "256", *settings]
    processes, kept = before
    cfg = load(PretrainConfig, [*words, "--grad_accum", "1"], prog="x")
    start_run(Path("out"), cfg.model_copy(update={"grad_accum": kept}))
    (Path("out") / "environment.json").write_text(json.dumps([{"num_processes": processes}]))
    monkeypatch.setenv("WORLD_SIZE", str(now))
    found = load(PretrainConfig, words, prog="x", num_processes=now, complete=planning.complete)
    assert found.grad_accum == parts


@pytest.mark.parametrize(
    ("settings", "processes", "parts", "why"),
    [
        (["--data.image_size", "64"], 1, 64, "64 images at once take less than"),
        ([], 2, 32, "64 images at once in each process: not measured"),
        (["--model.grn_scope", "batch"], 1, 1, "the whole batch, as model.grn_scope = batch pools"),
        (["--grad_accum", "2"], 1, 2, ""),
    ],
)
def test_parts_are_not_measured_where_they_fit_or_must_not_change(
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: list[int],
    settings: list[str],
    processes: int,
    parts: int,
    why: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    words = [*RECIPE, *settings]
    cfg = load(PretrainConfig, words, prog="x", num_processes=processes, complete=planning.complete)
    assert cfg.grad_accum == parts and cfg.chosen.get("grad_accum", "").startswith(why) and not measured


def test_no_step_takes_more_memory_than_is_reckoned(photos: Path, timed: None) -> None:
    cfg = load(BenchConfig, [*RECIPE, "--batch_size", "16", "--data.image_size", "96"], prog="x")
    taken = planning._pretraining_step(cfg.model_copy(update={"seconds": 0.01}), 16, False).memory
    assert taken < planning._most_memory(cfg, 16) < 20 * taken


@pytest.mark.parametrize("given", [[], ["--model.variant", "nano"], ["--epochs", "0.5"]])
def test_a_network_that_would_not_see_each_image_once_gives_way_to_the_next_smaller(
    photos: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int], given: list[str]
) -> None:
    """An hour is for nine tenths of 13 images, and for two thirds more with each smaller network."""
    nano, pico = VARIANTS["convnextv2_nano"], VARIANTS["convnextv2_pico"]
    monkeypatch.setattr(choices, "SMALL", nano)
    speeds = {nano: 0.9 * 12 / 3600 / 0.88, pico: 1.5 * 12 / 3600 / 0.88}
    seen: list[Any] = []

    def step(cfg: Any, at_once: int) -> bench.Result:
        seen.append(cfg.model.variant)
        return bench.Result(
            bench.Candidate("packed", "fp32", at_once), 1, (1 / speeds[VARIANTS[cfg.model.variant]],), 0.0, 10**9
        )

    monkeypatch.setattr(planning, "_pretraining_step", step)
    words = ["photos", "--hours", "1", "--device", "cpu", "--data.val_share", "0.05", *given]
    cfg = load(PretrainConfig, words, prog="x", complete=planning.complete)
    if given:
        assert seen == ["convnextv2_nano"] and cfg.model.variant == "convnextv2_nano"
    else:
        assert seen == ["convnextv2_nano", "convnextv2_pico"] and cfg.model.variant == "convnextv2_pico"
        assert cfg.chosen["model.variant"].startswith("a larger one would not see each image once")
        assert cfg.epochs == pytest.approx(1.5 * 12 / 12, rel=0.1)


def test_a_launcher_is_told_to_print_the_settings_first(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["pretrain", "photos", *SMALL]) == 2
    assert "print them with it (--print-config > FILE)" in capsys.readouterr().err


def write_maps(folder: Path) -> None:
    """Label maps of two classes for what `write_images` writes."""
    folder.mkdir()
    for number in range(13):
        Image.fromarray(np.arange(24, dtype=np.uint8)[None].repeat(20, 0) // 12).save(folder / f"{number:02}.png")


def test_images_and_label_maps_alone_make_a_run(photos: Path, measured: list[int]) -> None:
    write_maps(Path("maps"))
    words = ["photos", "--maps", "maps", "--hours", "0.001", "--device", "cpu", *SMALL[:4]]
    cfg = load(SegmentConfig, words, prog="x", complete=planning.complete)
    assert cfg.out == Path("runs/photos-segmented") and cfg.data.image_size == (16, 16) and cfg.batch_size == 8
    assert cfg.epochs < 4  # .9 * 3.6 s at 10 images/s of 10
    assert {"epochs", "batch_size", "data.image_size"} <= set(cfg.chosen) and "model.variant" not in cfg.chosen
    with pytest.raises(ValueError, match=r"has no folder of label maps beside it"):
        load(SegmentConfig, ["photos"], prog="x", complete=planning.complete)


def test_a_batch_of_segmentation_is_no_larger_than_what_is_left_to_learn_from(
    photos: Path, measured: list[int]
) -> None:
    write_maps(Path("maps"))
    for folder in ("photos", "maps"):
        for path in sorted(Path(folder).iterdir())[2:]:
            path.unlink()
    words = ["photos", "--maps", "maps", "--hours", "0.001", "--device", "cpu", *SMALL[:4]]
    assert load(SegmentConfig, words, prog="x", complete=planning.complete).batch_size == 1


@pytest.mark.parametrize(("told", "stride"), [(", stem_stride: 1", 1), ("", 2)])
def test_a_stride_among_the_numbers_of_a_network_is_kept(
    photos: Path, measured: list[int], told: str, stride: int
) -> None:
    numbers = f"{{depths: [1, 1], dims: [8, 16]{told}}}"
    words = ["photos", "--hours", "0.001", "--device", "cpu", "--model.variant", numbers]
    cfg = load(PretrainConfig, words, prog="x", complete=planning.complete)
    assert cfg.model.spec.stem_stride == cfg.model.stem_stride == stride
    assert ("model.stem_stride" in cfg.chosen) == (not told)


def test_steps_are_really_timed_and_their_memory_measured(
    photos: Path, timed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_images(Path("labelled") / name, 9)
    write_maps(Path("maps"))
    pretraining = ["pretrain", "photos", "--hours", "0.001", *SMALL, "--data.image_size", "48", "--print-config"]
    segmentation = ["segment", "photos", "--maps", "maps"]
    common = ["--hours", "0.001", "--device", "cpu", "--print-config"]
    for words in (pretraining, ["finetune", "labelled", *common], [*segmentation, *common]):
        with pytest.raises(SystemExit):
            cli.main(words)
        printed = " ".join(capsys.readouterr().out.split())
        assert re.search(r"at [1-9][\d,.]* images/s", printed), printed
        assert re.search(r"images at once take [\d.]+ GB of [\d.]+ GB free", printed), printed


def large_photos(folder: Path) -> Path:
    """Six JPEGs of 24 million pixels."""
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((6000, 4000)).save(folder / f"{number}.jpg", quality=80)
    return folder


def limit_memory(group: Path, num_bytes: int) -> None:
    """Have this process see a limit, as of a container, of which half a gigabyte is used, and time steps."""
    planning._pretraining_step, planning._dense_step = TIMED
    (group / "memory.max").write_text(f"{num_bytes}\n")
    (group / "memory.current").write_text("500000000\n")
    cores.CGROUP = group


@requires_time
def test_the_first_command_on_large_photographs_keeps_within_four_gigabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its processes together: pages that they share count once, where they are."""
    monkeypatch.chdir(tmp_path)
    photos, group, most = large_photos(tmp_path / "photos"), tmp_path / "group", 4 * 10**9
    group.mkdir()
    command = ["pretrain", str(photos), "--hours", "0.003", "--device", "cpu", "--out", str(tmp_path / "run")]
    process = start(command, tmp_path / "log", prepare=partial(limit_memory, group, most))
    peak, seen = 0, 0
    while process.is_alive():
        assert process.pid is not None
        peak, seen = max(peak, first_hour.memory_of(process.pid)), seen + 1
        process.join(0.15)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert seen > 20 and 3 * 10**8 < peak < most


def test_the_weights_that_a_run_starts_from_are_found_by_their_key(photos: Path, measured: list[int]) -> None:
    spec = ConvNeXtSpec(depths=(1, 1), dims=(8, 16), stem_stride=4)
    state = {f"encoder.{name}": value for name, value in Encoder(spec, 3).state_dict().items()}
    torch.save({"other": {"x": torch.zeros(1)}, "average": state}, "w.pth")
    words = ["photos", "--init", "w.pth", "--model.key", "average", "--device", "cpu"]
    cfg = load(PretrainConfig, words, prog="x", complete=planning.complete)
    assert cfg.model.spec == spec and cfg.chosen["model.variant"] == "that of model.init"


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A classifier of three colours, of images of 32 x 48 with a mean and std of their own."""
    spec = ConvNeXtSpec(depths=(1, 1), dims=(8, 16), stem_stride=2)
    image = ImageRecord(input_size=(3, 32, 48), mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0), crop_pct=1.0)
    architecture = Architecture(spec, num_classes=3)
    weights = Weights(Classifier(Encoder(spec), 3).state_dict(), architecture, image, ("blue", "green", "red"))
    save_weights(tmp_path / "tuned.safetensors", weights, "fcmae")
    return tmp_path / "tuned.safetensors"


def test_a_fine_tuning_has_the_height_and_width_of_its_weights(
    tuned: Path, tmp_path: Path, measured: list[int]
) -> None:
    (tmp_path / "labelled").mkdir()
    write_colors(tmp_path / "labelled", {"red": (200, 40, 40), "blue": (40, 40, 200)}, (8, 8))
    words = [str(tmp_path / "labelled"), "--init", str(tuned), "--device", "cpu", "--out", str(tmp_path / "out")]
    cfg = load(FinetuneConfig, words, prog="x", complete=planning.complete)
    assert cfg.data.image_size == (32, 48) and cfg.data.mean is None
    # The head that is kept has a class that no label here is of.
    kept = load(FinetuneConfig, [*words, "--model.keep_head"], prog="x", complete=planning.complete)
    assert kept.epochs == cfg.epochs


def test_grey_images_are_measured_where_the_weights_are_of_colours(
    tuned: Path, tmp_path: Path, measured: list[int]
) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "xray" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 4096, (40, 60), dtype=np.uint16)
            tifffile.imwrite(tmp_path / "xray" / name / f"{i}.tif", pixels)
    words = [str(tmp_path / "xray"), "--init", str(tuned), "--device", "cpu", "--out", str(tmp_path / "out")]
    cfg = load(FinetuneConfig, [*words, "--data.in_chans", "1"], prog="x", complete=planning.complete)
    assert cfg.data.mean is not None and cfg.data.mean[0] == pytest.approx(2048 / 65535, rel=0.1)
    # These weights have learnt images of such values, as three channels.
    cfg = load(FinetuneConfig, words, prog="x", complete=planning.complete)
    assert (cfg.data.in_chans, cfg.data.mean) == (3, None)


@pytest.mark.parametrize(("bands", "kind"), [(1, "uint16"), (3, "uint16"), (6, "uint8"), (1, "uint8")])
def test_what_is_no_photograph_is_read_as_it_is_beside_weights_of_photographs(
    tuned: Path, tmp_path: Path, measured: list[int], bands: int, kind: str
) -> None:
    weights = read_init(str(tuned), None, None)
    image = weights.image.model_copy(update={"mean": tuple(IMAGENET_MEAN), "std": tuple(IMAGENET_STD)})
    save_weights(tuned, replace(weights, image=image), "fcmae")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "xray" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 200, (40, 60, bands)).astype(kind)
            pixels = pixels[..., 0] if bands == 1 else pixels
            tifffile.imwrite(
                tmp_path / "xray" / name / f"{i}.tif", pixels, photometric="minisblack", planarconfig="contig"
            )
    words = [str(tmp_path / "xray"), "--init", str(tuned), "--device", "cpu", "--out", str(tmp_path / "out")]
    cfg = load(FinetuneConfig, words, prog="x", complete=planning.complete)
    if (bands, kind) == (1, "uint8"):  # shades of grey are read as colours
        assert (cfg.data.in_chans, cfg.data.mean) == (3, None)
    else:
        assert cfg.data.in_chans == bands and cfg.data.mean is not None
        assert cfg.data.mean == pytest.approx([100 / np.iinfo(kind).max] * bands, rel=0.1)


def test_the_stem_of_the_weights_is_reckoned_with(tuned: Path) -> None:
    settings = {"data.path": "x", "out": "o", "model.init": str(tuned), "data.image_size": 224}
    named = {"model.variant": {"depths": [1, 1], "dims": [8, 16]}}
    cfg = options.make(FinetuneConfig, settings | named)
    assert planning._most_memory(cfg, 64) == planning._most_memory(options.make(FinetuneConfig, settings), 64)


def test_held_out_images_count_among_the_hours_of_a_fine_tuning(
    tmp_path: Path, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    colors = {"red": (200, 40, 40), "blue": (40, 40, 200)}
    for folder, nums in (("labelled", (10, 10)), ("tested", (3, 4))):
        (tmp_path / folder).mkdir()
        write_colors(tmp_path / folder, colors, nums)
    found, duration = list[tuple[int, float]](), choices.duration

    def noted(plan: Any, num: int, hours: float, speed: float, most: float = 800, num_evaluated: float = 0) -> None:
        found.append((num, num_evaluated))
        duration(plan, num, hours, speed, most, num_evaluated)

    monkeypatch.setattr(choices, "duration", noted)
    words = ["finetune", "labelled", "--print-config", "true", "--device", "cpu"]
    for more in ([], ["--data.val_path", "tested"], ["--regularization.ema_decay", ".9"]):
        with pytest.raises(SystemExit):  # what was chosen is printed
            cli.main([*words, *more])
    assert found == [(16, 4), (20, 7), (16, 2 * 4)]  # by the average too

"""The study of what a patch that has left shows: each fill is what it says, and arms differ in it alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import randomize

from fcmae.cli import COMMANDS
from fcmae.config import SegmentConfig
from fcmae.heads import Exits
from fcmae.networks.build import make_encoder
from fcmae.networks.spec import ConvNeXtSpec
from fcmae.options import load

sys.path.append(str(Path(__file__).parents[1] / "studies"))
import fills as study

SPEC = ConvNeXtSpec(depths=(1, 1, 1), dims=(4, 6, 8), stem_stride=2)


def model_of(fill: str, tau: float) -> study.Filled:
    model = study.Filled(make_encoder(SPEC), Exits(SPEC.dims, 3, 5, tau), fill)
    randomize(model.encoder)
    randomize(model.head.exits)
    return model.double()


def test_zero_is_what_packed_rows_compute_and_its_share_is_told() -> None:
    model, images = model_of("zero", 1.0).eval(), torch.randn(2, 3, 24, 32, dtype=torch.float64)
    answers = list(model.anytime(images[:1]))
    model.head.tau = float(answers[0].confidence.quantile(0.5))
    plain = study.Anytime(model.encoder, model.head).eval()
    model.computed.clear()
    torch.testing.assert_close(model(images), plain(images), atol=1e-10, rtol=1e-10)
    assert [row[0] for row in model.computed] == [1.0, 1.0] and 0 < model.computed[0][1] < 1


@pytest.mark.parametrize("fill", ["carried", "radial"])
def test_without_a_patch_that_leaves_a_fill_changes_nothing(fill: str) -> None:
    model, images = model_of(fill, 1.0), torch.randn(2, 3, 24, 32, dtype=torch.float64)
    plain = study.Anytime(model.encoder, model.head)
    torch.testing.assert_close(model(images), plain(images))
    torch.testing.assert_close(model.eval()(images), plain.eval()(images))


@pytest.mark.parametrize("fill", ["carried", "radial"])
def test_a_fill_reaches_neighbours_and_learns(fill: str) -> None:
    images = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    model = model_of(fill, 1.0)
    sure = next(model.anytime(images[:1])).confidence
    model.head.tau = float(sure.quantile(0.5))
    filled, zero = model(images), study.Anytime(model.encoder, model.head)(images)
    assert torch.equal(filled[0], zero[0]) and not torch.allclose(filled[1], zero[1])
    filled.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert fill != "radial" or model.head.decay.grad != 0


def test_radial_is_the_mean_of_near_sites() -> None:
    mask = torch.tensor([[[False, True]]])
    layout = study.Radial(mask, torch.tensor(0.5, dtype=torch.float64))
    f = torch.randn(1, 4, 8, 1, dtype=torch.float64)
    identity = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    identity[0, 0, 3, 3] = 1
    found = layout.depthwise_conv(f, identity, None)
    pairs = [((y, x), (1, 4)) for y in range(4) for x in range(4) if abs(y - 1) <= 3 and abs(x - 4) <= 3]
    weights = torch.tensor([-0.25 * ((y - v) ** 2 + (x - u) ** 2) for (y, x), (v, u) in pairs]).double().softmax(0)
    expected = sum(w * f[0, y, x, 0] for w, ((y, x), _) in zip(weights, pairs, strict=True))
    torch.testing.assert_close(found[0, 1, 4, 0], expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(found[:, :, :4], f[:, :, :4])


def test_carried_is_the_downsampling() -> None:
    layout = study.Carried(torch.tensor([[[False, True]]]))
    weight = torch.randn(3, 2, 2, 2)
    f = layout.downsample(torch.randn(1, 4, 8, 2), weight, None)
    spoiled = f.clone()
    spoiled[:, :, 2:] = torch.inf
    assert torch.equal(layout.fill(spoiled), f)


def words_of(job: study.Job) -> tuple[str, ...]:
    """What follows the name of the command or of the fill."""
    return job.words[1 + next(i for i, word in enumerate(job.words) if word in (*study.FILLS, "pretrain")) :]


def test_arms_differ_in_the_fill_alone(tmp_path: Path) -> None:
    jobs = {job.name: job for job in study.jobs(tmp_path, 10, 2)}
    assert len(jobs) == 7
    for name, job in jobs.items():
        cfg = load(COMMANDS["pretrain" if name == "pretrained" else "segment"][0], list(words_of(job)), prog=name)
        assert name == "pretrained" or (isinstance(cfg, SegmentConfig) and cfg.model.tau == 0.8)
    assert set(jobs["carried-1"].words) ^ set(jobs["radial-1"].words) == {
        "carried", "radial", f"--out={tmp_path}/runs/carried-1", f"--out={tmp_path}/runs/radial-1",
    }  # fmt: skip
    (tmp_path / "jobs").mkdir()
    for arm, value in (("zero", 0.5), ("carried", 0.6)):
        for seed in range(2):
            (tmp_path / "jobs" / f"{arm}-{seed}.json").write_text('{"command": "-", "seconds": 60}')
            folder = tmp_path / "runs" / f"{arm}-{seed}"
            folder.mkdir(parents=True)
            (folder / "computed.json").write_text("[1, 0.25]")
            (folder / "metrics.jsonl").write_text(f'{{"step": 1, "epoch": 1, "miou": {value}}}\n')
    first, second, *_ = study.rows(study.collect(tmp_path, list(jobs.values()), 10))
    assert first[1:3] == ["zero", "2"] and second[1] == "carried" and second[4].startswith("+10.0")
    assert first[-1] == second[-1] == "100, 25"

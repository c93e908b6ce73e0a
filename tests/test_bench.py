import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch

import fcmae.bench
import fcmae.masked
import fcmae.timing
import fcmae.training.steps
from fcmae.bench import (
    Candidate,
    Machine,
    Result,
    bench,
    report,
    search,
    survey,
    time_candidate,
)
from fcmae.cli import main
from fcmae.config import BenchConfig, PretrainConfig
from fcmae.options import load
from fcmae.options.problems import ConfigError
from fcmae.processes import Failed

CPU = Machine("cpu", "cpu (test)", "fp32", ("fp32",))


def config(**settings: Any) -> BenchConfig:
    """The smallest step: 8 images of 16 pixels."""
    values = {"batch_size": 8, "device": "cpu", "data.image_size": 16, "seconds": 0.01, "log.trackers": "none"}
    values |= {"model.variant": runs.TINY, "model.stem_stride": 1, "model.mask_patch": 8, "model.decoder_dim": 8}
    words = [word for key, value in (values | settings).items() for word in (f"--{key}", str(value))]
    return load(BenchConfig, words, prog="test")


class Made:
    """Stands in for the measuring: the speed of a candidate is a function of it; 0 runs out of memory."""

    def __init__(self, images_per_s: Callable[[Candidate], float], failure: str = "out of memory") -> None:
        self.images_per_s, self.failure = images_per_s, failure
        self.seen: list[Candidate] = []

    def __call__(self, candidate: Candidate) -> Result:
        self.seen.append(candidate)
        speed = self.images_per_s(candidate)
        if speed == 0:
            return Result(candidate, 64, failure=self.failure)
        return Result(candidate, 64, (64 / speed,), first_s=1.0, memory=10**9)


def find(made: Made, first: Candidate, **options: Any) -> Candidate:
    space = {
        "backends": ["packed", "masked"],
        "precisions": ["bf16"],
        "batch_size": 64,
        "unit": 1,
        "compiled": [True],
    }
    return search(first, made, **(space | options)).candidate


pytestmark = pytest.mark.usefixtures("forgotten")


def test_each_property_is_varied_with_the_best_of_the_ones_before() -> None:
    def speed(candidate: Candidate) -> float:
        factors = {"masked": 2, "bf16": 2, "cudagraphs": 2, 16: 1.5, 32: 1.51}
        found = (candidate.backend, candidate.precision, candidate.compile, candidate.images)
        return math.prod(factors.get(value, 1) for value in found)

    made = Made(speed)
    # 32 images at once gain less than 2 % on 16: noise, and twice the memory.
    best = find(made, Candidate("packed", "fp32", 8), compiled=[True, "cudagraphs"])
    assert best == Candidate("masked", "bf16", 16)
    assert made.seen == [
        Candidate("packed", "fp32", 8),
        Candidate("masked", "fp32", 8),
        Candidate("masked", "bf16", 8),
        Candidate("masked", "bf16", 16),
        Candidate("masked", "bf16", 32),
        Candidate("masked", "bf16", 16, True),
    ]


def test_graphs_are_tried_where_a_step_has_one_part() -> None:
    made = Made(lambda candidate: 2 if candidate.compile == "cudagraphs" else 1)
    for images, expected in ((64, "cudagraphs"), (32, False)):
        first = Candidate("packed", "fp32", images)
        assert find(made, first, unit=None, compiled=["cudagraphs"]).compile == expected
    made = Made(lambda candidate: 1)
    find(made, Candidate("packed", "fp32", 64, "cudagraphs"), unit=1)  # which would be tried with half the images
    assert {candidate.images for candidate in made.seen} == {64}


def test_a_compilation_that_is_configured_is_not_tried_again() -> None:
    made = Made(lambda candidate: 1)
    assert find(made, Candidate("packed", "fp32", 64, True), compiled=[True]).compile is True
    assert len(made.seen) == len(set(made.seen))


def test_fewer_images_at_once_are_tried_when_more_are_not_faster() -> None:
    made = Made(lambda candidate: 100 / candidate.images)
    assert find(made, Candidate("packed", "fp32", 8)).images == 1
    assert [c.images for c in made.seen if c.backend == "packed" and not c.compile] == [8, 8, 16, 4, 2, 1]


def test_images_at_once_are_divisors_of_the_batch() -> None:
    made = Made(lambda candidate: candidate.images)
    assert find(made, Candidate("packed", "fp32", 6), batch_size=36).images == 12
    assert [c.images for c in made.seen if not c.compile] == [6, 6, 6, 12]
    made = Made(lambda candidate: 1 / candidate.images)
    assert find(made, Candidate("packed", "fp32", 12), batch_size=36).images == 3
    assert find(made, Candidate("packed", "fp32", 12), batch_size=36, unit=2).images == 6


def test_images_at_once_stay_where_they_change_what_is_computed() -> None:
    made = Made(lambda candidate: 1.0)
    assert find(made, Candidate("packed", "fp32", 8), unit=None).images == 8
    assert {candidate.images for candidate in made.seen} == {8}


def test_running_out_of_memory_halves_the_images_at_once_or_ends_their_growth() -> None:
    made = Made(lambda candidate: candidate.images if candidate.images <= 8 else 0)
    assert find(made, Candidate("packed", "fp32", 32)) == Candidate("packed", "fp32", 8)
    assert [c.images for c in made.seen if c.backend == "masked"] == [32, 16, 8]


@pytest.mark.parametrize(("failure", "tried"), [("out of memory", [8, 4, 2, 1]), ("no compiler", [8])])
def test_an_error_says_that_nothing_runs_and_why(failure: str, tried: list[int]) -> None:
    made = Made(lambda candidate: 0, failure)
    with pytest.raises(ValueError, match=f"no candidate runs, packed for this reason: {failure}; .*grad_checkpointing"):
        find(made, Candidate("packed", "fp32", 8))
    assert [c.images for c in made.seen if c.backend == "packed"] == tried


def test_the_slower_of_loader_and_model_sets_the_hours() -> None:
    cfg = config(batch_size=64, epochs=100)
    best = Result(Candidate("packed", "fp32", 64), 64, (1.0,), memory=10**9)  # 64 images/s
    fed = replace(best, step_s=(1.0, 1.0, 1.6))  # the hours are of all its steps
    machine = replace(CPU, num_workers=2, loader_images_per_s=500.0, steps_per_epoch=30)
    text = "\n".join(report(cfg, machine, best, fed))
    assert "the model is the limit" in text
    assert "100 epochs of 30 steps: 1.0 hours" in text  # 3000 steps of 1.2 s
    text = "\n".join(report(cfg, replace(machine, loader_images_per_s=32.0), best, fed))
    assert "the data are the limit" in text
    assert "100 epochs of 30 steps: 1.7 hours" in text  # 3000 steps of 2 s
    assert "--data.path" in "\n".join(report(cfg, CPU, best, None))


@pytest.mark.parametrize("configured", [True, False, "auto"])
@pytest.mark.parametrize("compiled", [True, False, "cudagraphs"])
def test_the_printed_flags_are_settings_of_pretraining(compiled: Any, configured: Any) -> None:
    cfg = config(batch_size=64, **{"model.compile": configured})
    images = 64 if compiled == "cudagraphs" else 16  # graphs cannot add up parts
    candidate = Candidate("masked", "bf16", images, compiled)
    fastest = next(report(cfg, CPU, Result(candidate, 64, (1.0,)), None))
    flags = fastest.removeprefix("\nfastest: ").split()
    words = ["--data.path", "photos", "--out", "run", "--batch_size", "64", "--model.compile", str(configured)]
    found = load(PretrainConfig, [*words, *flags], prog="test")
    assert (found.model.backend, found.precision, found.model.compile) == ("masked", "bf16", compiled)
    assert found.batch_size // found.grad_accum == images
    assert ("--model.compile" in flags) == (compiled != configured)


def test_a_step_is_computed_under_several_masks_an_image(tmp_path: Path) -> None:
    settings = {"data.path": runs.write_images(tmp_path), "data.num_workers": 0, "data.masks_per_image": 2}
    cfg = config(**settings)
    assert survey(cfg).steps_per_epoch == 3  # 13 images under 2 masks, in steps of 8
    for from_files in (False, True):
        assert time_candidate(cfg, Candidate("packed", "fp32", 4), from_files).images_per_s > 0


def test_only_the_images_and_the_run_directory_may_be_missing() -> None:
    assert config().out is None
    with pytest.raises(ConfigError, match=r"model.mask_ratio: .*visible"):
        config(**{"model.mask_ratio": 0.99})
    with pytest.raises(ConfigError, match="grad_accum"):
        config(grad_accum=3)


def test_a_candidate_out_of_memory_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(function: Callable[..., Any], cfg: BenchConfig, *args: Any) -> Any:
        if function is fcmae.bench.survey:
            return CPU
        candidate, from_files = args
        assert not from_files
        if candidate.images > 4 or candidate.backend == "masked":
            raise Failed("out of memory")
        return Result(candidate, cfg.batch_size, (0.5, 0.25, 1.0), memory=2 * 10**9)

    monkeypatch.setattr(fcmae.bench, "in_process", fake)
    monkeypatch.setattr(fcmae.bench, "find_spec", lambda name: None)
    bench(config(vary="backend,images"))
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith(("packed", "masked"))]
    numbers = ["16.0", "8.0", "-", "32.0", "0.500", "2.0", "GB"]
    assert rows == [
        ["packed", "fp32", "no", "8", "out", "of", "memory"],
        ["masked", "fp32", "no", "8", "out", "of", "memory"],
        ["packed", "fp32", "no", "4", *numbers],
        ["masked", "fp32", "no", "4", "out", "of", "memory"],
        ["packed", "fp32", "no", "8", "out", "of", "memory"],
        ["packed", "fp32", "no", "2", *numbers],
    ]
    assert "minkowski: MinkowskiEngine is not installed" in out
    assert "fastest: --model.backend packed --precision fp32 --grad_accum 2\n" in out


def test_a_sigterm_ends_it_so_that_it_removes_what_is_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(fcmae.bench, "bench", lambda cfg: seen.append(signal.getsignal(signal.SIGTERM)))
    assert main(["bench", "--config", "pretrain_cpu"]) == 0
    assert callable(seen[0]) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", "--config", "pretrain_cpu"]) == 2
    assert "without a launcher" in capsys.readouterr().err


def test_steps_that_are_timed_are_those_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients flow to every weight, of as many images as the candidate says; the weights stay."""
    seen: list[tuple[int, ...]] = []
    losses: list[float] = []
    loss, update = fcmae.masked.masked_loss, fcmae.training.steps.start_update

    def spy_loss(model: Any, images: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(tuple(images.shape))
        value = loss(model, images, *args, **options)
        losses.append(value.item())
        return value

    def spy_update(accelerator: Any, model: torch.nn.Module, optimizer: Any, mean: torch.Tensor, **options: Any) -> Any:
        assert mean.item() == pytest.approx(sum(losses) / 2)  # of both parts
        losses.clear()
        before = [p.detach().clone() for p in model.parameters()]
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        result = update(accelerator, model, optimizer, mean, **options)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert all(p.grad is None for p in model.parameters())
        return result

    monkeypatch.setattr(fcmae.masked, "masked_loss", spy_loss)
    monkeypatch.setattr(fcmae.training.steps, "start_update", spy_update)
    result = time_candidate(config(seconds=1), Candidate("masked", "fp32", 4), False)
    assert set(seen) == {(4, 3, 16, 16)}
    assert len(result.step_s) >= 3 and min(result.step_s) > 0 and result.memory > 10**7


def test_parts_that_are_left_out_take_as_long_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    loss, update = fcmae.masked.masked_loss, fcmae.training.steps.start_update

    def part(*args: Any, **options: Any) -> Any:
        clock.now += 2
        return loss(*args, **options)

    def optimizer(*args: Any, **options: Any) -> Any:
        clock.now += 5
        return update(*args, **options)

    monkeypatch.setattr(fcmae.masked, "masked_loss", part)
    monkeypatch.setattr(fcmae.training.steps, "start_update", optimizer)
    monkeypatch.setattr(fcmae.timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    result = time_candidate(config(seconds=10), Candidate("packed", "fp32", 2), False)
    assert set(result.step_s) == {4 * 2 + 5} and result.first_s == 4 * 2 + 5
    assert time_candidate(config(), Candidate("packed", "fp32", 8), False).step_s == (2 + 5,)  # slow: one is enough


def test_the_users_images_are_read_as_the_run_reads_them(tmp_path: Path) -> None:
    photos = runs.write_images(tmp_path / "photos")  # 13, one of them held out
    cfg = config(batch_size=4, grad_accum=2, **{"data.path": photos, "data.num_workers": 0, "data.val_share": 0.05})
    machine = survey(cfg)
    assert (machine.device, machine.precision, machine.num_workers, machine.steps_per_epoch) == ("cpu", "fp32", 0, 3)
    assert machine.loader_images_per_s is not None and machine.loader_images_per_s > 0
    assert time_candidate(cfg, Candidate("packed", "fp32", 1), True).images_per_s > 0
    with pytest.raises(ValueError, match="batch_size: 64 is more than the 12 training images"):
        survey(cfg.model_copy(update={"batch_size": 64}))


def test_the_command_times_each_candidate_in_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data.image_size", "64", "--batch_size", "4", "--grad_accum", "2", "--device", "cpu"]
    assert main(["bench", *words, "--seconds", "0.1", "--vary", "none"]) == 0
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("packed") and line.endswith("GB")]) == 1
    assert "fastest: --model.backend packed --precision fp32 --grad_accum 2\n" in out


def test_without_a_recipe_what_is_timed_is_the_run_that_pretrain_would_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = runs.write_images(tmp_path / "photos")
    seen: list[BenchConfig] = []
    monkeypatch.setattr(fcmae.bench, "bench", seen.append)
    assert main(["bench", str(photos), "--hours", "0.01", "--device", "cpu", "--data.num_workers", "0"]) == 0
    (cfg,) = seen
    assert {"data.image_size", "model.variant", "batch_size", "epochs"} <= cfg.chosen.keys() and cfg.batch_size < 4096
    assert cfg.out is None and not (tmp_path / "runs").exists()
    assert main(["bench", "--config", "pretrain_cpu", "--hours", "2"]) == 2
    assert "hours = 2: what fits into them is chosen for images" in capsys.readouterr().err


def test_an_error_that_ends_the_command_is_the_users_to_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> Any:
        raise Failed("no image in photos")

    monkeypatch.setattr(fcmae.bench, "in_process", fail)
    assert main(["bench", "--config", "pretrain_cpu", "--data.path", "photos"]) == 2
    assert capsys.readouterr().err == "fcmae: error: no image in photos\n"


def test_the_mean_rate_counts_slow_steps_as_they_come() -> None:
    result = Result(Candidate("packed", "fp32", 8), 8, (1.0, 1.0, 2.0))
    assert (result.images_per_s, result.mean_images_per_s) == (8, 6)
    assert Result(Candidate("packed", "fp32", 8), 8, failure="out of memory").mean_images_per_s == 0

"""One step on any number of parts is torch's own, waits for nothing, and depends on (seed, step, process) alone."""

from __future__ import annotations

import copy
import json
import math
import random
import weakref
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from hypothesis import given
from hypothesis import strategies as st
from runs import config, forget_accelerator, write_images
from torch import Tensor, nn

from fcmae.data.find import find_images
from fcmae.networks.spec import VARIANTS
from fcmae.pretraining import build_dataset
from fcmae.training import steps as training_steps
from fcmae.training.log import Log
from fcmae.training.optim import due
from fcmae.training.run import RunDirectory
from fcmae.training.session import Session
from fcmae.training.signals import StopSignal
from fcmae.training.steps import (
    StartedStep,
    Step,
    Steps,
    schedule_of,
    seed_step,
    start_update,
)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    forget_accelerator()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 16)


def model_and_batch() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1)).double(), torch.randn(8, 3).double()


def steps_of(
    images: Path, out: Path, accelerator: Accelerator, net: nn.Module, learning_rate: float = 0.1, **settings: object
) -> tuple[Steps, Log]:
    """The steps of a run that reads its images and trains any network on whatever a test makes its loss of."""
    rate = {"optim__base_lr": learning_rate * 256 / 8, "optim__warmup_epochs": 0, "data__val_share": 0, "epochs": 1}
    cfg = config(images, out, batch_size=8, **(rate | settings))
    out.mkdir(exist_ok=True)
    net.encoder = SimpleNamespace(spec=VARIANTS["convnextv2_atto"])  # type: ignore[assignment]  # no BatchNorm
    session = Session(RunDirectory(cfg), accelerator, StopSignal())
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.0, fused=True))
    for group in optimizer.param_groups:
        group |= {"lr_scale": 1.0, "first_step": 0}
    log = Log(cfg, accelerator, schedule_of(cfg, per_epoch=2, start=0), 16)
    dataset = build_dataset(cfg, find_images(cfg.data.path), augment=True)
    return Steps(session, log, model, optimizer, dataset, fingerprint="of the images"), log


def take(step: Step, net: nn.Module, parts: tuple[Tensor, ...]) -> None:
    seen = []
    for part, batch in zip(parts, step.micro_batches(), strict=True):
        seen += batch.index.tolist()
        step.backward(net(part).square().mean())
    assert len(set(seen)) == 8
    step.update()
    step.save()


def plain_step(net: nn.Module, batch: Tensor, clip_grad: float | None = None) -> tuple[float, float]:
    """The same in torch alone: (loss, norm of the gradient)."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = net(batch).square().mean()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), clip_grad or math.inf)
    optimizer.step()
    return loss.item(), norm.item()


@pytest.mark.parametrize("num_micro_batches", [1, 2, 8])
@pytest.mark.parametrize("clip_grad", ["none", 0.01, 100.0])
def test_a_step_is_torch_s_own_in_any_number_of_parts(
    accelerator: Accelerator, images: Path, tmp_path: Path, num_micro_batches: int, clip_grad: str | float
) -> None:
    net, batch = model_and_batch()
    reference = copy.deepcopy(net)
    settings = {"optim__clip_grad": clip_grad, "grad_accum": num_micro_batches}
    steps, log = steps_of(images, tmp_path / "out", accelerator, net, **settings)
    step = next(iter(steps))
    take(step, net, batch.chunk(num_micro_batches))
    log.close()
    loss, norm = plain_step(reference, batch, None if isinstance(clip_grad, str) else clip_grad)
    (line,) = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    assert (step.number, step.lr) == (1, pytest.approx(0.1))
    # The loss and the norm pass through float32.
    assert (line["loss"], line["grad_norm"]) == (pytest.approx(loss, rel=1e-6), pytest.approx(norm, rel=1e-6))
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert ours.grad is None  # cleared for the next step


def test_what_was_computed_of_a_part_without_memory_is_let_go_before_the_step_is_taken_again(
    accelerator: Accelerator, images: Path, tmp_path: Path
) -> None:
    net, _ = model_and_batch()
    steps, log = steps_of(images, tmp_path / "out", accelerator, net)
    step = next(iter(steps))
    kept: list[weakref.ref[Tensor]] = []

    def compute() -> None:
        activations = net(torch.randn(8, 3).double())
        kept.append(weakref.ref(activations))
        if len(kept) == 1:
            step.backward(activations.mean())
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert kept[0]() is None and all(parameter.grad is None for parameter in net.parameters())

    num_micro_batches = 0
    for _ in step.micro_batches():
        num_micro_batches += 1
        with step.accumulate():
            compute()
        if num_micro_batches == 2:
            break
    log.close()
    assert num_micro_batches == 2 and steps.session.cfg.grad_accum == 2


def test_any_other_error_of_a_part_is_raised(accelerator: Accelerator, images: Path, tmp_path: Path) -> None:
    steps, log = steps_of(images, tmp_path / "out", accelerator, model_and_batch()[0])
    step = next(iter(steps))
    next(step.micro_batches())
    with pytest.raises(RuntimeError, match="of the model"), step.accumulate():
        raise RuntimeError("of the model")
    log.close()


def test_the_numbers_of_a_step_are_read_while_the_next_computes(
    accelerator: Accelerator, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading waits for the device: between two steps nothing is read of the one that has just been started."""
    started: list[StartedStep] = []
    read: list[tuple[int, int]] = []
    make, result = StartedStep.__init__, StartedStep.result

    def noted(self: StartedStep, *args: object) -> None:
        make(self, *args)  # type: ignore[arg-type]
        started.append(self)

    def read_now(self: StartedStep) -> object:
        read.append((started.index(self) + 1, len(started)))
        return result(self)

    monkeypatch.setattr(StartedStep, "__init__", noted)
    monkeypatch.setattr(StartedStep, "result", read_now)
    net, batch = model_and_batch()
    seldom = {"log__every_steps": 99, "checkpoint__every_epochs": 9, "epochs": 2}
    steps, log = steps_of(images, tmp_path / "out", accelerator, net, **seldom)
    for step in steps:
        take(step, net, (batch,))
    log.close()
    assert steps.finished
    assert read == [(1, 2), (2, 3), (3, 4), (4, 4)]  # the last one at once, as it is saved


def start(accelerator: Accelerator, net: nn.Module, loss: Tensor, clip_grad: float | None = None) -> StartedStep:
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1, fused=True))
    accelerator.backward(loss)
    return start_update(accelerator, model, optimizer, loss.detach(), clip_grad=clip_grad)


def test_a_signal_to_one_process_is_known_to_all(accelerator: Accelerator) -> None:
    for stop in (True, False):
        net, batch = model_and_batch()
        optimizer = accelerator.prepare(torch.optim.SGD(net.parameters(), lr=0.1, fused=True))
        loss = net(batch).mean()
        accelerator.backward(loss)
        assert start_update(accelerator, net, optimizer, loss.detach(), stop=stop).result().stop is stop


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    accelerator: Accelerator, images: Path, tmp_path: Path, value: float
) -> None:
    net, batch = model_and_batch()
    before = copy.deepcopy(net.state_dict())
    batch[3, 1] = value
    steps, log = steps_of(images, tmp_path / "out", accelerator, net, grad_accum=2)
    with pytest.raises(FloatingPointError, match=r"^step 1: the loss is (nan|inf)$"):
        take(next(iter(steps)), net, batch.chunk(2))
    log.close()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_and_no_other(
    accelerator: Accelerator, value: float, clip_grad: float | None
) -> None:
    net, batch = model_and_batch()
    before = copy.deepcopy(net.state_dict())
    net[2].bias.register_hook(lambda grad: grad * value)  # the loss stays finite
    with pytest.raises(FloatingPointError, match=r"^the gradient is not finite in 2.bias \(1 parameters in all\)$"):
        start(accelerator, net, net(batch).square().mean(), clip_grad).result()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def fp16_step(accelerator: Accelerator, net: nn.Module, optimizer: Any, scale: float = 1.0) -> StartedStep:
    """A step of a loss of which the scaled gradient is `scale` times as large, as a GPU in fp16 would take it."""
    loss = net(torch.ones(1, 4)).sum() * scale
    accelerator.scaler.scale(loss).backward()
    return start_update(accelerator, net, optimizer, loss.detach())


def test_fp16_skips_a_step_that_overflows_and_scales_the_next_loss_down(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Linear(4, 2)
    # The largest scale whose gradient of 1 is finite, so that one of 4 is not.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    monkeypatch.setattr(accelerator, "scaler", scaler)
    monkeypatch.setattr(
        accelerator, "unscale_gradients", lambda optimizer: scaler.unscale_(optimizer.optimizer), raising=False
    )
    optimizer = AcceleratedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), device_placement=False, scaler=scaler)
    before = copy.deepcopy(net.state_dict())
    found = fp16_step(accelerator, net, optimizer, 4.0).result()
    assert math.isfinite(found.loss) and not math.isfinite(found.grad_norm)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert scaler.get_scale() == 2.0**126
    found = fp16_step(accelerator, net, optimizer).result()
    assert found.grad_norm == pytest.approx(math.sqrt(10)) and scaler.get_scale() == 2.0**126
    assert not torch.equal(net.weight, before["weight"])


def test_fp16_ends_a_run_whose_gradient_no_scale_makes_finite(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Linear(4, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.5)
    monkeypatch.setattr(accelerator, "scaler", scaler)
    monkeypatch.setattr(
        accelerator, "unscale_gradients", lambda optimizer: scaler.unscale_(optimizer.optimizer), raising=False
    )
    optimizer = AcceleratedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), device_placement=False, scaler=scaler)
    loss = net(torch.ones(1, 4)).sum()
    scaler.scale(loss * torch.tensor(3e38) * 10).backward()
    with pytest.raises(FloatingPointError, match="not finite however far fp16's loss is scaled down"):
        start_update(accelerator, net, optimizer, loss.detach()).result()


@given(st.integers(1, 40), st.sampled_from(["0.1", "0.25", "0.3", "0.7", "1", "1.5", "3"]), st.integers(1, 30))
def test_something_is_due_at_each_multiple_rounded_up_and_at_the_end(
    steps_per_epoch: int, epochs: str, num_epochs: int
) -> None:
    total = steps_per_epoch * num_epochs
    # In whole fractions; the loop computes in binary, where 23 / (.1 * 23) is less than 10.
    every = Fraction(epochs) * steps_per_epoch
    expected = {math.ceil(every * k) for k in range(1, int(total / every) + 1)} | {total}
    assert {step for step in range(1, total + 1) if due(step, float(epochs) * steps_per_epoch, total)} == expected


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_each_process_draws_its_own(
    accelerator: Accelerator, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(training_steps, "seed_step", lambda *key: seen.append(key))
    steps, log = steps_of(images, tmp_path / "out", accelerator, nn.Linear(1, 1), seed=3)
    with closing(log):
        monkeypatch.setattr(Accelerator, "process_index", 1)
        next(iter(steps))
    assert seen == [(3, 0, 1)]


def test_every_generator_depends_on_seed_step_and_process_alone() -> None:
    found = []
    for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        seed_step(*key)
        found.append(draws())
    assert found[0] == found[4]
    for values in zip(*found[:4], strict=True):
        assert len(set(values)) == 4

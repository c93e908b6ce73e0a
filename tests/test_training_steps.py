"""One step on any number of parts, and what is counted between two lines of the log."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from runs import forget_accelerator
from torch import Tensor, nn

from fcmae.training import loop
from fcmae.training.loop import StepResult, Window, due, optimizer_step


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    forget_accelerator()


def model_and_batch() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1)).double(), torch.randn(8, 3).double()


def take_step(
    accelerator: Accelerator, net: nn.Module, batch: Tensor, num_parts: int = 1, clip_grad: float | None = None
) -> StepResult:
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1, fused=True))
    losses = (model(part).square().mean() for part in batch.chunk(num_parts))
    started = optimizer_step(
        accelerator, model, optimizer, losses, num_parts=num_parts, clip_grad=clip_grad, stop=False
    )
    return started.result()


def plain_step(net: nn.Module, batch: Tensor, clip_grad: float | None = None) -> tuple[float, float]:
    """The same in torch alone: (loss, norm of the gradient)."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = net(batch).square().mean()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), clip_grad or math.inf)
    optimizer.step()
    return loss.item(), norm.item()


@pytest.mark.parametrize("num_parts", [1, 2, 8])
@pytest.mark.parametrize("clip_grad", [None, 0.01, 100.0])
def test_a_step_is_torch_s_own_in_any_number_of_parts(
    accelerator: Accelerator, num_parts: int, clip_grad: float | None
) -> None:
    net, batch = model_and_batch()
    reference = copy.deepcopy(net)
    result = take_step(accelerator, net, batch, num_parts, clip_grad)
    loss, norm = plain_step(reference, batch, clip_grad)
    # The loss and the norm pass through float32.
    assert result == (pytest.approx(loss, rel=1e-6), pytest.approx(norm, rel=1e-6), False)
    for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_gradients_are_cleared_for_the_next_step(accelerator: Accelerator) -> None:
    net, batch = model_and_batch()
    take_step(accelerator, net, batch)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_signal_to_one_process_is_known_to_all(accelerator: Accelerator) -> None:
    net, batch = model_and_batch()
    optimizer = accelerator.prepare(torch.optim.SGD(net.parameters(), lr=0.1, fused=True))
    losses = iter([net(batch).mean()])
    assert optimizer_step(accelerator, net, optimizer, losses, num_parts=1, clip_grad=None, stop=True).result().stop


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(accelerator: Accelerator, value: float) -> None:
    net, batch = model_and_batch()
    before = copy.deepcopy(net.state_dict())
    batch[3, 1] = value
    with pytest.raises(FloatingPointError, match=r"^the loss is (nan|inf)$"):
        take_step(accelerator, net, batch, num_parts=2)
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
        take_step(accelerator, net, batch, clip_grad=clip_grad)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@given(st.integers(1, 40), st.sampled_from(["0.1", "0.25", "0.3", "0.7", "1", "1.5", "3"]), st.integers(1, 30))
def test_something_is_due_at_each_multiple_rounded_up_and_at_the_end(
    steps_per_epoch: int, epochs: str, num_epochs: int
) -> None:
    total = steps_per_epoch * num_epochs
    # In whole fractions; the loop computes in binary, where .1 * 30 is more than 3.
    every = Fraction(epochs) * steps_per_epoch
    expected = {math.ceil(every * k) for k in range(1, int(total / every) + 1)} | {total}
    assert {step for step in range(1, total + 1) if due(step, float(epochs) * steps_per_epoch, total)} == expected


class Clock:
    """time.perf_counter that moves when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_window_counts_images_and_waiting_but_not_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(loop.time, "perf_counter", clock)

    def slow() -> Iterator[int]:
        for number in range(2):
            clock.now += 0.5
            yield number

    window = Window()
    for number in window.timed(slow()):  # type: ignore[arg-type]  # the window does not look into batches
        clock.now += 1.5
        window.add(loss=number, images=10)
    with window.paused():
        clock.now += 60
    assert window.summary() == {"loss": 0.5, "images_per_s": 5.0, "data_wait_s": 1.0, "data_wait_share": 0.25}
    clock.now += 2
    window.add(loss=4.0, images=3)
    assert window.summary() == {"loss": 4.0, "images_per_s": 1.5, "data_wait_s": 0.0, "data_wait_share": 0.0}


def test_on_cuda_the_device_is_not_said_to_wait_while_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is a step ahead: a device that computes for 1.5 s waits for the last half second of the next 2."""
    clock, busy_until = Clock(), 0.0
    monkeypatch.setattr(loop.time, "perf_counter", clock)

    class Event:
        """Stands in for CUDA's: a mark that the device passes when it has done what it was given before."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.passed = max(clock.now, busy_until)

        def elapsed_time(self, later: Event) -> float:
            return (later.passed - self.passed) * 1000

    monkeypatch.setattr(torch.cuda, "Event", Event)

    def slow() -> Iterator[int]:
        for _ in range(3):
            clock.now += 2.0
            yield 0

    window = Window("cuda")
    for _ in window.timed(slow()):  # type: ignore[arg-type]
        busy_until = clock.now + 1.5
        window.add(loss=1.0, images=10)
    # The first batch is waited for by an idle device, for 2 s.
    assert window.summary() == {"loss": 1.0, "images_per_s": 5.0, "data_wait_s": 6.0, "data_wait_share": 0.5}

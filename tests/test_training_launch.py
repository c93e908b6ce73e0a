"""Devices and precision are those of the settings, whatever the environment says to accelerate."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from runs import config

from fcmae.training.launch import closing_trackers, make_accelerator
from fcmae.training.records import last_state

pytestmark = pytest.mark.usefixtures("forgotten")


def test_half_precision_on_a_cpu_is_refused(tmp_path: Path) -> None:
    cfg = config(Path("photos"), tmp_path).model_copy(update={"precision": "fp16"})
    with pytest.raises(ValueError, match="precision = fp16 needs a GPU: use fp32 or bf16"):
        make_accelerator(cfg)


def test_what_an_interrupted_loop_left_skips_no_step(tmp_path: Path) -> None:
    """accelerate's optimizers do nothing between the parts of a step."""
    GradientState()._set_sync_gradients(False)
    make_accelerator(config(Path("photos"), tmp_path))
    assert GradientState().sync_gradients


def test_trackers_are_closed_where_a_run_ends_by_an_error(tmp_path: Path) -> None:
    accelerator = make_accelerator(config(Path("photos"), tmp_path))
    ended: list[bool] = []
    accelerator.trackers = [SimpleNamespace(finish=lambda: ended.append(True))]
    with pytest.raises(FloatingPointError), closing_trackers(accelerator):
        raise FloatingPointError
    assert ended == [True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbored", "log.trackers: tensorbored is none of accelerate's: .*tensorboard.*wandb"),
        ("wandb", "log.trackers: wandb is not installed: `pip install wandb`, or leave it out"),
    ],
)
def test_a_tracker_that_would_be_left_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("fcmae.training.launch.get_available_trackers", lambda: ["tensorboard"])
    cfg = config(Path("photos"), tmp_path)
    with pytest.raises(ValueError, match=message):
        make_accelerator(cfg.model_copy(update={"log": cfg.log.model_copy(update={"trackers": ["tensorboard", name]})}))


def test_automatic_precision_on_a_cpu_is_full(tmp_path: Path) -> None:
    accelerator = make_accelerator(config(Path("photos"), tmp_path))
    assert (accelerator.mixed_precision, accelerator.device.type) == ("no", "cpu")
    assert not list(tmp_path.iterdir())


def test_one_of_several_processes_without_a_gpu_is_named_before_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name, value in {"WORLD_SIZE": "4", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="device = auto: process 3 of 4 finds no GPU that torch can use: mend that"):
        make_accelerator(config(Path("photos"), tmp_path, device="auto"))


@pytest.mark.parametrize(("there", "here", "is_refused"), [(2, 4, True), (4, 4, False), (1, 4, False)])
def test_more_processes_than_gpus_are_refused_but_where_each_is_shown_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: int, here: int, is_refused: bool
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setenv("LOCAL_RANK", str(here - 1))
    cfg = config(Path("photos"), tmp_path, device="auto", precision="fp32", log__trackers="nonsense")
    sentence = (
        "4 processes or more on this machine, and torch finds 2 GPUs: start 2" if is_refused else "none of accelerate's"
    )
    with pytest.raises(ValueError, match=sentence):  # trackers are looked at after that
        make_accelerator(cfg)


def gradient(accelerator: Accelerator) -> tuple[torch.Tensor, object, object]:
    """Of a fixed step, and in what it was computed."""
    torch.manual_seed(0)
    net = accelerator.prepare(torch.nn.Linear(3, 2))
    loss = net(torch.ones(4, 3)).square().mean()
    accelerator.backward(loss)
    state = accelerator.state
    kind = (accelerator.mixed_precision, state.dynamo_plugin.backend, accelerator.distributed_type, accelerator.device)
    return net.weight.grad, loss.dtype, kind


def test_what_accelerate_reads_from_the_environment_changes_no_gradient_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(Path("photos"), tmp_path)
    folder = Path(accelerate.__file__).parent
    source = "".join((folder / name).read_text() for name in ("accelerator.py", "state.py", "utils/dataclasses.py"))
    names = set(re.findall(r"ACCELERATE_[A-Z0-9_]*[A-Z0-9]", source))
    names |= {f"ACCELERATE_DYNAMO_{name}" for name in ("BACKEND", "MODE", "USE_FULLGRAPH", "USE_DYNAMIC")}
    assert len(names) > 25
    values = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "eager",
        "ACCELERATE_FP8_BACKEND": "TE",
        "ACCELERATE_TORCH_DEVICE": "meta",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    }
    expected, *others = gradient(make_accelerator(cfg))
    refused = set()
    for name in sorted(names):
        with monkeypatch.context() as patch:
            patch.setenv(name, values.get(name, "true"))
            try:
                found, *rest = gradient(make_accelerator(cfg))
            except ValueError as error:
                assert str(error).startswith(f"{name} is set in the environment")
                refused.add(name)
            else:
                assert torch.equal(found, expected), name
                assert rest == others, name
    kinds = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")
    assert refused == {f"ACCELERATE_USE_{kind}" for kind in kinds}


def test_processes_wait_for_what_the_first_one_finds_and_learn_of_any_error(tmp_path: Path) -> None:
    """For longer than their collectives do."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, time\n"
        "from contextlib import nullcontext\n"
        "from pathlib import Path\n"
        "from fcmae.training.messages import logging_to\n"
        "from fcmae.training.records import record_end, record_start\n"
        "from datetime import timedelta\n"
        "import torch\n"
        "from accelerate import Accelerator\n"
        "from fcmae.training.launch import ending_together, same_everywhere, share_buffers, waiting_for_all\n"
        "rank, port = int(os.environ['RANK']), int(os.environ['MASTER_PORT'])\n"
        "store = torch.distributed.TCPStore('127.0.0.1', port, 2, rank == 0)\n"  # imports take unlike times
        "given = dict(store=store, rank=rank, world_size=2, timeout=timedelta(seconds=3))\n"
        "torch.distributed.init_process_group('gloo', **given)\n"
        "accelerator = Accelerator(cpu=True)\n"
        "if rank == 0:\n"
        "    record_start(Path(), cpu=True)\n"
        "    log = logging_to(Path('train.log'), lambda: record_end(Path(), 'failed'))\n"
        "else:\n"
        "    log = nullcontext()\n"
        "with log, ending_together(accelerator, None):\n"
        "    print(same_everywhere(accelerator, lambda: time.sleep(4) or 'found'), flush=True)\n"
        "    with waiting_for_all(accelerator):\n"
        "        time.sleep(4 * accelerator.process_index)\n"
        "    norm = torch.nn.BatchNorm1d(2)\n"
        "    norm.running_mean += 1 + accelerator.process_index\n"
        "    share_buffers(norm)\n"
        "    assert norm.running_mean.tolist() == [1, 1]\n"
        "    if accelerator.process_index:\n"
        "        raise LookupError('no such kernel')\n"
        "    time.sleep(600)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joined = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env=os.environ | joined | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [out for out, _ in said] == ["found\n", "found\n"]
    first, second = (process.returncode for process in started)
    # Torch's own threads may abort a process that ends by an exception: it has said why, and is none that succeeded.
    assert first == 2 and second in (1, -signal.SIGABRT), (first, second, said)
    assert "fcmae: error: process 1 failed: no such kernel" in said[0][1]
    assert last_state(tmp_path) == "failed"
    assert "LookupError: no such kernel" in said[1][1]

"""Several nodes: network namespaces of this machine, joined by a bridge, each with a launcher of its own."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import requires_time
from runs import assert_same_metrics, flags, forget_accelerator, losses, start, write_images
from runs import ended as all_ended

from fcmae import cli
from fcmae.training import checkpoint

pytestmark = [requires_time, pytest.mark.usefixtures("one_thread")]

SCRIPT = Path(__file__).parents[1] / "pretrain.py"


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


class Nodes:
    """Namespaces that reach each other at 10.213.0.1, .2, ... over a bridge, which is in one of its own."""

    def __init__(self, number: int) -> None:
        self.names = [f"fcmae{os.getpid()}n{i}" for i in range(number)]
        self.switch = f"fcmae{os.getpid()}sw"
        self.started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Nodes:
        for name in (self.switch, *self.names):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        for i, name in enumerate(self.names):
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"port{i}", "netns", self.switch)
            ip("-n", self.switch, "link", "set", f"port{i}", "master", "bridge", "up")
            ip("-n", name, "address", "add", f"10.213.0.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            self.kill(process)
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def start(self, node: int, launch: Sequence[str], words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """A launcher on a node."""
        inside = ["ip", "netns", "exec", self.names[node], sys.executable, "-m"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", **OWN_STORE}
        words = [*inside, *launch, str(SCRIPT), *words]
        with log.open("wb") as file:
            process = subprocess.Popen(words, env=environment, stdout=file, stderr=file)
        self.started.append(process)
        return process

    @staticmethod
    def kill(process: subprocess.Popen[bytes]) -> None:
        """A node that is gone: its launcher and all that this has started, at once."""
        if process.poll() is None:
            launcher = psutil.Process(process.pid)
            for each in (launcher, *launcher.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        process.wait()


@pytest.fixture(scope="module")
def allowed() -> None:
    """Skips where namespaces cannot be made, or fails: FCMAE_REQUIRE_NODES=1."""
    reason = None
    if os.geteuid() != 0:
        reason = "network namespaces need root"
    elif shutil.which("ip") is None:
        reason = "network namespaces need the ip command of iproute2"
    else:
        tried = Nodes(1)
        try:
            tried.__enter__()
        except subprocess.CalledProcessError as error:
            reason = f"no network namespaces can be made: {error.stderr.strip()}"
        finally:
            tried.__exit__()
    if reason is not None:
        (pytest.fail if os.environ.get("FCMAE_REQUIRE_NODES") else pytest.skip)(reason)


@pytest.fixture
def nodes(allowed: None) -> Iterator[Callable[[int], Nodes]]:
    entered: list[Nodes] = []

    def make(number: int) -> Nodes:
        entered.append(Nodes(number))  # before it is made: what of it was is removed
        return entered[-1].__enter__()

    yield make
    for each in entered:
        each.__exit__()


def fixed(number: int, node: int) -> list[str]:
    """torchrun's words for nodes that are all there."""
    words: dict[str, Any] = {"--nnodes": number, "--node-rank": node, "--nproc-per-node": 1, "--master-port": 29500}
    words |= {"--master-addr": "10.213.0.1", "--local-addr": f"10.213.0.{node + 1}"}
    return ["torch.distributed.run", *(str(word) for pair in words.items() for word in pair)]


def by_accelerate(number: int, node: int) -> list[str]:
    """accelerate's for the same."""
    words: dict[str, Any] = {"--num_machines": number, "--num_processes": number, "--machine_rank": node}
    words |= {"--main_process_ip": "10.213.0.1", "--main_process_port": 29500}
    return ["accelerate.commands.launch", "--multi_gpu", *(str(word) for pair in words.items() for word in pair)]


def elastic(least: int, most: int, node: int) -> list[str]:
    """torchrun's words for nodes that may come and go, all but the first, which keeps what they agree on."""
    words = ["torch.distributed.run", "--nnodes", f"{least}:{most}", "--local-addr", f"10.213.0.{node + 1}"]
    words += ["--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    return [
        *words,
        "--rdzv-endpoint",
        "10.213.0.1:29400",
        "--rdzv-id",
        "test",
        "--rdzv-conf",
        f"last_call_timeout=3,is_host={node == 0}",
    ]


def run(images: Path, out: Path, **changed: Any) -> None:
    """One process, this one."""
    assert cli.main(["pretrain", *flags(images, out, **changed)]) == 0
    forget_accelerator()


def wait_until(
    condition: Callable[[], Any], started: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], timeout: float = 300
) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        alive = all(process.poll() is None for process in started)
        assert alive and time.monotonic() < deadline, "\n".join(log.read_text() for log in logs)
        time.sleep(0.02)


def ended(process: subprocess.Popen[bytes], log: Path, timeout: float = 300) -> int:
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        logs = "\n".join(f"{each}:\n{each.read_text()}" for each in sorted(log.parent.glob("*.log")))
        raise AssertionError(f"{log.name}: it goes on after {timeout} s\n{logs}") from None


# As docs/howto.md says: a store for each start, or the next one may read addresses of processes that are gone.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
SLOW_LINK = ("tbf", "rate", "4mbit", "burst", "32kbit", "latency", "400ms")
OPTIONS: dict[str, Any] = {"batch_size": 6, "epochs": 10, "data__val_share": 0, "checkpoint__every_epochs": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("nodes") / "images", 12)


@pytest.fixture(scope="module")
def alone(images: Path) -> Path:
    """The run of one process: 20 steps."""
    run(images, images.parent / "alone", **OPTIONS)
    return images.parent / "alone"


def test_nodes_train_as_one_process(nodes: Callable[[int], Nodes], images: Path, alone: Path, tmp_path: Path) -> None:
    two, words = nodes(2), flags(images, tmp_path / "out", **OPTIONS)
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    started = [two.start(i, by_accelerate(2, i), words, logs[i]) for i in range(2)]
    assert [ended(*each) for each in zip(started, logs, strict=True)] == [0, 0]
    assert "on 2 x cpu" in logs[0].read_text()
    assert_same_metrics(tmp_path / "out", alone, rel=1e-4)


def test_the_nodes_that_are_left_go_on_from_the_last_checkpoint_in_the_same_order(
    nodes: Callable[[int], Nodes], images: Path, tmp_path: Path
) -> None:
    three, out = nodes(3), tmp_path / "out"
    words = flags(images, out, **OPTIONS | {"epochs": 40})
    logs = [tmp_path / f"{i}.log" for i in range(3)]
    started = [three.start(i, elastic(2, 3, i), words, logs[i]) for i in range(3)]
    wait_until(lambda: checkpoint.steps(out), started, logs)
    three.kill(started[2])
    assert [ended(*each) for each in zip(started[:2], logs[:2], strict=True)] == [0, 0]
    text = (out / "train.log").read_text()
    assert "on 3 x cpu" in text
    assert "resuming after step" in text
    assert "on 2 x cpu" in text
    assert [step for step, _ in losses(out)] == list(range(1, 81))
    whole = tmp_path / "whole"
    run(images, whole, **OPTIONS | {"epochs": 40})
    assert dict(losses(out)) == pytest.approx(dict(losses(whole)), rel=1e-3)


def test_a_link_that_is_slow_or_away_for_seconds_changes_nothing(
    nodes: Callable[[int], Nodes], images: Path, alone: Path, tmp_path: Path
) -> None:
    two, out = nodes(2), tmp_path / "out"
    ip("netns", "exec", two.switch, "tc", "qdisc", "add", "dev", "port1", "root", *SLOW_LINK)
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    started = [two.start(i, fixed(2, i), flags(images, out, **OPTIONS), logs[i]) for i in range(2)]
    wait_until(lambda: checkpoint.steps(out), started, logs)
    ip("-n", two.switch, "link", "set", "port1", "down")
    time.sleep(3)
    ip("-n", two.switch, "link", "set", "port1", "up")
    assert [ended(*each) for each in zip(started, logs, strict=True)] == [0, 0]
    assert "on 2 x cpu" in logs[0].read_text()
    assert_same_metrics(out, alone, rel=1e-4)


def one_each(
    two: Nodes, words: Sequence[str], logs: Sequence[Path], own: tuple[Path, str] | None = None
) -> list[int | None]:
    """The exit statuses of a process on each of two nodes, without launchers, of which one would end the other.

    own: a folder in whose place the second node has an empty disk, and what its shell does then.
    """
    places = [partial(_on_node, name, rank, own if rank else None) for rank, name in enumerate(two.names)]
    return all_ended([start(["pretrain", *words], log, prepare=on) for log, on in zip(logs, places, strict=True)], 60)


def _on_node(name: str, rank: int, own: tuple[Path, str] | None) -> None:
    system = ctypes.CDLL(None, use_errno=True)
    with Path("/var/run/netns", name).open() as space:
        assert system.setns(space.fileno(), 0) == 0
    if own is not None:
        folder, then = own
        assert system.unshare(0x20000) == 0  # CLONE_NEWNS
        mounts = f"mount --make-rprivate / && mount -t tmpfs -o size=1m none {folder} && {then}"
        subprocess.run(["sh", "-c", mounts], check=True)
    os.environ |= {"MASTER_ADDR": "10.213.0.1", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "eth0"}


def test_a_node_without_the_images_ends_all_with_its_sentence(
    nodes: Callable[[int], Nodes], images: Path, tmp_path: Path
) -> None:
    """The first node lists the images; another one cannot read them."""
    two, missing = nodes(2), tmp_path / "missing"
    shutil.copytree(images, missing)
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in sorted(missing.iterdir())))
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    words = flags(listed, tmp_path / "out", **OPTIONS)
    assert one_each(two, words, logs, (missing, "true")) == [2, 2]
    sentence = f"data.path: 16 files drawn in a row cannot be used, the first is {missing}"
    assert f"error: process 1 failed: {sentence}" in logs[0].read_text()
    assert f"error: {sentence}" in logs[1].read_text()


@pytest.mark.parametrize(
    ("begun", "then", "sentence"),
    [
        (True, "true", ": process 1 finds step 0 there and process 0 step 20: put it on storage that all share"),
        (False, "touch {out}/mine", " is not empty and holds no run of fcmae"),
        (False, "head -c 1040384 /dev/zero > {out}/.tmp-full", "do not fit, as the disk has"),
    ],
    ids=["not shared", "of something else", "full"],
)
def test_a_run_directory_that_one_node_cannot_use_ends_all_with_the_sentence(
    nodes: Callable[[int], Nodes], images: Path, alone: Path, tmp_path: Path, begun: bool, then: str, sentence: str
) -> None:
    two, out = nodes(2), tmp_path / "out"
    if begun:
        shutil.copytree(alone, out)
    else:
        out.mkdir()
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    assert one_each(two, flags(images, out, **OPTIONS), logs, (out, then.format(out=out))) == [2, 2]
    for log in logs:
        assert sentence in log.read_text()
        assert str(out) in log.read_text()


def test_a_signal_to_one_node_stops_all_after_a_saved_step(
    nodes: Callable[[int], Nodes], images: Path, tmp_path: Path
) -> None:
    two, out = nodes(2), tmp_path / "out"
    words = flags(images, out, **OPTIONS | {"epochs": 999, "checkpoint__every_epochs": 999})
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    started = [two.start(i, fixed(2, i), words, logs[i]) for i in range(2)]
    wait_until(lambda: (out / "metrics.jsonl").exists(), started, logs)
    started[1].send_signal(signal.SIGTERM)
    # The process of the other node has had no signal, and ends with this one's status: its launcher says so.
    assert [ended(*each) for each in zip(started, logs, strict=True)] == [1, 1]
    assert "exitcode  : 143" in logs[0].read_text()
    ((step, _),) = checkpoint.steps(out).items()
    assert f"after step {step}; the same command resumes" in (out / "train.log").read_text()


def test_a_batch_that_the_nodes_cannot_share_is_refused_on_each(
    nodes: Callable[[int], Nodes], images: Path, tmp_path: Path
) -> None:
    two = nodes(2)
    words = flags(images, tmp_path / "out", **OPTIONS | {"batch_size": 5})
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    assert one_each(two, words, logs) == [2, 2]
    for log in logs:
        assert "batch_size" in log.read_text()
    assert not (tmp_path / "out").exists()


SRUN = """\
import os, signal, subprocess, sys
started = []
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in started])
words = [word for word in sys.argv[1:] if not word.startswith("--kill-on")]
for i in range(int(os.environ["SLURM_NTASKS"])):
    started.append(subprocess.Popen(words, env=os.environ | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}))
sys.exit(max(task.wait() for task in started))
"""
SCONTROL = """\
import os, sys
if sys.argv[1:] == ["show", "hostnames", "node[1-2]"]:
    print("localhost\\nother")
elif sys.argv[1] == "requeue":
    open(os.environ["REQUEUED"], "a").write(sys.argv[2])
else:
    sys.exit(1)
"""


# Begins, and fails when it is warned.
FAILING = """\
import os, pathlib, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(2))
pathlib.Path(os.environ["REQUEUED"] + ".begun" + os.environ["RANK"]).touch()
time.sleep(60)
"""
SBATCH = str(Path(__file__).parents[1] / "docs" / "pretrain.sbatch")


def slurm(folder: Path, **programs: str) -> tuple[dict[str, str], Path]:
    """The environment of a job of two tasks here, where srun and scontrol are ours; and where requeueing writes."""
    place, requeued = folder / "bin", folder / "requeued"
    place.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, **programs}.items():
        (place / name).write_text(f"#!{sys.executable}\n{text}")
        (place / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4321",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "REQUEUED": str(requeued),
    }
    path = f"{place}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | job | {"PATH": path, "OMP_NUM_THREADS": "1"}, requeued


def test_a_job_under_slurm_that_fails_after_the_warning_is_not_queued_again(tmp_path: Path) -> None:
    environment, requeued = slurm(tmp_path, fcmae=FAILING)
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        job = subprocess.Popen(["bash", SBATCH, "pretrain"], env=environment, stdout=file, stderr=file)
        try:
            wait_until(lambda: len(list(tmp_path.glob("requeued.begun*"))) == 2, [job], [log])
            job.send_signal(signal.SIGUSR1)
            assert ended(job, log) == 2, log.read_text()
        finally:
            Nodes.kill(job)
    assert not requeued.exists()


def test_a_job_under_slurm_that_is_warned_saves_and_goes_back_into_the_queue(images: Path, tmp_path: Path) -> None:
    out, (environment, requeued) = tmp_path / "out", slurm(tmp_path)
    options = OPTIONS | {"epochs": 60, "checkpoint__every_epochs": 999}
    words = ["bash", SBATCH, "pretrain", *flags(images, out, **options)]
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        job = subprocess.Popen(words, env=environment, stdout=file, stderr=file)
        try:
            wait_until(lambda: len(losses(out)) > 2 if (out / "metrics.jsonl").exists() else False, [job], [log])
            job.send_signal(signal.SIGUSR1)
            assert ended(job, log) == 0, log.read_text()
        finally:
            Nodes.kill(job)
    assert requeued.read_text() == "4321"
    assert 2 < max(checkpoint.steps(out)) < 120
    (start,) = json.loads((out / "environment.json").read_text())
    assert (start["num_processes"], start["num_nodes"], start["job"]) == (2, 2, "4321")
    requeued.unlink()
    again = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert "on 2 x cpu" in again.stderr
    assert [step for step, _ in losses(out)] == list(range(1, 121))
    assert not requeued.exists()

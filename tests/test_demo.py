"""The demo's split, its choice of labels, and how it is stopped; the demo itself is run by `make demo`."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("elpv_dataset")
spec = importlib.util.spec_from_file_location("demo_run", Path(__file__).parents[1] / "demo" / "run.py")
assert spec is not None
assert spec.loader is not None
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)


def test_training_and_test_cells_are_whole_blocks_of_the_list() -> None:
    training, test = demo.split_blocks(2624)
    assert sorted(training + test) == list(range(2624))
    chosen = set(test)
    changes = sum((i in chosen) != (i + 1 in chosen) for i in range(2623))
    assert changes <= 2 * demo.TEST_BLOCKS
    assert len(test) == pytest.approx(2624 * demo.TEST_BLOCKS / demo.NUM_BLOCKS, abs=demo.TEST_BLOCKS)


def test_few_labels_keep_the_proportions_and_stay_in_training() -> None:
    paths, labels = demo.read_dataset()
    assert len(paths) == 2624
    assert all(path.is_file() for path in paths)
    training, _ = demo.split_blocks(len(paths))
    few = demo.few_labels(training, labels, 100, seed=0)
    assert len(few) == 100
    assert set(few) <= set(training)
    share = Counter(labels[i] for i in training)["defective"] / len(training)
    assert Counter(labels[i] for i in few)["defective"] == round(100 * share)
    assert few == demo.few_labels(training, labels, 100, seed=0) != demo.few_labels(training, labels, 100, seed=1)


def test_a_table_of_images_where_pretraining_helps_stands_beside() -> None:
    text = demo.where_it_helps()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "50 labels a class" in line]
    assert [row[2] for row in rows] == ["pixels:32", "histogram:8", "pixels:1", "scratch", "pretrained"]
    assert rows[-1][-2] == "better" and {row[-2] for row in rows[:3]} == {"worse"} and "make demo-long" in text
    tutorial = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
    assert "\n".join(line for line in text.splitlines() if line.startswith("|")) in tutorial


# Stands in for a command that trains: see fcmae.training.signals.StopSignal.
COMMAND = """#!{python}
import os, signal, sys, time
received = []
def note(number, frame):
    if received and number == signal.SIGINT:
        raise KeyboardInterrupt
    received.append(number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, note)
print("ready", os.getpid(), flush=True)
while not received:
    time.sleep(0.01)
print("noted", flush=True)
time.sleep({step_s})
print("saved", flush=True)
sys.exit({{signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}}[received[0]])
"""


def start_demo(tmp_path: Path, step_s: float) -> tuple[subprocess.Popen[str], int]:
    """A process that runs one command of the demo, in a group of its own, and the command's process id."""
    command = tmp_path / "command"
    command.write_text(COMMAND.format(python=sys.executable, step_s=step_s))
    command.chmod(0o755)
    code = (
        f"import runpy, sys; sys.executable = {str(command)!r}; "
        f"runpy.run_path({demo.__file__!r})['fcmae']('pretrain', 'photos'); print('went on')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["\n", "$ fcmae pretrain photos\n"]
    ready, pid = process.stdout.readline().split()
    assert ready == "ready"
    return process, int(pid)


STATUSES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}


@pytest.mark.parametrize(
    ("to", "number"),
    [
        *((to, number) for to in ("demo", "group") for number in STATUSES),
        # Not SIGUSR1: the command's status is then that of a finished one.
        *(("command", number) for number in (signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_a_stopped_demo_lets_its_command_save_and_ends_there(tmp_path: Path, to: str, number: signal.Signals) -> None:
    process, command = start_demo(tmp_path, step_s=0.3)
    if to == "group":
        os.killpg(process.pid, number)
    else:
        os.kill(command if to == "command" else process.pid, number)
    out, error = process.communicate(timeout=60)
    assert out.split() == ["noted", "saved"]
    assert (process.returncode, error) == (STATUSES[number], "")


@pytest.mark.parametrize("to", ["demo", "group"])
def test_a_second_interrupt_ends_the_demo_at_once(tmp_path: Path, to: str) -> None:
    process, _ = start_demo(tmp_path, step_s=600)
    send = os.killpg if to == "group" else os.kill
    send(process.pid, signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "noted\n"
    send(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "encoder").mkdir()
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        demo.main()
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]

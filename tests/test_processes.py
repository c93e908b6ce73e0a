import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fcmae.processes import Failed, each_in_process, in_process


def test_what_a_process_returns_comes_back() -> None:
    assert in_process(max, 2, 3) == 3


@pytest.mark.parametrize(
    ("function", "argument", "reason"),
    [
        (bytearray, 2**62, "^out of memory$"),
        (signal.raise_signal, signal.SIGKILL, "^out of memory, or killed"),
        (signal.raise_signal, signal.SIGABRT, "^Python was killed by SIGABRT$"),
        (os._exit, 3, "^ended with status 3$"),
        (os.stat, "/nowhere", "No such file"),
        (len, 3, "^TypeError: object of type 'int' has no len"),
    ],
)
def test_a_process_that_fails_says_why(function: Callable[[Any], Any], argument: Any, reason: str) -> None:
    with pytest.raises(Failed, match=reason):
        in_process(function, argument)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_ends_with_the_one_that_started_it(number: signal.Signals, tmp_path: Path) -> None:
    code = "import time; from fcmae.processes import in_process\nif __name__ == '__main__': in_process(time.sleep, 600)"
    (tmp_path / "main.py").write_text(code)  # spawn needs a file
    started = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], stderr=subprocess.DEVNULL)
    parent = psutil.Process(started.pid)
    while not (children := parent.children(recursive=True)):
        assert started.poll() is None
        time.sleep(0.05)
    time.sleep(1)  # until it sleeps too
    started.send_signal(number)
    assert started.wait(20) != 0
    assert not psutil.wait_procs(children, timeout=20)[1]


def _some(number: int) -> Iterator[int]:
    yield from range(number)
    os._exit(3)


def test_what_came_before_a_failure_is_not_lost() -> None:
    found = []
    with pytest.raises(Failed, match=r"^ended with status 3$"):
        found.extend(each_in_process(_some, 2))  # extend keeps what it had
    assert found == [0, 1]


def test_a_process_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(Failed, match=r"^it was not done after 0\.5 s$"):
        list(each_in_process(time.sleep, 60, timeout_s=0.5))


def test_a_script_without_a_guard_is_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import math\nfrom fcmae.processes import in_process\n"
        "print('begun')\nprint(in_process(math.sqrt, 4.0), __file__, __spec__)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["begun", f"2.0 {script} None"]


def test_a_notebook_is_left_without_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    assert in_process(max, 2, 3) == 3
    assert not hasattr(sys.modules["__main__"], "__file__")

"""A measurement of speed is alone on the machine; other work goes on side by side."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from pytest_kld.servers.quiet import alone, at_work

HOLD = (
    "import sys; from pathlib import Path; from pytest_kld.servers.quiet import alone\n"
    "with alone(Path(sys.argv[1]), lambda: None): print('held', flush=True); sys.stdin.read()"
)


def test_work_goes_on_beside_work(tmp_path: Path) -> None:
    with at_work(tmp_path), at_work(tmp_path):
        pass


def test_a_measurement_of_speed_waits_for_work_and_says_so(tmp_path: Path) -> None:
    waiting, measured = threading.Event(), threading.Event()

    def measure() -> None:
        with alone(tmp_path, waiting.set):
            measured.set()

    with at_work(tmp_path):
        thread = threading.Thread(target=measure)
        thread.start()
        assert waiting.wait(30)
        assert not measured.is_set()
    thread.join(30)
    assert measured.is_set()


def test_work_waits_for_the_measurement_of_another_process_and_is_freed_when_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        began = threading.Event()

        def work() -> None:
            with at_work(tmp_path):
                began.set()

        thread = threading.Thread(target=work)
        thread.start()
        assert not began.wait(0.3)
        other.kill()
        thread.join(30)
        assert began.is_set()

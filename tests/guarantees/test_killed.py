"""Processes that are killed at any point: the outcome is an error, nothing half-written is read, nothing is left."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from guarantees.campaign import REAL, SEEDS, Campaign, interrupt

pytestmark = pytest.mark.slow

Figures = dict[str, dict[str, Any]]
each_engine = pytest.mark.parametrize("campaign", ["transformers", "tiny", *REAL], indirect=True)
served = pytest.mark.parametrize("campaign", ["tiny", *REAL], indirect=True)
in_process = pytest.mark.parametrize("campaign", ["transformers"], indirect=True)


DEATH = "ended with exit code 137: it was killed, as the system does when memory runs out"
REAL_DEATH = r"ServerError: .*(ended with exit code|does not answer|answered 5\d\d)[\s\S]*\.log"
"""What is said of a server whose worker was killed: it may end by itself, or answer with an error."""


@served
def test_a_server_killed_at_a_random_point_of_a_capture_is_an_error_and_the_rerun_goes_on(
    campaign: Campaign, undisturbed: Figures
) -> None:
    """Each try kills what the try before left; of a real server any process, and a gate may do without that one."""
    chance, errors = random.Random(f"server of {campaign.engine}"), 0
    for _ in range(SEEDS):
        before = campaign.windows()
        process = campaign.start()
        campaign.wait_for_windows(before + chance.randrange(1, 5), process)
        time.sleep(chance.random() * 0.2)
        killed = ""
        for server in campaign.servers():
            one = chance.choice([server, *server.children(recursive=True)])
            killed = " ".join(one.cmdline()).strip()[-70:]
            one.kill()
        output = campaign.output(process)
        print(f"{campaign.engine}: {before} windows and more, killed {killed!r}: {campaign.result()['outcome']}")
        if process.returncode == 0:
            assert campaign.result()["figures"] == undisturbed[campaign.engine]
            shutil.rmtree(campaign.cache)
            continue
        assert killed, output
        assert (process.returncode, "1 error in" in output) == (1, True), output
        assert campaign.result()["outcome"] == "error"
        assert re.search(REAL_DEATH if campaign.environment else DEATH, output), output
        campaign.require_nobody()
        campaign.require_whole()
        errors += 1
    assert errors or (campaign.environment and SEEDS < 3)  # its helpers may be hit twice
    campaign.completes(undisturbed[campaign.engine])


@pytest.fixture
def memory_limit() -> Iterator[Callable[[int], None]]:
    """A function that lets the kernel kill a process, and what it starts from now on, beyond another 200 MB."""
    version_1, version_2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    root, limit = (version_1, "memory.limit_in_bytes") if version_1.is_dir() else (version_2, "memory.max")
    group = root / f"pytest-kld-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text("200M")
    except OSError as error:
        pytest.skip(f"memory cannot be limited here: {error}")

    def move(pid: int) -> None:
        (group / "cgroup.procs").write_text(str(pid))

    yield move
    for _ in range(100):
        with suppress(OSError):  # its last process is not gone yet
            group.rmdir()
            return
        time.sleep(0.1)


@served
def test_a_server_that_runs_out_of_memory_is_an_error_that_says_so(
    memory_limit: Callable[[int], None], campaign: Campaign, undisturbed: Figures
) -> None:
    """A real server does while it boots, because it needs more than that."""
    process = campaign.start()
    if campaign.environment is None:
        campaign.wait_for_windows(3, process)
    while not campaign.servers() and process.poll() is None:
        time.sleep(0.05)
    (server,) = campaign.servers()
    memory_limit(server.pid)
    campaign.fault("grows")
    output = campaign.output(process)
    assert (process.returncode, campaign.result()["outcome"]) == (1, "error"), output
    assert DEATH in output
    campaign.completes(undisturbed[campaign.engine])


@each_engine
def test_pytest_killed_at_a_random_point_leaves_nothing_that_is_read_and_the_rerun_goes_on(
    campaign: Campaign, undisturbed: Figures
) -> None:
    """At any time from its start on, not only in a capture."""
    chance = random.Random(campaign.engine)
    for _ in range(SEEDS):
        process = campaign.start()
        campaign.wait_for_any_point(process, chance)
        ended = process.poll() is not None
        process.kill()
        process.wait()
        print(f"{campaign.engine}: {'had ended' if ended else 'killed'} with {campaign.windows()} windows")
        campaign.require_nobody()
        campaign.require_whole()
        if ended:
            shutil.rmtree(campaign.cache)
    campaign.completes(undisturbed[campaign.engine])


@pytest.mark.parametrize("signals", [("SIGTERM",), ("SIGINT",), ("SIGINT", "SIGINT")], ids="-".join)
@each_engine
def test_a_session_that_is_told_to_end_says_what_it_did_not_measure(
    signals: tuple[str, ...], campaign: Campaign, undisturbed: Figures
) -> None:
    process = campaign.start()
    campaign.wait_for_windows(3, process)
    for index, name in enumerate(signals):
        time.sleep(0.3 * index)
        interrupt(process, signal.Signals[name])
    output = campaign.output(process)
    assert process.returncode != 0
    campaign.require_nobody()
    campaign.require_whole()
    if len(signals) == 1:
        assert process.returncode == pytest.ExitCode.INTERRUPTED, output
        assert campaign.result()["outcome"] == "error"
        assert campaign.result()["message"].startswith("not measured: the session ended before this test finished")
        assert "INCOMPLETE: " in output
        assert ("ended by SIGTERM" in output) == (signals == ("SIGTERM",))
        assert list(campaign.cache.glob("spool/*")) == []
    campaign.completes(undisturbed[campaign.engine])


@pytest.mark.parametrize("campaign", ["transformers", *REAL], indirect=True)
def test_a_worker_of_xdist_that_is_killed_in_a_capture_is_an_error_and_the_rerun_goes_on(
    campaign: Campaign, undisturbed: Figures
) -> None:
    process = campaign.start("-n1")
    campaign.wait_for_windows(3, process)
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    output = campaign.output(process)
    assert (process.returncode, campaign.result()["outcome"]) == (1, "error"), output
    assert "crashed" in campaign.result()["message"]
    campaign.completes(undisturbed[campaign.engine])


@in_process
def test_the_lock_of_a_killed_process_is_free_and_a_living_one_is_waited_for(
    campaign: Campaign, undisturbed: Figures
) -> None:
    process = campaign.start()
    campaign.wait_for_windows(3, process)
    locks = list(campaign.cache.glob("captures/*.lock"))
    assert locks
    process.send_signal(signal.SIGSTOP)
    second = campaign.start()
    campaign.wait_for_words("waiting for another process", second)
    time.sleep(2)
    assert second.poll() is None
    process.kill()
    output = campaign.output(second)
    assert second.returncode == 0, output
    assert "waiting for another process, which is making the capture" in output
    assert campaign.result()["figures"] == undisturbed["transformers"]


@served
def test_eight_processes_that_want_one_entry_make_it_once(campaign: Campaign, undisturbed: Figures) -> None:
    campaign.fault("")
    processes = [campaign.start(f"--kld-json={number}.json") for number in range(8)]
    outputs = [campaign.output(process) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, outputs[0]
    made = sum(len(re.findall(f"kld: capture .*: {campaign.count}/{campaign.count}", output)) for output in outputs)
    assert made == 2, outputs
    figures = [campaign.result(f"{number}.json")["figures"] for number in range(8)]
    assert figures == [undisturbed[campaign.engine]] * 8
    campaign.require_nobody()
    campaign.require_tidy()

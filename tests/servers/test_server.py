"""Servers boot, explain their failures, and leave nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import requests
from scripted import SCRIPT, command

from pytest_kld.errors import ServerError
from pytest_kld.servers.server import Server, ServerCommand, free_port


def descendants(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    return all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in processes)


@pytest.mark.parametrize("behaviour", ["healthy", "late", "stubborn", "orphans"])
def test_a_stopped_server_is_gone_with_all_that_it_started(behaviour: str, tmp_path: Path) -> None:
    server = Server(command(behaviour, tmp_path))
    assert requests.get(f"{server.url}/health", timeout=5).ok
    started = descendants(server)
    assert len(started) == (2 if behaviour in ("stubborn", "orphans") else 1)
    server.stop()
    assert gone(started)
    assert server.exit_code is not None
    with pytest.raises(ServerError, match="ended with exit code"):
        server.require_alive()


def test_a_flood_in_the_log_neither_stops_the_server_nor_the_quoting(tmp_path: Path) -> None:
    server = Server(command("floods", tmp_path))
    try:
        assert server.log.stat().st_size > 50_000_000
        assert max(map(len, server.log_tail().splitlines())) < 400
    finally:
        server.stop()


def test_a_death_while_booting_names_command_code_log_and_hint(tmp_path: Path) -> None:
    with pytest.raises(ServerError) as caught:
        Server(command("dies", tmp_path))
    text = str(caught.value)
    assert "ended with exit code 3 before it was ready" in text
    assert f"{SCRIPT} dies" in text
    assert "| CUDA out of memory" in text
    assert str(tmp_path / "logs" / "server.log") in text
    assert "hint: buy a larger GPU" in text


def test_a_server_that_is_never_ready_is_ended_at_the_deadline(tmp_path: Path) -> None:
    waited: list[float] = []
    with pytest.raises(ServerError, match=r"not ready after 1\.5 s"):
        Server(command("silent", tmp_path, startup_timeout=1.5), waited.append)
    assert waited
    assert not psutil.pid_exists(int((tmp_path / "pids").read_text()))


def test_a_command_that_cannot_be_started_is_an_error_of_its_own(tmp_path: Path) -> None:
    missing = command("healthy", tmp_path)
    with pytest.raises(ServerError, match="no-such-program"):
        Server(ServerCommand(**{**_fields(missing), "argv": ["no-such-program"]}))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_the_server_ends_when_its_parent_does(number: signal.Signals, tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(SCRIPT.parent)!r})
        from pathlib import Path
        from scripted import command
        from pytest_kld.servers.server import Server
        server = Server(command("stubborn", Path({str(tmp_path)!r}), grace=1))
        print(server.pid, flush=True)
        time.sleep(600)
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        supervisor = psutil.Process(int(parent.stdout.readline()))
        started = [supervisor, *supervisor.children(recursive=True)]
        assert len(started) == 3
        parent.send_signal(number)
    deadline = time.monotonic() + 20
    while not gone(started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(started)


def test_a_free_port_leaves_room_for_the_ports_that_servers_add_to_it() -> None:
    ports = {free_port() for _ in range(200)}
    assert len(ports) > 150
    assert max(ports) + 10_000 <= 65_535


def test_other_processes_are_left_alone(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        Server(command("stubborn", tmp_path, grace=0.5)).stop()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def _fields(made: ServerCommand) -> dict[str, object]:
    return {name: getattr(made, name) for name in made.__slots__}

"""Servers in containers and in job steps: they receive their variables, and they end with the session."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from scripted_sglang import COMMAND, make_pool, started

from pytest_kld.engines.served.engine import ServedEngine
from pytest_kld.engines.served.flags import parse_command
from pytest_kld.engines.served.pool import ServerPool
from pytest_kld.servers.launchers import command_in_key, inherited
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import Subject

MODEL = ModelSpec(name="org/model")
ON_A_CPU = ["--device", "cpu"]
TESTS = Path(__file__).parents[1]
LAUNCH = "python -m sglang.launch_server"
SESSION = """
import sys, time
from pathlib import Path
from scripted_sglang import make_pool
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import Subject
pool = make_pool(Path(sys.argv[1]), tuple(sys.argv[2:]))
pool.get(ModelSpec(name="org/model"), ["--device", "cpu"], {})
print("serving", flush=True)
time.sleep(600)
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """The command of a server in a container whose daemon is not a child of this process."""
    address, script = tmp_path / "docker.sock", TESTS / "scripted_docker.py"
    program = tmp_path / "docker"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} {address} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    daemon = subprocess.Popen([sys.executable, script, str(address), "daemon"])
    try:
        while not address.exists():
            time.sleep(0.01)
        yield (str(program), "run", "--rm", "--network", "host", "IMAGE", *COMMAND)
    finally:
        for process in psutil.Process(daemon.pid).children(recursive=True):
            process.kill()
        daemon.kill()
        daemon.wait()


def containers(docker: tuple[str, ...]) -> list[psutil.Process]:
    """Return the servers that the daemon's containers run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it ended meanwhile
            words = process.cmdline()
            spool = process.environ().get("PYTEST_KLD_CAPTURE_DIR", "")
            if words[1:2] == [COMMAND[1]] and spool.startswith(str(Path(docker[0]).parent)):
                found.append(process)
    return found


def test_variables_reach_a_container_and_it_ends_with_its_server(docker: tuple[str, ...], tmp_path: Path) -> None:
    pool = make_pool(tmp_path, docker)
    try:
        pool.get(MODEL, ON_A_CPU, {"SGLANG_X": "1"})
        environment = started(pool)["environment"]
        assert environment["SGLANG_X"] == "1"
        assert environment["SGLANG_LOGPROB_CHUNK_SIZE"] == "256"
        assert environment["PYTEST_KLD_CAPTURE_DIR"] == str(pool.capture_dir)
        assert "HOME" not in environment
        assert len(containers(docker)) == 1
    finally:
        pool.close()
    assert containers(docker) == []
    assert list(pool.log_dir.glob("*.cid")) == []


def test_a_container_ends_when_pytest_is_killed(docker: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-c", SESSION, str(tmp_path), *docker]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TESTS) as session:
        assert session.stdout is not None
        assert session.stdout.readline() == "serving\n"
        assert len(containers(docker)) == 1
        session.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(containers(docker), timeout=40)
    assert alive == []


def test_the_key_holds_what_reaches_a_container(
    docker: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_INHERITED", "1")

    def environment(pool: ServerPool) -> dict[str, str]:
        engine = ServedEngine(servers=pool, capture_dir=tmp_path, api_key=None)
        subject = Subject(name="org/model", model=MODEL, environment={"SGLANG_GIVEN": "2"})
        told: dict[str, str] = engine.fingerprint(subject)["environment"]
        return told

    plain = environment(make_pool(tmp_path, docker))
    assert plain["SGLANG_GIVEN"] == "2"
    assert "SGLANG_INHERITED" not in plain
    named = (*docker[:2], "-e", "SGLANG_INHERITED", *docker[2:])
    assert environment(make_pool(tmp_path, named))["SGLANG_INHERITED"] == "1"
    assert inherited(["python"], os.environ) == dict(os.environ)


def test_the_command_is_in_the_key_without_its_secrets() -> None:
    words = shlex.split(f"docker run -e HF_TOKEN=hunter2 -e SGLANG_X=1 --env=MY_KEY=hunter3 IMAGE:1.2 {LAUNCH}")
    kept = command_in_key(words)
    assert "hunter" not in " ".join(kept)
    assert {"SGLANG_X=1", "IMAGE:1.2"} <= set(kept)


SRUN = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
options = [words.pop(0) for word in sys.argv[1:] if word.startswith("-") and word in words and words[0] == word]
environment = dict(os.environ)
if "--export=ALL" not in options and os.environ.get("SLURM_EXPORT_ENV") == "NONE":
    environment = {{"PATH": os.environ["PATH"]}}
environment["STEP_OPTIONS"] = " ".join(options)
os.execvpe(words[0], words, environment)
"""


def test_variables_reach_a_job_step_on_this_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "srun"
    program.write_text(SRUN)
    program.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    monkeypatch.setenv("SLURM_EXPORT_ENV", "NONE")
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    pool = make_pool(tmp_path, (str(program), "--partition=gpu", *COMMAND))
    try:
        pool.get(MODEL, ON_A_CPU, {"SGLANG_X": "1"})
        environment = started(pool)["environment"]
    finally:
        pool.close()
    assert environment["SGLANG_X"] == "1"
    assert "--nodelist=node7" in environment["STEP_OPTIONS"].split()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (f"docker run IMAGE {LAUNCH}", "needs --network host"),
        (f"docker run -p 30000:30000 IMAGE {LAUNCH}", "needs --network host"),
        (f"docker run -d --network=host IMAGE {LAUNCH}", "-d cannot be given"),
        (f"docker run --network host --cidfile x IMAGE {LAUNCH}", "--cidfile cannot be given"),
        (f"docker run --network host --gpus device=2 IMAGE {LAUNCH}", "--gpus must be all"),
        (f"sudo docker run --network host IMAGE {LAUNCH}", "sudo drops"),
        (f"srun -p gpu {LAUNCH}", "Run pytest inside the allocation"),
    ],
)
def test_commands_that_cannot_work_are_refused_at_the_start(
    command: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=reason):
        parse_command(command, tuple(LAUNCH.split()[1:]), "sglang")


def test_commands_that_work_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    for command in (f"docker run --rm --gpus all --net host IMAGE {LAUNCH}", f"srun -p gpu {LAUNCH}"):
        assert parse_command(command, tuple(LAUNCH.split()[1:]), "sglang") == tuple(shlex.split(command))
    with pytest.raises(ValueError, match="--export=NONE cannot be given to srun"):
        parse_command(f"srun --export=NONE {LAUNCH}", tuple(LAUNCH.split()[1:]), "sglang")

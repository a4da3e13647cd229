"""A gate as a process of its own, to which damage is done, and what is left of it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from cpu_environment import ServerEnvironment
from filelock import FileLock

from pytest_kld.captures.capture import Capture
from pytest_kld.figures.scores import Scores

ENGINES, ROOT = Path(__file__).parents[1] / "engines", Path(__file__).parents[2]
SIZE = 64
DAY = 24 * 3600
SEEDS = int(os.environ.get("KLD_CAMPAIGN_SEEDS", "2"))
"""How many random points are tried in each case; `KLD_CAMPAIGN_SEEDS=50` tries many."""

REAL = [pytest.param(name, marks=[getattr(pytest.mark, name), pytest.mark.long]) for name in ("sglang", "vllm")]
"""The real engines; each try boots one or two servers, so the README's command leaves them out."""

CONFTEST = """
import time
from pathlib import Path

ENGINE = {engine!r}

if ENGINE == "tiny":
    import sys
    from tiny_engine import Tiny
    from pytest_kld.engines.served.engine import ServedEngine
    from pytest_kld.engines.served.kind import Settings
    from pytest_kld.engines.served.pool import ServerPool
    from pytest_kld.measuring import measurement

    def make_engine(_, config, progress, **_more):
        kind, spool = Tiny(), config.cache_dir / "spool"
        servers = ServerPool(
            kind=kind, command=(sys.executable, *kind.launch), capture_dir=spool, log_dir=config.cache_dir / "logs",
            startup_timeout=120, settings=Settings(), progress=progress,
        )
        return ServedEngine(servers=servers, capture_dir=spool, api_key=None)

    measurement.make_engine = make_engine
elif ENGINE == "transformers":
    from pytest_kld.engines import transformers

    load = transformers.TransformersEngine._load

    def slow(*args):
        network = load(*args)
        network.register_forward_hook(lambda *_: time.sleep(0.1 if Path("fault").read_text() == "slow" else 0))
        return network

    transformers.TransformersEngine._load = slow
"""
"""Runs the tiny engine's real servers in place of transformers, or slows transformers down; else changes nothing."""

BLIND = """
from pytest_kld.captures.cache import Cache

Cache.require_free = lambda *_: 1 << 40
"""
"""The check before a capture sees a larger disk than there is, as when another process fills it meanwhile."""


@dataclass
class Campaign:
    """A directory with a cache in which the same gate is run again and again.

    Attributes:
        directory: an empty directory.
        engine: `transformers`, `tiny`, or the name of the engine of `environment`.
        reference: the reference.
        candidates: the candidates.
        text: the corpus.
        environment: where the servers of a real engine run; None for the others.
        count: how many windows each model is measured on.

    """

    directory: Path
    engine: str
    reference: Path
    candidates: tuple[Path, ...]
    text: Path
    environment: ServerEnvironment | None = None
    count: int = 12
    temporary: Path = field(init=False)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.temporary = self.directory / "tmp"
        if self.environment:  # real engines bind sockets there, and the path of a socket is short
            self.temporary = Path(tempfile.mkdtemp(prefix="kld-"))
        self.temporary.mkdir(exist_ok=True)
        (self.directory / "pytest.ini").write_text("[pytest]\n")
        (self.directory / "conftest.py").write_text(CONFTEST.format(engine=self.engine))
        self.fault("")

    @property
    def cache(self) -> Path:
        return self.directory / "cache"

    def fault(self, fault: str) -> None:
        (self.directory / "fault").write_text(fault)

    def start(self, *options: str, **variables: str) -> subprocess.Popen[str]:
        """Start the gate as a shell does, as the leader of a process group; its output goes to a file."""
        plugins = ("no:cacheprovider", "no:hypothesispytest", "no:anyio", "no:platformdirs")
        command = [
            *(sys.executable, "-m", "pytest", f"--kld-ref={self.reference}"),
            *(self.environment.options() if self.environment else ["--kld-engine=transformers"]),
            *(word for plugin in plugins for word in ("-p", plugin)),
            *(f"--kld-candidate={path}" for path in self.candidates),
            *(f"--kld-dataset={self.text}", f"--kld-cache-dir={self.cache}"),
            *(f"--kld-windows={self.count}", f"--kld-window-size={SIZE}", "--kld-stride=32", "--kld-max-mean=0.1"),
            *("--kld-json=report.json", "--kld-device=cpu", *options),
        ]
        (self.directory / "report.json").unlink(missing_ok=True)
        output = self.directory / f"output-{len(self.started)}"
        with output.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env={
                    **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
                    "PYTHONPATH": os.pathsep.join([str(ENGINES), str(ROOT)]),
                    "TMPDIR": str(self.temporary),
                    "TINY_FAULT": str(self.directory / "fault"),
                    "OMP_NUM_THREADS": "1",
                    "CAMPAIGN": str(self.directory),
                    **variables,
                },
            )
        self.started.append(process)
        return process

    def output(self, process: subprocess.Popen[str]) -> str:
        """Wait for the end and return what was printed, of any run."""
        process.wait(timeout=900 if self.environment else 180)
        return (self.directory / f"output-{self.started.index(process)}").read_text()

    def run(self, *options: str, **variables: str) -> tuple[int, str]:
        process = self.start(*options, **variables)
        output = self.output(process)
        return process.returncode, output

    def result(self, report: str = "report.json") -> dict[str, Any]:
        (result,) = json.loads((self.directory / report).read_text())["results"]
        return dict(result)

    def windows(self) -> int:
        """Return how many windows are on disk, in whole captures and in those in progress."""
        return len(list(self.cache.glob("captures/*/windows/0*.safetensors")))

    def wait_for_windows(self, count: int, process: subprocess.Popen[str]) -> None:
        """Wait until so many windows are on disk, or until the process ends."""
        while self.windows() < count and process.poll() is None:
            time.sleep(0.005)

    def wait_for_words(self, words: str, process: subprocess.Popen[str]) -> None:
        """Wait until a run prints some words, or until it ends."""
        output = self.directory / f"output-{self.started.index(process)}"
        while words not in output.read_text() and process.poll() is None:
            time.sleep(0.1)

    def wait_for_any_point(self, process: subprocess.Popen[str], chance: random.Random) -> None:
        """Wait until a random point of a gate: of all its time, or, as likely, of what it has yet to capture."""
        windows = self.count * (1 + len(self.candidates))
        if chance.random() < 0.5 and self.windows() < windows:
            self.wait_for_windows(chance.randint(self.windows() + 1, windows), process)
            time.sleep(chance.random() * 0.2)
        else:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=chance.uniform(1, 60 if self.environment else 15))

    def processes(self) -> list[psutil.Process]:
        """Return all processes of all runs that are alive, wherever they are in the tree.

        They have our variable or run in our directory. A process that sets its title may lose the former.
        """
        found = []
        for process in psutil.process_iter():
            try:
                ours = str(self.directory) in {process.environ().get("CAMPAIGN"), process.cwd()}
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def servers(self) -> list[psutil.Process]:
        """Return the servers themselves, without their supervisors and what they start."""
        launch = list(self.environment.launch) if self.environment else ["-m", "tiny_server"]
        return [process for process in self.processes() if process.cmdline()[1 : 1 + len(launch)] == launch]

    def require_nobody(self, seconds: float = 30) -> None:
        """Check that every process of ours is gone, and with it every port and every lock."""
        psutil.wait_procs(self.processes(), timeout=seconds)
        assert [process.cmdline() for process in self.processes()] == []
        for lock in [*self.directory.rglob("*.lock")]:
            with FileLock(lock).acquire(timeout=0):
                pass

    def require_whole(self) -> None:
        """Check that whatever has an entry's name is whole."""
        for manifest in self.cache.glob("captures/*/capture.json"):
            if manifest.parent.suffix != ".partial":
                Capture.open(manifest.parent).verify()
        for scores in self.cache.glob("scores/*.safetensors"):
            Scores.load(scores)
        report = self.directory / "report.json"
        if report.exists():
            json.loads(report.read_text())

    def grow_old(self) -> None:
        """Let a day pass since the last write of what a killed session left."""
        then = time.time() - DAY - 60
        for path in [*self.cache.glob("spool/*"), *self.cache.glob("spool/*/*"), *self.cache.rglob(".*.tmp")]:
            os.utime(path, (then, then))

    def require_tidy(self) -> None:
        """Check that nothing temporary is left. What real engines leave in TMPDIR themselves does not count."""
        names = [path.relative_to(self.directory).as_posix() for path in self.directory.rglob("*")]
        odd = r"\.tmp$|\.partial$|^cache/(spool|discarded)/.|^tmp/(?!pytest-kld-gpus|torchinductor|pytest-of-)"
        assert [name for name in names if re.search(odd, name)] == []

    def completes(self, expected: dict[str, Any] | None = None) -> dict[str, Any]:
        """Run the gate to its end; check that it goes on from what is on disk and leaves nothing; return figures."""
        self.require_nobody()
        self.require_whole()
        there = {path: len(list(path.glob("windows/0*"))) for path in self.cache.glob("captures/*.partial")}
        self.grow_old()
        self.fault("")
        code, output = self.run()
        assert code == 0, output
        assert "was damaged" not in output
        kept = sorted(int(count) for count in re.findall(r"(\d+) of \d+ windows are already captured", output))
        for found, expected_count in zip(kept, sorted(filter(None, there.values())), strict=False):
            assert found >= expected_count - 1  # the last one may not have reached the journal
        self.require_nobody()
        self.require_whole()
        self.require_tidy()
        figures: dict[str, Any] = self.result()["figures"]
        assert expected is None or figures == expected
        return figures

    def end(self) -> None:
        """Kill what still runs."""
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.require_nobody()
        if self.environment:
            shutil.rmtree(self.temporary)


def interrupt(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal as a terminal does, to the foreground's process group."""
    os.killpg(process.pid, number)

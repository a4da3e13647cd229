"""Real servers with the hook, booted as pytest-kld boots them, whichever engine it is."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import torch
from cpu_environment import ServerEnvironment

from pytest_kld.engines import Prefill
from pytest_kld.engines.registry import served_kind
from pytest_kld.engines.served.client import ServedModel
from pytest_kld.engines.served.engine import ServedEngine
from pytest_kld.engines.served.kind import Settings
from pytest_kld.engines.served.pool import ServerPool
from pytest_kld.progress import Silent
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import Subject
from pytest_kld.text.windows import Windows

Boot = Callable[..., "Served"]


class Served:
    """A booted server with the engine that booted it."""

    def __init__(self, engine: ServedEngine, subject: Subject) -> None:
        self.engine, self.subject = engine, subject
        self.handle = engine.servers.get(subject.spec, subject.arguments["args"], subject.environment)

    @contextmanager
    def connected(self) -> Iterator[ServedModel]:
        with self.engine.open(self.subject) as loaded:
            yield loaded

    def capture(self, windows: Windows, rows: Sequence[int] | None) -> list[Prefill]:
        """Capture all windows: hidden states and the logits of some rows, or all logits."""
        with self.connected() as loaded:
            return sorted(loaded.prefill(windows, range(windows.count), rows), key=lambda prefill: prefill.window)

    @property
    def log(self) -> str:
        return self.handle.log.read_text(errors="replace")


@contextmanager
def booting(environment: ServerEnvironment, directory: Path) -> Iterator[Boot]:
    """Yield a function that boots a server for a model; all are gone afterwards."""
    pools = []

    def boot(model: Path, *flags: str, **env: str) -> Served:
        pool = ServerPool(
            kind=served_kind(environment.engine),
            command=environment.command,
            capture_dir=directory / "spool",
            log_dir=directory / "logs",
            startup_timeout=600,
            settings=Settings(device="cpu"),
            progress=Silent(),
        )
        pools.append(pool)
        engine = ServedEngine(servers=pool, capture_dir=directory / "spool", api_key=None)
        subject = Subject(
            name=str(model),
            model=ModelSpec.parse(str(model), Path()),
            engine=environment.engine,
            arguments={"args": [*environment.flags, *flags]},
            environment={**environment.variables, **env},
        )
        return Served(engine, subject)

    try:
        yield boot
    finally:
        for pool in pools:
            pool.close()


@contextmanager
def foreign_traffic(served: Served) -> Iterator[list[int]]:
    """Send other requests to vLLM meanwhile: some generate, some ask for log-probs, and their ids resemble ours."""
    stop, answered = threading.Event(), []

    def disturb() -> None:
        while not stop.is_set():
            body = {
                "model": served.subject.spec.source,
                "prompt": list(range(10, 60)),
                "max_tokens": 5,
                "prompt_logprobs": len(answered) % 2,
                "request_id": f"pytest-kld-other-{len(answered)}",
            }
            answer = requests.post(f"{served.handle.url}/v1/completions", json=body, timeout=60)
            answered.append(answer.status_code)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield answered
    finally:
        stop.set()
        thread.join()


def assert_same(ours: list[Prefill], theirs: list[Prefill]) -> None:
    """Two captures are bit-identical."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.window == other.window
        assert torch.equal(one.logits, other.logits)
        if one.hidden is not None and other.hidden is not None:
            assert torch.equal(one.hidden, other.hidden)


def mean_kl(p_logits: torch.Tensor, q_logits: torch.Tensor) -> float:
    p, q = (z.double().log_softmax(-1) for z in (p_logits, q_logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


def gate(directory: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """Run pytest as a user does; return what it printed and the results in its JSON report."""
    report = directory / "report.json"
    command = [sys.executable, "-m", "pytest", *arguments, f"--kld-json={report}"]
    run = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    return run, json.loads(report.read_text())["results"] if report.is_file() else []

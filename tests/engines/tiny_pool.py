"""The tiny engine with servers that stay for several tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny_engine import Tiny

from pytest_kld.captures.cache import Cache
from pytest_kld.captures.capture import Capture, Store
from pytest_kld.captures.recording import Recording
from pytest_kld.engines.served.engine import ServedEngine
from pytest_kld.engines.served.kind import Settings
from pytest_kld.engines.served.pool import ServerPool
from pytest_kld.progress import Silent
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import Subject
from pytest_kld.text.windows import Windows

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


class TinyPool:
    """The tiny engine with servers that stay for several tests."""

    def __init__(self, directory: Path, kind: Tiny) -> None:
        self.fault = directory / "fault"
        self.fault.write_text("")
        self.pool = ServerPool(
            kind=kind,
            command=(sys.executable, *kind.launch),
            capture_dir=directory / "spool",
            log_dir=directory / "logs",
            startup_timeout=120,
            settings=Settings(),
            progress=Silent(),
        )

    def of(self, kind: Tiny) -> ServedEngine:
        """Return the engine as another kind sees it."""
        self.pool.kind = kind
        return ServedEngine(servers=self.pool, capture_dir=self.pool.capture_dir, api_key=None)

    def subject(self, model: Path, *flags: str) -> Subject:
        """Return a model as it runs it."""
        spec = ModelSpec.parse(str(model), Path())
        variables = {"PYTHONPATH": os.pathsep.join((str(HERE), str(ROOT))), "TINY_FAULT": str(self.fault)}
        return Subject(
            name=spec.label, model=spec, engine="tiny", arguments={"args": list(flags)}, environment=variables
        )

    @contextmanager
    def spoiled(self, fault: str) -> Iterator[None]:
        self.fault.write_text(fault)
        yield
        self.fault.write_text("")

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self.pool.log_dir.iterdir())


def capture(engine: ServedEngine, subject: Subject, windows: Windows, directory: Path, store: Store) -> Capture:
    """Capture a Subject as the plugin does."""
    key = {"engine": engine.fingerprint(subject), "store": store}
    recording = Recording(engine=engine, subject=subject, windows=windows, store=store, key=key)
    cache = Cache(directory)
    entry = cache.capture_entry(key)
    recording.run(cache, entry, Silent())
    return Capture.open(entry, windows)

"""An engine is what `tiny_engine.py` and the seams in `tiny_server.py` say of it, and nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import record
from tiny_engine import Tiny

from pytest_kld.captures.cache import Cache
from pytest_kld.captures.capture import Capture, Store
from pytest_kld.captures.recording import Recording
from pytest_kld.engines.served import client as served_client
from pytest_kld.engines.served.engine import ServedEngine
from pytest_kld.engines.served.kind import Settings
from pytest_kld.engines.served.pool import ServerPool
from pytest_kld.errors import CaptureError, ServerError
from pytest_kld.figures.compare import compare
from pytest_kld.figures.scores import Summary
from pytest_kld.progress import Silent
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import Subject
from pytest_kld.text.windows import Windows

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
CHUNK = 24


class Engine:
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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = Engine(tmp_path_factory.mktemp("tiny"), Tiny())
    yield engine
    engine.pool.close()


def capture(engine: ServedEngine, subject: Subject, windows: Windows, directory: Path, store: Store) -> Capture:
    """Capture a Subject as the plugin does."""
    key = {"engine": engine.fingerprint(subject), "store": store}
    recording = Recording(engine=engine, subject=subject, windows=windows, store=store, key=key)
    cache = Cache(directory)
    entry = cache.capture_entry(key)
    recording.run(cache, entry, Silent())
    return Capture.open(entry, windows)


def figures(reference: Capture, candidate: Capture, windows: Windows) -> dict[str, Any]:
    scores = compare(
        reference, candidate, windows, head="exact", device=torch.device("cpu"), progress=Silent(), extended=False
    )
    return Summary.of(scores).to_json()


@pytest.mark.parametrize("store", ["hidden", "logits"])
@pytest.mark.parametrize("chunk", [1_000, CHUNK], ids=["whole", "chunked"])
def test_its_captures_agree_with_those_of_transformers(
    tiny: Engine, reference_dir: Path, windows: Windows, tmp_path: Path, store: Store, chunk: int
) -> None:
    theirs = record(reference_dir, windows, tmp_path / "theirs", store=store)
    engine, subject = tiny.of(Tiny(chunk=chunk)), tiny.subject(reference_dir)
    ours = capture(engine, subject, windows, tmp_path / "ours", store)
    assert ours.manifest["store"] == store
    assert ours.manifest["facts"]["model_class"] == "Qwen3ForCausalLM"
    found = figures(theirs, ours, windows)
    assert found["positions"] == windows.count * windows.size
    assert found["max"] < 1e-9
    last = chunk * (windows.size // chunk)
    assert f"prefill of {windows.size - last} tokens at {last}\n" in tiny.log
    assert list(engine.capture_dir.iterdir()) == []


def test_a_spoiled_candidate_on_it_is_as_far_away_as_on_transformers(
    tiny: Engine, reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    reference = record(reference_dir, windows, tmp_path / "reference")
    theirs = record(candidate_dir, windows, tmp_path / "theirs")
    ours = capture(tiny.of(Tiny()), tiny.subject(candidate_dir), windows, tmp_path / "ours", "auto")
    mean = figures(reference, ours, windows)["mean"]
    assert mean > 1e-3
    assert mean == pytest.approx(figures(reference, theirs, windows)["mean"], rel=1e-5)


def test_its_key_has_versions_flags_and_environment(tiny: Engine, reference_dir: Path) -> None:
    found = tiny.of(Tiny()).fingerprint(tiny.subject(reference_dir, "--a", "8"))
    assert (found["engine"], found["arguments"]) == ("tiny", [["--a", "8"]])
    assert found["versions"] == {name: version(name) for name in ("transformers", "torch")}
    assert found["environment"]["TINY_FAULT"] == str(tiny.fault)


def test_its_own_checks_and_hints_are_used(tiny: Engine, reference_dir: Path) -> None:
    engine = tiny.of(Tiny())
    with pytest.raises(ServerError, match="Tiny's arguments: --port cannot be given"):
        engine.facts(tiny.subject(reference_dir, "--port", "1"))
    with (
        pytest.raises(ServerError, match="exit code 2 before it was ready") as caught,
        engine.open(tiny.subject(reference_dir, "--nonsense")),
    ):
        pass
    assert "hint: the flag is not known" in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "kind", "error", "words"),
    [
        ("no-hook", Tiny(), ServerError, "the server answered and the hook did not.*TINY_FAULT must not be no-hook"),
        (
            "lost-row",
            Tiny(),
            CaptureError,
            "the hook failed in the server.*the batch has 3 rows of logits and 2 were seen",
        ),
        ("odd-answer", Tiny(), ServerError, "did not answer as Tiny does .KeyError: 'tokens'"),
        ("", replace(Tiny(), name="other"), ServerError, "is tiny, and other is asked for: see --kld-engine"),
    ],
)
def test_what_is_wrong_with_it_is_an_error_that_says_so(
    tiny: Engine,
    reference_dir: Path,
    windows: Windows,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    kind: Tiny,
    error: type[Exception],
    words: str,
) -> None:
    monkeypatch.setattr(served_client, "_HANDSHAKE_TIMEOUT_SECONDS", 1)
    monkeypatch.setattr(served_client, "_FILE_TIMEOUT_SECONDS", 5)
    with (
        tiny.spoiled(fault),
        pytest.raises(error, match=f"(?s){words}"),
        tiny.of(kind).open(tiny.subject(reference_dir)) as loaded,
    ):
        list(loaded.prefill(windows, [0], [1]))


def test_an_engine_that_is_not_installed_is_an_error_before_a_boot(tiny: Engine, reference_dir: Path) -> None:
    engine = tiny.of(replace(Tiny(), package="no-such-package"))
    subject = replace(tiny.subject(reference_dir), environment={**tiny.subject(reference_dir).environment, "A": "1"})
    with pytest.raises(ServerError, match=r"has no Tiny.*--kld-tiny-command"), engine.open(subject):
        pass

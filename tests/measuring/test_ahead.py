"""Real servers of a small engine side by side: the same captures and scores as one after the other."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from nvidia_smi import put_on_path

from pytest_kld.collecting.paths import NeededPaths
from pytest_kld.engines.served.engine import ServedEngine
from pytest_kld.engines.served.kind import Settings
from pytest_kld.engines.served.pool import ServerPool
from pytest_kld.errors import CaptureError, ServerError
from pytest_kld.measuring.ahead import capture_side_by_side
from pytest_kld.measuring.floors import Floors
from pytest_kld.measuring.measurement import Measurement
from pytest_kld.progress import Silent
from pytest_kld.settings.config import CONFIG
from pytest_kld.settings.subjects import on_path
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import EnginePath, Subject

ENGINES, ROOT = Path(__file__).parents[1] / "engines", Path(__file__).parents[2]
sys.path.insert(0, str(ENGINES))
from tiny_engine import Tiny  # noqa: E402

pytestmark = pytest.mark.slow


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@contextmanager
def measurement(
    pytester: pytest.Pytester, arguments: tuple[str, ...], cache: Path
) -> Iterator[tuple[Measurement, Notes]]:
    """A measurement whose engine `tiny` is a real server."""
    config = pytester.parseconfigure(*arguments, f"--kld-cache-dir={cache}").stash[CONFIG]
    made, notes = Measurement(config, Silent()), Notes()
    kind = Tiny()
    pool = ServerPool(
        kind=kind,
        command=(sys.executable, *kind.launch),
        capture_dir=cache / "spool",
        log_dir=cache / "logs",
        startup_timeout=120,
        settings=Settings(),
        progress=notes,
    )
    made._engines["tiny"] = ServedEngine(servers=pool, capture_dir=pool.capture_dir, api_key=None)
    try:
        yield made, notes
    finally:
        made.close()


def subject(model: Path, name: str, *flags: str) -> Subject:
    no_fault = model.parent / "no-fault"
    no_fault.touch()
    variables = {"PYTHONPATH": os.pathsep.join((str(ENGINES), str(ROOT))), "TINY_FAULT": str(no_fault)}
    spec = ModelSpec.parse(str(model), Path())
    return Subject(name=name, model=spec, engine="tiny", arguments={"args": list(flags)}, environment=variables)


def options(reference: Path, text: Path) -> tuple[str, ...]:
    return (
        *(f"--kld-ref={reference}", f"--kld-dataset={text}", "--kld-engine=transformers", "--kld-path=both"),
        *("--kld-windows=3", "--kld-window-size=64", "--kld-stride=32", "--kld-device=cpu", "--kld-concurrency=2"),
    )


def captures_of(made: Measurement, reference: Subject, candidate: Subject, also: list[EnginePath]) -> dict[str, bytes]:
    """Obtain the captures of both paths as fixtures do; return the bytes of the divergence on each."""
    windows, found = made.windows(), {}
    for path in PATHS:
        beside = [other for other in also if other != path]
        of_reference = made.capture(on_path(reference, path), windows, beside)
        capture = made.candidate_capture(on_path(candidate, path), windows, of_reference, beside)
        found[path] = made.scoring.scores(of_reference, capture, made.on_path(windows, path)).columns["kl"].tobytes()
    return found


PATHS: tuple[EnginePath, ...] = ("prefill", "decode")


def test_one_boot_serves_both_paths_with_the_bits_of_two(
    pytester: pytest.Pytester,
    reference_dir: Path,
    candidate_dir: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    reference, candidate = subject(reference_dir, "reference"), subject(candidate_dir, "candidate")
    found, boots = [], []
    for name, also in (("two", []), ("one", list(PATHS))):
        with measurement(pytester, options(reference_dir, text_file), tmp_path / name) as (made, notes):
            found.append(captures_of(made, reference, candidate, also))
            boots.append(sum(note.startswith("booting") for note in notes.notes))
    assert found[0] == found[1]
    assert boots == [4, 2]
    put_on_path(tmp_path, monkeypatch, "GPU-0", "GPU-1")
    with measurement(pytester, options(reference_dir, text_file), tmp_path / "side by side") as (made, notes):
        both = [[on_path(one, path) for path in PATHS] for one in (reference, candidate)]
        capture_side_by_side(made, *both, made.windows(), extended=False)
        assert captures_of(made, reference, candidate, list(PATHS)) == found[0]
        assert sum(note.startswith("booting") for note in notes.notes) == 2


def test_what_is_wrong_with_one_path_is_said_by_the_test_of_that_path(
    pytester: pytest.Pytester, reference_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    refused = subject(reference_dir, "reference")
    with measurement(pytester, options(reference_dir, text_file), tmp_path / "cache") as (made, notes):
        windows = made.windows()
        fault = Path(refused.environment["TINY_FAULT"])
        fault.write_text("own-token")
        try:
            made.capture(refused, windows, ["decode"])
            with pytest.raises(CaptureError, match="not those of the text"):
                made.capture(on_path(refused, "decode"), windows, ["prefill"])
            made._close_engines()  # as a comparison does
            made.capture(refused, windows, ["decode"])  # for the next candidate
        finally:
            fault.write_text("")
        assert sum(note.startswith("booting") for note in notes.notes) == 1


def test_servers_side_by_side_give_the_scores_of_servers_one_after_the_other(
    pytester: pytest.Pytester,
    reference_dir: Path,
    candidate_dir: Path,
    broken_dir: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    reference = subject(reference_dir, "reference")
    near, far = subject(candidate_dir, "near"), subject(broken_dir, "far")
    unbootable = replace(near, name="unbootable", arguments={"args": ["--no-such-flag"]})
    figures = {}
    for how, gpus in (("serial", ()), ("side by side", ("GPU-0", "GPU-1"))):
        put_on_path(tmp_path, monkeypatch, *gpus)
        with measurement(pytester, options(reference_dir, text_file), tmp_path / how) as (made, notes):
            windows = made.windows()
            capture_side_by_side(made, [reference], [near, far, unbootable], windows, extended=False)
            assert (made.ahead is not None) == bool(gpus)
            of_reference = made.capture(reference, windows)
            captures = [made.candidate_capture(one, windows, of_reference) for one in (near, far)]
            if gpus:
                assert len(list((tmp_path / how / "scores").glob("*.safetensors"))) == 2  # before they are asked for
            figures[how] = [
                made.scoring.scores(of_reference, capture, windows).columns["kl"].tobytes() for capture in captures
            ]
            with pytest.raises(ServerError, match="no-such-flag"):
                made.candidate_capture(unbootable, windows, of_reference)
        booting = [index for index, note in enumerate(notes.notes) if note.startswith("booting")]
        ready = [index for index, note in enumerate(notes.notes) if " is ready after " in note]
        assert len(booting) == 4  # the one that failed is not booted again by its test
        assert (booting[1] < ready[0]) == bool(gpus)
    assert figures["serial"] == figures["side by side"]


def test_second_runs_are_captured_ahead_too_each_by_a_server_of_its_own(
    pytester: pytest.Pytester,
    reference_dir: Path,
    candidate_dir: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    put_on_path(tmp_path, monkeypatch, "GPU-0", "GPU-1")
    reference, candidate = subject(reference_dir, "reference"), subject(candidate_dir, "candidate")
    with measurement(pytester, (*options(reference_dir, text_file), "--kld-floor"), tmp_path / "cache") as (
        made,
        notes,
    ):
        windows = made.windows()
        both = [[on_path(one, path) for path in PATHS] for one in (reference, candidate)]
        capture_side_by_side(made, *both, windows, extended=False)
        captures_of(made, reference, candidate, list(PATHS))
        needed = NeededPaths.of((one, "both") for one in both[1])
        for path in PATHS:
            on_this = made.on_path(windows, path)
            floors = Floors(measurement=made, windows=windows, count=on_this.count, extended=False, needed=needed)
            sides = [made.library.obtain(on_path(one, path), on_this) for one in (reference, candidate)]
            found = floors.of_pair(*sides, gaps=path == "decode")
            assert found.reference["max"] == found.candidate["max"] == 0
        assert sum(note.startswith("booting") for note in notes.notes) == 4
        origins = {json.loads(path.read_text())["origin"] for path in (tmp_path / "cache").glob("captures/*/*.json")}
        assert len(origins) == 4

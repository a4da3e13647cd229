"""A reader whose captures another process replaces goes on with the new ones, and never mixes two."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from recorded import record

from pytest_kld.captures.capture import Capture
from pytest_kld.errors import DamagedCaptureError

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Gate

    from pytest_kld.text.windows import Windows

READER = """
import time
from pathlib import Path
import pytest
from pytest_kld.captures import capture

@pytest.fixture(scope="session", autouse=True)
def wait_in_the_middle():
    work, calls = {owner}.{name}, []
    def slow(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            Path("reading").touch()
            while not Path("../writer/{until}").exists():
                time.sleep(0.01)
        return work(*arguments, **named)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr({owner}, "{name}", slow)
        yield
"""
"""A conftest that lets the reading wait in the middle until the other process is so far."""

WRITER = """
import time
from pathlib import Path
import pytest
from pytest_kld.captures.recording import Recording

@pytest.fixture(scope="session", autouse=True)
def tell():
    record = Recording.run
    def run(*arguments):
        Path("recording").touch()
        time.sleep(2)
        record(*arguments)
        Path("recorded").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recording, "run", run)
        yield
"""
"""A conftest that tells when the reference is recorded anew, and lets it take its time."""


@pytest.mark.slow
@pytest.mark.parametrize("until", ["recording", "recorded"])
@pytest.mark.parametrize(("owner", "name"), [("capture", "sha256_of_file"), ("capture.LogitsReader", "logits")])
def test_a_refresh_in_another_process_does_not_disturb_a_comparison(
    owner: str, name: str, until: str, gate: Gate, tmp_path: Path
) -> None:
    cache = f"--kld-cache-dir={tmp_path / 'cache'}"
    gate(cache, "--kld-json=first.json").assert_outcomes(passed=1)
    for path in tmp_path.glob("cache/scores/*.safetensors"):
        path.unlink()
    reader, writer = tmp_path / "reader", tmp_path / "writer"
    for directory, conftest in ((reader, READER.format(owner=owner, name=name, until=until)), (writer, WRITER)):
        directory.mkdir()
        (directory / "pytest.ini").write_text("[pytest]\n")
        (directory / "conftest.py").write_text(conftest)

    def start(directory: Path, *options: str) -> Any:
        command = [
            *(sys.executable, "-m", "pytest", f"--kld-ref={gate.reference}", f"--kld-candidate={gate.candidate}"),
            *(*gate.protocol, cache, "--kld-max-mean=0.1", *options),
        ]
        return subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    reading = start(reader, f"--kld-json={gate.path / 'reader.json'}")
    while not (reader / "reading").exists():
        assert reading.poll() is None, reading.communicate()[0]
        time.sleep(0.01)
    writing = start(writer, "--kld-refresh", f"--kld-json={gate.path / 'writer.json'}")
    outputs = [process.communicate()[0] for process in (reading, writing)]
    assert [process.returncode for process in (reading, writing)] == [0, 0], outputs
    figures = [gate.results(f"{run}.json")[0]["figures"] for run in ("first", "reader", "writer")]
    assert figures[0] == figures[1] == figures[2]
    assert ("another process replaced the cache entry" in outputs[0]) == (until == "recorded")
    assert "was damaged" not in outputs[0]
    assert not list(tmp_path.glob("cache/discarded/*"))


def test_rows_of_a_capture_that_took_the_place_of_an_open_one_are_not_read(
    reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    opened = record(reference_dir, windows, tmp_path / "one")
    other = record(candidate_dir, windows, tmp_path / "two")
    assert opened.rows(0, 0, 1).shape == (1, 64)
    shutil.rmtree(opened.path)
    shutil.copytree(other.path, opened.path)
    for read in (lambda: opened.rows(0, 0, 1), opened.load_head, opened.require_unchanged):
        with pytest.raises(DamagedCaptureError, match="was replaced, changed or removed since this session opened it"):
            read()
    Capture.open(opened.path, windows).verify()
    shutil.rmtree(opened.path)
    with pytest.raises(DamagedCaptureError, match=r"cannot read .*00000"):
        opened.rows(0, 0, 1)
    with pytest.raises(DamagedCaptureError, match=r"cannot read .*head.*No such file"):
        opened.verify()

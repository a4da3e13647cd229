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

SLOW_READER = """
    import time
    from pathlib import Path
    import pytest
    from pytest_kld.captures import capture, recording

    def slowed(owner, name, marker):
        work = getattr(owner, name)
        def slow(*arguments, **named):
            Path(marker).touch()
            time.sleep({seconds})
            return work(*arguments, **named)
        return slow

    @pytest.fixture(scope="session", autouse=True)
    def slow():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr({owner}, {name!r}, slowed({owner}, {name!r}, "reading"))
            yield
"""
"""A conftest that lets a part of the reading take its time, and says when it began."""


@pytest.mark.parametrize(
    ("owner", "name", "seconds"), [("capture", "sha256_of_file", 0.7), ("capture.LogitsReader", "logits", 1.0)]
)
def test_a_refresh_in_another_process_does_not_disturb_a_comparison(
    owner: str, name: str, seconds: float, gate: Gate, tmp_path: Path
) -> None:
    cache = f"--kld-cache-dir={tmp_path / 'cache'}"
    gate(cache, "--kld-json=first.json").assert_outcomes(passed=1)
    for path in tmp_path.glob("cache/scores/*.safetensors"):
        path.unlink()
    reader, writer = tmp_path / "reader", tmp_path / "writer"
    for directory in (reader, writer):
        directory.mkdir()
        (directory / "pytest.ini").write_text("[pytest]\n")
    conftest = SLOW_READER.format(owner=owner, name=name, seconds=seconds)
    (reader / "conftest.py").write_text("\n".join(line[4:] for line in conftest.splitlines()))

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
    writing = start(writer, "--kld-refresh", "--kld-store=auto", f"--kld-json={gate.path / 'writer.json'}")
    outputs = [process.communicate()[0] for process in (writing, reading)]
    assert [process.returncode for process in (writing, reading)] == [0, 0], outputs
    figures = [gate.results(f"{run}.json")[0]["figures"] for run in ("first", "reader", "writer")]
    assert figures[0] == figures[1] == figures[2]
    assert "Traceback" not in outputs[1]
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

"""Fuzzes the readers with inputs that reach new code, by atheris. CONTRIBUTING.md has the command; CI does not run it.

The file of a crash is kept, and its path is in the message; the failure has the traceback.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path
from types import FunctionType
from typing import Any

import atheris
import pytest
import torch
from hostile import READERS
from test_hostile import bounded, made, read_or_refused, restored, sealed, target  # noqa: F401 (fixtures)

torch.set_num_threads(1)  # the fuzzer runs in a fork, which has none of its parent's threads
SECONDS = int(os.environ.get("KLD_FUZZ_SECONDS", "60"))


@pytest.fixture(scope="session", autouse=True)
def instrumented() -> None:
    """Count the branches of the package's functions, which pytest has imported before this file."""
    for function in gc.get_objects():
        if type(function) is FunctionType and str(function.__module__).startswith("pytest_kld."):
            atheris.instrument_func(function)


@pytest.mark.parametrize(("name", "target"), [(name, name) for name in READERS], indirect=["target"], ids=list(READERS))
def test_no_input_breaks_a_reader(
    name: str,
    target: Path,  # noqa: F811
    tmp_path: Path,
    windows: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = Path(tempfile.mkdtemp(prefix="kld-fuzz-"))
    (work / "corpus").mkdir()
    for seal in b"\0\1":  # the first byte says whether digests are made right again
        (work / "corpus" / str(seal)).write_bytes(bytes([seal]) + target.read_bytes())

    def read(data: bytes) -> None:
        with restored(tmp_path):
            target.write_bytes(data[1:])
            if data[:1] > b"\0":
                sealed(name, target)
            read_or_refused(name, target, windows)

    limits = [f"-max_total_time={SECONDS}", "-timeout=30", "-rss_limit_mb=0", "-print_final_stats=1"]
    if not (child := os.fork()):
        log = os.open(work / "log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={work}/", str(work / "corpus")], read)
            atheris.Fuzz()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    told = (work / "log").read_text(errors="replace")
    assert os.waitstatus_to_exitcode(status) == 0, f"{work}\n{told[-5000:]}"
    with capsys.disabled():
        print(f"\n{name}: {next(line for line in told.splitlines() if line.startswith('Done'))}")

"""A server of another user: let in by a group, else kept out. Two real users, so only root can run this."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from conftest import ROOT

SERVER, CLIENT, GROUP, OTHER_GROUP = 62_001, 62_002, 62_010, 62_011

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="only root can become two users"),
]

CLIENT_PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path

from tiny_engine import Tiny
from pytest_kld.engines.served import connection
from pytest_kld.engines.served.engine import ServedEngine
from pytest_kld.engines.served.kind import Settings
from pytest_kld.engines.served.pool import ServerPool
from pytest_kld.errors import KLDError
from pytest_kld.progress import Silent
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import Subject
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import cut_windows, load_tokenizer

connection._FILE_TIMEOUT_SECONDS = 10
url, model, spool = sys.argv[1], sys.argv[2], Path(sys.argv[3])
spec = ModelSpec.parse(model, Path())
tokenizer = load_tokenizer(spec, trust_remote_code=False)
windows = cut_windows(load_corpus("python-docs", Path()), tokenizer, count=2, size=64, stride=32, label=model)
pool = ServerPool(
    kind=Tiny(), command=(), capture_dir=spool, log_dir=spool, startup_timeout=60, settings=Settings(),
    progress=Silent(),
)
engine = ServedEngine(servers=pool, capture_dir=spool, api_key=None)
subject = Subject(name=model, model=spec, engine="tiny", arguments={"url": url}, environment={})
try:
    with engine.open(subject) as loaded:
        for prefill in loaded.prefill(windows, range(2), None):
            print("captured", tuple(prefill.logits.shape))
except KLDError as error:
    print("refused:", error)
"""
CLOSED = next((path for path in Path(sys.base_prefix).parents if path.stat().st_mode & 0o005 != 0o005), None)
"""The directory that keeps others from this interpreter, such as /root."""
AS_USER = """
closed=$1 base=$2 place=$3; shift 3
if [ -n "$closed" ]; then
    mount --bind "$base" "$place"
    mount -t tmpfs -o mode=755 tmpfs "$closed"
    mkdir -p "$base"
    mount --bind "$place" "$base"
fi
umask 027
exec setpriv --clear-groups "$@"
"""
"""Lets other users reach the interpreter, in a mount namespace of its own, and becomes one of them."""


@pytest.fixture
def open_dir(reference_dir: Path) -> Iterator[Path]:
    """A directory that other users can enter, with a model."""
    directory = Path(tempfile.mkdtemp(prefix="pytest-kld-users-", dir="/tmp"))
    directory.chmod(0o755)
    shutil.copytree(reference_dir, directory / "model")
    for path in (directory / "model").iterdir():
        path.chmod(0o644)
    (directory / "fault").write_text("")
    (directory / "interpreter").mkdir()
    (directory / "client.py").write_text(CLIENT_PROGRAM)
    spool = directory / "spool"
    spool.mkdir()
    os.chown(spool, CLIENT, GROUP)
    spool.chmod(0o2770)
    yield directory
    shutil.rmtree(directory)


def start(directory: Path, user: int, group: int, *words: object) -> subprocess.Popen[str]:
    """Run Python as another user."""
    command = [
        *("unshare", "--mount", "sh", "-euc", AS_USER, "sh"),
        *(str(CLOSED or ""), sys.base_prefix, directory / "interpreter", f"--reuid={user}", f"--regid={group}", "--"),
        *(sys.executable, *map(str, words)),
    ]
    variables = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "engines")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_KLD_CAPTURE_DIR": str(directory / "spool"),
        "TINY_FAULT": str(directory / "fault"),
        "HOME": str(directory),
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def capture(directory: Path, server_group: int) -> str:
    """Serve as one user in this group, capture as another one, and return what the client printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = start(
        directory, SERVER, server_group, "-m", "tiny_server", f"--model={directory / 'model'}", f"--port={port}"
    )
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise AssertionError(server.stdout and server.stdout.read())
            try:
                requests.get(url, timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        client = start(directory, CLIENT, GROUP, directory / "client.py", url, directory / "model", directory / "spool")
        return client.communicate(timeout=240)[0]
    finally:
        server.kill()
        server.communicate()


def test_a_server_of_another_user_is_let_in_by_its_group(open_dir: Path) -> None:
    printed = capture(open_dir, GROUP)
    assert printed.count("captured (64, 1024)") == 2, printed


def test_a_server_of_a_user_outside_the_group_is_kept_out_with_an_error(open_dir: Path) -> None:
    printed = capture(open_dir, OTHER_GROUP)
    assert "captured" not in printed
    assert "refused:" in printed, printed

"""The key of a server stays between this process and that server: no log, report, cache or process list shows it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import requests
from conftest import Gate

from pytest_kld.errors import ServerError
from pytest_kld.servers.server import free_port
from pytest_kld.settings.engines import api_key

ENGINES = Path(__file__).parents[1] / "engines"
REPORTS = ("--kld-json=r.json", "--kld-html=r.html", "--kld-markdown=r.md", "--kld-junit=r.xml", "--junitxml=j.xml")


class Keyed:
    """A gate on a server that requires a key, in a process of its own."""

    def __init__(self, gate: Gate, directory: Path) -> None:
        self.gate, self.key, self.secrets = gate, f"sk-{uuid4().hex}", directory
        self.keyfile, self.spool, port = directory / "key", gate.path / "spool", free_port()
        self.keyfile.write_text(self.key)
        (directory / "fault").write_text("slow")
        self.spool.mkdir(mode=0o700)
        self.url = f"http://127.0.0.1:{port}"
        path = os.pathsep.join([str(ENGINES), str(ENGINES.parents[1])])
        self.variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        server = {"PYTEST_KLD_CAPTURE_DIR": str(self.spool), "TINY_FAULT": str(directory / "fault")}
        command = ["-m", "keyed_server", str(self.keyfile), f"--model={gate.reference}", f"--port={port}"]
        self.server = subprocess.Popen([sys.executable, *command], env=self.variables | server)
        while self.server.poll() is None:
            try:
                assert requests.get(f"{self.url}/version", timeout=5).status_code == 401
                break
            except requests.ConnectionError:
                time.sleep(0.1)

    def run(self, key: str | None = None) -> tuple[int, set[str]]:
        """Gate, and return the exit code and the command lines of every process that there was meanwhile."""
        options = [
            *(f"--kld-ref={self.gate.reference}", f"--kld-candidate={self.gate.reference}", "--kld-max-mean=1"),
            *("--kld-engine=vllm", f"--kld-ref-url={self.url}", f"--kld-candidate-url={self.url}"),
            *(f"--kld-capture-dir={self.spool}", "--kld-api-key-env=THE_KEY", "--kld-cache-dir=cache", "-rA", "-vv"),
        ]
        with (self.gate.path / "output").open("wb") as output:
            run = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, *self.gate.protocol, *REPORTS],
                **{"cwd": self.gate.path, "stdout": output, "stderr": subprocess.STDOUT},
                env={**self.variables, "THE_KEY": key or self.key},
            )
            seen: set[str] = set()
            while run.poll() is None:
                for process in psutil.process_iter():
                    try:
                        seen.add(" ".join([*process.cmdline(), process.name()]))
                    except psutil.Error:
                        continue
                time.sleep(0.2)
        return run.returncode, seen

    def written(self) -> dict[str, bytes]:
        """Return the contents of every file that the run left, and their names."""
        return {str(path): path.read_bytes() for path in self.gate.path.rglob("*") if path.is_file()}


@pytest.fixture
def keyed(gate: Gate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    made = Keyed(gate, tmp_path_factory.mktemp("secrets"))
    yield made
    made.server.kill()
    made.server.wait()


def require_hidden(key: str, written: dict[str, bytes], seen: set[str]) -> None:
    assert [name for name, contents in written.items() if key in name or key.encode() in contents] == []
    assert [line for line in seen if key in line] == []


def test_a_gate_with_a_key_shows_it_nowhere(keyed: Keyed) -> None:
    code, seen = keyed.run()
    written = keyed.written()
    output = written[str(keyed.gate.path / "output")].decode()
    assert code == 0, output
    assert any("--kld-api-key-env=THE_KEY" in line for line in seen)
    assert {Path(name).suffix for name in written} >= {".json", ".html", ".md", ".xml", ".safetensors"}
    assert [name for name in written if name.endswith("capture.json")]
    require_hidden(keyed.key, written, seen)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["another key", "a window fails"])
def test_a_server_that_quotes_the_key_in_an_error_does_not_make_us_show_it(keyed: Keyed, fault: str) -> None:
    wrong = f"sk-{uuid4().hex}" if fault == "another key" else keyed.key
    if fault == "a window fails":
        keyed.keyfile.with_suffix(".quote").touch()
    code, seen = keyed.run(wrong)
    written = keyed.written()
    output = written[str(keyed.gate.path / "output")].decode()
    assert code == 1, output
    assert ("401" if fault == "another key" else "Bearer [API key]") in output
    require_hidden(wrong, written, seen)


@pytest.mark.parametrize("value", ["secret\n", " secret", "sec\tret", "sécret", "sec\x1bret"])
def test_a_key_that_no_header_can_hold_is_refused_without_its_value(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", value)
    with pytest.raises(ServerError, match="--kld-api-key-env=THE_KEY: the key in it has") as raised:
        api_key("THE_KEY")
    assert value.strip() not in str(raised.value)


def test_a_variable_that_is_not_set_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    assert api_key("THE_KEY") is None
    assert api_key(None) is None
    monkeypatch.setenv("THE_KEY", "sk-0123_-.~+/=")
    assert api_key("THE_KEY") == "sk-0123_-.~+/="

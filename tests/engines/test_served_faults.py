"""What goes wrong with a real server, whichever engine it is, and what is left of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import TINY, MakeModel
from cpu_environment import ServerEnvironment
from served import Boot, booting
from transformers import LlamaConfig

from pytest_kld import __version__
from pytest_kld.engines.registry import served_kind
from pytest_kld.engines.served import connection as served_connection
from pytest_kld.errors import ServerError
from pytest_kld.hook.protocol import CaptureRequest
from pytest_kld.servers.server import Server, ServerCommand, free_port
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import Windows, cut_windows, load_tokenizer

pytestmark = pytest.mark.slow

SIZE = 256
ROWS = [SIZE // 2, SIZE - 1]
PLUGINS = {"sglang": "SGLANG_PLUGINS", "vllm": "VLLM_PLUGINS"}
WORKER = {"sglang": "scheduler", "vllm": "VLLM::EngineCore"}
"""Words in the command line of the process that runs the model."""


@pytest.fixture
def boot(engine: ServerEnvironment, tmp_path: Path) -> Iterator[Boot]:
    with booting(engine, tmp_path) as boot:
        yield boot


@pytest.fixture(scope="module")
def llama_dir(make_model: MakeModel) -> Path:
    """A tiny Llama with heads of a size that every engine runs."""
    return make_model("served-llama", LlamaConfig(**{**TINY, "head_dim": 32}, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def text(llama_dir: Path) -> Windows:
    """Eight windows of 256 tokens."""
    tokenizer = load_tokenizer(ModelSpec.parse(str(llama_dir), Path()), trust_remote_code=False)
    return cut_windows(load_corpus("python-docs", Path()), tokenizer, count=8, size=SIZE, stride=128, label="llama")


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and everything that it started."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def left(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Return those that still run after a time."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def without(engine: ServerEnvironment, path: Path) -> ServerEnvironment:
    """Return an environment that finds pytest-kld in a directory instead of where it was installed."""
    first, *others = engine.variables["PYTHONPATH"].split(os.pathsep)
    assert (Path(first) / "pytest_kld").is_dir()
    return replace(engine, variables={**engine.variables, "PYTHONPATH": os.pathsep.join([str(path), *others])})


def test_a_server_without_the_hook_is_an_error_and_one_that_does_not_end_is_killed(
    boot: Boot, llama_dir: Path, engine: ServerEnvironment
) -> None:
    """A stopped process reacts to no SIGTERM."""
    served = boot(llama_dir, **{PLUGINS[engine.engine]: "none-of-these"})
    with pytest.raises(ServerError, match="the server answered and the hook did not") as caught, served.connected():
        pass
    assert "PYTEST_KLD_CAPTURE_DIR" in str(caught.value)
    assert PLUGINS[engine.engine] in str(caught.value)
    assert str(served.handle.log) in str(caught.value)
    supervisor, *processes = tree(served.handle.pid)
    assert len(processes) > 1
    for process in processes:
        process.suspend()
    served.engine.close()
    assert left([supervisor, *processes], 5) == []


def test_an_engine_without_the_hook_installed_is_an_error_before_anything_boots(
    engine: ServerEnvironment, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)  # `python -m` looks there first
    bare = without(engine, tmp_path)
    with booting(bare, tmp_path) as boot, pytest.raises(ServerError, match="pip install pytest-kld"):
        boot(llama_dir)
    assert not (tmp_path / "logs").exists()


def test_a_hook_of_another_version_is_an_error_before_anything_boots(
    engine: ServerEnvironment, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    installed = Path(engine.variables["PYTHONPATH"].split(os.pathsep)[0])
    other = shutil.copytree(installed, tmp_path / "other")
    init = other / "pytest_kld" / "__init__.py"
    init.write_text(init.read_text().replace(__version__, "0.0.1"))
    with (
        booting(without(engine, other), tmp_path) as boot,
        pytest.raises(ServerError, match=r"pytest-kld 0\.0\.1[\s\S]*install the same version on both sides"),
    ):
        boot(llama_dir)
    assert not (tmp_path / "logs").exists()


def test_a_server_that_dies_while_it_boots_is_an_error_with_log_and_advice(
    boot: Boot, llama_dir: Path, engine: ServerEnvironment
) -> None:
    with pytest.raises(ServerError, match="ended with exit code 2 before it was ready") as caught:
        boot(llama_dir, "--no-such-flag")
    assert "unrecognized arguments: --no-such-flag" in str(caught.value)
    title = served_kind(engine.engine).title
    assert f"hint: this release of {title} does not know one of the flags" in str(caught.value)


def test_what_a_server_says_is_no_command_to_a_ci_runner(
    pytester: pytest.Pytester, engine: ServerEnvironment, llama_dir: Path
) -> None:
    """The engine repeats the unknown flag in its log, and the error quotes the log."""
    flags = (*engine.flags, "--no-such-flag\n::error::said-the-\x1b[31mserver")
    result = pytester.runpytest_subprocess(
        *replace(engine, flags=flags).options(),
        *(f"--kld-ref={llama_dir}", f"--kld-candidate={llama_dir}", "--kld-dataset=python-docs", "--kld-windows=2"),
        *("--kld-window-size=64", "--kld-stride=64", "--kld-max-mean=0.01", "--kld-json=report.json"),
        f"--kld-cache-dir={pytester.path / 'cache'}",
    )
    result.assert_outcomes(errors=1)
    assert "::error::said-the" in (next((pytester.path / "cache").rglob("*.log"))).read_text()
    for text in (result.stdout.str(), result.stderr.str(), (pytester.path / "report.json").read_text()):
        assert not [line for line in text.splitlines() if line.lstrip().startswith("::")]
        assert "\x1b[31m" not in text
    assert r"\x3a:error::said-the-\x1b[31mserver" in result.stdout.str()


def test_a_missing_file_and_a_death_in_a_capture_are_errors_and_leave_no_process(
    boot: Boot, llama_dir: Path, text: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = boot(llama_dir)
    monkeypatch.setattr(served_connection, "_FILE_TIMEOUT_SECONDS", 5)
    processes = tree(served.handle.pid)
    (worker,) = [one for one in processes if WORKER[served.engine.kind.name] in " ".join(one.cmdline())]
    with served.connected() as loaded:
        with loaded.run(CaptureRequest(hidden=True, rows=(1,))) as run:
            loaded._ask(run, 0, text.token_ids[0].tolist())
            loaded.pieces(run, 0, SIZE)
            (run / "0.0.safetensors").unlink()
            with pytest.raises(ServerError, match="the server answered and the hook did not write window 0"):
                loaded.pieces(run, 0, SIZE)
        prefills = loaded.prefill(text, range(text.count), ROWS)
        next(prefills)
        worker.kill()
        with pytest.raises(ServerError, match=r"does not answer|answered 5") as caught:
            list(prefills)
    assert str(served.handle.log) in str(caught.value)
    served.engine.close()
    assert left(processes, 5) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_no_server_outlives_pytest(
    number: signal.Signals, pytester: pytest.Pytester, engine: ServerEnvironment, llama_dir: Path
) -> None:
    pytester.makepyfile("""
        import time
        def test_serves(kld_server, request):
            handle = kld_server(request.config.getoption("--kld-ref"))
            print("\\nSERVING", handle.pid, flush=True)
            time.sleep(600)
    """)
    command = [
        *(sys.executable, "-m", "pytest", "-s", f"--kld-ref={llama_dir}", *engine.options()),
        f"--kld-cache-dir={pytester.path / 'cache'}",
    ]
    with subprocess.Popen(command, cwd=pytester.path, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pid = next(int(line.split()[1]) for line in run.stdout if line.startswith("SERVING"))
        processes = tree(pid)
        assert len(processes) > 3
        run.send_signal(number)
        run.stdout.read()
    assert left(processes, 40) == []


def test_a_running_server_with_a_key_is_used_by_its_url(
    pytester: pytest.Pytester, engine: ServerEnvironment, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers by URL is what a cluster gives; here one server is both sides, so KL is exactly 0."""
    shared = pytester.path / "shared"
    shared.mkdir()
    kind, port = served_kind(engine.engine), free_port()
    address = kind.address(ModelSpec.parse(str(llama_dir), Path()), port)
    server = Server(
        ServerCommand(
            argv=[*engine.command, *address, "--api-key", "secret", *engine.flags],
            environment={**os.environ, **engine.variables, "PYTEST_KLD_CAPTURE_DIR": str(shared)},
            url=f"http://127.0.0.1:{port}",
            health=kind.health,
            log=pytester.path / "server.log",
            startup_timeout=600,
        )
    )
    report = pytester.path / "report.json"
    options = [
        *(f"--kld-engine={engine.engine}", f"--kld-ref={llama_dir}", f"--kld-candidate={llama_dir}"),
        *(f"--kld-ref-url={server.url}", f"--kld-candidate-url={server.url}", f"--kld-capture-dir={shared}"),
        *("--kld-dataset=python-docs", "--kld-windows=2", "--kld-window-size=64", "--kld-stride=64"),
        *("--kld-max-mean=0.01", f"--kld-cache-dir={pytester.path / 'cache'}", f"--kld-json={report}"),
    ]
    try:
        without_key = pytester.runpytest_subprocess(*options)
        without_key.assert_outcomes(errors=1)
        without_key.stdout.fnmatch_lines(["*--kld-api-key-env*"])
        monkeypatch.setenv("THE_KEY", "secret")
        with_key = pytester.runpytest_subprocess(*options, "--kld-api-key-env=THE_KEY")
        with_key.assert_outcomes(passed=1)
    finally:
        server.stop()
    told = report.read_text()
    assert json.loads(told)["results"][0]["figures"]["mean"] == 0.0
    assert "secret" not in told

"""Nothing gets more rights than it needs."""

from __future__ import annotations

import ast
import os
import stat
from pathlib import Path
from typing import Any

import pytest

import pytest_kld
from pytest_kld.captures.cache import Cache
from pytest_kld.engines.served.client import ServedModel
from pytest_kld.engines.served.kind import Settings
from pytest_kld.engines.sglang.kind import SGLang
from pytest_kld.engines.vllm.kind import VLLM
from pytest_kld.hook.protocol import CaptureRequest, new_run
from pytest_kld.hook.recorder import Recorder
from pytest_kld.settings.options import OPTIONS
from pytest_kld.subjects.model import ModelSpec

PACKAGE = Path(pytest_kld.__file__).parent
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml"}
CALLS = {"eval", "exec", "torch.load", "np.load", "numpy.load", "torch.jit.load", "torch.package"}


def mistakes(tree: ast.AST) -> list[str]:
    """Return what in a module could run code from a file that it loads."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            if (called := ast.unparse(node.func)) in CALLS:
                found.append(called)
            found += [word.arg for word in node.keywords if word.arg in ("allow_pickle", "weights_only")]
            trusted = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
            found += ["trust_remote_code=True" for value in trusted if ast.unparse(value) == "True"]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_that_is_loaded_can_run_code(path: Path) -> None:
    assert mistakes(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        *(
            "import pickle",
            "from yaml import load",
            "torch.load(path)",
            "np.load(path, allow_pickle=True)",
            "eval(text)",
        ),
        "from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_could_run_code_is_found(line: str) -> None:
    assert mistakes(ast.parse(line))


def served(directory: Path) -> ServedModel:
    nothing: Any = None
    return ServedModel(kind=nothing, url="", label="m", capture_dir=directory, api_key=None, pool=None, server=None)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_run_directory_is_private(tmp_path: Path) -> None:
    with served(tmp_path / "spool").run(CaptureRequest(hidden=True)) as run:
        assert (mode(run), mode(run.parent)) == (0o700, 0o700)
        assert [path.name for path in run.iterdir()] == ["request.json"]


def test_capture_directory_that_hands_down_its_group_lets_that_group_in(tmp_path: Path) -> None:
    tmp_path.chmod(0o2770)
    with served(tmp_path).run(CaptureRequest(hidden=True)) as run:
        assert mode(run) == 0o2770
        assert run.stat().st_gid == tmp_path.stat().st_gid


def test_new_cache_directory_is_private(tmp_path: Path) -> None:
    Cache(tmp_path / "cache")
    assert mode(tmp_path / "cache") == 0o700
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o755)
    Cache(tmp_path / "shared")
    assert mode(tmp_path / "shared") == 0o755


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_hook_ignores_a_run_that_it_may_not_enter(tmp_path: Path) -> None:
    private = tmp_path / "private"
    run = private / new_run()
    run.mkdir(parents=True)
    private.chmod(0o700)
    os.seteuid(65534)
    try:
        assert Recorder(str(private))._run(run.name) is None
    finally:
        os.seteuid(0)
    assert Recorder(str(private))._run(run.name) is not None


def test_code_of_a_repository_is_not_trusted_by_default() -> None:
    assert not Settings().trust_remote_code
    (option,) = [option for option in OPTIONS if option.name == "trust_remote_code"]
    assert option.flag
    assert option.default is None
    for kind in (SGLang(), VLLM()):
        assert "--trust-remote-code" not in kind.complete((), Settings(device="cpu"))
        assert "--trust-remote-code" in kind.complete((), Settings(device="cpu", trust_remote_code=True))


@pytest.mark.parametrize("kind", [SGLang(), VLLM()], ids=["sglang", "vllm"])
def test_servers_are_told_to_listen_on_loopback_only(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    words = kind.address(ModelSpec.parse(str(tmp_path), tmp_path), 30_000)
    assert words[words.index("--host") + 1] == "127.0.0.1"

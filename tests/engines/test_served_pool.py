"""What is asked of the place where SGLang runs, before anything boots there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_kld import __version__
from pytest_kld.engines.served.kind import Settings
from pytest_kld.engines.served.pool import ServerPool
from pytest_kld.engines.sglang.kind import KIND
from pytest_kld.errors import ServerError
from pytest_kld.hook.protocol import PROTOCOL
from pytest_kld.progress import Silent

GOOD = {
    "protocol": PROTOCOL,
    "pytest_kld": __version__,
    "versions": {"sglang": "0.5.23"},
    "devices": ["NVIDIA H100"],
    "hooked": True,
    "why_not": None,
}


def pool_that_is_told(told: object, tmp_path: Path) -> ServerPool:
    """A pool whose interpreter answers the question with the given text and can do nothing else."""
    interpreter = tmp_path / "python"
    text = told if isinstance(told, str) else json.dumps(told)
    interpreter.write_text(f"#!/bin/sh\necho 'a banner'\ncat <<'END'\n{text}\nEND\n")
    interpreter.chmod(0o755)
    return ServerPool(
        kind=KIND,
        command=(str(interpreter), *KIND.launch),
        capture_dir=tmp_path / "spool",
        log_dir=tmp_path / "logs",
        startup_timeout=5,
        settings=Settings(),
        progress=Silent(),
    )


def test_versions_and_devices_are_asked_for_once(tmp_path: Path) -> None:
    pool = pool_that_is_told(GOOD, tmp_path)
    told = pool.installed({})
    assert (told.versions, told.devices) == ({"sglang": "0.5.23"}, ("NVIDIA H100",))
    Path(pool.command[0]).unlink()
    assert pool.installed({}) is told


def test_a_hook_of_another_version_is_refused_and_both_are_named(tmp_path: Path) -> None:
    pool = pool_that_is_told({**GOOD, "pytest_kld": "9.9.9", "protocol": 7}, tmp_path)
    with pytest.raises(ServerError, match=r"pytest-kld 9\.9\.9 is installed \(protocol 7\)") as caught:
        pool.installed({})
    assert f"{__version__} (protocol {PROTOCOL})" in str(caught.value)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({**GOOD, "versions": {}}, "has no SGLang"),
        ({**GOOD, "hooked": False, "why_not": "run pytest-kld patch --apply"}, "run pytest-kld patch --apply"),
        ("no JSON", "Install pytest-kld where SGLang runs"),
    ],
)
def test_what_is_missing_is_an_error_before_a_boot(told: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=words):
        pool_that_is_told(told, tmp_path).installed({})


def test_an_interpreter_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    pool = pool_that_is_told(GOOD, tmp_path)
    Path(pool.command[0]).unlink()
    with pytest.raises(ServerError, match="does not run") as caught:
        pool.installed({})
    assert str(tmp_path / "python") in str(caught.value)
    assert "--kld-sglang-command" in str(caught.value)


def test_flags_are_completed_and_what_the_user_gives_wins(tmp_path: Path) -> None:
    pool = pool_that_is_told(GOOD, tmp_path)
    assert pool.complete(["--tp", "2"]) == ["--tp", "2", "--prefill-max-requests", "1"]
    assert pool.complete(["--prefill-max-requests", "4"]) == ["--prefill-max-requests", "4"]
    with pytest.raises(ServerError, match="--port cannot be given"):
        pool.complete(["--port", "1"])

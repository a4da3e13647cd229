"""Faults of a server that the real one cannot be made to show."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from scripted import SCRIPT

from pytest_kld.engines.served import client as served_client
from pytest_kld.engines.served import connection as served_connection
from pytest_kld.engines.served.client import ServedModel
from pytest_kld.engines.served.pieces import narrow
from pytest_kld.engines.sglang.kind import KIND
from pytest_kld.errors import ServerError
from pytest_kld.servers.server import Server, ServerCommand, free_port
from pytest_kld.subjects.model import ModelSpec

MODEL = ModelSpec(name="org/model")


@contextmanager
def scripted(behaviour: str, tmp_path: Path) -> Iterator[str]:
    port = free_port()
    server = Server(
        ServerCommand(
            argv=[sys.executable, str(SCRIPT), behaviour, str(port)],
            environment=os.environ,
            url=f"http://127.0.0.1:{port}",
            health="/health",
            log=tmp_path / "server.log",
            startup_timeout=30,
        )
    )
    try:
        yield server.url
    finally:
        server.stop()


def connect(url: str, tmp_path: Path) -> ServedModel:
    return ServedModel.connect(
        KIND, url, model=MODEL, pool=None, server=None, capture_dir=tmp_path / "spool", api_key=None
    )


def test_an_answer_of_500_is_an_error_that_quotes_it(tmp_path: Path) -> None:
    with (
        scripted("errors", tmp_path) as url,
        pytest.raises(ServerError, match=r"answered 500.*the kernel is not implemented"),
    ):
        connect(url, tmp_path)


def test_a_speculation_that_refuses_log_probs_is_an_error_with_advice(tmp_path: Path) -> None:
    with scripted("speculates", tmp_path) as url, pytest.raises(ServerError, match=r"hint: .*without --speculative-\*"):
        connect(url, tmp_path)


def test_an_answer_without_a_file_is_an_error_that_says_how_to_put_the_hook_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_connection, "_FILE_TIMEOUT_SECONDS", 0.5)
    with scripted("mute", tmp_path) as url, pytest.raises(ServerError, match="the hook did not") as caught:
        connect(url, tmp_path)
    assert "--kld-capture-dir" in str(caught.value)
    assert "pytest-kld patch --apply" in str(caught.value)
    assert list((tmp_path / "spool").iterdir()) == []


def test_nobody_at_the_url_is_an_error_that_names_it(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerError, match=f"the server {url} does not answer"):
        connect(url, tmp_path)


@pytest.mark.parametrize(
    ("served", "same"),
    [
        ("org/model", True),
        ("/mnt/weights/model", True),
        ("/hub/models--org--model/snapshots/0a1b", True),
        ("org/model-NVFP4", False),
        ("/mnt/weights/other", False),
    ],
)
def test_a_server_of_another_model_is_told_by_its_name(served: str, same: bool) -> None:
    assert served_client._same_model(MODEL, served) is same


def test_logits_are_narrowed_only_where_that_loses_nothing() -> None:
    wide = torch.tensor([[1.5, float("nan"), float("-inf"), -20.125]])
    assert narrow(wide, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(narrow(wide, torch.bfloat16).float().nan_to_num(), wide.nan_to_num())
    assert narrow(wide + 1e-4, torch.bfloat16).dtype == torch.float32

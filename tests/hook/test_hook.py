"""The hook is inert unless it is wanted, and reports where it cannot be put in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pytest_kld.hook.decoder import REMEMBERED_WINDOWS
from pytest_kld.hook.protocol import (
    CAPTURE_DIR_VARIABLE,
    CaptureRequest,
    new_run,
    parse_request_id,
    request_id,
)
from pytest_kld.hook.writer import Piece, Writer, copy_to_host
from pytest_kld.settings.parsers import MOST_SEQUENCES


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != CAPTURE_DIR_VARIABLE}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, **variables},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )


def test_it_imports_nothing_heavy_and_does_nothing_without_the_variable() -> None:
    program = (
        "import sys; from pytest_kld.hook.sglang import install; install(); "
        "print([name for name in ('torch', 'sglang', 'safetensors', 'numpy') if name in sys.modules])"
    )
    assert python(program).stdout.strip() == "[]"


def test_a_hook_that_cannot_be_put_in_is_reported_and_does_not_raise(tmp_path: Path) -> None:
    program = "import sys; sys.modules['sglang'] = None; from pytest_kld.hook.sglang import install; install()"
    python(program, **{CAPTURE_DIR_VARIABLE: str(tmp_path)})
    (report,) = tmp_path.glob("install-error-*.txt")
    assert "sglang" in report.read_text()


def test_what_is_installed_is_told_in_one_line_of_json() -> None:
    program = (
        "import runpy, sys; sys.argv[1:] = ['pytest_kld.hook.sglang']; "
        "runpy.run_module('pytest_kld.hook', run_name='__main__')"
    )
    told = json.loads(python(program).stdout)
    assert told["versions"]["torch"].startswith("2.")
    assert told["hooked"] is False
    assert "finds no SGLang" in told["why_not"]


@pytest.mark.parametrize("rid", ["HEALTH_CHECK_17", "pytest-kld:x:1", "pytest-kld:" + "a" * 32 + ":-1", None, 7, "0"])
def test_other_request_ids_are_not_ours(rid: object) -> None:
    assert parse_request_id(rid) is None


def test_our_request_ids_and_requests_survive_the_way() -> None:
    run = new_run()
    assert parse_request_id(request_id(run, 12)) == (run, 12)
    request = CaptureRequest(hidden=True, rows=(3, 5), head=True)
    assert CaptureRequest.from_json(json.loads(json.dumps(request.to_json()))) == request


def test_pieces_appear_whole_and_a_failed_write_is_reported(tmp_path: Path) -> None:
    writer = Writer()
    rows = torch.arange(6.0).reshape(2, 3)
    copied = copy_to_host(rows)
    writer.put(Piece(tmp_path / "0.0.safetensors", {"hidden": copied}))
    rows.zero_()  # the device uses its memory again
    (tmp_path / "gone").write_text("")
    writer.put(Piece(tmp_path / "gone" / "1.0.safetensors", {"hidden": copied}))
    writer.put(Piece(tmp_path / "2.0.safetensors", {"hidden": copied}))
    while not (tmp_path / "2.0.safetensors").is_file():
        pass
    assert torch.equal(load_file(tmp_path / "0.0.safetensors")["hidden"], torch.arange(6.0).reshape(2, 3))
    assert not list(tmp_path.glob(".*.tmp"))


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def test_copies_from_a_gpu_are_pinned_and_only_the_writer_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    empty, thread = torch.empty, threading.current_thread

    class Event:
        def record(self) -> None:
            done.append(("record", thread().name))

        def synchronize(self) -> None:
            done.append(("synchronize", thread().name))

    def pinned(*size: Any, pin_memory: bool = False, **named: Any) -> torch.Tensor:
        done.append(("pinned" if pin_memory else "pageable", thread().name))
        return empty(*size, **named)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", pinned)
    writer, here = Writer(), thread().name
    for number in range(3):
        rows = torch.full((2, 3), float(number)).as_subclass(OnDevice)
        copied = {"hidden": copy_to_host(rows), "logits": copy_to_host(rows)}
        writer.put(Piece(tmp_path / f"{number}.0.safetensors", copied))
    while not (tmp_path / "2.0.safetensors").is_file():
        pass
    assert [step for step in done if step[1] == here] == [("pinned", here), ("record", here)] * 6
    assert [step for step in done if step[1] != here] == [("synchronize", "pytest-kld-writer")] * 6
    assert torch.equal(load_file(tmp_path / "2.0.safetensors")["logits"], torch.full((2, 3), 2.0))


def test_a_full_disk_is_reported_beside_the_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pytest_kld.hook.writer.save_file", no_space)
    writer = Writer()
    writer.put(Piece(tmp_path / "0.0.safetensors", {"hidden": copy_to_host(torch.zeros(1))}))
    while not (tmp_path / "error-0.txt").is_file():
        pass
    assert "No space left" in (tmp_path / "error-0.txt").read_text()


def test_every_window_that_may_be_decoded_at_a_time_is_remembered() -> None:
    """A window that is dropped while it is decoded loses rows."""
    assert REMEMBERED_WINDOWS >= MOST_SEQUENCES

"""Servers that answer, but not as they should: each is an error that says so, and no capture comes of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from guarantees.campaign import ENGINES
from guarantees.proxy import Change, Proxy, behind
from recorded import record

sys.path.insert(0, str(ENGINES))
from tiny_engine import Tiny
from tiny_pool import TinyPool, capture

from pytest_kld.captures.cache import Cache
from pytest_kld.captures.library import CaptureLibrary
from pytest_kld.engines.served import connection
from pytest_kld.errors import CaptureError, KLDError, ServerError
from pytest_kld.progress import Silent
from pytest_kld.servers.server import Server, ServerCommand, free_port
from pytest_kld.subjects.subject import Subject
from pytest_kld.text.windows import Windows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyPool]:
    """One server for all faults that it survives."""
    engine = TinyPool(tmp_path_factory.mktemp("tiny"), Tiny())
    engine.pool.cpu_servers = 6
    yield engine
    engine.pool.close()


def boot(tiny: TinyPool, subject: Subject) -> str:
    return tiny.pool.get(subject.spec, subject.arguments["args"], subject.environment).url


def require_nothing_captured(tiny: TinyPool, cache: Path) -> None:
    assert list(cache.glob("captures/*/capture.json")) == []
    assert list(tiny.pool.capture_dir.iterdir()) == []


def test_files_that_come_later_than_answers_are_waited_for(
    tiny: TinyPool, reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    right = record(reference_dir, windows, tmp_path / "right")
    with tiny.spoiled("late"):
        late = capture(
            tiny.of(Tiny()), tiny.subject(reference_dir, "--a", "late"), windows, tmp_path / "late", "hidden"
        )
    assert [late.rows(0, 0, 64).allclose(right.rows(0, 0, 64), atol=1e-5)] == [True]


def test_files_that_come_too_late_are_an_error(
    tiny: TinyPool, reference_dir: Path, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_FILE_TIMEOUT_SECONDS", 0.5)
    subject = tiny.subject(reference_dir, "--a", "late")
    with tiny.spoiled("late"), pytest.raises(ServerError, match="the server answered and the hook did not write"):
        capture(tiny.of(Tiny()), subject, windows, tmp_path, "hidden")
    require_nothing_captured(tiny, tmp_path)


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_an_answer_that_never_ends_is_an_error(
    fault: str,
    tiny: TinyPool,
    reference_dir: Path,
    windows: Windows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject, engine = tiny.subject(reference_dir, "--a", fault), tiny.of(Tiny())
    boot(tiny, subject)
    monkeypatch.setattr(connection, "_ANSWER_TIMEOUT_SECONDS", 2)
    with tiny.spoiled(fault), pytest.raises(ServerError, match=r"does not answer: .*(within 2 s|timeout=2)"):
        capture(engine, subject, windows, tmp_path, "hidden")
    require_nothing_captured(tiny, tmp_path)
    tiny.pool.close()  # that server still hangs


HEALTH = """
import socket, sys, time
server = socket.create_server(("127.0.0.1", int(sys.argv[2])))
while True:
    taken, _ = server.accept()
    taken.recv(1000)
    taken.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 1000\\r\\n\\r\\n")
    while True:
        if sys.argv[1] == "drip":
            taken.sendall(b"x")
        time.sleep(0.2)
"""


@pytest.mark.parametrize("behaviour", ["hang", "drip"])
def test_a_health_check_that_never_ends_is_an_error_at_the_deadline(behaviour: str, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "health.py").write_text(HEALTH)
    command = ServerCommand(
        argv=[sys.executable, str(tmp_path / "health.py"), behaviour, str(port)],
        environment={},
        url=f"http://127.0.0.1:{port}",
        health="/ready",
        log=tmp_path / "log",
        startup_timeout=2,
    )
    with pytest.raises(ServerError, match="the server was not ready after 2 s"):
        Server(command)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}", timeout=5)


def test_a_line_of_a_hundred_megabytes_in_the_log_harms_nothing(
    tiny: TinyPool, reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    subject, engine = tiny.subject(reference_dir, "--a", "floods"), tiny.of(Tiny())
    boot(tiny, subject)
    with tiny.spoiled("floods"):
        capture(engine, subject, windows, tmp_path, "hidden")
    handle = tiny.pool.handles[-1]
    assert handle.log.stat().st_size > 100_000_000
    assert len(str(tiny.pool.failure(handle, "what"))) < 20_000
    tiny.pool.close()
    handle.log.unlink()


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_server_restarted_behind_our_back_is_an_error(
    place: int, tiny: TinyPool, reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    """Before the first window, and between two; the new one has the same model, name and flags."""
    subject = tiny.subject(reference_dir)
    proxy = Proxy(boot(tiny, subject))
    other = boot(tiny, tiny.subject(reference_dir, "--a", "other"))

    def restart(body: dict[str, Any]) -> dict[str, Any]:
        if proxy.requests > place + 2:  # two handshakes: for the key, and for the capture
            proxy.url = other
        return body

    proxy.change = restart
    with (
        proxy.serving() as url,
        pytest.raises(CaptureError, match=r"another process answers at .* than at the beginning"),
    ):
        capture(tiny.of(Tiny()), behind(subject, url), windows, tmp_path, "hidden")
    require_nothing_captured(tiny, tmp_path)


def test_another_model_behind_a_url_is_an_error(
    tiny: TinyPool, reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    url = boot(tiny, tiny.subject(candidate_dir))
    with pytest.raises(ServerError, match=rf"serves .*candidate, and {reference_dir} is asked for"):
        capture(tiny.of(Tiny()), behind(tiny.subject(reference_dir), url), windows, tmp_path, "hidden")
    require_nothing_captured(tiny, tmp_path)


def other_tokens(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "tokens": [*body["tokens"][:-1], 7]}


def other_request(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "id": "chat-1"}


def answered_as_sent(body: dict[str, Any]) -> Change:
    return lambda answer: {**answer, "tokens": body["tokens"]}


@pytest.mark.parametrize(
    ("change", "change_answer", "words"),
    [
        (other_tokens, None, "the server ran other token ids than it was sent"),
        (other_request, None, "the server answered another request: chat-1"),
        (None, lambda answer: {**answer, "id": "chat-1"}, "the server answered another request: chat-1"),
        (None, lambda answer: {**answer, "said": [None, *answer["said"][:-1]]}, "they do not belong to this request"),
    ],
    ids=["tokens", "id", "id of the answer", "log-probs"],
)
def test_ids_changed_by_a_proxy_are_an_error(
    change: Change | None,
    change_answer: Change | None,
    words: str,
    tiny: TinyPool,
    reference_dir: Path,
    windows: Windows,
    tmp_path: Path,
) -> None:
    proxy = Proxy(boot(tiny, tiny.subject(reference_dir)))
    engine = tiny.of(Tiny())
    with proxy.serving() as url, engine.open(behind(tiny.subject(reference_dir), url)) as loaded:
        proxy.change = change or proxy.change
        proxy.change_answer = change_answer or proxy.change_answer
        with pytest.raises(KLDError, match=words):
            list(loaded.prefill(windows, [0, 1, 2], [31, 63]))
    require_nothing_captured(tiny, tmp_path)


def test_a_file_that_vanishes_between_check_and_read_is_an_error(
    tiny: TinyPool, reference_dir: Path, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    covers = connection.covers

    def vanish(pieces: dict[int, Path], first: int, count: int) -> bool:
        there = covers(pieces, first, count)
        if there:
            next(iter(pieces.values())).unlink()
        return there

    monkeypatch.setattr(connection, "covers", vanish)
    with pytest.raises(CaptureError, match=r"cannot read .*safetensors, which a server wrote"):
        capture(tiny.of(Tiny()), tiny.subject(reference_dir), windows, tmp_path, "hidden")
    require_nothing_captured(tiny, tmp_path)


def test_a_server_restarted_with_other_settings_before_its_capture_gives_none(
    tiny: TinyPool, reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    """The capture would have the key of the settings before."""
    subject = tiny.subject(reference_dir)
    other = replace(subject, environment={**subject.environment, "MKL_CBWR": "COMPATIBLE"})
    proxy = Proxy(boot(tiny, subject))
    there = boot(tiny, other)

    def restart(body: dict[str, Any]) -> dict[str, Any]:
        if proxy.requests > 1:
            proxy.url = there
        return body

    proxy.change = restart
    library = CaptureLibrary(
        cache=Cache(tmp_path),
        engine=lambda _: tiny.of(Tiny()),
        make_room=lambda _: None,
        identify=lambda _: {},
        store="hidden",
        progress=Silent(),
    )
    with proxy.serving() as url, pytest.raises(CaptureError, match=r"the settings with which .* changed while it was"):
        library.obtain(behind(subject, url), windows)
    require_nothing_captured(tiny, tmp_path)

"""A shared cache on real remotes: what one machine makes, another has, whole or not at all."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from recorded import transformers_subject

from pytest_kld.captures import shared as shared_module
from pytest_kld.captures.cache import Cache
from pytest_kld.captures.capture import Capture
from pytest_kld.captures.library import CaptureLibrary
from pytest_kld.captures.manifest import manifest_bytes
from pytest_kld.captures.remote import Remote
from pytest_kld.captures.shared import SharedCache
from pytest_kld.engines.transformers import TransformersEngine
from pytest_kld.errors import CacheWarning, CaptureError, ModelError, RemoteError
from pytest_kld.progress import Silent
from pytest_kld.subjects.digests import FileDigests

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Gate

    from pytest_kld.text.windows import Windows


class Notes(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class CountingEngine(TransformersEngine):
    """The engine; counts how often a model is run, and can be made to fail."""

    runs = 0
    fails = False

    @contextmanager
    def open(self, subject: Any) -> Iterator[Any]:
        type(self).runs += 1
        if type(self).fails:
            raise ModelError("it does not load")
        with super().open(subject) as loaded:
            yield loaded


class Machine:
    """A machine with a cache of its own."""

    def __init__(self, root: Path, url: str, *, push: bool = True, **options: Any) -> None:
        self.notes = Notes()
        self.cache = Cache(root, options.pop("refreshed_since", None))
        self.remote = Remote(url)
        self.shared = SharedCache(remote=self.remote, push=push, progress=self.notes, **options)
        digests = FileDigests(kind="sample", memo=root / "memo", fresh=False, note=self.notes.note)
        self.library = CaptureLibrary(
            cache=self.cache,
            engine=lambda _: CountingEngine(dtype="float32", device="cpu"),
            identify=lambda model: model.identity(digests),
            store="auto",
            progress=self.notes,
            strict=self.shared.strict,
            shared=self.shared,
            make_room=lambda _: None,
        )

    def capture(self, model: Path, windows: Windows) -> Capture:
        return self.library.obtain(transformers_subject(model), windows)


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> type[CountingEngine]:
    monkeypatch.setattr(CountingEngine, "runs", 0)
    monkeypatch.setattr(CountingEngine, "fails", False)
    monkeypatch.setattr("pytest_kld.captures.remote._PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(shared_module, "_POLL_SECONDS", 0.02)
    return CountingEngine


@pytest.fixture
def team(tmp_path: Path) -> Path:
    return tmp_path / "team"


@pytest.fixture
def url(team: Path) -> str:
    return f"file://{team}"


@pytest.fixture
def first(tmp_path: Path, url: str) -> Machine:
    return Machine(tmp_path / "first", url)


@pytest.fixture
def second(tmp_path: Path, url: str) -> Machine:
    return Machine(tmp_path / "second", url, push=False)


def names(team: Path) -> list[str]:
    return sorted(path.relative_to(team).as_posix() for path in team.rglob("*") if path.is_file())


def test_second_machine_takes_the_capture_of_a_copy_of_the_model(
    first: Machine, second: Machine, reference_dir: Path, windows: Windows, tmp_path: Path, team: Path
) -> None:
    made = first.capture(reference_dir, windows)
    assert CountingEngine.runs == 1
    elsewhere = tmp_path / "other-user" / "models" / "another-name"
    shutil.copytree(reference_dir, elsewhere)
    taken = second.capture(elsewhere, windows)
    assert CountingEngine.runs == 1
    assert taken.digest == made.digest
    assert taken.path.name == made.path.name
    taken.verify()
    assert [name.partition("/")[0] for name in names(team)] == ["captures", *["files"] * 4, "pytest-kld.json"]
    second.cache.discard(taken.path)
    shutil.rmtree(team)
    with pytest.raises(RemoteError, match=r"there is no shared cache at file://.*--kld-cache-push"):
        Machine(tmp_path / "third", f"file://{team}", push=False).capture(elsewhere, windows)


def test_key_holds_no_path_host_user_or_time(
    first: Machine, reference_dir: Path, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import getpass
    import os
    import socket

    elsewhere = tmp_path / "copy"
    shutil.copytree(reference_dir, elsewhere)
    os.utime(elsewhere / "model.safetensors", (1, 1))
    subjects = [transformers_subject(path) for path in (reference_dir, elsewhere)]
    monkeypatch.setenv("HOSTNAME", "one")
    key = first.library._key(subjects[0], windows)
    monkeypatch.setenv("HOSTNAME", "other")
    monkeypatch.setattr(socket, "gethostname", lambda: "other")
    monkeypatch.setattr(time, "time", lambda: 1e10)
    assert first.library._key(subjects[1], windows) == key
    text = json.dumps(key)
    assert str(tmp_path) not in text
    assert str(reference_dir.parent) not in text
    assert getpass.getuser() not in text


def test_capture_that_was_made_before_is_uploaded(
    first: Machine, second: Machine, reference_dir: Path, windows: Windows, tmp_path: Path, url: str
) -> None:
    alone = Machine(tmp_path / "first", url)
    object.__setattr__(alone.library, "shared", None)
    alone.capture(reference_dir, windows)
    first.capture(reference_dir, windows)
    second.capture(reference_dir, windows)
    assert CountingEngine.runs == 1


def test_upload_that_is_killed_leaves_nothing_that_is_read_as_whole_and_goes_on(
    first: Machine, second: Machine, reference_dir: Path, windows: Windows, team: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, uploaded = Remote.upload, []

    def until_the_third(self: Remote, name: str, path: Path) -> None:
        if len(uploaded) == 2:
            raise KeyboardInterrupt
        uploaded.append(name)
        upload(self, name, path)

    monkeypatch.setattr(shared_module, "_AT_ONCE", 1)
    monkeypatch.setattr(Remote, "upload", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        first.capture(reference_dir, windows)
    assert names(team) == sorted([*uploaded, "pytest-kld.json"])
    second.capture(reference_dir, windows)  # takes nothing of it
    assert CountingEngine.runs == 2
    kept = list(uploaded)
    uploaded.clear()
    monkeypatch.setattr(Remote, "upload", lambda *args: (uploaded.append(args[1]), upload(*args)))
    first.capture(reference_dir, windows)
    assert len(uploaded) == 2
    assert not set(kept) & set(uploaded)
    assert len(names(team)) == 6


def test_download_that_is_interrupted_goes_on(
    first: Machine, second: Machine, reference_dir: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    first.capture(reference_dir, windows)
    download, downloaded = Remote.download, []

    def until_the_third(self: Remote, name: str, path: Path, size: int) -> None:
        if len(downloaded) == 2:
            raise KeyboardInterrupt
        downloaded.append(name)
        download(self, name, path, size)

    monkeypatch.setattr(shared_module, "_AT_ONCE", 1)
    monkeypatch.setattr(Remote, "download", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        second.capture(reference_dir, windows)
    assert not list(second.cache.root.glob("captures/*/capture.json"))
    downloaded.clear()
    monkeypatch.setattr(Remote, "download", lambda *args: (downloaded.append(args[1]), download(*args)))
    second.capture(reference_dir, windows).verify()
    assert len(downloaded) == 2
    assert CountingEngine.runs == 1


def damage_file(team: Path) -> None:
    file = max(team.glob("files/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"\1")


def shorten_file(team: Path) -> None:
    file = max(team.glob("files/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])


def forge_manifest(team: Path) -> None:
    (path,) = team.glob("captures/*.json")
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["files"]["../../outside"] = manifest["files"]["head.safetensors"]
    path.write_bytes(manifest_bytes(manifest))


def cut_manifest(team: Path) -> None:
    (path,) = team.glob("captures/*.json")
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [damage_file, shorten_file, forge_manifest, cut_manifest])
def test_damaged_shared_capture_is_never_used_and_is_replaced(
    first: Machine, second: Machine, reference_dir: Path, windows: Windows, team: Path, tmp_path: Path, damage: Any
) -> None:
    made = first.capture(reference_dir, windows)
    damage(team)
    strict = Machine(tmp_path / "strict", f"file://{team}", push=False, strict=True)
    with pytest.raises(CaptureError):
        strict.capture(reference_dir, windows)
    replacing = Machine(tmp_path / "replacing", f"file://{team}")
    with pytest.warns(CacheWarning, match=r"the capture of .* at file://.*/team is damaged"):
        assert replacing.capture(reference_dir, windows).digest == made.digest
    assert CountingEngine.runs == 2
    second.capture(reference_dir, windows).verify()
    assert CountingEngine.runs == 2
    assert not (tmp_path / "outside").exists()


def test_missing_file_is_a_warning_and_the_model_is_run(
    first: Machine, second: Machine, reference_dir: Path, windows: Windows, team: Path
) -> None:
    first.capture(reference_dir, windows)
    max(team.glob("files/*"), key=lambda path: path.stat().st_size).unlink()
    with pytest.warns(CacheWarning, match=r"cannot be downloaded: cannot download files/"):
        second.capture(reference_dir, windows)
    assert CountingEngine.runs == 2


def test_refresh_makes_the_capture_again_and_replaces_the_shared_one(
    first: Machine, reference_dir: Path, windows: Windows, team: Path, tmp_path: Path
) -> None:
    first.capture(reference_dir, windows)
    (manifest,) = team.glob("captures/*.json")
    before = manifest.stat().st_mtime_ns
    again = Machine(tmp_path / "second", f"file://{team}", read=False, refreshed_since=time.time())
    again.capture(reference_dir, windows)
    assert CountingEngine.runs == 2
    assert manifest.stat().st_mtime_ns > before
    entry = Cache(tmp_path / "third").capture_entry(
        Capture.open(next(again.cache.root.glob("captures/*/"))).manifest["key"]
    )
    assert not again.shared.offers(entry)
    assert not again.shared.pull(Cache(tmp_path / "third"), entry, "it")
    assert not entry.exists()


def test_second_session_waits_for_the_first_and_takes_its_capture(
    first: Machine, reference_dir: Path, windows: Windows, tmp_path: Path, url: str, team: Path
) -> None:
    waiting = [Machine(tmp_path / name, url, push=push) for name, push in (("second", True), ("third", False))]
    name = first.cache.capture_entry(first.library._key(transformers_subject(reference_dir), windows)).name
    captures: list[Capture] = []
    with first.shared.turn(first.cache, first.cache.root / "captures" / name, "it") as mine:
        assert mine
        threads = [
            threading.Thread(target=lambda m=machine: captures.append(m.capture(reference_dir, windows)))
            for machine in waiting
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: all(any("waiting for process" in said for said in m.notes.said) for m in waiting))
        assert not captures
        object.__setattr__(first.library, "shared", None)
        first.shared.give(first.capture(reference_dir, windows), lambda: None)
    for thread in threads:
        thread.join(30)
    assert CountingEngine.runs == 1
    assert len(captures) == 2
    assert not list(team.glob("claims/*"))


def wait_until(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_claim_that_shows_no_life_is_taken_over(
    first: Machine, reference_dir: Path, windows: Windows, team: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_module, "_STALE_SECONDS", 0.2)
    name = first.cache.capture_entry(first.library._key(transformers_subject(reference_dir), windows)).name
    first.remote.create(f"claims/{name}.json", json.dumps({"by": "process 7 on a dead node"}).encode())
    first.capture(reference_dir, windows)
    assert "process 7 on a dead node has stopped making" in " ".join(first.notes.said)
    assert CountingEngine.runs == 1
    assert not list(team.glob("claims/*"))


def test_claim_of_a_living_session_is_not_taken_over_however_long_it_takes(
    first: Machine, second: Machine, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_module, "_STALE_SECONDS", 0.3)
    monkeypatch.setattr(shared_module, "_BEAT_SECONDS", 0.05)
    entry = first.cache.root / "captures" / ("0" * 32)
    with first.shared.turn(first.cache, entry, "it") as mine:
        assert mine
        ended = threading.Event()
        waiting = threading.Thread(target=lambda: (second.shared._wait(f"claims/{entry.name}.json", "it"), ended.set()))
        waiting.start()
        assert not ended.wait(1)
    assert ended.wait(10)


def test_session_that_fails_lets_the_others_try(
    first: Machine, reference_dir: Path, windows: Windows, team: Path, tmp_path: Path
) -> None:
    CountingEngine.fails = True
    with pytest.raises(ModelError):
        first.capture(reference_dir, windows)
    assert not list(team.glob("claims/*"))
    CountingEngine.fails = False
    Machine(tmp_path / "second", f"file://{team}").capture(reference_dir, windows)
    assert CountingEngine.runs == 2


def test_only_one_of_many_creates_a_file(team: Path) -> None:
    remote = Remote(f"file://{team}")
    created: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: created.append(remote.create("claims/x.json", b"%d" % n))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(created) == [False] * 7 + [True]


class Handler(http.server.SimpleHTTPRequestHandler):
    """A plain HTTP server of files that can refuse, fail for a while, or send too much."""

    refuse = 0
    fail_times = 0
    more = b""

    def do_GET(self) -> None:
        if type(self).refuse:
            self.send_error(type(self).refuse)
        elif type(self).fail_times:
            type(self).fail_times -= 1
            self.send_error(503)
        elif type(self).more and "/files/" in self.path:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(type(self).more)
        else:
            super().do_GET()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def web(team: Path) -> Iterator[tuple[str, type[Handler]]]:
    handler = type("OwnHandler", (Handler,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(team)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_capture_is_read_over_http(
    first: Machine, reference_dir: Path, windows: Windows, tmp_path: Path, web: tuple[str, type[Handler]]
) -> None:
    made = first.capture(reference_dir, windows)
    address, handler = web
    handler.fail_times = 2  # it is tried three times
    taken = Machine(tmp_path / "second", address, push=False).capture(reference_dir, windows)
    taken.verify()
    assert taken.digest == made.digest
    assert CountingEngine.runs == 1


@pytest.mark.parametrize(("status", "message"), [(403, "403.*Check the credentials"), (500, "500.*Check the network")])
def test_remote_that_refuses_at_first_use_is_an_error(
    first: Machine,
    reference_dir: Path,
    windows: Windows,
    tmp_path: Path,
    web: tuple[str, type[Handler]],
    status: int,
    message: str,
) -> None:
    first.capture(reference_dir, windows)
    web[1].refuse = status
    with pytest.raises(RemoteError, match=rf"cannot read pytest-kld\.json at http://127.*{message}"):
        Machine(tmp_path / "second", web[0], push=False).capture(reference_dir, windows)
    assert CountingEngine.runs == 1


def test_remote_that_cannot_be_reached_is_an_error(reference_dir: Path, windows: Windows, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"cannot read pytest-kld\.json at http://127.*Check the network"):
        Machine(tmp_path / "second", "http://127.0.0.1:9", push=False).capture(reference_dir, windows)
    assert CountingEngine.runs == 0


def test_remote_that_falls_silent_is_an_error_after_a_while(
    reference_dir: Path, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr("pytest_kld.captures.remote._ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RemoteError, match=r"Timeout.*Check the network"):
            Machine(tmp_path / "second", url, push=False).capture(reference_dir, windows)


def test_download_ends_when_it_is_longer_than_it_should_be(
    first: Machine, reference_dir: Path, windows: Windows, tmp_path: Path, web: tuple[str, type[Handler]]
) -> None:
    first.capture(reference_dir, windows)
    web[1].more = bytes(1 << 24)
    second = Machine(tmp_path / "second", web[0], push=False)
    with pytest.warns(CacheWarning, match=r"cannot be downloaded: the remote sent more than the [\d,]+ bytes"):
        second.capture(reference_dir, windows)
    assert CountingEngine.runs == 2


def test_another_web_page_is_no_shared_cache(tmp_path: Path, team: Path, web: tuple[str, type[Handler]]) -> None:
    team.mkdir()
    (team / "pytest-kld.json").write_text("<html>")
    machine = Machine(tmp_path / "second", web[0], push=False)
    with pytest.raises(RemoteError, match=r"has schema none instead of 1"):
        machine.shared.pull(machine.cache, machine.cache.root / "captures" / "x", "it")


def test_password_in_a_url_is_not_shown() -> None:
    assert Remote("sftp://me:secret@host/x").shown == "sftp://me:…@host/x"


def test_gate_on_a_second_machine_measures_the_same_and_loads_no_model(
    gate: Gate, tmp_path: Path, team: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (f"--kld-cache-url=file://{team}", "--kld-json=report.json")
    gate(f"--kld-cache-dir={tmp_path / 'one'}", "--kld-cache-push", *options).assert_outcomes(passed=1)
    (first,) = gate.results()
    monkeypatch.setattr("pytest_kld.engines.transformers.load_network", lambda *_: pytest.fail("a model was loaded"))
    gate(f"--kld-cache-dir={tmp_path / 'two'}", *options).assert_outcomes(passed=1)
    (second,) = gate.results()
    assert second["figures"] == first["figures"]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket in a real S3 server, in a process of its own."""
    code = (
        "from moto.server import ThreadedMotoServer; import sys; s = ThreadedMotoServer('127.0.0.1', 0, verbose=False);"
        "s.start(); print(*s.get_host_and_port(), flush=True); sys.stdin.read(); s.stop()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("127.0.0.1"):
            break
    yield "http://" + ":".join(line.split())
    server.communicate()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    for name, value in (
        ("AWS_ENDPOINT_URL", s3),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    import s3fs

    name = f"bucket-{abs(hash(request.node.name))}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/team/kld"


@pytest.mark.slow
def test_s3_shares_a_capture(bucket: str, reference_dir: Path, windows: Windows, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        made = Machine(tmp_path / "first", bucket).capture(reference_dir, windows)
        taken = Machine(tmp_path / "second", bucket, push=False).capture(reference_dir, windows)
    taken.verify()
    assert taken.digest == made.digest
    assert CountingEngine.runs == 1
    remote = Remote(bucket)
    assert not remote.create("pytest-kld.json", b"{}")
    assert remote.read("claims/none.json", 10) is None


@pytest.mark.slow
def test_s3_bucket_that_is_missing_is_an_error(
    bucket: str, reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    missing = bucket.replace("bucket-", "nobucket-")
    with pytest.raises(RemoteError, match="there is no shared cache at s3://nobucket"):
        Machine(tmp_path / "second", missing, push=False).capture(reference_dir, windows)
    with pytest.raises(RemoteError, match=r"cannot write pytest-kld.json at s3://nobucket.*bucket does not exist"):
        Machine(tmp_path / "second", missing).capture(reference_dir, windows)
    assert CountingEngine.runs == 0

"""Captures in one file: what arrives is what left, and an archive from a stranger can do nothing else."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import shutil
import tarfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded import record
from safetensors.torch import load_file, save_file

from pytest_kld.captures.archive import check_archive, export_captures, import_captures
from pytest_kld.captures.arrival import check_arriving
from pytest_kld.captures.cache import Cache
from pytest_kld.captures.capture import Capture, LogitsReader
from pytest_kld.captures.manifest import manifest_bytes
from pytest_kld.errors import ArchiveError, CacheError, CaptureError, KLDError
from pytest_kld.files import sha256_of_json
from pytest_kld.progress import Silent

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_kld.text.windows import Windows

Files = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def captures(reference_dir: Path, made: Path, request: pytest.FixtureRequest) -> list[Capture]:
    """A capture with hidden states and one with logits, recorded once for all tests."""
    if not (made / "sender").is_dir():
        windows = request.getfixturevalue("windows")
        for store in ("hidden", "logits"):
            record(reference_dir, windows.first(2), made / "sender", store=store)
    return [Capture.open(path.parent) for path in sorted(made.glob("sender/captures/*/capture.json"), key=by_store)]


def by_store(path: Path) -> str:
    return str(json.loads(path.read_text())["store"])


@pytest.fixture
def archive(captures: list[Capture], made: Path) -> Path:
    """Both captures in one file, written once for all tests."""
    path = made / "captures.tar"
    if not path.exists():
        assert export_captures(captures, path, Silent()) == path.stat().st_size
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "receiver")


def contents(root: Path) -> dict[str, bytes]:
    """Return every file below a directory, except locks."""
    paths = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def files_of(archive: Path) -> Files:
    """Return the members of an archive, read by Python's own tarfile."""
    with tarfile.open(archive) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def pack(path: Path, files: Files, *, index: bool = True) -> Path:
    """Write an archive of these files, with an index that fits them, as a stranger would."""
    if index:
        listed = [[name, len(data), hashlib.sha256(data).hexdigest()] for name, data in files[1:]]
        value = {"schema": 1, "files": listed}
        files = [("pytest-kld.json", json.dumps({**value, "sha256": sha256_of_json(value)}).encode()), *files[1:]]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data + bytes(-len(data) % 512) + bytes(1024))
    return path


def test_import_gives_the_same_captures(archive: Path, captures: list[Capture], cache: Cache, windows: Windows) -> None:
    imported = import_captures(archive, cache, Silent())
    assert [one.was_there for one in imported] == [False, False]
    for one in imported:
        (sent,) = [capture for capture in captures if capture.path.name == one.entry.name]
        assert contents(one.entry) == contents(sent.path)
        arrived = Capture.open(one.entry, windows.first(2))
        arrived.verify()
        assert one.model == sent.name
        assert torch.equal(arrived.rows(1, 0, windows.size), sent.rows(1, 0, windows.size))
    assert [one.was_there for one in import_captures(archive, cache, Silent())] == [True, True]


def test_archive_is_a_tar_file_whose_bytes_depend_on_the_captures_only(
    archive: Path, captures: list[Capture], tmp_path: Path
) -> None:
    again = tmp_path / "again.tar"
    export_captures([*reversed(captures), captures[0]], again, Silent())
    assert again.read_bytes() == archive.read_bytes()
    names = [name for name, _ in files_of(archive)]
    assert names[0] == "pytest-kld.json"
    assert {name.partition("/")[0] for name in names[1:]} == {capture.path.name for capture in captures}


def test_damaged_capture_is_not_exported(captures: list[Capture], tmp_path: Path) -> None:
    shutil.copytree(captures[0].path, tmp_path / "damaged")
    file = tmp_path / "damaged" / "windows" / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CaptureError, match=r"00001\.safetensors is corrupt"):
        export_captures([Capture.open(tmp_path / "damaged")], tmp_path / "archive.tar", Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_one_changed_or_missing_byte_is_found_before_anything_is_unpacked(
    archive: Path, cache: Cache, tmp_path: Path, share: float
) -> None:
    data = bytearray(archive.read_bytes())
    data[int(share * (len(data) - 1))] ^= 1
    (tmp_path / "changed.tar").write_bytes(data)
    (tmp_path / "cut.tar").write_bytes(archive.read_bytes()[: int(share * (len(data) - 1))])
    for name in ("changed.tar", "cut.tar"):
        with pytest.raises(ArchiveError):
            import_captures(tmp_path / name, cache, Silent())
    assert list(contents(cache.root)) == ["CACHEDIR.TAG"]


def renamed(name: str) -> Callable[[Files], Files]:
    """Return what gives the third file (a window or a head) another name."""
    return lambda files: [*files[:2], (name, files[2][1]), *files[3:]]


def with_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Files], Files]:
    def changed(files: Files) -> Files:
        manifest = json.loads(files[1][1])
        del manifest["sha256"]
        change(manifest)
        return [files[0], (files[1][0], manifest_bytes(manifest)), *files[2:]]

    return changed


ATTACKS: dict[str, tuple[Callable[[Files], Files], str]] = {
    "above": (renamed("../outside"), "is not the name of a capture's file"),
    "absolute": (renamed("/tmp/outside"), "is not the name of a capture's file"),
    "inside": (lambda files: renamed(files[1][0].partition("/")[0] + "/../../outside")(files), "another|other files"),
    "hidden": (lambda files: renamed(files[1][0].partition("/")[0] + "/.outside")(files), "other files"),
    "twice": (lambda files: [*files[:3], *files[2:]], "twice"),
    "no manifest": (lambda files: [files[0], *files[2:]], "without a capture.json"),
    "further file": (
        lambda files: [*files, (files[-1][0].replace("windows/", "windows/z"), b"")],
        "lists other files",
    ),
    "missing window": (lambda files: files[:-1], "lists other files"),
    "other key": (with_manifest(lambda manifest: manifest["key"].update(x=1)), "has the key of another"),
    "path in the manifest": (
        with_manifest(lambda manifest: manifest["window_files"].__setitem__(0, "/etc/passwd")),
        r"window_files\[0\]",
    ),
    "file in the manifest": (
        with_manifest(lambda m: m["files"].update({"x/y": {"bytes": 1, "sha256": "0" * 64}})),
        "has a file 'x/y'",
    ),
    "size": (
        with_manifest(lambda m: m["files"]["windows/00000.safetensors"].update(bytes=2**61)),
        "lists other files",
    ),
}


@pytest.mark.parametrize(("attack", "message"), ATTACKS.values(), ids=ATTACKS)
def test_forged_archive_with_right_digests_writes_nothing(
    archive: Path, cache: Cache, tmp_path: Path, attack: Callable[[Files], Files], message: str
) -> None:
    first = files_of(archive)
    name = first[1][0].partition("/")[0]
    forged = pack(tmp_path / "forged.tar", attack([first[0], *(file for file in first if file[0].startswith(name))]))
    with pytest.raises((ArchiveError, CaptureError), match=message):
        import_captures(forged, cache, Silent())
    assert list(contents(cache.root)) == ["CACHEDIR.TAG"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forged.tar", "receiver"]


def test_an_archive_of_another_schema_is_refused_although_its_digests_are_right(
    archive: Path, cache: Cache, tmp_path: Path
) -> None:
    (name, written), *files = files_of(archive)
    index = json.loads(written)
    del index["sha256"]
    index["schema"] = 2
    index["sha256"] = sha256_of_json(index)
    newer = pack(tmp_path / "newer.tar", [(name, json.dumps(index).encode()), *files], index=False)
    with pytest.raises(ArchiveError, match="its schema is 2 instead of 1"):
        import_captures(newer, cache, Silent())


def test_link_and_device_are_not_files(archive: Path, cache: Cache, tmp_path: Path) -> None:
    files = files_of(archive)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
        linked = pack(tmp_path / "linked.tar", files)
        data = bytearray(linked.read_bytes())
        at = data.index(files[2][0].encode() + b"\0")
        member = tarfile.TarInfo(files[2][0])
        member.type, member.linkname = kind, "/etc/passwd"
        data[at : at + 512] = member.tobuf(tarfile.GNU_FORMAT)
        linked.write_bytes(data)
        with pytest.raises(ArchiveError, match="is not where the index says"):
            import_captures(linked, cache, Silent())
    assert list(contents(cache.root)) == ["CACHEDIR.TAG"]


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "shorter": (lambda t: t.update(hidden=t["hidden"][:-1].clone()), r"hidden: expected .*\[64, 64\].* \[63, 64\]"),
    "narrower": (lambda t: t.update(hidden=t["hidden"][:, 1:].clone()), r"hidden: expected .* \[64, 63\]"),
    "flat": (lambda t: t.update(hidden=t["hidden"].flatten()), r"hidden: expected .* \[4096\]"),
    "whole numbers": (lambda t: t.update(hidden=t["hidden"].int()), r"hidden: expected .*got I32"),
    "no ids": (lambda t: t.pop("token_ids"), r"expected the tensors check_logits, .*"),
    "further": (lambda t: t.update(more=torch.zeros(1)), r"expected the tensors .*'more'"),
    "row outside": (lambda t: t["check_rows"].fill_(64), r"check_rows: a row is not one of the 64 positions"),
    "row below": (lambda t: t["check_rows"].fill_(-1), r"check_rows: a row is not one of the 64 positions"),
    "check": (lambda t: t.update(check_logits=t["check_logits"][:, :9].clone()), r"check_logits: expected .* \[2, 9\]"),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_tensor_of_another_shape_is_an_error_wherever_its_digest_is_right(
    captures: list[Capture], cache: Cache, tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    forged = tmp_path / "forged"
    shutil.copytree(captures[0].path, forged)
    file = forged / "windows" / "00001.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    manifest = copy.deepcopy(captures[0].manifest)
    data = file.read_bytes()
    manifest["files"]["windows/00001.safetensors"] = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (forged / "capture.json").write_bytes(manifest_bytes(manifest))
    with pytest.raises(CaptureError, match=message):
        Capture.open(forged).verify()
    export_captures([Capture.open(forged)], tmp_path / "forged.tar", Silent())
    with pytest.raises(CaptureError, match=message):
        import_captures(tmp_path / "forged.tar", cache, Silent())
    assert list(contents(cache.root)) == ["CACHEDIR.TAG"]


def test_import_goes_on_where_a_killed_one_stopped(
    archive: Path, captures: list[Capture], cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_kld.captures import archive as module

    unpack, written = module._unpack, []

    def until_the_second(archive: Path, file: Any, member: Any, path: Path) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(member.name)
        unpack(archive, file, member, path)

    monkeypatch.setattr(module, "_unpack", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        import_captures(archive, cache, Silent())
    assert not list(cache.root.glob("captures/*/capture.json"))
    kept = list(written)
    written.clear()
    monkeypatch.setattr(module, "_unpack", lambda *args: (written.append(args[2].name), unpack(*args)))
    import_captures(archive, cache, Silent())
    assert len(kept) == 1
    assert len(written) == sum(len(capture.manifest["files"]) for capture in captures) - 1


def test_too_small_a_disk_is_an_error_before_anything_is_unpacked(
    archive: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CacheError, match=r"the import of .*captures\.tar needs .* but .* has 1\.0 kB free"):
        import_captures(archive, cache, Silent())
    assert list(contents(cache.root)) == ["CACHEDIR.TAG"]


@pytest.mark.parametrize("text", [b"", b"x" * 5000, b"PK\x03\x04" + bytes(600)], ids=["empty", "text", "zip"])
def test_another_file_is_not_an_archive(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(ArchiveError, match=r"file is not an archive of captures"):
        check_archive(tmp_path / "file", Silent())
    with pytest.raises(ArchiveError, match=r"cannot read the archive .*No such file"):
        check_archive(tmp_path / "none", Silent())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.sampled_from(["", "../x", "/x", "a" * 32, "a" * 32 + "/x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON | st.fixed_dictionaries({"schema": st.just(1), "files": st.lists(st.lists(JSON, max_size=4))}))
def test_any_index_is_read_or_refused(cache: Cache, tmp_path: Path, value: Any) -> None:
    whole = {**value, "sha256": sha256_of_json(value)} if isinstance(value, dict) else value
    path = pack(tmp_path / "forged.tar", [("pytest-kld.json", json.dumps(whole).encode())], index=False)
    with suppress(KLDError):
        assert import_captures(path, cache, Silent()) == []
    assert list(contents(cache.root)) == ["CACHEDIR.TAG"]


@pytest.fixture
def forged(captures: list[Capture], tmp_path: Path) -> Path:
    """A copy of the capture with hidden states, to be forged."""
    shutil.copytree(captures[0].path, tmp_path / "forged")
    return tmp_path / "forged"


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_header_of_a_tensor_file_is_refused_or_has_the_right_shapes(
    captures: list[Capture], forged: Path, windows: Windows, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["windows/00001.safetensors", "head.safetensors"]))
    whole = bytearray((captures[0].path / name).read_bytes())
    length = int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 7 + length))
        whole[at] = data.draw(st.sampled_from(b'0123456789[]{},:"\\ FIBU\x00\xff'))
    (forged / name).write_bytes(whole)
    manifest = copy.deepcopy(captures[0].manifest)
    manifest["files"][name] = {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    (forged / "capture.json").write_bytes(manifest_bytes(manifest))
    with suppress(CaptureError):
        capture = Capture.open(forged, windows.first(2))
        capture.verify()
        assert LogitsReader.of(capture, "exact", torch.device("cpu")).logits(1, 0, 64).shape == (64, 1024)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_manifest_is_refused_or_names_only_the_files_of_a_capture(
    captures: list[Capture], cache: Cache, data: st.DataObject
) -> None:
    manifest = copy.deepcopy(captures[0].manifest)
    entry = cache.capture_entry(manifest["key"])
    holder: Any = manifest
    while True:
        name = data.draw(st.sampled_from(list(holder) if isinstance(holder, dict) else list(range(len(holder)))))
        if not isinstance(holder[name], dict | list) or not holder[name] or data.draw(st.booleans()):
            break
        holder = holder[name]
    if isinstance(holder, dict) and data.draw(st.booleans()):
        holder[data.draw(st.sampled_from(["../x", "/x", "windows/00009.safetensors", "capture.json"]))] = holder[name]
    else:
        holder[name] = data.draw(JSON)
    with suppress(CaptureError):
        arriving = check_arriving(cache, entry, manifest_bytes(manifest))
        assert arriving["files"].keys() == captures[0].manifest["files"].keys()

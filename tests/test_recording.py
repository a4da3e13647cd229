"""Recording and its cache: whole entries, made once, resumed when interrupted, and refused when damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from recorded import load, own_logits, record
from safetensors.torch import save_file

from pytest_kld.cache import Cache
from pytest_kld.capture import Capture
from pytest_kld.engines.transformers import TransformersEngine
from pytest_kld.errors import CacheError, CaptureError, KLDError, ModelError
from pytest_kld.models import ModelSpec
from pytest_kld.recording import capture_bytes, require_fits

if TYPE_CHECKING:
    from pytest_kld.windows import Windows

RECORD = """
import os, sys, time
from pathlib import Path
import numpy as np
from pytest_kld.cache import Cache
from pytest_kld.engines.transformers import TransformersEngine
from pytest_kld.models import ModelSpec
from pytest_kld.progress import Silent
from pytest_kld.recording import Recording
from pytest_kld.windows import Windows

model, root, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
ids = np.arange(5 * 64, dtype=np.int32).reshape(5, 64)
windows = Windows(token_ids=ids, starts=np.arange(5), stride=64, dataset="", text_sha256="", tokenizer="", bos=None)

class Slow(TransformersEngine):
    def _load(self, *args):
        network = TransformersEngine._load(self, *args)
        def note(*_):
            with (root / "runs").open("a") as file:
                file.write("x")
            time.sleep(seconds)
        network.register_forward_hook(note)
        return network

recording = Recording(engine=Slow(device="cpu"), model=ModelSpec.parse(str(model), Path()), arguments={},
                      windows=windows, store="logits", key={"a": 1})
cache = Cache(root / "cache")
entry = cache.capture_entry(recording.key)
with cache.lock(entry, lambda: None):
    if not (entry / "capture.json").is_file():
        recording.run(cache, entry, Silent())
"""


def start(model: Path, root: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", RECORD, str(model), str(root), str(seconds)])


def runs(root: Path) -> int:
    return len((root / "runs").read_text()) if (root / "runs").is_file() else 0


def test_a_killed_capture_is_resumed_and_complete_windows_are_not_run_again(
    reference_dir: Path, tmp_path: Path
) -> None:
    killed = start(reference_dir, tmp_path, 0.3)
    while not list(tmp_path.glob("cache/captures/*.partial/windows/00001.safetensors")):
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not list(tmp_path.rglob("capture.json"))
    done = len(list(tmp_path.glob("cache/captures/*.partial/windows/0*.safetensors")))
    before = runs(tmp_path)
    assert start(reference_dir, tmp_path, 0).wait() == 0
    assert runs(tmp_path) - before == 5 - done
    (manifest,) = tmp_path.rglob("capture.json")
    capture = Capture.open(manifest.parent)
    capture.verify()
    assert capture.windows == 5
    assert not list(tmp_path.rglob("*.partial"))


def test_two_processes_make_an_entry_once(reference_dir: Path, tmp_path: Path) -> None:
    racing = [start(reference_dir, tmp_path, 0.1) for _ in range(2)]
    assert [process.wait() for process in racing] == [0, 0]
    assert runs(tmp_path) == 5
    assert len(list(tmp_path.rglob("capture.json"))) == 1


@pytest.mark.parametrize("store", ["hidden", "logits", "logprobs"])
def test_every_store_holds_what_the_model_says(
    store: Any, reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    capture = record(reference_dir, windows, tmp_path, store=store, dtype="bfloat16")
    assert (capture.store, capture.windows, capture.vocab_size) == (store, 3, 1024)
    for window in range(3):
        ids = capture.token_ids(window)
        assert ids is not None
        assert ids.tolist() == windows.token_ids[window].tolist()
    rows = torch.stack([capture.rows(window, 0, 64) for window in range(3)])
    engine = own_logits(load(reference_dir, "bfloat16"), windows)
    if store == "hidden":
        assert (rows.dtype, rows.shape) == (torch.bfloat16, (3, 64, 64))
    elif store == "logits":
        assert torch.equal(rows, engine)
    else:
        torch.testing.assert_close(rows, engine.float().log_softmax(-1))
        assert sorted(p.name for p in capture.path.iterdir())[:3] == [f"{i}.safetensors" for i in range(3)]


@pytest.mark.parametrize("store", ["hidden", "logits", "logprobs"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_capture_takes_the_bytes_that_were_announced(
    store: Any, dtype: str, reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    capture = record(reference_dir, windows, tmp_path, store=store, dtype=dtype)
    facts = TransformersEngine(dtype=dtype).facts(ModelSpec.parse(str(reference_dir), Path()), {})
    announced = capture_bytes(facts, windows, store, 2)
    used = sum(path.stat().st_size for path in capture.path.rglob("*") if path.is_file())
    assert 0 <= announced - used <= 1 << 20
    assert capture.manifest["files"] == {
        name: {"bytes": (capture.path / name).stat().st_size, "sha256": entry["sha256"]}
        for name, entry in capture.manifest["files"].items()
    }


@pytest.mark.parametrize("files_per_window", [1, 2])
def test_captures_of_the_original_layout_are_read(files_per_window: int, windows: Windows, tmp_path: Path) -> None:
    matrices = torch.randn(3 * files_per_window, 64, 50).log_softmax(-1)
    for index, matrix in enumerate(matrices):
        save_file({"log_probs": matrix}, tmp_path / f"{index}.safetensors")
    capture = Capture.open(tmp_path, windows)
    capture.verify()
    assert (capture.store, capture.vocab_size, capture.windows) == ("logprobs", 50, 3)
    assert f"{3 * files_per_window} files for 3 windows" in capture.manifest["store_reason"]
    for window in range(3):
        assert torch.equal(capture.rows(window, 0, 64), matrices[window * files_per_window])
        assert capture.token_ids(window) is None
    with pytest.raises(CaptureError, match="it is not a capture"):
        Capture.open(tmp_path)


def test_an_original_layout_that_does_not_fit_the_windows_is_refused(windows: Windows, tmp_path: Path) -> None:
    def write(name: str, shapes: list[tuple[int, int]], key: str = "log_probs") -> Path:
        (tmp_path / name).mkdir()
        for index, shape in enumerate(shapes):
            save_file({key: torch.zeros(shape)}, tmp_path / name / f"{index}.safetensors")
        return tmp_path / name

    for path, message in (
        (write("four", [(64, 50)] * 4), r"holds 4 window files, .* has 3 windows: expected 3, or 6"),
        (write("long", [(64, 50), (65, 50), (64, 50)]), r"1\.safetensors has shape \[65, 50\], expected \[64, 50\]"),
        (write("narrow", [(64, 50), (64, 50), (64, 49)]), r"2\.safetensors has shape \[64, 49\]"),
        (write("key", [(64, 50)] * 3, "logits"), r"cannot read .*key/0\.safetensors: .*log_probs"),
    ):
        with pytest.raises(CaptureError, match=message):
            Capture.open(path, windows)
    gap = write("gap", [(64, 50)] * 3)
    (gap / "1.safetensors").rename(gap / "7.safetensors")
    with pytest.raises(CaptureError, match=r"1\.safetensors is missing"):
        Capture.open(gap, windows)


@pytest.mark.parametrize("name", ["head.safetensors", "windows/00001.safetensors"])
def test_damage_to_a_file_is_an_error_that_names_it(
    name: str, reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    capture = record(reference_dir, windows, tmp_path)
    file = capture.path / name
    whole = file.read_bytes()
    for position in (3, 20, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(CaptureError, match=rf"{name} is corrupt.*--kld-refresh"):
            Capture.open(capture.path, windows).verify()
    file.write_bytes(whole[:-1])
    with pytest.raises(CaptureError, match=rf"{name} has .* bytes, expected .*--kld-refresh"):
        Capture.open(capture.path, windows)
    file.unlink()
    with pytest.raises(CaptureError, match=rf"{name} is missing"):
        Capture.open(capture.path, windows)


def test_any_flipped_byte_in_the_manifest_is_found(reference_dir: Path, windows: Windows, tmp_path: Path) -> None:
    capture = record(reference_dir, windows, tmp_path)
    file = capture.path / "capture.json"
    whole = file.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(CaptureError, match=r"the manifest .*capture\.json is corrupt.*--kld-refresh"):
            Capture.open(capture.path, windows)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CaptureError, match=r"capture\.json is corrupt"):
        Capture.open(capture.path, windows)


def test_digest_tells_what_a_capture_says_and_not_how_it_came_about(
    reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    one, again = (record(reference_dir, windows, tmp_path / name) for name in ("1", "2"))
    other = record(candidate_dir, windows, tmp_path / "1")
    assert one.digest == again.digest != other.digest


def test_a_capture_from_another_version_is_refused(reference_dir: Path, windows: Windows, tmp_path: Path) -> None:
    from pytest_kld.capture import write_manifest

    capture = record(reference_dir, windows, tmp_path)
    write_manifest(capture.path, {**capture.manifest, "schema": 99})
    with pytest.raises(CaptureError, match="of schema 99"):
        Capture.open(capture.path, windows)


def test_a_cache_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"file/cache cannot be written: .*--kld-cache-dir"):
        Cache(tmp_path / "file" / "cache")


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 700 kB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], check=False, capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_read_only_disk_is_an_error(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CacheError, match="Read-only file system"):
        Cache(small_disk)


def test_a_disk_that_fills_up_keeps_nothing_half_written(
    small_disk: Path, reference_dir: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CacheError, match=r"needs 1\.\d MB and .* has 700\.\d kB free|needs .* and .* free"):
        record(reference_dir, windows, small_disk, store="logits")
    assert not list(small_disk.rglob("*.partial"))
    # The check sees a larger disk than there is, as when another process fills it meanwhile.
    monkeypatch.setattr(Cache, "require_free", lambda *_: 1 << 40)
    with pytest.raises(CacheError, match=r"cannot write .*00002\.safetensors: .*No space left.*--kld-cache-dir"):
        record(reference_dir, windows, small_disk, store="logits")
    (partial,) = small_disk.rglob("*.partial")
    assert sorted(path.name for path in partial.rglob("*.*")) == ["00000.safetensors", "00001.safetensors"]


def test_a_file_size_limit_is_an_error_as_a_full_disk_is(reference_dir: Path, tmp_path: Path) -> None:
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n{RECORD}"
    command = [sys.executable, "-c", limited, str(reference_dir), str(tmp_path), "0"]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "CacheError: cannot write" in run.stderr
    assert not [
        path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".json") and path.name != "CACHEDIR.TAG"
    ]


def test_ids_beyond_the_vocabulary_and_windows_beyond_the_context_are_refused(
    reference_dir: Path, windows: Windows
) -> None:
    from dataclasses import replace

    facts = TransformersEngine().facts(ModelSpec.parse(str(reference_dir), Path()), {})
    greatest = int(windows.token_ids.max())
    require_fits(replace(facts, vocab_size=greatest + 1, context_length=64), windows, "model")
    with pytest.raises(
        ModelError, match=rf"vocabulary of model has {greatest} tokens, and the windows use id {greatest}"
    ):
        require_fits(replace(facts, vocab_size=greatest), windows, "model")
    with pytest.raises(ModelError, match=r"made for 63 positions and the windows have 64.*--kld-window-size"):
        require_fits(replace(facts, context_length=63), windows, "model")


def test_a_failed_recording_publishes_nothing(reference_dir: Path, windows: Windows, tmp_path: Path) -> None:
    def fail_at_third(network: Any) -> Any:
        calls = iter(range(3))

        def hook(*_: Any) -> None:
            if next(calls, None) is None:
                raise RuntimeError("out of luck")

        network.register_forward_hook(hook)
        return network

    with pytest.raises(KLDError, match="forward pass failed: RuntimeError: out of luck"):
        record(reference_dir, windows, tmp_path, alter=fail_at_third)
    assert not list(tmp_path.rglob("capture.json"))
    resumed = record(reference_dir, windows, tmp_path)
    assert json.loads((resumed.path / "capture.json").read_text())["complete"] is True

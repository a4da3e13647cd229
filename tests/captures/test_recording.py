"""Recording: whole entries, made once, and resumed when interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import TINY
from recorded import load, own_logits, record, transformers_subject
from transformers import Gemma2Config, Qwen3Config

from pytest_kld.captures.capture import Capture
from pytest_kld.captures.recording import capture_bytes, require_fits
from pytest_kld.engines.transformers import TransformersEngine
from pytest_kld.errors import CacheError, KLDError, ModelError
from pytest_kld.figures.compare import compare
from pytest_kld.progress import Silent

if TYPE_CHECKING:
    from conftest import MakeModel

    from pytest_kld.text.windows import Windows

RECORD = """
import os, sys, time
from pathlib import Path
import numpy as np
from pytest_kld.captures.cache import Cache
from pytest_kld.engines.transformers import TransformersEngine
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import Subject
from pytest_kld.progress import Silent
from pytest_kld.captures.recording import Recording
from pytest_kld.text.windows import Windows

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

subject = Subject(name=str(model), model=ModelSpec.parse(str(model), Path()), engine="transformers")
recording = Recording(engine=Slow(device="cpu"), subject=subject, windows=windows, store="logits",
                      key={"a": 1})
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


@pytest.mark.slow
def test_a_killed_capture_is_resumed_and_complete_windows_are_not_run_again(
    reference_dir: Path, tmp_path: Path
) -> None:
    killed = start(reference_dir, tmp_path, 0.3)
    while not list(tmp_path.glob("cache/captures/*.partial/windows/00001.safetensors")):
        assert killed.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)  # the journal follows the file, and the next window takes 0.3 s
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


@pytest.mark.slow
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
    facts = TransformersEngine(dtype=dtype).facts(transformers_subject(reference_dir))
    announced = capture_bytes(facts, windows, store, 2)
    used = sum(path.stat().st_size for path in capture.path.rglob("*") if path.is_file())
    assert 0 <= announced - used <= 1 << 20
    assert capture.manifest["files"] == {
        name: {"bytes": (capture.path / name).stat().st_size, "sha256": entry["sha256"]}
        for name, entry in capture.manifest["files"].items()
    }


def softcap_in_float32(network: Any) -> Any:
    """Let Gemma 2 end as SGLang does: a product in bfloat16, its softcap in float32."""
    cap = network.config.final_logit_softcapping

    def widen(_module: Any, _args: Any, output: Any) -> Any:
        output.logits = cap * torch.tanh(output.logits.float() / cap)
        return output

    def announce(*_: Any) -> None:
        network.config.final_logit_softcapping = None  # transformers leaves the product alone

    def restore(_module: Any, _args: Any, output: Any) -> Any:
        network.config.final_logit_softcapping = cap
        return output

    network.register_forward_pre_hook(announce)
    network.register_forward_hook(widen)
    network.register_forward_hook(restore)
    return network


def test_a_softcap_in_float32_on_a_product_in_bfloat16_keeps_hidden_states(
    make_model: MakeModel, windows: Windows, tmp_path: Path
) -> None:
    model = make_model("gemma2", Gemma2Config(**TINY, final_logit_softcapping=5.0))
    capture = record(model, windows, tmp_path, dtype="bfloat16", alter=softcap_in_float32)
    assert capture.manifest["store_reason"] == "check rows agree with the head"
    assert capture.store == "hidden"
    assert capture.manifest["transforms"] == {"scale": 1.0, "softcap": 5.0}
    assert 0 < capture.manifest["checks"]["worst"] <= 1


def test_a_head_that_is_not_linear_is_refused_under_a_softcap_in_float32(
    make_model: MakeModel, windows: Windows, tmp_path: Path
) -> None:
    def int8(network: Any) -> Any:
        """Run the head on a weight of 8 bits, as a quantized head does, and show the other one."""
        weight = network.lm_head.weight.detach().float()
        step = weight.abs().amax(-1, keepdim=True) / 127
        coarse = ((weight / step).round() * step).bfloat16()
        network.lm_head.register_forward_hook(lambda _module, args, _output: args[0] @ coarse.T)
        return softcap_in_float32(network)

    model = make_model("gemma2", Gemma2Config(**TINY, final_logit_softcapping=5.0))
    facts = TransformersEngine(dtype="bfloat16").facts(transformers_subject(model))
    capture = record(model, windows, tmp_path, dtype="bfloat16", alter=int8)
    assert capture.store == "logits"
    assert "its head is not linear" in capture.manifest["store_reason"]
    used = sum(path.stat().st_size for path in capture.path.rglob("*") if path.is_file())
    assert 0 <= capture_bytes(facts, windows, "logits", 2, torch.float32) - used <= 1 << 20
    assert used > capture_bytes(facts, windows, "logits", 2) - (1 << 20)


def test_a_disk_that_is_too_small_for_float32_logits_is_an_error_before_they_are_written(
    make_model: MakeModel, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("gemma2", Gemma2Config(**TINY, final_logit_softcapping=5.0))
    facts = TransformersEngine(dtype="bfloat16").facts(transformers_subject(model))
    narrow = capture_bytes(facts, windows, "logits", 2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=narrow + 1000))
    with pytest.raises(CacheError, match="store logits"):
        record(model, windows, tmp_path, store="logits", dtype="bfloat16", alter=softcap_in_float32)
    assert not list(tmp_path.rglob("*.safetensors"))


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

    facts = TransformersEngine().facts(transformers_subject(reference_dir))
    greatest = int(windows.token_ids.max())
    require_fits(replace(facts, vocab_size=greatest + 1, context_length=64), windows, "model")
    with pytest.raises(
        ModelError, match=rf"vocabulary of model has {greatest} tokens, but the windows use id {greatest}"
    ):
        require_fits(replace(facts, vocab_size=greatest), windows, "model")
    with pytest.raises(ModelError, match=r"supports 63 positions, but the windows have 64.*--kld-window-size"):
        require_fits(replace(facts, context_length=63), windows, "model")


def failing_after(passes: int) -> Any:
    """Return what lets a model fail after so many forward passes; the first of them may prove the head."""

    def alter(network: Any) -> Any:
        calls = iter(range(passes))

        def hook(*_: Any) -> None:
            if next(calls, None) is None:
                raise RuntimeError("out of luck")

        network.register_forward_hook(hook)
        return network

    return alter


def flip(path: Path, name: str) -> None:
    """Flip a bit in the exponent of the first number of a tensor, float32, of a file: no check row of hidden states."""
    contents = bytearray(path.read_bytes())
    size = struct.unpack("<Q", contents[:8])[0]
    contents[8 + size + json.loads(contents[8 : 8 + size])[name]["data_offsets"][0] + 3] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize(("store", "tensor"), [("hidden", "hidden"), ("hidden", "check_logits"), ("logits", "logits")])
def test_a_damaged_window_of_an_interrupted_capture_is_recorded_again(
    store: Any, tensor: str, reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    reference = record(reference_dir, windows, tmp_path / "reference", store=store)

    def table(candidate: Capture) -> Any:
        pair = (reference, candidate)
        return compare(*pair, windows, head="exact", device=torch.device("cpu"), progress=Silent()).columns["kl"]

    undisturbed = table(record(candidate_dir, windows, tmp_path / "undisturbed", store=store))
    with pytest.raises(KLDError, match="out of luck"):
        record(
            candidate_dir,
            windows,
            tmp_path / "resumed",
            store=store,
            alter=failing_after(3 if store == "hidden" else 2),
        )
    file = next((tmp_path / "resumed").rglob("00001.safetensors"))
    whole = (file.parent / "00000.safetensors").stat()
    flip(file, tensor)
    resumed = record(candidate_dir, windows, tmp_path / "resumed", store=store)
    resumed.verify()
    assert (table(resumed) == undisturbed).all()
    assert (resumed.path / "windows" / "00000.safetensors").stat() == whole  # it was not damaged and not run again
    expected = {"capture.json", *(f"windows/{i:05d}.safetensors" for i in range(3))}
    assert {str(p.relative_to(resumed.path)) for p in resumed.path.rglob("*") if p.is_file()} == expected | (
        {"head.safetensors"} if store == "hidden" else set()
    )


@pytest.mark.parametrize("journal", [None, b"", b"\xff\x00{garbage", "other"])
def test_windows_without_a_digest_of_this_capture_are_not_believed(
    journal: Any, reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    undisturbed = record(candidate_dir, windows, tmp_path / "undisturbed")
    for name, model in (("a", candidate_dir), ("b", reference_dir)):
        with pytest.raises(KLDError, match="out of luck"):
            record(model, windows, tmp_path / name, alter=failing_after(3))
    (ours,), (theirs,) = ((tmp_path / name).glob("captures/*.partial") for name in ("a", "b"))
    if journal == "other":  # another model's windows of the same text, with the digests that they have
        shutil.rmtree(ours)
        shutil.copytree(theirs, ours)
    else:
        (ours / "journal").unlink()
        shutil.copyfile(theirs / "windows" / "00000.safetensors", ours / "windows" / "00000.safetensors")
        if journal is not None:
            (ours / "journal").write_bytes(journal)
    assert record(candidate_dir, windows, tmp_path / "a").digest == undisturbed.digest


@pytest.mark.slow
def test_what_a_killed_writer_left_is_not_published(make_model: MakeModel, tmp_path: Path) -> None:
    wide = make_model("wide", Qwen3Config(**{**TINY, "vocab_size": 65_536}), tokenizer=False)  # 17 MB a window
    left: list[Path] = []
    while not left:
        killed = start(wide, tmp_path, 0)
        while killed.poll() is None and not left:
            left = list(tmp_path.glob("cache/captures/*.partial/windows/.*.tmp"))
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        left = [path for path in left if path.is_file()]
        assert not list(tmp_path.rglob("capture.json")), "the capture was complete before a file was seen half-written"
    assert start(wide, tmp_path, 0).wait() == 0
    (manifest,) = tmp_path.rglob("capture.json")
    capture = Capture.open(manifest.parent)
    capture.verify()
    files = {str(path.relative_to(capture.path)) for path in capture.path.rglob("*") if path.is_file()}
    assert files == {"capture.json", *capture.manifest["files"]}


def test_a_failed_recording_publishes_nothing(reference_dir: Path, windows: Windows, tmp_path: Path) -> None:
    with pytest.raises(KLDError, match="forward pass failed: RuntimeError: out of luck"):
        record(reference_dir, windows, tmp_path, alter=failing_after(3))
    assert not list(tmp_path.rglob("capture.json"))
    resumed = record(reference_dir, windows, tmp_path)
    assert json.loads((resumed.path / "capture.json").read_text())["complete"] is True

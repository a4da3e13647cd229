"""Two captures compared: the figures are those of the models, and memory does not grow with the windows."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from recorded import load, own_logits, record

from pytest_kld.errors import CaptureError, ScoresError
from pytest_kld.figures.compare import compare
from pytest_kld.figures.scores import COLUMNS, Scores, Summary
from pytest_kld.kernel.reduction import _one_pass
from pytest_kld.progress import Silent

if TYPE_CHECKING:
    from pytest_kld.captures.capture import Capture
    from pytest_kld.text.windows import Windows


def scores_of(reference: Capture, candidate: Capture, windows: Windows, head: Any = "exact") -> Scores:
    return compare(reference, candidate, windows, head=head, device=torch.device("cpu"), progress=Silent())


def expected_kl(reference: torch.Tensor, candidate: torch.Tensor) -> np.ndarray:
    log_p, log_q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).numpy()


@pytest.mark.parametrize("store", ["hidden", "logits", "logprobs"])
def test_scores_agree_with_transformers_own_logits_in_float64(
    store: Any, reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    captures = [record(model, windows, tmp_path, store=store) for model in (reference_dir, candidate_dir)]
    scores = scores_of(*captures, windows)
    logits = [own_logits(load(model), windows) for model in (reference_dir, candidate_dir)]
    kl = expected_kl(*logits)
    assert abs(Summary.of(scores).mean - kl.mean()) < 1e-6
    np.testing.assert_allclose(scores.columns["kl"], kl, rtol=1e-3, atol=1e-6)
    labels = torch.from_numpy(windows.token_ids[:, 1:]).long()
    for side, z in zip(("reference", "candidate"), logits, strict=True):
        nll = -z.double().log_softmax(-1)[:, :-1].gather(-1, labels[..., None])[..., 0]
        np.testing.assert_allclose(scores.columns[f"{side}_nll"][:, :-1], nll, rtol=1e-5, atol=1e-5)
        assert np.isnan(scores.columns[f"{side}_nll"][:, -1]).all()
        assert (scores.columns[f"{side}_argmax"] == z.argmax(-1).numpy()).mean() > 0.99
    assert set(scores.columns) == set(COLUMNS)
    np.testing.assert_array_equal(scores.columns["token_ids"], windows.token_ids)
    assert scores.about["candidate"]["model"] == str(candidate_dir)


def test_stores_agree_with_each_other_and_may_be_mixed(
    reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    hidden = record(reference_dir, windows, tmp_path, store="hidden")
    means = [
        Summary.of(scores_of(hidden, record(candidate_dir, windows, tmp_path, store=store), windows)).mean
        for store in ("hidden", "logits", "logprobs")
    ]
    assert means == pytest.approx([means[0]] * 3, rel=1e-4)


def test_native_head_repeats_the_engines_rounding(
    reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    captures = [record(model, windows, tmp_path, dtype="bfloat16") for model in (reference_dir, candidate_dir)]
    kl = expected_kl(*(own_logits(load(model, "bfloat16"), windows) for model in (reference_dir, candidate_dir)))
    native, exact = (Summary.of(scores_of(*captures, windows, head)) for head in ("native", "exact"))
    assert native.mean == pytest.approx(kl.mean(), abs=1e-6)
    assert exact.mean != pytest.approx(kl.mean(), abs=1e-6)


@pytest.mark.filterwarnings("default")  # torch's compiler imports deprecated parts of torch
def test_large_jobs_are_compiled_and_agree(
    reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures = [record(model, windows, tmp_path) for model in (reference_dir, candidate_dir)]
    eager = scores_of(*captures, windows)
    monkeypatch.setattr("pytest_kld.figures.compare._WORTH_COMPILING", 0)
    compiled = scores_of(*captures, windows)
    assert (eager.about["kernel"], compiled.about["kernel"]) == ("eager", "compiled")
    assert compiled.columns["kl"].mean() == pytest.approx(eager.columns["kl"].mean(), rel=1e-6)
    np.testing.assert_allclose(compiled.columns["kl"], eager.columns["kl"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("fault", "error"), [("no compiler", "RuntimeError"), ("a wrong one", "AssertionError")])
def test_large_jobs_run_without_a_working_compiler_and_say_so(
    fault: str, error: str, reference_dir: Path, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(*arguments: torch.Tensor) -> Any:
        if fault == "no compiler":
            raise RuntimeError("no C++ compiler")
        return [result * 1.01 for result in _one_pass(*arguments)]

    capture = record(reference_dir, windows, tmp_path)
    monkeypatch.setattr("pytest_kld.figures.compare._WORTH_COMPILING", 0)
    monkeypatch.setattr("torch.compile", lambda *_, **__: compiled)
    assert scores_of(capture, capture, windows).about["kernel"] == f"eager (torch.compile does not work here: {error})"


@pytest.mark.parametrize("store", ["hidden", "logits"])
def test_identical_models_give_exactly_zero(store: Any, reference_dir: Path, windows: Windows, tmp_path: Path) -> None:
    once, again = (record(reference_dir, windows, tmp_path / name, store=store) for name in ("1", "2"))
    summary = Summary.of(scores_of(once, again, windows))
    assert (summary.mean, summary.max, summary.top1_agreement, summary.ppl_ratio) == (0, 0, 1, 1)


def test_blocks_of_rows_do_not_show(
    reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures = [record(model, windows, tmp_path, store="logits") for model in (reference_dir, candidate_dir)]
    whole = scores_of(*captures, windows)
    monkeypatch.setattr("pytest_kld.figures.compare._BLOCK_ELEMENTS", 7 * 1024)
    for name in COLUMNS:
        np.testing.assert_array_equal(scores_of(*captures, windows).columns[name], whole.columns[name])


def test_other_windows_are_refused(reference_dir: Path, windows: Windows, tmp_path: Path) -> None:
    capture = record(reference_dir, windows, tmp_path)
    changed = windows.token_ids.copy()
    changed[2, 5] += 1
    with pytest.raises(CaptureError, match=r"token ids differ: window 2 of .* has other ids than this session's"):
        scores_of(capture, capture, replace(windows, token_ids=changed))
    cut = "windows 3, windows_from start, window_size 64, stride 32"
    theirs = f"dataset {windows.dataset}, {cut}, tokenizer {windows.tokenizer}"
    with pytest.raises(CaptureError, match=rf"token ids differ: the capture .* covers other windows \({theirs}\)"):
        type(capture).open(capture.path, replace(windows, token_ids=changed))


def test_an_id_beyond_the_common_vocabulary_is_refused(reference_dir: Path, windows: Windows, tmp_path: Path) -> None:
    capture = record(reference_dir, windows, tmp_path)
    narrow = replace(capture, manifest={**capture.manifest, "vocab_size": int(windows.token_ids.max())})
    with pytest.raises(CaptureError, match=r"token id .* but the vocabulary common to .* ends before it"):
        scores_of(capture, narrow, windows)


def test_nan_everywhere_is_an_error(reference_dir: Path, windows: Windows, tmp_path: Path) -> None:
    def poison(network: Any) -> Any:
        network.model.norm.weight.data.fill_(torch.nan)
        return network

    captures = (
        record(reference_dir, windows, tmp_path / "a"),
        record(reference_dir, windows, tmp_path / "b", alter=poison),
    )
    scores = scores_of(*captures, windows)
    with pytest.raises(ScoresError, match="the reference is NaN or infinite in 0 and the candidate in 192"):
        Summary.of(scores)


def test_nan_at_one_position_is_counted_there_alone(reference_dir: Path, windows: Windows, tmp_path: Path) -> None:
    def poison_one_position(network: Any) -> Any:
        def poison(_module: Any, _args: Any, hidden: torch.Tensor) -> torch.Tensor:
            hidden[:, 10] = torch.nan
            return hidden

        network.model.norm.register_forward_hook(poison)
        return network

    clean = record(reference_dir, windows, tmp_path / "a")
    poisoned = record(reference_dir, windows, tmp_path / "b", alter=poison_one_position)
    assert poisoned.store == "hidden"
    as_candidate, as_reference = (Summary.of(scores_of(*p, windows)) for p in ((clean, poisoned), (poisoned, clean)))
    assert (as_candidate.reference_nan_count, as_candidate.candidate_nan_count) == (0, 3)
    assert (as_reference.reference_nan_count, as_reference.candidate_nan_count) == (3, 0)
    assert as_candidate.mean == 0
    assert as_candidate.coverage == 63 / 64


PEAK_MEMORY = """
import sys
from pathlib import Path
import numpy as np, torch
from pytest_kld.captures.capture import Capture, write_tensors
from pytest_kld.captures.manifest import window_file
from pytest_kld.figures.compare import compare
from pytest_kld.progress import Silent
from pytest_kld.kernel.reduction import _one_pass
from pytest_kld.figures.scores import Summary
from pytest_kld.text.windows import Windows

count, root, size, vocab, width = int(sys.argv[1]), Path(sys.argv[2]), 32, 65_536, 16
ids = np.random.default_rng(0).integers(0, vocab, (count, size), dtype=np.int32)
starts = np.arange(count)
windows = Windows(token_ids=ids, starts=starts, stride=1, dataset="", text_sha256="", tokenizer="", bos=None)
head = torch.randn(vocab, width)
captures = []
for side in ("reference", "candidate"):
    path, files = root / side, {"head.safetensors": write_tensors(root / side / "head.safetensors", {"weight": head})}
    for index in range(count):
        hidden, rows = torch.randn(size, width), torch.tensor([16, 31], dtype=torch.int32)
        tensors = {"token_ids": torch.from_numpy(ids[index]), "hidden": hidden, "check_rows": rows,
                   "check_logits": hidden[rows.long()] @ head.T}
        files[window_file("hidden", index)] = write_tensors(path / window_file("hidden", index), tensors)
    manifest = {"model": side, "store": "hidden", "vocab_size": vocab, "files": files, "protocol": None,
                "routing": None, "transforms": {"scale": 1.0, "softcap": None},
                "window_files": [window_file("hidden", index) for index in range(count)]}
    captures.append(Capture(path=path, manifest=manifest))
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
Path("/proc/self/clear_refs").write_text("5")  # else the peak of the process that started this one would count
before = peak()
for capture in captures:
    capture.verify()
Summary.of(compare(*captures, windows, head="exact", device=torch.device("cpu"), progress=Silent()))
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_number_of_windows(tmp_path: Path) -> None:
    """Kept for all windows, 60 windows of check rows would take 63 MB, and their logits 1 GB.

    The head is checked in groups of 32 windows, so both runs have more. The allocator returns what is freed at once.
    """

    def peak_bytes(count: int) -> int:
        command = [sys.executable, "-c", PEAK_MEMORY, str(count), str(tmp_path / str(count))]
        returning = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        run = subprocess.run(command, check=True, capture_output=True, text=True, env=returning)
        return 1024 * int(run.stdout)

    assert 0 < peak_bytes(94) < peak_bytes(34) + 10_000_000

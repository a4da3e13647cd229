"""An engine is what `tiny_engine.py` and the seams in `tiny_server.py` say of it, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from recorded import record
from safetensors.torch import load_file, save_file
from tiny_engine import Tiny
from tiny_pool import TinyPool, capture

from pytest_kld.captures.capture import Capture, Store
from pytest_kld.engines.served import connection as served_connection
from pytest_kld.errors import CaptureError, ServerError
from pytest_kld.figures.compare import compare
from pytest_kld.figures.scores import Summary
from pytest_kld.progress import Silent
from pytest_kld.text.windows import Windows

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
CHUNK = 24
SPOILED = 302
"""A token id."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyPool]:
    engine = TinyPool(tmp_path_factory.mktemp("tiny"), Tiny())
    yield engine
    engine.pool.close()


def with_nan(make_model: MakeModel) -> Path:
    """Return a model that gives NaN for a window with `SPOILED`."""
    model = make_model("tiny-nan")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][SPOILED] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def figures(reference: Capture, candidate: Capture, windows: Windows) -> dict[str, Any]:
    scores = compare(
        reference, candidate, windows, head="exact", device=torch.device("cpu"), progress=Silent(), extended=False
    )
    return Summary.of(scores).to_json()


@pytest.mark.parametrize("store", ["hidden", "logits"])
@pytest.mark.parametrize("chunk", [1_000, CHUNK], ids=["whole", "chunked"])
def test_its_captures_agree_with_those_of_transformers(
    tiny: TinyPool, reference_dir: Path, windows: Windows, tmp_path: Path, store: Store, chunk: int
) -> None:
    theirs = record(reference_dir, windows, tmp_path / "theirs", store=store)
    engine, subject = tiny.of(Tiny(chunk=chunk)), tiny.subject(reference_dir)
    ours = capture(engine, subject, windows, tmp_path / "ours", store)
    assert ours.manifest["store"] == store
    assert ours.manifest["facts"]["model_class"] == "Qwen3ForCausalLM"
    found = figures(theirs, ours, windows)
    assert found["positions"] == windows.count * windows.size
    assert found["max"] < 1e-9
    last = chunk * (windows.size // chunk)
    assert f"prefill of {windows.size - last} tokens at {last}\n" in tiny.log
    assert list(engine.capture_dir.iterdir()) == []


def test_a_spoiled_candidate_on_it_is_as_far_away_as_on_transformers(
    tiny: TinyPool, reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    reference = record(reference_dir, windows, tmp_path / "reference")
    theirs = record(candidate_dir, windows, tmp_path / "theirs")
    ours = capture(tiny.of(Tiny()), tiny.subject(candidate_dir), windows, tmp_path / "ours", "auto")
    mean = figures(reference, ours, windows)["mean"]
    assert mean > 1e-3
    assert mean == pytest.approx(figures(reference, theirs, windows)["mean"], rel=1e-5)


def test_its_key_has_versions_flags_and_environment(tiny: TinyPool, reference_dir: Path) -> None:
    found = tiny.of(Tiny()).fingerprint(tiny.subject(reference_dir, "--a", "8"))
    assert (found["engine"], found["arguments"]) == ("tiny", [["--a", "8"]])
    assert found["versions"] == {name: version(name) for name in ("transformers", "torch")}
    assert found["environment"]["TINY_FAULT"] == str(tiny.fault)


def test_its_own_checks_and_hints_are_used(tiny: TinyPool, reference_dir: Path) -> None:
    engine = tiny.of(Tiny())
    with pytest.raises(ServerError, match="Tiny's arguments: --port cannot be given"):
        engine.facts(tiny.subject(reference_dir, "--port", "1"))
    with (
        pytest.raises(ServerError, match="exit code 2 before it was ready") as caught,
        engine.open(tiny.subject(reference_dir, "--nonsense")),
    ):
        pass
    assert "hint: the flag is not known" in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "kind", "error", "words"),
    [
        ("no-hook", Tiny(), ServerError, "the server answered and the hook did not.*TINY_FAULT must not be no-hook"),
        (
            "lost-row",
            Tiny(),
            CaptureError,
            "the hook failed in the server.*the batch has 3 rows of logits and 2 were seen",
        ),
        ("prefix-cache", Tiny(), CaptureError, "window 0: after 0 positions the engine ran position 8.*a prefix cache"),
        ("odd-answer", Tiny(), ServerError, "did not answer as Tiny does .KeyError: 'tokens'"),
        ("", replace(Tiny(), name="other"), ServerError, "is tiny, and other is asked for: see --kld-engine"),
    ],
)
def test_what_is_wrong_with_it_is_an_error_that_says_so(
    tiny: TinyPool,
    reference_dir: Path,
    windows: Windows,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    kind: Tiny,
    error: type[Exception],
    words: str,
) -> None:
    monkeypatch.setattr(served_connection, "_HANDSHAKE_TIMEOUT_SECONDS", 1)
    monkeypatch.setattr(served_connection, "_FILE_TIMEOUT_SECONDS", 5)
    with (
        tiny.spoiled(fault),
        pytest.raises(error, match=f"(?s){words}"),
        tiny.of(kind).open(tiny.subject(reference_dir)) as loaded,
    ):
        list(loaded.prefill(windows, [0], [1]))


def test_an_engine_that_is_not_installed_is_an_error_before_a_boot(tiny: TinyPool, reference_dir: Path) -> None:
    engine = tiny.of(replace(Tiny(), packages=("no-such-package",)))
    subject = replace(tiny.subject(reference_dir), environment={**tiny.subject(reference_dir).environment, "A": "1"})
    with pytest.raises(ServerError, match=r"has no Tiny.*--kld-tiny-command"), engine.open(subject):
        pass


def test_log_probs_that_the_server_could_not_write_are_believed_only_if_something_captured_is_not_finite(
    tiny: TinyPool, reference_dir: Path, make_model: MakeModel, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's server, this one fails on NaN with words by which its kind knows it."""
    kind = replace(Tiny(), not_finite="cannot write nan")
    with tiny.spoiled("no-nan"), tiny.of(kind).open(tiny.subject(with_nan(make_model))) as loaded:
        prefills = sorted(loaded.prefill(windows, range(windows.count), [1]), key=lambda prefill: prefill.window)
    hidden = torch.stack([prefill.hidden for prefill in prefills if prefill.hidden is not None])
    spoiled = torch.from_numpy((windows.token_ids == SPOILED).any(1))
    assert spoiled.any()
    assert not spoiled.all()
    assert torch.equal(hidden.isnan().any((1, 2)), spoiled)
    with (
        tiny.spoiled("always-nan"),
        tiny.of(kind).open(tiny.subject(reference_dir)) as loaded,
        pytest.raises(CaptureError, match="all that was captured is finite"),
    ):
        list(loaded.prefill(windows, [0], [1]))

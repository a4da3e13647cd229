"""Decoding on a server, with the tiny engine: what comes back is right, or it is an error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recorded import record
from tiny_engine import Tiny
from tiny_pool import TinyPool, capture

from pytest_kld.captures.capture import Capture, Store
from pytest_kld.errors import CaptureError, ServerError
from pytest_kld.figures.compare import compare
from pytest_kld.progress import Silent
from pytest_kld.text.windows import Windows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyPool]:
    pool = TinyPool(tmp_path_factory.mktemp("tiny"), Tiny())
    yield pool
    pool.pool.close()


def decoded(tiny: TinyPool, model: Path, windows: Windows, directory: Path, store: Store = "auto") -> Capture:
    """Capture a model that decodes, as the plugin does."""
    subject = replace(tiny.subject(model), path="decode")
    return capture(tiny.of(Tiny()), subject, windows, directory, store)


@pytest.mark.parametrize("store", ["hidden", "logits"])
def test_decode_steps_agree_with_those_of_transformers(
    tiny: TinyPool, reference_dir: Path, windows: Windows, tmp_path: Path, store: Store
) -> None:
    steps = windows.decoded(16, 2)
    ours = decoded(tiny, reference_dir, steps, tmp_path / "ours", store)
    assert ours.manifest["store"] == store
    for run in (windows, steps):  # transformers prefilling, and decoding
        theirs = record(reference_dir, run, tmp_path / f"{run.rows}", store=store)
        scores = compare(theirs, ours, steps, head="exact", device=torch.device("cpu"), progress=Silent())
        assert scores.columns["kl"].shape == (3, 48)
        assert scores.columns["kl"].max() < 1e-9
    assert list(tiny.pool.capture_dir.iterdir()) == []


def test_logits_are_kept_if_a_graph_hides_the_head(
    tiny: TinyPool, reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    with tiny.spoiled("graph"):
        ours = decoded(tiny, reference_dir, windows.decoded(16, 2), tmp_path)
    assert (ours.store, ours.manifest["store_reason"]) == ("logits", "the head's input was not recorded")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("own-token", "window 0: the server decoded 49 tokens, and not those of the text"),
        ("one-by-one", r"window 0: 2 of 2 steps decoded 1 to 1 sequences together instead of 2. Does the server admit"),
        ("mixed", r"window 0: 1 of 48 steps also prefilled a sequence, so other kernels may have run"),
        ("retract", "at position 30 the server prefilled what it had decoded, because it had no room for all"),
    ],
)
def test_a_server_that_decodes_in_another_way_is_an_error(
    tiny: TinyPool, reference_dir: Path, windows: Windows, tmp_path: Path, fault: str, said: str
) -> None:
    with tiny.spoiled(fault), pytest.raises(CaptureError, match=said):
        decoded(tiny, reference_dir, windows.decoded(16, 2), tmp_path)


def test_flags_that_do_not_decode_one_token_a_step_are_refused_before_anything_boots(
    tiny: TinyPool, reference_dir: Path
) -> None:
    subject = replace(tiny.subject(reference_dir, "--draft"), path="decode")
    with pytest.raises(ServerError, match="--draft cannot be given when decoding is measured"):
        tiny.of(Tiny()).facts(subject)

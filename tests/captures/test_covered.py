"""The windows that a capture covers come back from the capture alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from recorded import record

from pytest_kld.captures.capture import Capture
from pytest_kld.captures.covered import windows_of
from pytest_kld.captures.manifest import read_manifest, write_manifest
from pytest_kld.errors import CaptureError
from pytest_kld.text.windows import Windows, join_windows


@pytest.fixture
def three_texts(windows: Windows) -> Windows:
    """Three datasets, of one window, two windows and one window, spread over each text."""
    whole = replace(windows, taken_from="spread", text_tokens=1000)

    def part(name: str, first: int, stop: int) -> Windows:
        ids, starts = whole.token_ids[first:stop], whole.starts[first:stop]
        return replace(whole, dataset=name, text_sha256=name * 64, token_ids=ids, starts=starts)

    return join_windows([part("a", 2, 3), part("b", 0, 2), part("c", 2, 3)])


def test_every_field_of_the_windows_comes_back(reference_dir: Path, three_texts: Windows, tmp_path: Path) -> None:
    found = windows_of(record(reference_dir, three_texts, tmp_path))
    for ours, theirs in zip((found, *found.parts), (three_texts, *three_texts.parts), strict=True):
        assert np.array_equal(ours.token_ids, theirs.token_ids)
        assert ours.starts.tolist() == theirs.starts.tolist()
        plain = {"token_ids": None, "starts": None, "parts": ()}
        assert replace(ours, **plain) == replace(theirs, **plain)
    assert found.digest == three_texts.digest


@pytest.mark.parametrize("starts", [None, 0, [0, 32], [0, 32, "64"], [0, 32, -1], [0, 32, True], [0, 32, 1 << 62]])
def test_starts_that_are_none_are_refused(
    starts: object, reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    capture = record(reference_dir, windows, tmp_path)
    manifest = {**read_manifest(capture.path), "starts": starts}
    write_manifest(capture.path, manifest)
    with pytest.raises(CaptureError, match="does not say where its windows begin"):
        windows_of(Capture.open(capture.path))

"""The Capture's format: what is read back is what was written, and damage is an error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from recorded import record
from safetensors.torch import save_file

from pytest_kld.captures.capture import Capture
from pytest_kld.captures.manifest import write_manifest
from pytest_kld.errors import CaptureError

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_kld.text.windows import Windows


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
    with pytest.raises(CaptureError, match="is not a capture: it has no"):
        Capture.open(tmp_path)


@pytest.mark.parametrize("dimensions", [0, 1, 3])
@pytest.mark.parametrize("window", [0, 1])
def test_log_probs_that_are_no_matrix_are_refused_by_name(
    dimensions: int, window: int, windows: Windows, tmp_path: Path
) -> None:
    for index in range(windows.count):
        matrix = torch.zeros(windows.size, 8)
        save_file({"log_probs": matrix}, tmp_path / f"{index}.safetensors")
    save_file({"log_probs": torch.zeros([4] * dimensions)}, tmp_path / f"{window}.safetensors")
    with pytest.raises(
        CaptureError, match=rf"{window}\.safetensors: log_probs has {dimensions} dimensions .*expected 2"
    ):
        Capture.open(tmp_path, windows)


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


def says_the_same(flipped: bytes, whole: bytes) -> bool:
    """Tell whether the byte carries nothing, as the 17th digit of a number may."""
    try:
        return bool(json.loads(flipped) == json.loads(whole))
    except ValueError:
        return False


def test_any_flipped_byte_in_the_manifest_is_found(reference_dir: Path, windows: Windows, tmp_path: Path) -> None:
    capture = record(reference_dir, windows, tmp_path)
    file = capture.path / "capture.json"
    whole = file.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        if says_the_same(flipped, whole):
            continue
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
    capture = record(reference_dir, windows, tmp_path)
    write_manifest(capture.path, {**capture.manifest, "schema": 99})
    with pytest.raises(CaptureError, match="its schema is 99 instead of 1"):
        Capture.open(capture.path, windows)

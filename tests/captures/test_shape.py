"""A manifest from elsewhere, with a right digest, is a capture's or an error."""

from __future__ import annotations

import copy
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded import record

from pytest_kld.captures.capture import Capture, LogitsReader
from pytest_kld.captures.manifest import read_manifest, write_manifest
from pytest_kld.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_kld.text.windows import Windows

Place = tuple[str | int, ...]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def whole(reference_dir: Path, windows: Windows, made: Path, tmp_path: Path) -> Capture:
    """A capture of a test's own, recorded once for all of them."""
    if not (made / "captures").is_dir():
        record(reference_dir, windows, made)
    (entry,) = (made / "captures").glob("*/capture.json")
    shutil.copytree(entry.parent, tmp_path / "whole")
    return Capture.open(tmp_path / "whole", windows)


def logits(path: Path, windows: Windows) -> torch.Tensor:
    """Use everything of a capture, as a comparison does."""
    capture = Capture.open(path, windows)
    capture.verify()
    json.dumps([capture.name, capture.store, capture.digest, capture.manifest])
    reader = LogitsReader.of(capture, "exact", torch.device("cpu"))
    for window in range(capture.windows):
        capture.token_ids(window)
    return torch.stack([reader.logits(window, 0, windows.size) for window in range(capture.windows)])


def places(value: Any, above: Place = ()) -> list[Place]:
    """Return the place of every value within a value, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(place for name, item in inner for place in places(item, (*above, name)))]


def put(manifest: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(manifest)
    holder: Any = changed
    for name in place[:-1]:
        holder = holder[name]
    if value is DELETED:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    return changed


DELETED = object()
BAD_NAMES = ("../x", "/etc/passwd", "a/../../x", "a//b", "", ".", "a\\b", "a\0b", "\ud800", "x" * 300, "\x1b[31m")
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "store": (lambda m: m.update(store="disk"), r"store: expected one of hidden, logits, logprobs, got 'disk'"),
    "other store": (lambda m: m.update(store="logits"), r"transforms: not allowed with the store logits"),
    "no transforms": (lambda m: m.update(transforms=None), r"transforms: required with the store hidden"),
    "list": (lambda m: m.update(transforms=[1, None]), r"transforms: expected an object, got a list"),
    "text": (lambda m: m["transforms"].update(scale="1"), r"transforms\.scale: expected a number above 0, got '1'"),
    "great": (lambda m: m["transforms"].update(scale=10**400), r"transforms\.scale: .* got a very large number"),
    "zero": (lambda m: m["transforms"].update(softcap=0), r"transforms\.softcap: expected a number above 0, got 0"),
    "missing": (lambda m: m["transforms"].pop("scale"), r"transforms\.scale: is missing"),
    "width": (lambda m: m.update(vocab_size=True), r"vocab_size: expected a whole number of at least 1, got True"),
    "other width": (lambda m: m.update(vocab_size=7), r"vocab_size: expected 1024, got 7"),
    "no windows": (lambda m: m.update(window_files=[]), r"window_files: expected a list that is not empty"),
    "fewer": (lambda m: m["window_files"].pop(), r"protocol\.windows: expected 2, got 3"),
    "twice": (
        lambda m: m["window_files"].__setitem__(1, m["window_files"][0]),
        r"window_files\[1\]: expected 'windows/00001\.safetensors', got 'windows/00000\.safetensors'",
    ),
    "absolute": (lambda m: m["window_files"].__setitem__(0, "/etc/passwd"), r"window_files\[0\]: .*'/etc/passwd'"),
    "not listed": (lambda m: m["files"].pop("windows/00002.safetensors"), r"files: 'windows/00002.* is missing"),
    "no head": (lambda m: m["files"].pop("head.safetensors"), r"files: 'head\.safetensors' is missing"),
    "no digest": (
        lambda m: m["files"]["head.safetensors"].update(sha256=None),
        r"files\['head\.safetensors'\]\.sha256: expected a SHA-256, got None",
    ),
    "negative": (lambda m: m["files"]["head.safetensors"].update(bytes=-1), r"files.*\.bytes: expected a whole number"),
    **{
        f"file {name!r}": (
            lambda m, name=name: m["files"].update({name: m["files"]["head.safetensors"]}),  # type: ignore[misc]
            r"files: .* is not the name of a file in the capture's directory",
        )
        for name in BAD_NAMES
    },
    "protocol": (lambda m: m.update(protocol=None), r"protocol: expected an object, got None"),
    "ids": (lambda m: m["protocol"].update(token_ids_sha256="x"), r"protocol\.token_ids_sha256: expected a SHA-256"),
    "size": (lambda m: m["protocol"].update(window_size=64.0), r"protocol\.window_size: expected a whole number"),
    "facts": (lambda m: m["facts"].update(dtype=None), r"facts\.dtype: expected a string, got None"),
    "key": (lambda m: m.update(key="k"), r"key: expected an object, got 'k'"),
    "model": (lambda m: m.update(model=["m"]), r"model: expected a string, got a list"),
    "checks": (lambda m: m["checks"].update(worst="0"), r"checks\.worst: expected a number, got '0'"),
    "no routing": (lambda m: m.pop("routing"), r"routing: is missing"),
    "no experts": (
        lambda m: m.update(routing={"layers": [0], "experts": 4, "unobserved": None}),
        r"files: 'experts\.safetensors' is missing",
    ),
    "long prompt": (
        lambda m: m["protocol"].update(decoding={"prompt_size": 64, "concurrency": 1}),
        r"protocol\.decoding\.prompt_size: expected less than 64, got an object",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=[ascii(name)[:30] for name in CHANGES])
def test_field_of_another_shape_is_an_error_that_names_it(
    whole: Capture, windows: Windows, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    manifest = copy.deepcopy(whole.manifest)
    change(manifest)
    write_manifest(whole.path, manifest)
    with pytest.raises(CaptureError, match=rf"capture\.json is invalid: {message}"):
        logits(whole.path, windows)


def test_experts_that_nobody_observed_have_no_file(whole: Capture, windows: Windows) -> None:
    routing = {"layers": [], "experts": 4, "unobserved": "no router"}
    write_manifest(whole.path, {**whole.manifest, "routing": routing})
    opened = Capture.open(whole.path, windows)
    assert (opened.routing, opened.routed) == (routing, None)


def test_manifest_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "capture.json").mkdir()
    with pytest.raises(CaptureError, match=rf"the manifest {tmp_path / 'capture.json'} is corrupt \(IsADirectory"):
        read_manifest(tmp_path)


def test_manifest_that_is_nested_too_deeply_is_an_error(whole: Capture, windows: Windows) -> None:
    (whole.path / "capture.json").write_text("[" * 100_000)
    with pytest.raises(CaptureError, match=r"the manifest .* is corrupt"):
        Capture.open(whole.path, windows)


def test_capture_on_disk_keeps_names_that_are_not_utf8(whole: Capture, windows: Windows) -> None:
    write_manifest(whole.path, {**whole.manifest, "model": "odd\udcff\x9b\u202e"})
    text = (whole.path / "capture.json").read_bytes().decode()
    assert text.isascii()
    assert Capture.open(whole.path, windows).name == "odd\udcff\x9b\u202e"


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([2**31, 2**63, -(2**63), 10**400, 1.5, -0.0, 1e300, 5e-324])
    | st.text(st.characters(exclude_categories=()), max_size=5)
    | st.sampled_from(["hidden", "logits", "logprobs", "../x", "/etc/passwd", "windows/00001.safetensors"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def test_any_change_to_a_manifest_is_an_error_or_changes_no_logit(
    whole: Capture, windows: Windows, tmp_path: Path
) -> None:
    expected = logits(whole.path, windows)
    copied = tmp_path / "copy"
    shutil.copytree(whole.path, copied)
    everywhere = [place for place in places(whole.manifest) if place]

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(place=st.sampled_from(everywhere), value=VALUES | st.just(DELETED))
    def change(place: Place, value: Any) -> None:
        write_manifest(copied, put(whole.manifest, place, value))
        try:
            found = logits(copied, windows)
        except CaptureError:
            return
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    change()

"""Every file that is read may be damaged or forged: then it is refused with an error of ours, or it is read.

Each reader starts from a real file, which is changed: bytes, and the values of its JSON, digests made right again.
`pytest tests/test_hostile.py --hypothesis-profile=long` looks longer than CI does.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hostile import READERS, handshake, make_files, seal_capture, use_capture, use_config, use_scores
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import made_result

from pytest_kld.captures import remote
from pytest_kld.captures.inventory import inventory
from pytest_kld.captures.timing import EarlierRuns
from pytest_kld.engines.served import connection
from pytest_kld.engines.served.handshake import read_handshake
from pytest_kld.engines.stored import read_stored
from pytest_kld.errors import KLDError, ModelError, ServerError
from pytest_kld.figures.scores import Scores
from pytest_kld.files import sha256_of_json
from pytest_kld.gate.baseline import Baseline
from pytest_kld.subjects.model import ModelSpec

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**63, 10**400, 1e308, math.inf, math.nan, "", "nan", "\x00", "\x1b[31m", "\u202e"),
    *("\ud800", "../../etc/passwd", "::error::x", "a" * 5000, [], {}, [[]], {"": {}}, [{}], ["x"], {"a": [1]}),
)
DEEP = b"[" * 100_000
MOST_MEMORY = 2 << 30
"""How many bytes more than before a reader may use: no header makes it allocate what the file does not hold."""


@pytest.fixture(scope="module")
def made(reference_dir: Path, candidate_dir: Path, windows: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one real file of each kind."""
    made = tmp_path_factory.mktemp("hostile")
    make_files(made, reference_dir, candidate_dir, windows)
    return made


@pytest.fixture
def target(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> Path:
    """A copy of the file, with what belongs to it."""
    name = sorted(made.glob(READERS[request.param][0]))[0].relative_to(made)
    if len(name.parts) > 1:
        shutil.copytree(made / name.parts[0], tmp_path / name.parts[0])
    else:
        shutil.copy(made / name, tmp_path / name)
    return tmp_path / name


@pytest.fixture(autouse=True)
def bounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wait for no file, and let nobody allocate what a lying header asks for."""
    monkeypatch.setattr(connection, "_FILE_TIMEOUT_SECONDS", 0)
    monkeypatch.setattr(remote, "_PAUSE_SECONDS", 0)
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def read_or_refused(name: str, target: Path, windows: Any) -> None:
    read = READERS[name][1]
    with suppress(KLDError):
        read(target, windows) if name == "original" else read(target)


def sealed(name: str, target: Path) -> None:
    """Make the digests of a changed file right again, if it has any."""
    if (seal := READERS[name][2]) is not None:
        with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            seal(target)


@contextmanager
def restored(folder: Path) -> Iterator[None]:
    """Give the files of a folder their contents back at the end, and remove what was added."""
    before = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    try:
        yield
    finally:
        for path in sorted(folder.rglob("*"), reverse=True):
            if path not in before:
                path.rmdir() if path.is_dir() else path.unlink()
        for path, text in before.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is not None and not (path.is_file() and path.read_bytes() == text):
                path.write_bytes(text)


def changed_bytes(data: st.DataObject, whole: bytes) -> bytes:
    """Flip, cut, repeat or insert some bytes, mostly of the beginning, where headers are."""
    text = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        most = len(text) if data.draw(st.booleans()) else min(len(text), 2000)
        at = data.draw(st.integers(0, max(0, most - 1)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "double", "length"]))
        if kind == "flip" and text:
            text[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del text[at : at + data.draw(st.integers(1, max(1, len(text))))]
        elif kind == "insert":
            text[at:at] = data.draw(st.binary(max_size=8) | st.sampled_from([DEEP, b"NaN", b"1e999", b'"\xff', b"{}"]))
        elif kind == "double":
            text += text[at : at + 1000]
        else:
            text[:8] = data.draw(st.sampled_from([0, 1, 2**20, 2**31, 2**63, 2**64 - 1])).to_bytes(8, "little")
    return bytes(text)


LONG = settings.get_current_profile_name() == "long"
QUIET = settings(
    max_examples=int(os.environ.get("KLD_FUZZ_EXAMPLES", "3000")) if LONG else 20,
    derandomize=not LONG,  # the same files every time; the long run looks for new ones
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@QUIET
@pytest.mark.parametrize(("name", "target"), [(name, name) for name in READERS], indirect=["target"], ids=list(READERS))
@given(data=st.data())
def test_changed_bytes_are_refused_or_read(
    name: str, target: Path, tmp_path: Path, windows: Any, data: st.DataObject
) -> None:
    with restored(tmp_path):
        target.write_bytes(changed_bytes(data, target.read_bytes()))
        if data.draw(st.booleans()):
            sealed(name, target)
        read_or_refused(name, target, windows)


def changed_value(data: st.DataObject, value: Any) -> Any:
    """Put an odd value somewhere into JSON, or remove something, or add something."""
    value = copy.deepcopy(value)
    holder, name = {"": value}, ""
    top: Any = holder
    while isinstance(holder[name], dict | list) and holder[name] and data.draw(st.integers(0, 9)) > 1:
        holder = holder[name]
        name = data.draw(st.sampled_from(list(holder) if isinstance(holder, dict) else list(range(len(holder)))))
    kind = data.draw(st.sampled_from(["odd", "odd", "remove", "key"]))
    if kind == "remove" and holder is not top:
        del holder[name]
    elif kind == "key" and isinstance(holder, dict):
        holder[data.draw(st.sampled_from(["", "x", "__class__", "\x1b", "\ud800"]))] = holder[name]
    else:
        holder[name] = data.draw(st.sampled_from(ODD))
    return top.get("")


JSON = ("manifest", "report", "handshake", "memo")
JSON += ("shared manifest", "shared marker", "claim", "SGLang load", "vLLM load", "index", "config")


@QUIET
@pytest.mark.parametrize(("name", "target"), [(name, name) for name in JSON], indirect=["target"], ids=JSON)
@given(data=st.data())
def test_odd_values_in_json_are_refused_or_read(
    name: str, target: Path, tmp_path: Path, windows: Any, data: st.DataObject
) -> None:
    with restored(tmp_path):
        value = changed_value(data, json.loads(target.read_bytes()))
        if "manifest" in name and isinstance(value, dict):
            value.pop("sha256", None)
            with suppress(ValueError):
                value["sha256"] = sha256_of_json(value)
        target.write_text(json.dumps(value))
        read_or_refused(name, target, windows)


@QUIET
@given(data=st.data())
def test_forged_scores_with_a_right_digest_are_refused_or_read(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    scores = Scores.load(made / "scores.safetensors")
    columns, about = dict(scores.columns), scores.about
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(columns)))
        forge = data.draw(st.sampled_from(["flat", "short", "dtype", "empty"]))
        column = columns[name]
        columns[name] = {
            "flat": column.ravel(),
            "short": column[:, :-1],
            "dtype": column.astype("float32"),
            "empty": column[:0],
        }[forge]
    else:
        about = changed_value(data, about)
    forged = Scores(columns=columns, about=about, evidence=scores.evidence)
    with suppress(ValueError, UnicodeEncodeError):
        forged.save(tmp_path / "forged.safetensors")
        with suppress(KLDError):
            use_scores(tmp_path / "forged.safetensors")


@QUIET
@given(data=st.data())
def test_odd_values_in_a_baseline_are_refused_or_read(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    scores = Scores.load(made / "scores.safetensors")
    result = made_result("candidate")
    baseline = Baseline.of(result, "2026-01-01") if "scores" in (result.about or {}) else None
    if baseline is None:
        about = {**scores.about, "skip_first": 0, "scores": "x"}
        baseline = Baseline.of(made_result("candidate", about=about), "2026-01-01")
    baseline.save(tmp_path / "b.json")
    (tmp_path / "b.json").write_text(json.dumps(changed_value(data, json.loads((tmp_path / "b.json").read_bytes()))))
    with suppress(KLDError):
        read = Baseline.load(tmp_path / "b.json")
        read.what_differs({**scores.about, "skip_first": 0, "scores": "x"})
        read.notes(scores.about)


def test_listing_a_cache_of_damaged_entries_is_no_error(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "cache", tmp_path / "cache")
    manifests = list(tmp_path.glob("cache/captures/*/capture.json"))
    manifests[0].write_bytes(DEEP)
    manifests[1].write_bytes(b'{"timing": 1, "subject": [1e999]}')
    (tmp_path / "cache" / "scores").mkdir(exist_ok=True)
    header = json.dumps({"__metadata__": {"about": DEEP.decode()}}).encode()
    (tmp_path / "cache" / "scores" / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert [bool(entry.damage) for entry in inventory(tmp_path / "cache")] == [True] * 3
    assert EarlierRuns.in_cache(tmp_path / "cache").runs == ()


@pytest.mark.parametrize(
    ("where", "name"), [(None, "origin"), (None, "quantization"), ("routing", "per_token"), ("head", "scale")]
)
def test_a_handshake_without_a_field_is_refused_by_its_name(tmp_path: Path, where: str | None, name: str) -> None:
    told = handshake()
    del (told if where is None else told[where])[name]
    (tmp_path / "handshake.json").write_text(json.dumps(told))
    with pytest.raises(ServerError, match=rf"http://h lacks {where + '.' if where else ''}{name}$"):
        read_handshake(tmp_path / "handshake.json", "http://h")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"weight_map": null}', b'{"weight_map": {"a": [1]}}', b"\xff", DEEP], ids=range(6)
)
def test_a_damaged_index_of_shards_is_refused_by_its_name(made: Path, tmp_path: Path, text: bytes) -> None:
    shutil.copytree(made / "checkpoint", tmp_path / "checkpoint")
    index = tmp_path / "checkpoint" / "model.safetensors.index.json"
    index.write_bytes(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is damaged, or is no index of shards"):
        read_stored(ModelSpec.parse(str(index.parent), Path()), {})


def test_a_config_whose_architectures_are_no_list_has_no_issue(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "checkpoint", tmp_path / "checkpoint")
    for odd in (True, 7, {"a": 1}, None):
        (tmp_path / "checkpoint" / "config.json").write_text(json.dumps({"architectures": odd}))
        use_config(tmp_path / "checkpoint" / "config.json")


def test_an_index_that_names_a_file_with_a_name_too_long_lacks_it(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "checkpoint", tmp_path / "checkpoint")
    index = tmp_path / "checkpoint" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "a" * 5000}}))
    with pytest.raises(ModelError, match="names 1 files that are not there"):
        read_stored(ModelSpec.parse(str(index.parent), Path()), {})


def test_digest_of_the_forged_file_is_what_the_reader_sees(made: Path) -> None:
    """The fuzzing reaches beyond the digests: a sealed change is found by its contents, not by its digest."""
    target = made / "capture" / "head.safetensors"
    whole = target.read_bytes()
    target.write_bytes(whole[:-4] + b"\xff\xff\xff\x7f")
    seal_capture(target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() in (made / "capture" / "capture.json").read_text()
    with pytest.raises(KLDError, match=r"differ from the engine's own|invalid"):
        use_capture(target)
    target.write_bytes(whole)
    seal_capture(target)

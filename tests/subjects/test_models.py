"""What a user may name as a model, and what identifies its bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_kld.errors import ModelError
from pytest_kld.subjects.digests import FileDigests
from pytest_kld.subjects.model import ModelSpec, is_capture

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache as `hf download` fills it, with two revisions of one model, and no network."""
    model = tmp_path / "models--org--name"
    for revision, commit in COMMITS.items():
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text("{}")
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def model_dir(path: Path) -> Path:
    (path / ".cache").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"12345678")
    return path


def test_a_directory_is_taken_where_there_is_one(tmp_path: Path) -> None:
    path = model_dir(tmp_path / "org" / "name@v2")
    spec = ModelSpec.parse("org/name@v2", tmp_path)
    assert spec == ModelSpec(name="org/name@v2", path=path)
    assert (spec.label, spec.source, spec.pin()) == ("org/name@v2", str(path), spec)


@pytest.mark.parametrize(
    ("text", "name", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("org/name", "org/name", None),
        ("Qwen/Qwen3-0.6B@refs/pr/1", "Qwen/Qwen3-0.6B", "refs/pr/1"),
    ],
)
def test_a_hub_id_may_have_a_revision(text: str, name: str, revision: str | None, tmp_path: Path) -> None:
    spec = ModelSpec.parse(text, tmp_path)
    assert (spec.name, spec.revision, spec.path, spec.label) == (name, revision, None, text)


@pytest.mark.parametrize("text", ["./nothing", "/nothing/here", "a/b/c", "org/name@", "@v1", "org/na me", "~/nothing"])
def test_what_is_neither_directory_nor_hub_id_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no directory .*, and it is not a hub id \(ORG/NAME\[@REVISION\]\)"):
        ModelSpec.parse(text, tmp_path)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is neither a model directory \(no config\.json\) nor a capture"):
        ModelSpec.parse("empty", tmp_path)


@pytest.mark.parametrize("name", ["capture.json", "0.safetensors"])
def test_a_capture_is_known_by_its_first_file(name: str, tmp_path: Path) -> None:
    assert not is_capture(tmp_path)
    assert not is_capture(None)
    (tmp_path / name).write_text("")
    assert is_capture(ModelSpec.parse(str(tmp_path), Path()).path)


@pytest.mark.parametrize(("revision", "commit"), [(None, "a"), ("main", "a"), ("v2", "b"), ("b" * 40, "b")])
def test_a_hub_id_is_pinned_to_its_commit_offline(revision: str | None, commit: str, hub: Path) -> None:
    pinned = ModelSpec(name="org/name", revision=revision).pin()
    assert pinned.revision == commit * 40
    assert pinned.identity(FileDigests()) == {"hub": "org/name", "commit": commit * 40, "elsewhere": {}}
    assert pinned.pin() == pinned


@pytest.mark.parametrize(("name", "revision"), [("org/other", None), ("org/name", "v3")])
def test_a_model_that_is_not_there_is_an_error(name: str, revision: str | None, hub: Path) -> None:
    spec = ModelSpec(name=name, revision=revision)
    with pytest.raises(ModelError, match=rf"cannot find the model {spec.label}: .*not a local directory.*hf download"):
        spec.pin()


def test_a_hub_adapter_is_its_commit_and_its_bases(hub: Path) -> None:
    snapshot = hub / "models--org--name" / "snapshots" / COMMITS["v2"]
    (snapshot / "adapter_config.json").write_text('{"base_model_name_or_path": "org/name", "revision": "main"}')
    (snapshot / "config.json").write_text('{"auto_map": {"AutoModel": "org/code--own.Model"}}')
    pinned = ModelSpec(name="org/name", revision="v2").pin()
    base = {"base model": {"hub": "org/name", "commit": COMMITS["main"], "elsewhere": {}}}
    assert pinned.identity(FileDigests()) == {"hub": "org/name", "commit": COMMITS["v2"], "elsewhere": base}
    code = hub / "models--org--code" / "snapshots" / ("c" * 40)
    code.mkdir(parents=True)
    (code / "own.py").write_text("")
    (hub / "models--org--code" / "refs").mkdir()
    (hub / "models--org--code" / "refs" / "main").write_text("c" * 40)
    trusted = pinned.identity(FileDigests(), trust_remote_code=True)
    assert trusted["elsewhere"]["code of AutoModel"] == {"hub": "org/code", "commit": "c" * 40, "elsewhere": {}}


@pytest.mark.parametrize("name", ["capture.json", "0.safetensors"])
def test_a_model_directory_that_also_holds_a_capture_is_refused(name: str, tmp_path: Path) -> None:
    path = model_dir(tmp_path / "model")
    (path / name).write_text("")
    with pytest.raises(
        ValueError, match=rf"model could be a model or a capture: it contains config\.json and {name}\. Move"
    ):
        ModelSpec.parse("model", tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("m" * 10_000, "File name too long"),
        ("m/" * 10_000, "File name too long"),
        ("a\0b", "null"),
        ("\udcff", "not valid UTF-8"),
        ("org/na\ud800me", "not valid UTF-8"),
        ("~nobody-of-this-name/model", "home directory"),
    ],
)
def test_what_no_file_can_be_called_is_refused_in_a_short_message(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason) as raised:
        ModelSpec.parse(text, tmp_path)
    assert type(raised.value) is ValueError
    assert len(str(raised.value)) < 1_000
    str(raised.value).encode()


def test_control_characters_are_shown_escaped(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no directory") as raised:
        ModelSpec.parse("a/b/\x1b[31mc\n", tmp_path)
    assert "\\x1b[31mc\\n" in str(raised.value)
    assert "\x1b" not in str(raised.value)

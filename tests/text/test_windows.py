"""Windows: which ids both sides are run on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeModel
from transformers import PreTrainedTokenizerFast

from pytest_kld.errors import CorpusError, ModelError
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.text.corpus import Corpus, load_corpus
from pytest_kld.text.windows import (
    Windows,
    check_same_tokens,
    cut_windows,
    load_tokenizer,
    load_tokenizer_if_any,
    tokenizer_files,
)

CORPUS = Corpus(name="a text", text=load_corpus("python-docs", Path()).text[:4000])


def cut(tokenizer: Any, count: int | None = 3, size: int = 64, stride: int = 16, corpus: Corpus = CORPUS) -> Windows:
    return cut_windows(corpus, tokenizer, count=count, size=size, stride=stride, label="the model")


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, putting a begin-of-sequence token before a text as Llama 3's does."""
    from tokenizers import Tokenizer, processors

    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.add_special_tokens(["<bos>"])
    bos = raw.token_to_id("<bos>")
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>")


def test_windows_slide_over_the_ids_of_the_whole_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(CORPUS.text)["input_ids"]
    windows = cut(tokenizer)
    assert (windows.count, windows.size, windows.bos) == (3, 64, None)
    assert windows.starts.tolist() == [0, 16, 32]
    for start, row in zip(windows.starts, windows.token_ids, strict=True):
        assert row.tolist() == ids[start : start + 64]
    assert windows.protocol() == {
        "dataset": "a text",
        "text_sha256": CORPUS.sha256,
        "tokenizer": "the model",
        "windows": 3,
        "window_size": 64,
        "stride": 16,
        "bos": None,
        "token_ids_sha256": windows.digest,
        "windows_from": "start",
        "decoding": None,
        "datasets": [{"dataset": "a text", "text_sha256": CORPUS.sha256, "windows": 3, "text_tokens": len(ids)}],
    }


@pytest.mark.parametrize(("size", "stride"), [(64, 16), (64, 100), (2, 1), (100, 7)])
def test_max_takes_all_that_fit_and_one_more_does_not(
    size: int, stride: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer(CORPUS.text)["input_ids"]
    windows = cut(tokenizer, None, size, stride)
    assert windows.starts[-1] + size <= len(ids) < windows.starts[-1] + stride + size
    assert np.array_equal(cut(tokenizer, windows.count, size, stride).token_ids, windows.token_ids)
    with pytest.raises(CorpusError, match=rf"give {windows.count} windows .* {windows.count + 1} are requested"):
        cut(tokenizer, windows.count + 1, size, stride)


@pytest.mark.parametrize("count", [1, None])
def test_too_little_text_for_one_window_is_an_error(count: int | None, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a short text")["input_ids"]
    short = Corpus(name="short", text="a short text")
    assert cut(tokenizer, count, len(ids), 16, short).count == 1
    with pytest.raises(
        CorpusError, match=rf"short is too short: its {len(ids)} tokens give 0 windows of {len(ids) + 1}"
    ):
        cut(tokenizer, count, len(ids) + 1, 16, short)


def test_a_window_of_one_token_predicts_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CorpusError, match="--kld-window-size"):
        cut(tokenizer, size=1)


def test_bos_stands_in_place_of_each_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    bos_tokenizer = with_bos(tokenizer)
    windows, plain = cut(bos_tokenizer), cut(tokenizer)
    assert windows.bos == bos_tokenizer.bos_token_id
    assert (windows.token_ids[:, 0] == windows.bos).all()
    assert np.array_equal(windows.token_ids[:, 1:], plain.token_ids[:, 1:])
    assert windows.digest != plain.digest


def test_bos_that_the_tokenizer_has_and_does_not_put_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    has_one = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="z")
    assert cut(has_one).bos is None


def test_digest_depends_on_ids_and_shape_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = cut(tokenizer)
    assert replace(windows, dataset="other", stride=1, token_ids=windows.token_ids.copy()).digest == windows.digest
    assert replace(windows, token_ids=windows.token_ids.reshape(6, 32)).digest != windows.digest
    changed = windows.token_ids.copy()
    changed[2, 63] += 1
    assert replace(windows, token_ids=changed).digest != windows.digest


def test_a_model_without_tokenizer_is_an_error(make_model: MakeModel) -> None:
    model = ModelSpec.parse(str(make_model("bare", tokenizer=False)), Path())
    with pytest.raises(ModelError, match=r"bare has no tokenizer that can be loaded.*--kld-tokenizer"):
        load_tokenizer(model, trust_remote_code=False)


def test_a_broken_tokenizer_is_an_error(make_model: MakeModel) -> None:
    path = make_model("broken-tokenizer")
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="broken-tokenizer has no tokenizer that can be loaded"):
        load_tokenizer(ModelSpec.parse(str(path), Path()), trust_remote_code=False)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        *((name, True) for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")),
        *(
            (name, True)
            for name in ("merges.txt", "spiece.model", "tekken.json", "qwen.tiktoken", "tokenizer.model.v3")
        ),
        *((name, True) for name in ("sentencepiece.bpe.model", "tokenization_own.py", "tokenizer.model.v3", "a.spm")),
        *((name, False) for name in ("config.json", "model.safetensors", "special_tokens_map.json", "own.py")),
        *(
            (name, False)
            for name in ("vocab.safetensors", "README.md", "generation_config.json", "chat_template.jinja")
        ),
    ],
)
def test_files_of_a_tokenizer_are_known_by_their_names(name: str, is_one: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    assert tokenizer_files(ModelSpec(name="m", path=tmp_path)) == ([name] if is_one else [])


def test_a_hub_model_without_tokenizer_has_none_and_a_broken_one_is_an_error(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "a" * 40
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    shutil.copytree(make_model("bare", tokenizer=False), snapshot)
    model = ModelSpec(name="org/name", revision=commit)
    assert load_tokenizer_if_any(model, trust_remote_code=False) is None
    (snapshot / "tokenizer.json").write_text("{")
    refusal = r"the tokenizer of org/name@a+ \(tokenizer\.json\) cannot be loaded: .*Repair it"
    with pytest.raises(ModelError, match=refusal):
        load_tokenizer_if_any(model, trust_remote_code=False)


def test_a_hub_that_cannot_be_asked_for_a_tokenizer_is_an_error_and_not_none(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.list_repo_files", _refuse_connection)
    commit = "b" * 40
    snapshot = tmp_path / "models--org--bare" / "snapshots" / commit
    shutil.copytree(make_model("bare", tokenizer=False), snapshot)
    with pytest.raises(ModelError, match=r"cannot tell whether org/bare@b+ has a tokenizer: the hub does not answer"):
        tokenizer_files(ModelSpec(name="org/bare", revision=commit))


def _refuse_connection(*_: object, **__: object) -> None:
    raise ConnectionRefusedError


def test_ids_that_mean_other_tokens_to_the_candidate_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = cut(tokenizer)
    check_same_tokens(windows, tokenizer, with_bos(tokenizer), "candidate")  # one more token, not used
    swapped = reordered(tokenizer, int(windows.token_ids.min()), 999)
    with pytest.raises(ModelError, match=rf"id {windows.token_ids.min()} is .* for the model and .* for candidate"):
        check_same_tokens(windows, tokenizer, swapped, "candidate")


def test_ids_that_the_candidate_lacks_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = cut(with_bos(tokenizer))
    with pytest.raises(ModelError, match=r"id 1000 is '<bos>' for the model and None for candidate"):
        check_same_tokens(windows, with_bos(tokenizer), tokenizer, "candidate")


def reordered(tokenizer: PreTrainedTokenizerFast, one: int, other: int) -> PreTrainedTokenizerFast:
    import json

    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {index: token for token, index in state["model"]["vocab"].items()}
    state["model"]["vocab"] |= {names[one]: other, names[other]: one}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))

"""Every source of text, and what is wrong with a text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow
import pyarrow.parquet
import pytest

from pytest_kld.errors import CorpusError
from pytest_kld.text.corpus import load_corpus

if TYPE_CHECKING:
    from collections.abc import Callable

DOCUMENTS = ["Erster Text: äöü €.", "", "second\u2028document\r\nwith \x85 odd ends of lines"]


def write_jsonl(path: Path, documents: list[object]) -> None:
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in documents]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8", newline="")


def write_parquet(path: Path, documents: list[object], column: str = "text") -> None:
    pyarrow.parquet.write_table(pyarrow.table({column: documents}), path)


def test_python_docs_are_english_prose_and_the_same_every_time() -> None:
    corpus = load_corpus("python-docs", Path())
    assert len(corpus.text) > 100_000
    assert "statement" in corpus.text
    assert corpus == load_corpus("python-docs", Path("/elsewhere"))
    assert corpus.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()


def test_a_text_file_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Eins.\n\n\nZwei €\n", encoding="utf-8")
    assert load_corpus("a.txt", tmp_path).text == "Eins.\n\n\nZwei €\n"
    assert load_corpus(str(tmp_path / "a.txt"), Path()).name == str(tmp_path / "a.txt")


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", write_jsonl), ("a.parquet", write_parquet)])
def test_documents_are_joined_with_two_newlines(
    name: str, write: Callable[[Path, list[object]], None], tmp_path: Path
) -> None:
    write(tmp_path / name, list(DOCUMENTS))
    assert load_corpus(name, tmp_path).text == "\n\n".join(DOCUMENTS)


@pytest.mark.filterwarnings("default")  # datasets leaves files to the garbage collector
def test_a_local_directory_opens_as_a_dataset_without_a_hub(tmp_path: Path) -> None:
    data = tmp_path / "data" / "somewhere"
    data.mkdir(parents=True)
    write_parquet(data / "test-00000.parquet", list(DOCUMENTS))
    write_parquet(data / "train-00000.parquet", ["training text"])
    assert load_corpus(f"hf:{data}", tmp_path).text == "\n\n".join(DOCUMENTS)
    assert load_corpus(f"hf:{data}::train", tmp_path).text == "training text"
    assert load_corpus(f"hf:{data}:default:train", tmp_path).text == "training text"
    with pytest.raises(CorpusError, match=r"cannot load the dataset .*split validation.*python-docs or a file"):
        load_corpus(f"hf:{data}::validation", tmp_path)


@pytest.mark.filterwarnings("default")
def test_a_dataset_needs_strings_in_a_field_text(tmp_path: Path) -> None:
    for name, documents, column in (("other", ["a"], "body"), ("null", ["a", None], "text")):
        (tmp_path / name).mkdir()
        write_parquet(tmp_path / name / "test.parquet", list(documents), column)
    with pytest.raises(CorpusError, match="has no field `text`, only body"):
        load_corpus(f"hf:{tmp_path / 'other'}", tmp_path)
    with pytest.raises(CorpusError, match="row 2: the field `text` is NoneType"):
        load_corpus(f"hf:{tmp_path / 'null'}", tmp_path)


@pytest.mark.filterwarnings("default")
def test_wikitext_without_hub_or_cache_says_what_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match=r"cannot load the dataset Salesforce/wikitext .*Offline, use python-docs"):
        load_corpus("wikitext-2", tmp_path)


@pytest.mark.parametrize("dataset", ["wikitext", "text.csv", "hf:", "hf::config", "hf:a:b:c:d", ""])
def test_an_unknown_dataset_names_what_there_is(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"unknown dataset .*wikitext-2, python-docs, a \.txt.*hf:NAME"):
        load_corpus(dataset, tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_missing_file_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=rf"cannot read the dataset .*{name}"):
        load_corpus(name, tmp_path)


@pytest.mark.parametrize("text", ["", " \n\n\t "])
def test_an_empty_text_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    write_jsonl(tmp_path / "a.jsonl", [text, text])
    write_parquet(tmp_path / "a.parquet", [text, text])
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        with pytest.raises(CorpusError, match=f"the dataset {name} is empty"):
            load_corpus(name, tmp_path)


def test_a_text_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(b"caf\xe9")
        with pytest.raises(CorpusError, match=f"cannot read the dataset .*{name}.*utf-8"):
            load_corpus(name, tmp_path)


@pytest.mark.parametrize("line", ["{", "[]", "1", '{"body": "b"}', '{"text": null}', '{"text": 1}'])
def test_a_line_that_is_no_document_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 3: "):
        load_corpus("a.jsonl", tmp_path)


def test_a_parquet_file_needs_strings_in_a_column_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "other.parquet", ["a"], "body")
    write_parquet(tmp_path / "null.parquet", ["a", None])
    write_parquet(tmp_path / "numbers.parquet", [1, 2])
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "null.parquet").read_bytes()[:-9])
    for name, message in {
        "other": r"other\.parquet: cannot read a column `text`",
        "null": r"null\.parquet, row 2: the field `text` is NoneType",
        "numbers": r"numbers\.parquet, row 1: the field `text` is int",
        "broken": r"broken\.parquet: cannot read",
    }.items():
        with pytest.raises(CorpusError, match=message):
            load_corpus(f"{name}.parquet", tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        r'{"text": "a \ud800 b"}',
        r'{"text": "a \uDCFF"}',
        r'{"text": "\udc00\ud800"}',
        r'{"messages": [{"role": "user", "content": "\ud83d"}]}',
        r'{"messages": [{"role": "user", "content": [{"text": "\ud83d"}]}]}',
    ],
)
def test_half_of_a_surrogate_pair_is_an_error_with_file_and_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + line)
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 2: \\u[0-9a-f]{4} is half of a surrogate pair"):
        load_corpus("a.jsonl", tmp_path, str)


def test_a_whole_surrogate_pair_is_its_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud83d\ude42 \\ud800"}')
    assert load_corpus("a.jsonl", tmp_path).text == "\U0001f642 \\ud800"


def test_template_that_makes_half_of_a_pair_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(CorpusError, match=r"the text of the dataset a\.jsonl contains '\\udcff', which is half of"):
        load_corpus("a.jsonl", tmp_path, lambda _: "\udcff")


@pytest.mark.parametrize("opening", ["[", '{"text":', '{"messages": [{"role": "a", "content": '])
def test_deeply_nested_json_is_an_error_with_file_and_line(opening: str, tmp_path: Path) -> None:
    closing = opening.translate(str.maketrans("[{", "]}", 'abcdefghijklmnopqrstuvwxyz":, '))[::-1]
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{opening * 100_000}1{closing * 100_000}')
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 2: lists and objects are nested too deeply"):
        load_corpus("a.jsonl", tmp_path)


def test_number_of_many_digits_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": ' + "9" * 5000 + "}")
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 1: cannot be read as JSON"):
        load_corpus("a.jsonl", tmp_path)


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Text.\ufeff", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"text": "Text.\ufeff"}\n', encoding="utf-8-sig")
    (tmp_path / "only.txt").write_text("", encoding="utf-8-sig")
    assert (tmp_path / "a.txt").read_bytes().startswith(b"\xef\xbb\xbfT")
    assert load_corpus("a.txt", tmp_path).text == load_corpus("a.jsonl", tmp_path).text == "Text.\ufeff"
    with pytest.raises(CorpusError, match=r"only\.txt is empty"):
        load_corpus("only.txt", tmp_path)

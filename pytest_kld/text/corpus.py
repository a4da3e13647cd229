"""The text to measure on: how it is loaded and what identifies it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_kld.errors import CorpusError

Rows = list[str] | list[list[Any]]
"""Texts, or conversations."""
Render = Callable[[list[Any]], str]
"""Turns a conversation, a list of messages with `role` and `content`, into text. See `windows.chat_renderer`."""

_HALF = re.compile("[\ud800-\udfff]")
BUILT_IN = ("wikitext-2", "python-docs")
CORPUS_FILES = (".txt", ".jsonl", ".parquet")
_ENCODING = "utf-8-sig"
"""UTF-8; a byte-order mark at the start of a file is not part of its text."""
_WAYS_OUT = (
    f"Give --kld-dataset one of {', '.join(BUILT_IN)}, a .txt, .jsonl or .parquet file, or hf:NAME[:CONFIG][:SPLIT]."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A text and its name.

    Documents are joined with two newlines, as is usual for WikiText. Conversations are joined without a separator,
    because a chat template ends its last message itself.
    """

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Return the digest of the text in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_corpus(dataset: str, base: Path, render: Render | None = None) -> Corpus:
    """Load the text that `--kld-dataset` names.

    Args:
        dataset: `wikitext-2` (raw, test split), `python-docs` (the language reference that comes with the
            interpreter), a file ending in .txt, .jsonl or .parquet (with a `text` field), or
            `hf:NAME[:CONFIG][:SPLIT]` (split `test` by default, a `text` field). The rows of a .jsonl file may have
            `messages` instead of `text`: all rows or none.
        base: the directory that a relative path starts from.
        render: turns `messages` into text.

    Raises:
        CorpusError: the dataset is unknown, unreadable, empty, or without a text field; or a conversation cannot be
            rendered.

    """
    separator = "\n\n"
    if dataset == "wikitext-2":
        documents = _hub_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    elif dataset == "python-docs":
        documents = _python_docs()
    elif dataset.startswith("hf:"):
        name, config, split = _hub_parts(dataset)
        documents = _hub_dataset(name, config or None, split or "test")
    else:
        rows = _file(base / Path(dataset).expanduser(), dataset)
        documents = [row if isinstance(row, str) else _rendered(row, render, dataset) for row in rows]
        separator = "\n\n" if any(isinstance(row, str) for row in rows) else ""
    text = separator.join(documents)
    if (half := _HALF.search(text)) is not None:
        raise CorpusError(
            f"the text of the dataset {dataset} contains {half[0]!r}, which is half of a surrogate pair and not a "
            "character; repair it"
        )
    if not text.strip():
        raise CorpusError(f"the dataset {dataset} is empty: there is no text to measure on. {_WAYS_OUT}")
    return Corpus(name=dataset, text=text)


def _hub_parts(dataset: str) -> tuple[str, str, str]:
    parts = dataset.removeprefix("hf:").split(":")
    if len(parts) > 3 or not parts[0]:
        raise CorpusError(f"unknown dataset {dataset!r}. {_WAYS_OUT}")
    name, config, split = (*parts, "", "")[:3]
    return name, config, split


def _python_docs() -> list[str]:
    from pydoc_data.topics import topics  # typed in typeshed, in the standard library since 2.6

    return [topics[name] for name in sorted(topics)]


def _hub_dataset(name: str, config: str | None, split: str) -> list[str]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # a hub, a network or a loading script can raise anything
        raise CorpusError(
            f"cannot load the dataset {name} (config {config}, split {split}): {error}. {_WAYS_OUT} "
            "Offline, use python-docs or a file: they do not need the hub."
        ) from error
    if "text" not in rows.column_names:
        raise CorpusError(f"the dataset {name} has no field `text`, only {', '.join(rows.column_names)}")
    return _strings(rows["text"], f"the dataset {name}, row")


def _rendered(messages: list[Any], render: Render | None, dataset: str) -> str:
    if render is None:
        raise CorpusError(f"the dataset {dataset} contains conversations, but there is no tokenizer to render them")
    try:
        return render(messages)
    except Exception as error:  # a template rejects messages with an error of its author's choice
        raise CorpusError(
            f"the dataset {dataset}: cannot render a conversation with the chat template: {error}"
        ) from error


def _file(path: Path, dataset: str) -> Rows:
    readers: dict[str, Callable[[Path], Rows]] = {
        ".txt": _read_txt,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise CorpusError(f"unknown dataset {dataset!r}. {_WAYS_OUT}")
    try:
        return readers[path.suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"cannot read the dataset {path}: {error}. {_WAYS_OUT}") from error


def _read_txt(path: Path) -> list[str]:
    return [path.read_text(encoding=_ENCODING)]


def _read_jsonl(path: Path) -> Rows:
    documents: list[str] = []
    conversations: list[list[Any]] = []
    # Not splitlines(): JSON strings may contain U+2028 and other characters that it treats as line ends.
    for number, line in enumerate(path.read_text(encoding=_ENCODING).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            if "\\ud" in line.lower():  # an escape may be half of a surrogate pair, which no tokenizer accepts
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise CorpusError(
                f"{path}, line {number}: {half} is half of a surrogate pair and not a character; repair the file"
            ) from error
        except ValueError as error:
            raise CorpusError(f"{path}, line {number}: cannot be read as JSON: {error}") from error
        except RecursionError as error:
            raise CorpusError(f"{path}, line {number}: lists and objects are nested too deeply to be read") from error
        match row:
            case {"text": _, "messages": _}:
                raise CorpusError(f"{path}, line {number}: the row has both `text` and `messages`; give one of them")
            case {"text": str(text)}:
                documents.append(text)
            case {"messages": [*messages]} if messages and all(map(_is_message, messages)):
                conversations.append(messages)
            case _:
                raise CorpusError(
                    f"{path}, line {number}: expected an object with a field `text` that is a string, or with a field "
                    "`messages` that is a list of objects with `role` and `content`"
                )
        if documents and conversations:
            raise CorpusError(
                f"{path}, line {number}: some rows have `text` and some `messages`; put them in separate files"
            )
    return conversations or documents


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def _read_parquet(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        column = pyarrow.parquet.read_table(path, columns=["text"]).column("text")
    except (pyarrow.ArrowException, KeyError) as error:
        raise CorpusError(f"{path}: cannot read a column `text`: {error}") from error
    return _strings(column.to_pylist(), f"{path}, row")


def _strings(texts: Iterable[Any], where: str) -> list[str]:
    documents = list(texts)
    for number, text in enumerate(documents, 1):
        if not isinstance(text, str):
            raise CorpusError(f"{where} {number}: the field `text` is {type(text).__name__}, not a string")
    return documents

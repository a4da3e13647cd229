"""Text: where it comes from and what identifies it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_kld.errors import CorpusError

if TYPE_CHECKING:
    from collections.abc import Iterable

BUILT_IN = ("wikitext-2", "python-docs")
CORPUS_FILES = (".txt", ".jsonl", ".parquet")
_WAYS_OUT = (
    f"Give --kld-dataset one of {', '.join(BUILT_IN)}, a .txt, .jsonl or .parquet file, or hf:NAME[:CONFIG][:SPLIT]."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A text and its name. Documents are joined with two newlines, as is usual for WikiText."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Return the digest of the text in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_corpus(dataset: str, base: Path) -> Corpus:
    """Load the text that `--kld-dataset` names.

    Args:
        dataset: `wikitext-2` (raw, test split), `python-docs` (the language reference that comes with the
            interpreter), a file ending in .txt, .jsonl or .parquet (with a `text` field), or
            `hf:NAME[:CONFIG][:SPLIT]` (split `test` by default, a `text` field).
        base: the directory that a relative path starts from.

    Raises:
        CorpusError: unknown, unreadable, without a text field, or empty.

    """
    if dataset == "wikitext-2":
        documents = _hub_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    elif dataset == "python-docs":
        documents = _python_docs()
    elif dataset.startswith("hf:"):
        name, config, split = _hub_parts(dataset)
        documents = _hub_dataset(name, config or None, split or "test")
    else:
        documents = _file(base / Path(dataset).expanduser(), dataset)
    text = "\n\n".join(documents)
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
    except Exception as error:  # whatever a hub, a network or a loading script can raise
        raise CorpusError(
            f"cannot load the dataset {name} (config {config}, split {split}): {error}. {_WAYS_OUT} "
            "Offline, python-docs and files need no hub."
        ) from error
    if "text" not in rows.column_names:
        raise CorpusError(f"the dataset {name} has no field `text`, only {', '.join(rows.column_names)}")
    return _strings(rows["text"], f"the dataset {name}, row")


def _file(path: Path, dataset: str) -> list[str]:
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise CorpusError(f"unknown dataset {dataset!r}. {_WAYS_OUT}")
    try:
        return readers[path.suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"cannot read the dataset {path}: {error}. {_WAYS_OUT}") from error


def _read_txt(path: Path) -> list[str]:
    return [path.read_text(encoding="utf-8")]


def _read_jsonl(path: Path) -> list[str]:
    documents = []
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for ends of lines.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            document: Any = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(f"{path}, line {number}: expected an object with a field `text`: {error!r}") from error
        documents += _strings([document], f"{path}, line", number)
    return documents


def _read_parquet(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        column = pyarrow.parquet.read_table(path, columns=["text"]).column("text")
    except (pyarrow.ArrowException, KeyError) as error:
        raise CorpusError(f"{path}: cannot read a column `text`: {error}") from error
    return _strings(column.to_pylist(), f"{path}, row")


def _strings(texts: Iterable[Any], where: str, first: int = 1) -> list[str]:
    documents = list(texts)
    for number, text in enumerate(documents, first):
        if not isinstance(text, str):
            raise CorpusError(f"{where} {number}: the field `text` is {type(text).__name__}, not a string")
    return documents

"""Windows: the token ids that both models run on."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pytest_kld.errors import CorpusError, ModelError
from pytest_kld.subjects.model import advice

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from pytest_kld.subjects.model import ModelSpec
    from pytest_kld.text.corpus import Corpus, Render

WindowsFrom = Literal["start", "spread"]
"""Which part of a text the windows are from; see `cut_windows`."""
MIN_WINDOW_SIZE = 2
"""A window needs one token to condition on and one to predict."""
_TODAY = {"d": "26", "m": "07", "b": "Jul", "B": "July", "Y": "2024", "y": "24", "A": "Friday", "a": "Fri"}
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('%{code}', '{text}')" for code, text in _TODAY.items())
    + " }}{%- endmacro -%}"
)
"""The date that a chat template gets instead of today's: the fallback of Llama 3's templates."""

_TOKENIZER_FILE = re.compile(
    r"(tokeniz|tekken|vocab|merges|spiece|spm|sentencepiece|bpe|tiktoken)[^/]*\.(json|model|txt|py|codes|v\d+[^/]*)"
    r"|[^/]*\.(tiktoken|spm)"
)
"""The names that libraries give to tokenizer files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How windows are decoded: a prompt is prefilled, and the rest of the window is forced, one token a step.

    Attributes:
        prompt_size: tokens of each window that are prefilled. The positions from here on are measured: their logits
            come from a decode step. The prompt's last position, which predicts the first forced token, is not one of
            them, because a prefill computes it.
        concurrency: sequences that are decoded together; kernels depend on it.

    """

    prompt_size: int
    concurrency: int

    def batches(self, indices: Sequence[int]) -> Iterator[list[int]]:
        """Yield the windows that are decoded together; the last batch is filled up with windows that it has already."""
        for start in range(0, len(indices), self.concurrency):
            batch = indices[start : start + self.concurrency]
            yield [batch[place % len(batch)] for place in range(self.concurrency)]

    def to_json(self) -> dict[str, int]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Sliding windows over the tokens of one dataset, or of several datasets in turn.

    Attributes:
        token_ids: [windows, positions], int32. Position i of a window predicts its token i + 1.
        starts: [windows], where each window begins in the tokenized text of its dataset.
        stride: distance between two starts, in tokens; between any two if the windows are spread, a multiple of it.
        dataset: the name of the text; for several, their names separated by commas.
        text_sha256: the digest of the text; for several, the digest of their digests.
        tokenizer: the label of the model whose tokenizer was used.
        bos: the id that replaces each window's first token if the tokenizer puts one before a text (as llama.cpp's
            perplexity does); None if it does not.
        parts: the windows of each dataset if there are several.
        taken_from: which part of each text the windows are from; None if a project gives windows of its own.
        text_tokens: the number of tokens of the text; None if it is unknown, or if there are several datasets.
        decoding: how they are decoded; None if they are prefilled whole.

    """

    token_ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    stride: int
    dataset: str
    text_sha256: str
    tokenizer: str
    bos: int | None
    parts: tuple[Windows, ...] = ()
    taken_from: WindowsFrom | None = None
    text_tokens: int | None = None
    decoding: Decoding | None = None

    @property
    def count(self) -> int:
        """Return the number of windows."""
        return int(self.token_ids.shape[0])

    @property
    def size(self) -> int:
        """Return the number of tokens in a window."""
        return int(self.token_ids.shape[1])

    @property
    def first_position(self) -> int:
        """Return the first position of each window that is measured."""
        return 0 if self.decoding is None else self.decoding.prompt_size

    @property
    def rows(self) -> int:
        """Return the number of positions of each window that are measured: those from `first_position` on."""
        return self.size - self.first_position

    @property
    def digest(self) -> str:
        """Return the SHA-256 of shape and token ids, in hexadecimal. It covers only what the model sees."""
        ids = np.ascontiguousarray(self.token_ids, dtype="<i4")
        return hashlib.sha256(f"{ids.shape}".encode() + ids.tobytes()).hexdigest()

    def first(self, count: int) -> Windows:
        """Return the first `count` windows; of windows that are spread over a text, these are spread over it too."""
        return replace(self, token_ids=self.token_ids[:count], starts=self.starts[:count])

    def decoded(self, prompt_size: int | None, concurrency: int) -> Windows:
        """Return the windows, to be decoded instead of prefilled.

        Args:
            prompt_size: tokens that are prefilled; None means a quarter of the window.
            concurrency: sequences that are decoded together.

        Raises:
            CorpusError: the prompt leaves no continuation in which a token is predicted.

        """
        prompt = max(1, self.size // 4) if prompt_size is None else prompt_size
        if prompt > self.size - 2:
            raise CorpusError(
                f"--kld-prompt-size: a prompt of {prompt:,} tokens leaves no decode step that predicts a token in "
                f"windows of {self.size:,} tokens; give at most {max(0, self.size - 2):,}"
                + (", or longer windows (--kld-window-size)" if self.size < 3 else "")
            )
        return replace(self, decoding=Decoding(prompt_size=prompt, concurrency=concurrency))

    def prefilled(self) -> Windows:
        """Return the windows, to be prefilled whole."""
        return replace(self, decoding=None)

    def protocol(self) -> dict[str, Any]:
        """Return how the windows were made, as JSON for manifests and reports."""
        return {
            "dataset": self.dataset,
            "datasets": [
                {
                    "dataset": part.dataset,
                    "text_sha256": part.text_sha256,
                    "windows": part.count,
                    "text_tokens": part.text_tokens,
                }
                for part in self.parts or (self,)
            ],
            "text_sha256": self.text_sha256,
            "tokenizer": self.tokenizer,
            "windows": self.count,
            "window_size": self.size,
            "stride": self.stride,
            "windows_from": self.taken_from,
            "bos": self.bos,
            "token_ids_sha256": self.digest,
            "decoding": None if self.decoding is None else self.decoding.to_json(),
        }


def load_tokenizer(model: ModelSpec, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        ModelError: the model has no tokenizer, or it cannot be loaded.

    """
    try:
        return _load_tokenizer(model, trust_remote_code)
    except ModelError as error:
        raise ModelError(
            f"{model.label} has no tokenizer that can be loaded: {error}. Name a model that has one with "
            "--kld-tokenizer."
        ) from error


def load_tokenizer_if_any(model: ModelSpec, *, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """Load a model's tokenizer; return None if the model has no tokenizer files.

    Args:
        model: the pinned model.
        trust_remote_code: whether a repository's own code may run.

    Raises:
        ModelError: the model has a tokenizer that cannot be loaded; the message names its files and the reason.

    """
    try:
        return _load_tokenizer(model, trust_remote_code)
    except ModelError as error:
        files = tokenizer_files(model)
        if not files:
            return None
        raise ModelError(
            f"the tokenizer of {model.label} ({', '.join(files)}) cannot be loaded: {error}. Repair it, or name the "
            "right tokenizer for both sides with --kld-tokenizer."
        ) from error


def _load_tokenizer(model: ModelSpec, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, or raise a ModelError that contains only the reason."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.source, revision=model.revision or "main", trust_remote_code=trust_remote_code
        )
        usable = len(tokenizer("a b c", add_special_tokens=False)["input_ids"]) > 0
    except Exception as error:  # faulty files can make a tokenizer raise anything
        why = str(error).strip() or type(error).__name__
        raise ModelError(f"{why}{advice(error)}".rstrip(".")) from error
    if not usable:  # transformers creates an empty tokenizer if files are missing
        raise ModelError("it has no vocabulary")
    return tokenizer


def tokenizer_files(model: ModelSpec) -> list[str]:
    """Return the names of the files that a model's tokenizer is loaded from; none if it has no tokenizer.

    Raises:
        ModelError: it is a hub model, its tokenizer is not in the cache, and the hub cannot be asked.

    """
    return sorted(name for name in _file_names(model) if _TOKENIZER_FILE.fullmatch(name))


def _file_names(model: ModelSpec) -> list[str]:
    if model.path is not None:
        return [path.name for path in model.path.iterdir()]
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import OfflineModeIsEnabled

    cached = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    names = [path.name for path in Path(cached).parent.iterdir()] if isinstance(cached, str) else []
    if any(_TOKENIZER_FILE.fullmatch(name) for name in names):
        return names
    try:
        return list(HfApi().list_repo_files(model.name, revision=model.revision))
    except OfflineModeIsEnabled:  # the user says that the cache has all there is
        return names
    except Exception as error:  # without a network the hub's client can raise anything
        raise ModelError(
            f"cannot tell whether {model.label} has a tokenizer: the hub does not answer ({type(error).__name__}), and "
            "its cache holds none. Try again, or name a model whose tokenizer fits both sides with --kld-tokenizer."
        ) from error


def cut_windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int | None,
    size: int,
    stride: int,
    label: str,
    taken_from: WindowsFrom = "start",
) -> Windows:
    """Tokenize a text and cut windows from it.

    Windows begin at multiples of the stride. `start` takes the first `count` of them, so the windows slide over the
    beginning of the text. `spread` takes `count` of them that are spread evenly over the whole text, in an order in
    which each window lies in the middle of a gap between earlier ones.

    Args:
        corpus: the text.
        tokenizer: a transformers tokenizer.
        count: number of windows; None takes all that fit.
        size: tokens in a window.
        stride: tokens between two starts.
        label: the tokenizer's name for the protocol.
        taken_from: which part of the text the windows are from.

    Raises:
        CorpusError: the text gives fewer windows than requested, or a window is too short to score.

    """
    if size < MIN_WINDOW_SIZE:
        raise CorpusError(
            f"--kld-window-size: a window of {size} token predicts nothing; give {MIN_WINDOW_SIZE} or more"
        )
    # The text is long on purpose, so the tokenizer's warning about the model's context length is turned off.
    ids = tokenizer(corpus.text, add_special_tokens=False, verbose=False)["input_ids"]
    available = max(0, (len(ids) - size) // stride + 1) if len(ids) >= size else 0
    wanted = count if count is not None else max(available, 1)
    if available < wanted:
        raise CorpusError(
            f"the dataset {corpus.name} is too short: its {len(ids):,} tokens give {available} windows of {size:,} "
            f"tokens at stride {stride:,}, but {wanted} are requested. Give a longer text (--kld-dataset), fewer "
            "windows (--kld-windows, or --kld-windows=max for all that fit), or smaller ones (--kld-window-size, "
            "--kld-stride)."
        )
    chosen = np.arange(wanted, dtype=np.int64) if taken_from == "start" else _spread(wanted, available)
    starts = chosen * stride
    token_ids = np.asarray(ids, dtype=np.int32)[starts[:, None] + np.arange(size)]
    bos = _leading_bos(tokenizer)
    if bos is not None:
        token_ids[:, 0] = bos
    return Windows(
        token_ids=token_ids,
        starts=starts,
        stride=stride,
        dataset=corpus.name,
        text_sha256=corpus.sha256,
        tokenizer=label,
        bos=bos,
        taken_from=taken_from,
        text_tokens=len(ids),
    )


def _spread(count: int, available: int) -> NDArray[np.int64]:
    """Return `count` of the numbers below `available`, spread evenly, in the order of van der Corput (1935).

    The k-th number is in the middle of the k-th of `count` equal stretches. Bits of k are read backwards to order them,
    so the first numbers are spread evenly too: of 100, the first 7 are every 16th, and the next 6 bisect their gaps.
    """
    bits = (count - 1).bit_length()
    order = sorted(range(count), key=lambda k: f"{k:0{bits}b}"[::-1])
    return (2 * np.array(order, dtype=np.int64) + 1) * available // (2 * count)


def join_windows(parts: Sequence[Windows]) -> Windows:
    """Concatenate the windows of several datasets that were cut in the same way.

    They form one job for an engine and one table of scores, so each model is loaded only once.
    """
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[0],
        token_ids=np.concatenate([part.token_ids for part in parts]),
        starts=np.concatenate([part.starts for part in parts]),
        dataset=", ".join(part.dataset for part in parts),
        text_sha256=hashlib.sha256("".join(part.text_sha256 for part in parts).encode()).hexdigest(),
        parts=tuple(parts),
        text_tokens=None,
    )


def chat_renderer(tokenizer: PreTrainedTokenizerBase, label: str) -> Render:
    """Return a function that renders conversations with a tokenizer's chat template, without a generation prompt.

    A template that writes today's date is given a fixed date; otherwise the windows would change every day.
    """

    def render(messages: list[Any]) -> str:
        if not tokenizer.chat_template:
            raise CorpusError(
                f"the tokenizer of {label} has no chat template; name a model that has one with --kld-tokenizer"
            )
        template = _FIXED_DATE + tokenizer.get_chat_template()
        return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))

    return render


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    bos: int | None = tokenizer.bos_token_id
    with_special: list[int] = tokenizer("a")["input_ids"]
    return bos if bos is not None and with_special[:1] == [bos] else None


def check_same_tokens(
    windows: Windows,
    reference: PreTrainedTokenizerBase,
    candidate: PreTrainedTokenizerBase,
    candidate_label: str,
) -> None:
    """Reject a candidate whose tokenizer gives the windows' ids a different meaning.

    Raises:
        ModelError: an id means different tokens; the message names the first such id.

    """
    used = np.unique(windows.token_ids).tolist()
    ours, theirs = reference.convert_ids_to_tokens(used), candidate.convert_ids_to_tokens(used)
    for token_id, one, other in zip(used, ours, theirs, strict=True):
        if one != other:
            raise ModelError(
                f"token ids differ between reference and candidate: id {token_id} is {one!r} for {windows.tokenizer} "
                f"and {other!r} for {candidate_label}. Their distributions are over different vocabularies, so KL "
                "divergence is meaningless. If the candidate's tokenizer files are wrong but its weights are right, "
                "name the right tokenizer for both with --kld-tokenizer."
            )

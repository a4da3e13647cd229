"""Engines run a model over windows. Everything that differs between them stays behind this protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_kld.kernel.head import Head
    from pytest_kld.subjects.subject import Subject
    from pytest_kld.text.windows import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known about a model before its weights are loaded.

    Attributes:
        model_class: the architecture's name.
        vocab_size: columns of the logits that are tokens, according to the model's config; columns beyond are padding.
        hidden_size: width of the last hidden state.
        context_length: number of positions that the model supports, or None if its config does not say.
        dtype: dtype of hidden states and logits, e.g. `bfloat16`.
        quantization: the quantization method's name, or None.

    """

    model_class: str
    vocab_size: int
    hidden_size: int
    context_length: int | None
    dtype: str
    quantization: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the facts for the manifest."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """What the engine computed for one window.

    Attributes:
        window: the window's index.
        hidden: [N, H], the head's input, in the engine's dtype; None if it was not observed.
        logits: [N, V], or [K, V] if rows were requested: the engine's own, in its dtype.

    """

    window: int
    hidden: Tensor | None
    logits: Tensor


class LoadedModel(Protocol):
    """A model that is ready to run."""

    @property
    def facts(self) -> ModelFacts:
        """The facts of the loaded model."""

    @property
    def heads(self) -> Sequence[Head]:
        """Candidates for its head, the most likely first; empty if it has no plain head. The check rows decide."""

    def prefill(self, windows: Windows, indices: Sequence[int], rows: Sequence[int] | None) -> Iterator[Prefill]:
        """Run windows and yield the results, in any order.

        Args:
            windows: all windows.
            indices: which to run.
            rows: positions whose logits are requested; None means all positions.

        """


class Engine(Protocol):
    """Runs Subjects. It reads their `model` (pinned), `arguments` and `environment`."""

    def facts(self, subject: Subject) -> ModelFacts:
        """Read a model's facts without loading its weights."""

    def fingerprint(self, subject: Subject) -> dict[str, Any]:
        """Return everything but the model's files that determines the bits of a capture, as JSON."""

    def open(self, subject: Subject) -> AbstractContextManager[LoadedModel]:
        """Load a model; the end of the context frees its memory."""

    def close(self) -> None:
        """Release what is kept between models, such as a running server. The next `open` starts afresh."""

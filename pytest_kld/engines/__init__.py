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


_ABOUT_EXPERTS = ("experts", "experts_per_token", "layers")


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
        experts: the number of routed experts in a layer; None for a dense model.
        experts_per_token: to how many of them a layer routes a token; None for a dense model.
        layers: the number of layers, or None if its config does not say.

    """

    model_class: str
    vocab_size: int
    hidden_size: int
    context_length: int | None
    dtype: str
    quantization: str | None
    experts: int | None = None
    experts_per_token: int | None = None
    layers: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the facts for the manifest, which describes experts elsewhere (`Routing`)."""
        return {name: value for name, value in asdict(self).items() if name not in _ABOUT_EXPERTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The layers of a mixture-of-experts model that route each token to some of their experts.

    Attributes:
        layers: the numbers of these layers.
        experts: the number of routed experts in each.
        unobserved: why the engine cannot tell the experts of each token, in a clause; None if it can.

    """

    layers: tuple[int, ...]
    experts: int
    unobserved: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        return {**asdict(self), "layers": list(self.layers)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """What the engine computed for one window, at the positions from `Windows.first_position` on: N of them.

    Attributes:
        window: the window's index.
        hidden: [N, H], the head's input, in the engine's dtype; None if it was not observed.
        logits: [N, V], or [K, V] if rows were requested: the engine's own, in its dtype.
        experts: [N, layers, experts per token], the ids of the experts that each position was routed to; None if the
            model is dense or they were not observed.

    """

    window: int
    hidden: Tensor | None
    logits: Tensor
    experts: Tensor | None = None


class LoadedModel(Protocol):
    """A model that is ready to run."""

    @property
    def facts(self) -> ModelFacts:
        """The facts of the loaded model."""

    @property
    def heads(self) -> Sequence[Head]:
        """Candidates for its head, the most likely first; empty if it has no plain head. The check rows decide."""

    @property
    def routing(self) -> Routing | None:
        """How it routes tokens to experts; None for a dense model. Final once windows have run."""

    @property
    def origin(self) -> str:
        """A name that this load of the model has, and no other: for a server, that of its process."""

    @property
    def runtime(self) -> dict[str, Any]:
        """What the engine chose for itself (backends, cache), for reports only. Plain JSON."""

    def prefill(self, windows: Windows, indices: Sequence[int], rows: Sequence[int] | None) -> Iterator[Prefill]:
        """Run windows and yield the results, in any order.

        Args:
            windows: all windows.
            indices: which to run.
            rows: positions whose logits are requested; None means all positions.

        """

    def decode(self, windows: Windows, indices: Sequence[int], rows: Sequence[int] | None) -> Iterator[Prefill]:
        """Prefill each window's prompt, decode the rest, and yield the results, in any order.

        Each step is given the window's own next token, whatever the model predicts. `concurrency` sequences are
        decoded together; if too few windows are left, further sequences fill the batch.

        Args:
            windows: all windows, with `decoding`.
            indices: which to run.
            rows: positions whose logits are requested; None means all from `Windows.first_position` on.

        Raises:
            KLDError: the model or the server cannot decode in this way, or ran other tokens.

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

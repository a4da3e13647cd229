"""What differs between served engines: the command line, the requests, the seams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pytest_kld.subjects.model import ModelSpec


Options = Mapping[str, Sequence[str]]
"""A release's flags: for each, its first spelling and the field that it sets; see `pytest_kld.hook.options`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The user's choices for all engines.

    Attributes:
        dtype: `auto` or a torch dtype's name.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        trust_remote_code: whether a repository's own code may run.

    """

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A server's answer to one window.

    Attributes:
        request_id: the id of the request that it answered.
        prompt_tokens: how many tokens it ran.
        log_probs: for each position of the window, the natural log-prob of its token given the tokens before, and the
            token's id. The first position's log-prob is None.

    """

    request_id: str
    prompt_tokens: int
    log_probs: Sequence[tuple[float | None, int]]


class ServerKind(Protocol):
    """A served engine. It holds no state; `engines/registry.py` finds it by name.

    Attributes:
        name: its name in `--kld-engine` and a Subject's `engine`.
        title: its name in messages.
        package: its Python package, whose version is the engine's.
        launch: the end of a command that starts it. `-m pytest_kld.hook SEAMS` in its place reports what is
            installed.
        seams: the module that hooks it inside the server; see `pytest_kld.hook`.
        health: the path that answers 200 once a server is ready.
        auto_dtype: the dtype that it picks by default, for estimating disk space.
        command_option: the option that names the command.
        note_on_named_gpus: what it means for a measurement if several GPUs are visible by UUID only, in a
            sentence.
        hook_advice: how to install the hook in a server that runs without it; sentences.

    """

    @property
    def name(self) -> str: ...  # noqa: D102 (described above)
    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def package(self) -> str: ...  # noqa: D102
    @property
    def launch(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def seams(self) -> str: ...  # noqa: D102
    @property
    def health(self) -> str: ...  # noqa: D102
    @property
    def auto_dtype(self) -> str: ...  # noqa: D102
    @property
    def command_option(self) -> str: ...  # noqa: D102
    @property
    def note_on_named_gpus(self) -> str: ...  # noqa: D102
    @property
    def hook_advice(self) -> str: ...  # noqa: D102

    def check_arguments(self, arguments: Sequence[str], source: str, options: Options | None = None) -> None:
        """Refuse flags that pytest-kld sets itself or that would spoil the measurement.

        Args:
            arguments: the user's flags.
            source: where the flags come from, for the message.
            options: the release's flags, if they are known.

        Raises:
            ServerError: names the flag, why, and what to do instead.

        """

    def complete(self, arguments: Sequence[str], settings: Settings, options: Options | None = None) -> list[str]:
        """Return all flags of a server except those for its address and model."""

    def address(self, model: ModelSpec, port: int) -> list[str]:
        """Return the flags for the model and the address: 127.0.0.1 and a port."""

    def gpus_needed(self, arguments: Sequence[str], options: Options | None = None) -> int:
        """Return how many GPUs a server with these flags takes; 0 if it runs on the CPU."""

    def numeric_arguments(self, arguments: Sequence[str], options: Options | None = None) -> list[list[str]]:
        """Return the flags that may change logits, in a fixed order, for the cache key."""

    def variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that a server gets on top of these, unless these already make that choice."""

    def axis_flags(self, axes: Mapping[str, str]) -> list[str]:
        """Return the flags that a Subject's axes stand for."""

    def hint(self, log: str) -> str | None:
        """Return advice for the end of a server's log, or None."""

    def request(self, request_id: str, token_ids: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """Return the path and the JSON body of a request that runs these tokens and returns their log-probs."""

    def read_answer(self, told: Any) -> Answer:
        """Read the answer's JSON.

        Raises:
            KeyError, IndexError, TypeError, ValueError: this engine does not answer in that form.

        """

    def describe(self, url: str, api_key: str | None) -> dict[str, Any]:
        """Return what determines the bits of a running server's captures: its version and arguments, as JSON.

        Raises:
            ServerError: it does not answer.

        """


def headers(api_key: str | None) -> dict[str, str]:
    """Return the HTTP headers of every request to a server."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}

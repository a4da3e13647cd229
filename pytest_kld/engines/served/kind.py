"""What differs between served engines: the command line, the requests, the seams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pytest_kld.engines.served.load import LoadTool
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
        decoded_together: how many sequences the session decodes together; 1 if it decodes none.

    """

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    decoded_together: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A server's answer to one window.

    Attributes:
        request_id: the id of the request that it answered.
        prompt_tokens: how many tokens it ran.
        log_probs: for each position of the window, the natural log-prob of its token given the tokens before, and the
            token's id. The first position's log-prob is None.
        unwritten: whether log-probs are missing because some are not finite, which this engine cannot write.
        experts: int32 [tokens, layers · K], the ids of the experts that each token used in each layer of the model,
            one layer after the other; None if the server does not tell them. Layers without experts hold any ids.

    """

    request_id: str
    prompt_tokens: int
    log_probs: Sequence[tuple[float | None, int]]
    unwritten: bool = False
    experts: NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A server's answer to one prompt that it decoded.

    Attributes:
        request_id: the id of the request that it answered.
        token_ids: the tokens after the prompt.

    """

    request_id: str
    token_ids: Sequence[int]


class ServerKind(Protocol):
    """A served engine. It holds no state; `engines/registry.py` finds it by name.

    Attributes:
        name: its name in `--kld-engine` and a Subject's `engine`.
        title: its name in messages.
        packages: the names of its Python package, of which one is installed; its version is the engine's.
        launch: the end of a command that starts it. `-m pytest_kld.hook SEAMS` in its place reports what is
            installed.
        seams: the module that hooks it inside the server; see `pytest_kld.hook`.
        health: the path that answers 200 once a server is ready.
        auto_dtype: the dtype that it picks by default, for estimating disk space.
        command_option: the option that names the command.
        note_on_named_gpus: what it means for a measurement if several GPUs are visible by UUID only, in a
            sentence.
        not_finite: what it answers, instead of log-probs, if some of them are not finite; empty if it can write them.
        hook_advice: how to install the hook in a server that runs without it; sentences.
        load_tool: its load generator; None if it has none.

    """

    @property
    def name(self) -> str: ...  # noqa: D102 (described above)
    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def packages(self) -> tuple[str, ...]: ...  # noqa: D102
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
    def not_finite(self) -> str: ...  # noqa: D102
    @property
    def hook_advice(self) -> str: ...  # noqa: D102
    @property
    def load_tool(self) -> LoadTool | None: ...  # noqa: D102

    def check_arguments(
        self, arguments: Sequence[str], source: str, options: Options | None = None, *, capturing: bool = True
    ) -> None:
        """Refuse flags that pytest-kld sets itself or that would spoil the measurement.

        Args:
            arguments: the user's flags.
            source: where the flags come from, for the message.
            options: the release's flags, if they are known.
            capturing: whether the server is to capture; one that is only put under load may run in any way.

        Raises:
            ServerError: names the flag, why, and what to do instead.

        """

    def check_device(self, settings: Settings, versions: Mapping[str, str], gpus: Sequence[str]) -> None:
        """Refuse a device that no flag can give the engine.

        Args:
            settings: the user's choices.
            versions: of the packages that are installed where it runs.
            gpus: the names of the GPUs there.

        Raises:
            ServerError: says why, and what to do instead.

        """

    def complete(
        self,
        arguments: Sequence[str],
        settings: Settings,
        options: Options | None = None,
        *,
        capturing: bool = True,
    ) -> list[str]:
        """Return all flags of a server except those for its address and model. See `check_arguments`.

        Raises:
            ServerError: a server with these flags cannot decode as many sequences together as the settings want.

        """

    def address(self, model: ModelSpec, port: int) -> list[str]:
        """Return the flags for the model and the address: 127.0.0.1 and a port."""

    def gpus_needed(self, arguments: Sequence[str], options: Options | None = None) -> int:
        """Return how many GPUs a server with these flags takes; 0 if it runs on the CPU."""

    def numeric_arguments(self, arguments: Sequence[str], options: Options | None = None) -> list[list[str]]:
        """Return the flags that may change logits, in a fixed order, for the cache key."""

    def variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that a server gets on top of these, unless these already make that choice."""

    def axis_flags(self, axes: Mapping[str, str]) -> list[str]:
        """Return the flags that a Subject's axes stand for.

        Raises:
            ServerError: the engine has no flag for one of them.

        """

    def hint(self, log: str) -> str | None:
        """Return advice for the end of a server's log, or None."""

    def request(self, request_id: str, token_ids: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """Return the path and the JSON body of a request that runs these tokens and returns their log-probs."""

    def read_answer(self, told: Any) -> Answer:
        """Read the answer's JSON.

        Raises:
            KeyError, IndexError, TypeError, ValueError: this engine does not answer in that form.

        """

    def runs_one_at_a_time(self, told: Mapping[str, Any]) -> bool:
        """Tell whether a server puts each prefill into a batch of its own, however many requests wait.

        Args:
            told: the server's arguments, as its hook reports them.

        """

    def why_not_decoding(self, told: Mapping[str, Any], together: int) -> str | None:
        """Return why a server cannot decode forced tokens one a step, and what to do; None if it can.

        Args:
            told: the server's arguments, as its hook reports them.
            together: how many sequences are to be decoded together.

        """

    def check_decoding(self, arguments: Sequence[str], source: str, options: Options | None = None) -> None:
        """Refuse flags with which a server would not decode one token a step. See `check_arguments`.

        Raises:
            ServerError: names the flag, why, and what to do instead.

        """

    def decode_request(
        self, request_ids: Sequence[str], prompts: Sequence[Sequence[int]], count: int
    ) -> tuple[str, dict[str, Any]]:
        """Return the path and the JSON body of a request that decodes `count` tokens after each prompt.

        The prompts must not share what is cached of them. No token ends a text early.

        Args:
            request_ids: the prompts' ids; their windows have consecutive numbers.
            prompts: token ids.
            count: how many tokens.

        """

    def read_decoded(self, told: Any) -> list[Decoded]:
        """Read the answer's JSON, in the order of the prompts. Raises what `read_answer` raises."""

    def describe(self, url: str, api_key: str | None) -> dict[str, Any]:
        """Return what determines the bits of a running server's captures, as JSON: its `versions` and `arguments`.

        An engine whose servers do not tell their arguments leaves them out; those that the hook reports take their
        place.

        Raises:
            ServerError: it does not answer.

        """


def headers(api_key: str | None) -> dict[str, str]:
    """Return the HTTP headers of every request to a server."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def without_key(text: str, api_key: str | None) -> str:
    """Return what a server answered without the key, which careless servers quote."""
    return text.replace(api_key, "[API key]") if api_key else text

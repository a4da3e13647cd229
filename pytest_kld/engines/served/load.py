"""An engine's own load generator: what is asked of it, and what it reports."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One run of a load generator: requests of random token ids, each answered with the same number of tokens.

    Attributes:
        concurrency: requests that are open at a time.
        requests: how many are sent in all.
        input_tokens: tokens of each prompt.
        output_tokens: tokens of each answer.
        seed: picks the ids.
        warmup: requests that are sent before and not counted.

    """

    concurrency: int
    requests: int
    input_tokens: int
    output_tokens: int
    seed: int
    warmup: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What a load generator reports of one run. Rates are per second, times in milliseconds.

    Attributes:
        completed: requests that were answered.
        output_tokens: tokens of all answers together.
        seconds: how long the run took.
        figures: `output_tps`, `total_tps`, `request_rate`, median and P99 of `ttft`, `tpot`, `itl` and `e2e`; see
            `throughput.figures.FIGURES`.
        mean_e2e: mean end-to-end latency of an answered request.
        errors: messages of failed requests, each once.
        most_concurrent: how many requests the server runs at a time; None if it does not say.
        raw: the report as it was read, without what it says about the server, which may hold secrets.

    """

    completed: int
    output_tokens: int
    seconds: float
    figures: Mapping[str, float]
    mean_e2e: float
    errors: Sequence[str]
    most_concurrent: int | None
    raw: Mapping[str, Any]


class LoadTool(Protocol):
    """An engine's load generator.

    Attributes:
        name: its name in messages.
        gauges: the server's metrics that are recorded beside.
        wants_own_server: whether the flags that pytest-kld gives a capturing server bound its concurrency, so that
            another server must be put under load.

    """

    @property
    def name(self) -> str: ...  # noqa: D102 (described above)
    @property
    def gauges(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def wants_own_server(self) -> bool: ...  # noqa: D102

    def most_concurrent(self, arguments: Sequence[str]) -> int | None:
        """Return how many requests a server with these flags runs at a time; None if they do not say."""

    def command(self, load: Load, url: str, model: str, tokenizer: str, output: Path) -> list[str]:
        """Return the words after the interpreter.

        Args:
            load: what is asked.
            url: the server's address.
            model: the name under which the server knows its model.
            tokenizer: the directory or hub id of its tokenizer.
            output: the file that the report is written to.

        """

    def read(self, text: str) -> LoadResult:
        """Read a report.

        Raises:
            AttributeError, LookupError, RecursionError, TypeError, ValueError: this release reports something else.

        """


MILLISECONDS = {
    f"{name}{suffix}": f"{prefix}_{reported}_ms"
    for name, reported in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"))
    for suffix, prefix in (("", "median"), ("_p99", "p99"))
}
"""Figures, and the fields that both SGLang's and vLLM's load generators report them in."""


def number(told: Mapping[str, Any], name: str) -> float:
    """Return a number of a report.

    Raises:
        KeyError, TypeError, ValueError: there is no such field, or it is not a finite number.

    """
    value = told[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} is not a finite number")
    return float(value)


def messages(told: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the messages of failed requests, each once.

    Raises:
        KeyError, TypeError: there is no such field, or it is not a list.

    """
    return tuple(dict.fromkeys(str(error) for error in told["errors"] if error))

"""SGLang's load generator, `sglang.bench_serving`. Its flags and fields are the same from 0.5.9 to 0.5.23."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_kld.engines.served.load import MILLISECONDS, Load, LoadResult, messages, number


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchServing:
    """See `LoadTool`."""

    name: str = "sglang.bench_serving"
    gauges: tuple[str, ...] = ("sglang:gen_throughput", "sglang:num_running_reqs", "sglang:token_usage")
    wants_own_server: bool = False

    def most_concurrent(self, arguments: Sequence[str]) -> int | None:  # noqa: ARG002
        """Return None: the report says it. See `LoadTool.most_concurrent`."""
        return None

    def command(self, load: Load, url: str, model: str, tokenizer: str, output: Path) -> list[str]:
        """Write its command line. See `LoadTool.command`. Answers ignore the end token by default."""
        return [
            *("-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url),
            *("--model", model, "--tokenizer", tokenizer, "--seed", str(load.seed)),
            *("--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", "1.0"),
            *("--random-input-len", str(load.input_tokens), "--random-output-len", str(load.output_tokens)),
            *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
            *("--warmup-requests", str(load.warmup), "--disable-tqdm"),
            *("--output-file", str(output), "--output-details"),
        ]

    def read(self, text: str) -> LoadResult:
        """Read the last line of its report. See `LoadTool.read`."""
        told = json.loads(text.splitlines()[-1])
        figures = {
            "output_tps": number(told, "output_throughput"),
            "total_tps": number(told, "total_throughput"),
            "request_rate": number(told, "request_throughput"),
            **{name: number(told, field) for name, field in MILLISECONDS.items()},
            "e2e": number(told, "median_e2e_latency_ms"),
            "e2e_p99": number(told, "p99_e2e_latency_ms"),
        }
        return LoadResult(
            completed=int(number(told, "completed")),
            output_tokens=int(number(told, "total_output_tokens")),
            seconds=number(told, "duration"),
            figures=figures,
            mean_e2e=number(told, "mean_e2e_latency_ms"),
            errors=messages(told),
            most_concurrent=_most_concurrent(told.get("server_info") or {}),
            raw={name: value for name, value in told.items() if name != "server_info"},
        )


def _most_concurrent(server: dict[str, Any]) -> int | None:
    """Return how many requests the server runs at a time, over all its data-parallel ranks."""
    states = server.get("internal_states") or [{}]
    each = states[0].get("effective_max_running_requests_per_dp")
    if isinstance(each, int):
        ranks = server.get("dp_size")
        return each * (ranks if isinstance(ranks, int) else 1)
    most = server.get("max_running_requests")
    return most if isinstance(most, int) else None


LOAD_TOOL = BenchServing()

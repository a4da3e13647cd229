"""vLLM's load generator, `vllm bench serve`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_kld.engines.served.load import MILLISECONDS, Load, LoadResult, messages, number
from pytest_kld.engines.vllm.arguments import RULES, SEQUENCES

_PROGRAM = (
    "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
    "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
"""What `vllm bench serve` runs. The program `vllm` itself does not run where the distribution has another name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchServe:
    """See `LoadTool`."""

    name: str = "vllm bench serve"
    gauges: tuple[str, ...] = ("vllm:num_requests_running", "vllm:kv_cache_usage_perc")
    wants_own_server: bool = True

    def most_concurrent(self, arguments: Sequence[str]) -> int | None:
        """Return the value of `--max-num-seqs`. See `LoadTool.most_concurrent`."""
        given = [values[0] for name, values in RULES.in_full(arguments, None) if name == SEQUENCES and values]
        return int(given[-1]) if given and given[-1].isdecimal() else None

    def command(self, load: Load, url: str, model: str, tokenizer: str, output: Path) -> list[str]:
        """Write its command line. See `LoadTool.command`."""
        return [
            *("-c", _PROGRAM, "--backend", "openai", "--endpoint", "/v1/completions", "--base-url", url),
            *("--model", model, "--tokenizer", tokenizer, "--seed", str(load.seed), "--ignore-eos"),
            *("--dataset-name", "random", "--random-range-ratio", "0", "--temperature", "0"),
            *("--random-input-len", str(load.input_tokens), "--random-output-len", str(load.output_tokens)),
            *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
            *("--num-warmups", str(load.warmup), "--disable-tqdm"),
            *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "99"),
            *("--save-result", "--save-detailed", "--result-dir", str(output.parent)),
            *("--result-filename", output.name),
        ]

    def read(self, text: str) -> LoadResult:
        """Read its report. See `LoadTool.read`."""
        told = json.loads(text)
        figures = {
            "output_tps": number(told, "output_throughput"),
            "total_tps": number(told, "total_token_throughput"),
            "request_rate": number(told, "request_throughput"),
            **{name: number(told, field) for name, field in MILLISECONDS.items()},
            "e2e": number(told, "median_e2el_ms"),
            "e2e_p99": number(told, "p99_e2el_ms"),
        }
        return LoadResult(
            completed=int(number(told, "completed")),
            output_tokens=int(number(told, "total_output_tokens")),
            seconds=number(told, "duration"),
            figures=figures,
            mean_e2e=number(told, "mean_e2el_ms"),
            errors=messages(told),
            most_concurrent=None,
            raw=told,
        )


LOAD_TOOL = BenchServe()

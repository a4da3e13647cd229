"""SGLang's command line: which flags are ours, which would spoil a measurement, which change its numbers."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence

from pytest_kld.errors import ServerError
from pytest_kld.subjects.subject import MOE_BACKEND

_OURS = {
    "--model-path": "the model is named with --kld-ref and --kld-candidate",
    "--model": "the model is named with --kld-ref and --kld-candidate",
    "--revision": "the revision is named with the model: NAME@REVISION",
    "--host": "the server listens on 127.0.0.1",
    "--port": "a free port is picked",
    "--base-gpu-id": "GPUs are leased; choose among them with CUDA_VISIBLE_DEVICES",
    "--gpu-id-step": "GPUs are leased; choose among them with CUDA_VISIBLE_DEVICES",
    "--api-key": "nobody else knows the server's port",
    "--served-model-name": "it is set where it is needed",
}
_SPOIL = {
    "--enable-dp-attention": "with data-parallel attention the head's input holds rows of other ranks' requests; "
    "use --tp alone, or --dp-size without it",
    "--enable-mixed-chunk": "it mixes decoding into the batches that are captured",
    "--disaggregation-mode": "prefill and decode must be one server",
    "--is-embedding": "embedding models have no distribution over tokens",
    "--dllm-algorithm": "a diffusion model predicts no next token",
    "--enable-lora": "requests name no adapter, so the base model would be measured; merge the adapter first",
    "--lora-paths": "requests name no adapter, so the base model would be measured; merge the adapter first",
}
_SPOIL_VALUES = {
    ("--load-format", "dummy"): "the weights would be random",
}
_NODES = (
    "several nodes are started by SGLang itself (--nnodes, --dist-init-addr) and named with --kld-ref-url or "
    "--kld-candidate-url"
)
_SIZES = (
    ("--tp", "--tp-size", "--tensor-parallel-size"),
    ("--pp-size", "--pp", "--pipeline-parallel-size"),
    ("--dp", "--dp-size", "--data-parallel-size"),
)
_NOT_NUMERIC = {
    "--mem-fraction-static",
    "--log-level",
    "--log-level-http",
    "--log-requests",
    "--watchdog-timeout",
    "--skip-server-warmup",
    "--enable-metrics",
    "--download-dir",
    "--max-total-tokens",
    "--max-running-requests",
    "--context-length",
    "--schedule-policy",
    "--disable-radix-cache",
    "--disable-cuda-graph",
    "--cuda-graph-max-bs",
    "--cuda-graph-bs",
    "--dist-timeout",
    "--trust-remote-code",
    "--grammar-backend",
    "--random-seed",
    "--tokenizer-worker-num",
    "--reasoning-parser",
    "--tool-call-parser",
    "--chat-template",
    "--stream-interval",
    "--decode-log-interval",
    "--show-time-cost",
    "--enable-cache-report",
    "--nccl-port",
}
"""Flags that move no logit of a prefill. Whatever is not listed here is part of the cache key."""

_AXES = {MOE_BACKEND: "--moe-runner-backend"}
"""The flag that each axis of a Subject stands for."""

LAUNCH = ("-m", "sglang.launch_server")
"""What a command that starts SGLang ends with; `-m pytest_kld.hook` in its place tells what is installed."""
ONE_WINDOW_A_BATCH = "--prefill-max-requests"
"""With 1 the composition of a batch does not depend on timing, so a repeat is bit-identical."""


def flags(arguments: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Split a command line into flags with their values: `--a 1`, `--a=1`, `--a`."""
    name: str | None = None
    values: list[str] = []
    for word in arguments:
        if word.startswith("--"):
            if name is not None:
                yield name, tuple(values)
            name, _, value = word.partition("=")
            values = [value] if value else []
        elif name is None:
            raise ServerError(f"SGLang's arguments begin with {word!r}; expected a flag such as --tp 8")
        else:
            values.append(word)
    if name is not None:
        yield name, tuple(values)


def check_arguments(arguments: Sequence[str], source: str) -> None:
    """Refuse flags that are ours to set or would spoil the measurement.

    Raises:
        ServerError: names the flag, why, and what to do instead.

    """
    for name, values in flags(arguments):
        reason = _OURS.get(name) or _SPOIL.get(name)
        if reason is None:
            reason = next(
                (why for (flag, value), why in _SPOIL_VALUES.items() if flag == name and value in values), None
            )
        if reason is None and name == "--nnodes" and values != ("1",):
            reason = _NODES
        if reason is None and name.startswith("--lora-") and name not in _SPOIL:
            reason = _SPOIL["--lora-paths"]
        if reason is not None:
            raise ServerError(f"{source}: {name} cannot be given: {reason}.")


def axis_flags(axes: Mapping[str, str]) -> list[str]:
    """Return the flags that axes stand for."""
    return [word for name, value in axes.items() for word in (_AXES[name], value)]


def gpus_needed(arguments: Sequence[str]) -> int:
    """Return how many GPUs a server with these arguments takes; 0 if it runs on the CPU."""
    given = dict(flags(arguments))
    if given.get("--device") == ("cpu",):
        return 0
    needed = 1
    for aliases in _SIZES:
        for alias in aliases:
            if alias in given:
                try:
                    needed *= int(given[alias][0])
                except (IndexError, ValueError):
                    raise ServerError(f"{alias} wants a whole number, got {' '.join(given[alias])!r}") from None
    return needed


def numeric_arguments(arguments: Sequence[str]) -> list[list[str]]:
    """Return the flags that may change logits, in a fixed order, for the cache key."""
    return sorted([name, *values] for name, values in flags(arguments) if name not in _NOT_NUMERIC)


def has_flag(arguments: Sequence[str], name: str) -> bool:
    """Tell whether a flag is given."""
    return any(given == name for given, _ in flags(arguments))


def parse_command(text: str) -> tuple[str, ...]:
    """Split the command that starts SGLang.

    Raises:
        ValueError: it does not end with `-m sglang.launch_server`.

    """
    words = tuple(shlex.split(text))
    if words[-2:] != LAUNCH:
        raise ValueError(
            f"expected a command that ends with `{' '.join(LAUNCH)}`, such as `/opt/sglang/bin/python -m "
            f"sglang.launch_server` or `docker run … python -m sglang.launch_server`, got {text!r}"
        )
    return words

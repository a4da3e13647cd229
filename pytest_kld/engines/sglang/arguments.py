"""SGLang's command line: flags that pytest-kld sets, that would spoil a measurement, or that may change its numbers."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_kld.errors import ServerError
from pytest_kld.servers.launchers import check_launcher
from pytest_kld.subjects.subject import MOE_BACKEND

if TYPE_CHECKING:
    from pytest_kld.engines.served.kind import Options

_OURS = {
    "--model-path": "the model is named with --kld-ref and --kld-candidate",
    "--model": "the model is named with --kld-ref and --kld-candidate",
    "--revision": "the revision is named with the model: NAME@REVISION",
    "--host": "the server listens on 127.0.0.1",
    "--port": "a free port is picked",
    "--base-gpu-id": "GPUs are leased; choose among them with CUDA_VISIBLE_DEVICES",
    "--gpu-id-step": "GPUs are leased; choose among them with CUDA_VISIBLE_DEVICES",
    "--api-key": "nobody else knows the server's port",
    "--served-model-name": "it is set when it is needed",
    "--config": "flags in a file would be neither checked nor in the cache key; give the flags themselves",
}
_DP_ATTENTION = (
    "with data-parallel attention the head's input holds rows of other ranks' requests; use --tp alone, or --dp-size "
    "without it"
)
_LORA = "requests name no adapter, so the base model would be measured; merge the adapter first"
_SPOIL = {
    "--enable-dp-attention": _DP_ATTENTION,
    "--attn-dp-size": _DP_ATTENTION,
    "--attention-data-parallel-size": _DP_ATTENTION,
    "--enable-mixed-chunk": "it mixes decoding into the batches that are captured",
    "--disaggregation-mode": "prefill and decode must be one server",
    "--is-embedding": "embedding models have no distribution over tokens",
    "--dllm-algorithm": "a diffusion model predicts no next token",
    "--enable-lora": _LORA,
    "--lora-paths": _LORA,
}
_SPOIL_VALUES = {
    ("--load-format", "dummy"): "the weights would be random",
    ("--speculative-algorithm", "uno"): "it refuses requests for log-probs, which a capture needs; leave out "
    "--speculative-*, which changes no logit of a prefill",
}
_HARMLESS_VALUES = {
    ("--attn-dp-size", "1"),
    ("--attention-data-parallel-size", "1"),
    ("--nnodes", "1"),
}
_NODES = (
    "several nodes are started by SGLang itself (--nnodes, --dist-init-addr) and named with --kld-ref-url or "
    "--kld-candidate-url"
)
_REFUSED = {**_OURS, **_SPOIL, "--nnodes": _NODES}
_REFUSED_FIELDS = {name.removeprefix("--").replace("-", "_"): reason for name, reason in _REFUSED.items()}
_SIZES = ("--tp-size", "--pp-size", "--dp-size")
_SPELLINGS = {
    "--tp": "--tp-size",
    "--tensor-parallel-size": "--tp-size",
    "--pipeline-parallel-size": "--pp-size",
    "--dp": "--dp-size",
    "--data-parallel-size": "--dp-size",
    "--ep": "--ep-size",
    "--expert-parallel-size": "--ep-size",
    "--attention-context-parallel-size": "--attn-cp-size",
    "--moe-data-parallel-size": "--moe-dp-size",
    "--decode-context-parallel-size": "--dcp-size",
    "--speculative-draft-model": "--speculative-draft-model-path",
    "--enable-hicache": "--enable-hierarchical-cache",
}
"""Alternative spellings in all supported releases, and the spelling that represents them in the cache key."""
_LEFT_OUT = {
    "--log-level": "what is printed",
    "--log-level-http": "what is printed",
    "--log-requests": "what is printed",
    "--log-requests-level": "what is printed",
    "--decode-log-interval": "what is printed",
    "--show-time-cost": "what is printed",
    "--enable-metrics": "counters beside the forward pass",
    "--watchdog-timeout": "when a server that hangs is killed",
    "--dist-timeout": "when a collective that hangs is aborted",
    "--download-dir": "where the weights are stored; their identity is in the key",
}
"""Flags that move no logit, each with the reason; every other flag is part of the cache key.

Some flags seem harmless but are not listed: graphs (`--disable-cuda-graph`, `--cuda-graph-*`,
`--disable-piecewise-cuda-graph`), since newer releases pad a prefill to a captured size, which runs other kernels;
memory and scheduling (`--mem-fraction-static`, `--max-total-tokens`, `--max-running-requests`, `--context-length`,
`--disable-radix-cache`, `--schedule-policy`, `--chunked-prefill-size`), since SGLang derives graph sizes, chunks and
backends from them; `--trust-remote-code`, since it decides which code is the model.
"""
_DIGESTED_BYTES = 64 << 20
"""A file that a flag names is in the key by its contents, up to this size."""

_AXES = {MOE_BACKEND: "--moe-runner-backend"}
"""The flag that each axis of a Subject stands for."""

LAUNCH = ("-m", "sglang.launch_server")
"""The end of a command that starts SGLang; `-m pytest_kld.hook` in its place reports what is installed."""
ONE_WINDOW_A_BATCH = "--prefill-max-requests"
"""With 1, a batch's composition does not depend on timing, so a repeat is bit-identical."""
_KNOWN = {
    *(*_REFUSED, *_SPELLINGS, *_SPELLINGS.values(), *_SIZES, *(name for name, _ in _SPOIL_VALUES)),
    *(ONE_WINDOW_A_BATCH, "--dtype", "--device", "--trust-remote-code", "--speculative-algorithm"),
}
"""The flags that this module looks for, used while the release's own flags are unknown."""


def flags(arguments: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Split a command line into flags with their values: `--a 1`, `--a=1`, `--a`."""
    name: str | None = None
    values: list[str] = []
    for word in arguments:
        if word.startswith("--"):
            if name is not None:
                yield name, tuple(values)
            name, equals, value = word.partition("=")
            values = [value] if equals else []
        elif name is None:
            raise ServerError(f"SGLang's arguments begin with {word!r}; expected a flag such as --tp 8")
        else:
            values.append(word)
    if name is not None:
        yield name, tuple(values)


def check_arguments(arguments: Sequence[str], source: str, options: Options | None = None) -> None:
    """Refuse flags that pytest-kld sets itself or that would spoil the measurement.

    Args:
        arguments: SGLang's flags.
        source: where the flags come from, for the message.
        options: the release's flags, if they are known; with them every spelling of a refused flag is refused.

    Raises:
        ServerError: names the flag, why, and what to do instead.

    """
    for name, values in flags(arguments):
        for meant in _meant(name, options):
            reason = _reason(meant, values, options)
            if reason is not None:
                short = "" if meant == name else f", short for {meant},"
                raise ServerError(f"{source}: {name}{short} cannot be given: {reason}.")


def axis_flags(axes: Mapping[str, str]) -> list[str]:
    """Return the flags that axes stand for."""
    return [word for name, value in axes.items() for word in (_AXES[name], value)]


def _reason(name: str, values: Sequence[str], options: Options | None) -> str | None:
    """Return why a flag, spelled in full, is refused, or None."""
    if any((name, value) in _HARMLESS_VALUES for value in values):
        return None
    lowered = [value.lower() for value in values]
    spoiling = next((why for (flag, value), why in _SPOIL_VALUES.items() if flag == name and value in lowered), None)
    field = (options or {}).get(name, ("", ""))[1]
    lora = _LORA if name.startswith("--lora-") else None
    return spoiling or _REFUSED.get(name) or _REFUSED_FIELDS.get(field) or lora


def _meant(name: str, options: Options | None) -> list[str]:
    """Return the flags that a word may stand for: SGLang's parser accepts any unambiguous prefix of a flag."""
    known = _KNOWN if options is None else options
    if name in known or name in _KNOWN:
        return [name]
    return [flag for flag in known if flag.startswith(name)] or [name]


def _in_full(arguments: Sequence[str], options: Options | None) -> list[tuple[str, tuple[str, ...]]]:
    """Return the flags with their values, each flag in one spelling."""
    found = []
    for name, values in flags(arguments):
        meant = {_SPELLINGS.get(flag, flag) for flag in _meant(name, options)}
        found.append((meant.pop() if len(meant) == 1 else name, values))
    return found


def gpus_needed(arguments: Sequence[str], options: Options | None = None) -> int:
    """Return how many GPUs a server with these arguments needs; 0 if it runs on the CPU."""
    given = dict(_in_full(arguments, options))
    if given.get("--device") == ("cpu",):
        return 0
    needed = 1
    for name in _SIZES:
        if name in given:
            try:
                needed *= int(given[name][0])
            except (IndexError, ValueError):
                raise ServerError(f"{name} wants a whole number, got {' '.join(given[name])!r}") from None
    return needed


def numeric_arguments(arguments: Sequence[str], options: Options | None = None) -> list[list[str]]:
    """Return the flags that may change logits, sorted by name, for the cache key.

    A flag that is given twice appears twice, in the given order, since the last one counts. The name of a file is
    followed by the digest of its contents.
    """
    found = [[name, *map(_with_contents, values)] for name, values in _in_full(arguments, options)]
    return sorted((flag for flag in found if flag[0] not in _LEFT_OUT), key=lambda flag: flag[0])


def _with_contents(value: str) -> str:
    path = Path(value)
    try:
        if "/" not in value or not path.is_file() or path.stat().st_size > _DIGESTED_BYTES:
            return value
        from pytest_kld.files import sha256_of_file

        return f"{value} sha256:{sha256_of_file(path)}"
    except (OSError, ValueError):  # not a file's name, or the file cannot be read here
        return value


def has_flag(arguments: Sequence[str], name: str, options: Options | None = None) -> bool:
    """Tell whether a flag is given, in any spelling."""
    return any(given == name for given, _ in _in_full(arguments, options))


def parse_command(text: str) -> tuple[str, ...]:
    """Split the command that starts SGLang.

    Raises:
        ValueError: it does not end with `-m sglang.launch_server`, or cannot work as a container or a job step.

    """
    words = tuple(shlex.split(text))
    if words[-2:] != LAUNCH:
        raise ValueError(
            f"expected a command that ends with `{' '.join(LAUNCH)}`, such as `/opt/sglang/bin/python -m "
            f"sglang.launch_server` or `docker run … python -m sglang.launch_server`, got {text!r}"
        )
    check_launcher(words, os.environ)
    return words

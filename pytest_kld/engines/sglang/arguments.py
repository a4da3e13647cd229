"""SGLang's command line: flags that pytest-kld sets, that would spoil a measurement, or that may change its numbers."""

from __future__ import annotations

from pytest_kld.engines.served.flags import FlagRules
from pytest_kld.subjects.subject import MOE_BACKEND, PREFILL_CHUNK

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
_PIPELINE = "no test has shown that captures of a pipeline's stages are right; use --tp"
_LORA = "requests name no adapter, so the base model would be measured; merge the adapter first"
_SPOIL = {
    "--enable-dp-attention": _DP_ATTENTION,
    "--attn-dp-size": _DP_ATTENTION,
    "--attention-data-parallel-size": _DP_ATTENTION,
    "--pp-size": _PIPELINE,
    "--pipeline-parallel-size": _PIPELINE,
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
_HARMLESS_VALUES = frozenset(
    {
        ("--attn-dp-size", "1"),
        ("--attention-data-parallel-size", "1"),
        ("--pp-size", "1"),
        ("--pipeline-parallel-size", "1"),
        ("--nnodes", "1"),
    }
)
SPECULATION = (
    "a draft's tokens are verified several a step by other kernels, and no token can be forced; leave out "
    "--speculative-*"
)
"""Why a server that speculates cannot be measured when it decodes."""
_NODES = (
    "several nodes are started by SGLang itself (--nnodes, --dist-init-addr) and named with --kld-ref-url or "
    "--kld-candidate-url"
)
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
LAUNCH = ("-m", "sglang.launch_server")
"""The end of a command that starts SGLang; `-m pytest_kld.hook` in its place reports what is installed."""
ONE_WINDOW_A_BATCH = "--prefill-max-requests"
"""With 1, a batch's composition does not depend on timing, so a repeat is bit-identical."""
RULES = FlagRules(
    title="SGLang",
    example="--tp 8",
    refused={**_OURS, **_SPOIL, "--nnodes": _NODES},
    owned=frozenset({*_OURS, "--nnodes"}),
    refused_beginnings={"--lora-": _LORA},
    refused_values=_SPOIL_VALUES,
    harmless_values=_HARMLESS_VALUES,
    spellings=_SPELLINGS,
    left_out=_LEFT_OUT,
    sizes=("--tp-size", "--pp-size", "--dp-size"),  # a server that is only timed may be a pipeline
    others=(ONE_WINDOW_A_BATCH, "--dtype", "--device", "--trust-remote-code", "--speculative-algorithm"),
    axes={MOE_BACKEND: "--moe-runner-backend", PREFILL_CHUNK: "--chunked-prefill-size"},
)

"""vLLM's command line: flags that pytest-kld sets, that would spoil a measurement, or that may change its numbers."""

from __future__ import annotations

from pytest_kld.engines.served.flags import FlagRules
from pytest_kld.subjects.subject import MOE_BACKEND, PREFILL_CHUNK

_TLS = "requests go to 127.0.0.1 and need no TLS"
_OURS = {
    "--model": "the model is named with --kld-ref and --kld-candidate",
    "--revision": "the revision is named with the model: NAME@REVISION",
    "--host": "the server listens on 127.0.0.1",
    "--port": "a free port is picked",
    "--uds": "the server listens on a port of 127.0.0.1",
    "--grpc": "requests are sent by HTTP",
    "--root-path": "the server's paths must be vLLM's own",
    "--ssl-keyfile": _TLS,
    "--ssl-certfile": _TLS,
    "--device-ids": "GPUs are leased; choose among them with CUDA_VISIBLE_DEVICES",
    "--api-key": "nobody else knows the server's port",
    "--served-model-name": "it is set when it is needed",
    "--config": "flags in a file would be neither checked nor in the cache key; give the flags themselves",
}
_LORA = "requests name no adapter, so the base model would be measured; merge the adapter first"
_NO_TOKENS = "such a model has no distribution over tokens"
_SEVERAL = (
    "servers of several nodes or launches are started by vLLM itself and named with --kld-ref-url or "
    "--kld-candidate-url"
)
_UNPROVED = "no test has shown that captures of such a server are right; use --tensor-parallel-size"
_SPOIL = {
    "--data-parallel-size": _UNPROVED,
    "--pipeline-parallel-size": _UNPROVED,
    "--prefill-context-parallel-size": _UNPROVED,
    "--enable-lora": _LORA,
    "--default-mm-loras": _LORA,
    "--convert": _NO_TOKENS,
    "--task": _NO_TOKENS,
    "--diffusion-config": "a diffusion model predicts no next token",
    "--kv-sharing-fast-prefill": "with it vLLM computes wrong log-probs for prompts",
    "--tokens-only": "the server would not take the requests for completions that a capture sends",
    "--headless": _SEVERAL,
    "--nnodes": _SEVERAL,
    "--data-parallel-size-local": _SEVERAL,
    "--data-parallel-rank": _SEVERAL,
    "--data-parallel-start-rank": _SEVERAL,
    "--data-parallel-address": _SEVERAL,
    "--data-parallel-hybrid-lb": _SEVERAL,
    "--data-parallel-external-lb": _SEVERAL,
    "--data-parallel-multi-port-external-lb": _SEVERAL,
}
_SPOIL_VALUES = {
    ("--load-format", "dummy"): "the weights would be random",
    ("--runner", "pooling"): _NO_TOKENS,
    ("--logprobs-mode", "raw_logits"): "the server's log-probs are compared with the captured logits",
    ("--logprobs-mode", "processed_logits"): "the server's log-probs are compared with the captured logits",
}
SPECULATION = (
    "a draft's tokens are verified several a step by other kernels, and no token can be forced; leave out "
    "--speculative-config and --spec-*"
)
"""Why a server that speculates cannot be measured when it decodes."""
SHARDED = "each rank samples some of the sequences, and every rank must force the tokens of all of them"
"""Why a server with --enable-batch-sharded-sampling cannot be measured when it decodes."""
SPACED = "prompts wait for steps that others decode, and all sequences must be prefilled before any of them decodes"
"""Why a server with --prefill-schedule-interval cannot be measured when it decodes."""
_HARMLESS_VALUES = frozenset(
    {
        ("--data-parallel-size", "1"),
        ("--pipeline-parallel-size", "1"),
        ("--prefill-context-parallel-size", "1"),
        ("--nnodes", "1"),
        ("--convert", "none"),
        ("--convert", "auto"),
        ("--task", "generate"),
        ("--task", "auto"),
    }
)
_SPELLINGS = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-ep": "--enable-expert-parallel",
    "-pcp": "--prefill-context-parallel-size",
    "-dcp": "--decode-context-parallel-size",
    "-n": "--nnodes",
    "-dpn": "--data-parallel-rank",
    "-dpr": "--data-parallel-start-rank",
    "-dpl": "--data-parallel-size-local",
    "-dpa": "--data-parallel-address",
    "-dph": "--data-parallel-hybrid-lb",
    "-dpe": "--data-parallel-external-lb",
    "-dpm": "--data-parallel-multi-port-external-lb",
    "-q": "--quantization",
    "-sc": "--speculative-config",
    "-cc": "--compilation-config",
    "-ac": "--attention-config",
    "-dc": "--diffusion-config",
}
"""Alternative spellings in all supported releases, and the spelling that represents them in the cache key."""
_LEFT_OUT = {
    "--log-level": "what is printed",
    "--log-config-file": "what is printed",
    "--logging-config": "what is printed",
    "--uvicorn-log-level": "what is printed",
    "--disable-uvicorn-access-log": "what is printed",
    "--disable-access-log-for-endpoints": "what is printed",
    "--max-log-len": "what is printed",
    "--enable-log-requests": "what is printed",
    "--no-enable-log-requests": "what is printed",
    "--disable-log-requests": "what is printed",
    "--enable-log-outputs": "what is printed",
    "--enable-log-deltas": "what is printed",
    "--disable-log-stats": "what is printed",
    "--aggregate-engine-logging": "what is printed",
    "--use-tqdm-on-load": "what is printed",
    "--otlp-traces-endpoint": "where traces are sent",
    "--kv-cache-metrics": "counters beside the forward pass",
    "--cudagraph-metrics": "counters beside the forward pass",
    "--distributed-timeout-seconds": "when a collective that hangs is aborted",
    "--cpu-distributed-timeout-seconds": "when a collective that hangs is aborted",
    "--shutdown-timeout": "how the server ends",
    "--disable-fastapi-docs": "pages beside the API",
    "--download-dir": "where the weights are stored; their identity is in the key",
}
"""Flags that move no logit, each with the reason; every other flag is part of the cache key.

Some flags seem harmless but are not listed: compilation and graphs (`--enforce-eager`, `--compilation-config`, `-O`,
`--cudagraph-capture-sizes`), since they choose kernels; memory and scheduling (`--gpu-memory-utilization`,
`--max-model-len`, `--max-num-seqs`, `--max-num-batched-tokens`, `--enable-prefix-caching`, `--block-size`), since vLLM
derives graph sizes, chunks and backends from them; `--trust-remote-code`, since it decides which code is the model.
"""
LAUNCH = ("-m", "vllm.entrypoints.openai.api_server")
"""The end of a command that starts vLLM; `-m pytest_kld.hook` in its place reports what is installed."""
SEQUENCES = "--max-num-seqs"
"""How many sequences a server runs together. With 1, a batch's composition does not depend on timing."""
GENERATION_CONFIG = "--generation-config"
"""With `vllm`, requests are run as they are sent: a checkpoint's own defaults for sampling do not change them."""
RULES = FlagRules(
    title="vLLM",
    example="--tensor-parallel-size 8",
    refused={**_OURS, **_SPOIL},
    owned=frozenset({*_OURS, *(flag for flag, why in _SPOIL.items() if why is _SEVERAL)}),
    refused_beginnings={"--lora-": _LORA},
    refused_values=_SPOIL_VALUES,
    harmless_values=_HARMLESS_VALUES,
    spellings=_SPELLINGS,
    left_out=_LEFT_OUT,
    sizes=("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size"),  # some are only timed
    others=(
        *(SEQUENCES, GENERATION_CONFIG, "--dtype", "--trust-remote-code"),
        *("--spec-method", "--spec-model", "--spec-tokens"),
        *("--enable-batch-sharded-sampling", "--prefill-schedule-interval"),
    ),
    axes={MOE_BACKEND: "--moe-backend", PREFILL_CHUNK: "--max-num-batched-tokens"},
    underscores=True,
)

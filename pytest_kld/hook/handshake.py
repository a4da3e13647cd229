"""What the hook says of the server that it is in: the handshake, and the head."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytest_kld import __version__
from pytest_kld.hook.protocol import HANDSHAKE_FILE, PROTOCOL, write_json_whole
from pytest_kld.servers.environment import numeric_environment

_PLAIN_METHODS = {None, "UnquantizedEmbeddingMethod", "UnquantizedLinearMethod", "PackWeightMethod"}
"""Quantization methods of a head that is a plain product."""
_SERVER_ARGUMENTS = (
    "model_path",
    "served_model_name",
    "revision",
    "attention_backend",
    "moe_runner_backend",
    "kv_cache_dtype",
    "quantization",
    "chunked_prefill_size",
    "speculative_algorithm",
    "tp_size",
    "pp_size",
    "dp_size",
    "enable_dp_attention",
    "attn_dp_size",
    "device",
)


def rank_of(runner: Any) -> int:
    """Return the tensor-parallel rank of a model runner's process."""
    if hasattr(runner, "tp_rank"):
        return int(runner.tp_rank)
    from sglang.srt.runtime_context import get_parallel  # it moved there

    return int(get_parallel().tp_rank)


def write_handshake(run: Path, runner: Any, processor: Any, head: dict[str, Any]) -> None:
    """Write who answers: versions, model, numerics, head, environment."""
    from sglang.version import __version__ as sglang_version

    config, arguments = runner.model_config, runner.server_args
    quantization = getattr(config, "quantization", None)
    write_json_whole(
        run / HANDSHAKE_FILE,
        {
            "protocol": PROTOCOL,
            "pytest_kld": __version__,
            "sglang": sglang_version,
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else str(runner.device),
            "model_class": type(runner.model).__name__,
            "vocab_size": int(processor.config.vocab_size),
            "hidden_size": int(config.hidden_size),
            "dtype": str(config.dtype).removeprefix("torch."),
            "quantization": None if quantization is None else str(quantization),
            "head": head,
            "dp_attention": runs_dp_attention(processor),
            "environment": numeric_environment(os.environ),
            "arguments": {name: _plain(getattr(arguments, name, None)) for name in _SERVER_ARGUMENTS},
        },
    )


def runs_dp_attention(processor: Any) -> bool | None:
    """Tell whether the running processor's rows are of several attention groups, each with requests of its own.

    It gathers the rows of all groups before the head (`do_tensor_parallel_all_gather_dp_attn`), or each group has a
    head of its own (`use_attn_tp_group`). None if it says neither.
    """
    said = [getattr(processor, name, None) for name in ("do_tensor_parallel_all_gather_dp_attn", "use_attn_tp_group")]
    return None if said == [None, None] else any(said)


def describe_head(processor: Any, head: Any) -> dict[str, Any]:
    """Tell whether the head is a plain product, and what is applied to it."""
    method = getattr(head, "quant_method", None)
    name = None if method is None else type(method).__name__
    weight = getattr(head, "weight", None)
    plain = name in _PLAIN_METHODS and isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point()
    return {
        "plain": bool(plain and weight is not None and weight.dtype.itemsize > 1),
        "kind": f"{type(head).__name__}, {name or 'no quantization method'}",
        "scale": getattr(processor, "logit_scale", None) or 1.0,
        "softcap": getattr(processor, "final_logit_softcapping", None) or None,
    }


def head_part(head: Any, rank: int) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
    """Return this rank's rows of the head without padding, and which of the vocabulary they are.

    A head that is not sharded is written by rank 0 alone.
    """
    shard = getattr(head, "shard_indices", None)
    if shard is None:
        if rank != 0:
            return None, {}
        start, stop = 0, int(head.weight.shape[0])
    else:
        start, stop = int(shard.org_vocab_start_index), int(shard.org_vocab_end_index)
    tensors = {"weight": head.weight.detach()[: stop - start]}
    bias = getattr(head, "bias", None)
    if isinstance(bias, Tensor):
        tensors["bias"] = bias.detach()[: stop - start]
    return tensors, {"start": str(start), "stop": str(stop)}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)

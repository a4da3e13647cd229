"""Known issues of models, engines and machines, and what to do about each.

They are those that the original evaluation ran into, as far as they concern this package: what its hook and its
figures have solved is said too, because the old remedies are in circulation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What about a machine decides whether an issue applies.

    Attributes:
        capabilities: the CUDA compute capability of each GPU, such as `12.0`.
        environment: its environment variables.

    """

    capabilities: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """One known issue.

    Attributes:
        name: a few words.
        applies: tells from a model's config and the machine whether it applies.
        what: what happens.
        fix: what to do.
        harmless: whether nothing needs to be done.

    """

    name: str
    applies: Callable[[Mapping[str, Any], Machine], bool]
    what: str
    fix: str
    harmless: bool = False


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("quantization_config") or _text(config).get("quantization_config")
    return found if isinstance(found, Mapping) else {}


def _has_linear_attention(config: Mapping[str, Any], _: Machine) -> bool:
    text = _text(config)
    kinds = text.get("layer_types")
    listed = isinstance(kinds, list) and "linear_attention" in kinds
    return listed or "linear_num_key_heads" in text


def _is_vision_language(config: Mapping[str, Any], _: Machine) -> bool:
    classes = config.get("architectures")
    listed = classes if isinstance(classes, list) else ()
    return "vision_config" in config or any(str(name).endswith("ForConditionalGeneration") for name in listed)


def _has_awq_experts_left_out(config: Mapping[str, Any], _: Machine) -> bool:
    quantization, text = _quantization(config), _text(config)
    experts = any(text.get(name) for name in ("num_experts", "n_routed_experts", "num_local_experts"))
    return bool(
        "awq" in str(quantization.get("quant_method")) and quantization.get("modules_to_not_convert") and experts
    )


def _needs_triton(config: Mapping[str, Any], machine: Machine) -> bool:
    return _has_linear_attention(config, machine) and any(cap.startswith("12.") for cap in machine.capabilities)


def _has_compressed_linear_attention(config: Mapping[str, Any], machine: Machine) -> bool:
    method = str(_quantization(config).get("quant_method")).replace("_", "-")
    return method == "compressed-tensors" and _has_linear_attention(config, machine)


def _has_speculative_head(config: Mapping[str, Any], _: Machine) -> bool:
    return any(_text(config).get(name) for name in ("mtp_num_hidden_layers", "num_nextn_predict_layers"))


def _is_minimax_nvfp4(config: Mapping[str, Any], _: Machine) -> bool:
    quantization = _quantization(config)
    words = f"{quantization.get('quant_method')} {quantization.get('quant_algo')}".lower()
    return "minimax" in str(config.get("model_type")).lower() and ("fp4" in words or "modelopt" in words)


ISSUES = (
    Issue(
        name="vision-language vocabulary",
        applies=_is_vision_language,
        what="a checkpoint in a vision-language format has more columns than the text-only model",
        fix="nothing to set (SGLANG_KLD_VOCAB_SIZE is not needed): figures cover the columns that both sides have, and "
        "--kld-max-cut-mass bounds the probability of the others",
        harmless=True,
    ),
    Issue(
        name="AWQ with experts that are not quantized",
        applies=_has_awq_experts_left_out,
        what="SGLang without pull request 20439 fails to load it: KeyError 'model.layers.0.mlp.experts.w13_weight'",
        fix="use an SGLang that has pull request 20439",
    ),
    Issue(
        name="hybrid attention on Blackwell (SM120)",
        applies=_needs_triton,
        what="SGLang ends with an AssertionError in its default attention backend",
        fix='give both sides `--attention-backend triton`: --kld-ref-args="--attention-backend triton" '
        '--kld-candidate-args="--attention-backend triton"',
    ),
    Issue(
        name="compressed-tensors with linear attention",
        applies=_has_compressed_linear_attention,
        what="SGLang does not load the weights of its linear_attn layers, and every logit is NaN",
        fix="try vLLM (--kld-engine=vllm), or gate a checkpoint in another format; in SGLang the gate is an error and "
        "never a pass",
    ),
    Issue(
        name="speculative head (MTP)",
        applies=_has_speculative_head,
        what="the original capture patch once saved the draft head's logits too, which raised the mean KLD by 18 %",
        fix="nothing to set: draft passes never reach a capture. Of old captures with two files per window, "
        "`pytest-kld import-logprobs` takes the even-numbered ones",
        harmless=True,
    ),
    Issue(
        name="NaN in MiniMax NVFP4",
        applies=_is_minimax_nvfp4,
        what="MiniMax-M2.5-NVFP4 gave NaN at 8 % of the positions",
        fix="one NaN fails a gate; --kld-max-nan=N allows N, and the figures cover the other positions",
    ),
    Issue(
        name="the original capture patch is active",
        applies=lambda _, machine: "SGLANG_KLD_SAVE_DIR" in machine.environment,
        what="SGLANG_KLD_SAVE_DIR is set, so a patched SGLang also writes over 100 GB of log-probabilities there",
        fix="unset SGLANG_KLD_SAVE_DIR",
    ),
)
"""Every known issue."""


def issues_of(config: Mapping[str, Any], machine: Machine) -> list[Issue]:
    """Return the issues that apply to a model on a machine.

    Args:
        config: the contents of the model's `config.json`; empty for issues of the machine alone.
        machine: the machine.

    """
    return [issue for issue in ISSUES if issue.applies(config, machine)]

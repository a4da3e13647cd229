"""Each fault is made for real, in a tiny model, and must be named; healthy quantization must not."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from pairs import log_probs_of, scores_of
from transformers import AutoModelForCausalLM, PhiConfig

from pytest_kld.diagnosis.patterns import PATTERNS, Pattern, find_patterns
from pytest_kld.figures.positions import Positions
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.tokens import Tokens
from pytest_kld.text.windows import Windows, cut_windows

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    Find = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def text_windows(tokenizer: PreTrainedTokenizerFast) -> Windows:
    return cut_windows(load_corpus("python-docs", Path()), tokenizer, count=16, size=64, stride=32, label="tiny")


@pytest.fixture(scope="module")
def reference(reference_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(reference_dir)


@pytest.fixture
def find(tmp_path: Path, text_windows: Windows, tokenizer: PreTrainedTokenizerFast) -> Find:
    """Return a function that compares two models and gives the evidence by the names of the patterns."""

    def run(reference: Any, candidate: Any, windows: Windows = text_windows) -> dict[str, str]:
        sides = (
            side if isinstance(side, torch.Tensor) else log_probs_of(side, windows) for side in (reference, candidate)
        )
        scores = scores_of(tmp_path, windows, *sides)
        return evidence_by_name(find_patterns(Positions.of(scores), Tokens.of(tokenizer)))

    return run


def evidence_by_name(patterns: list[Pattern]) -> dict[str, str]:
    assert all(pattern["explanation"] == PATTERNS[pattern["name"]] for pattern in patterns)
    return {pattern["name"]: pattern["evidence"] for pattern in patterns}


def build(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def damaged(model: Any, damage: Callable[[Any], None]) -> Any:
    candidate = copy.deepcopy(model)
    with torch.no_grad():
        damage(candidate)
    return candidate


def add_noise(model: Any, size: float) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * parameter.std(), alpha=size)


def round_to_bits(model: Any, bits: int) -> None:
    """Quantize each row of each linear layer but the head to a symmetric integer grid, and back."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "head" not in name:
            step = module.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            module.weight.copy_((module.weight / step).round() * step)


@torch.no_grad()
def stepwise(model: Any, windows: Windows) -> torch.Tensor:
    """Run a model token by token, so that what comes later cannot touch what comes before.

    In one pass over a window it can: a masked NaN is multiplied by an attention of 0, and that is NaN.
    """
    ids, cache, steps = torch.from_numpy(windows.token_ids).long(), None, []
    for step in range(windows.size):
        output = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    return torch.cat(steps, 1).float().log_softmax(-1)


@pytest.mark.parametrize("bits", [8, 6])
def test_healthy_quantization_shows_no_pattern(find: Find, reference: Any, bits: int) -> None:
    assert find(reference, damaged(reference, lambda model: round_to_bits(model, bits))) == {}


def test_the_same_model_twice_is_identical_and_nothing_else(find: Find, reference: Any) -> None:
    assert find(reference, copy.deepcopy(reference)) == {"identical": "KL is exactly 0 at each of 1,024 positions"}


def test_another_model_is_implausible(find: Find, reference: Any) -> None:
    found = find(reference, damaged(reference, lambda model: add_noise(model, 2.0)))
    assert "top-1 agreement is" in found["implausible"]
    assert not {"off-by-one", "permuted-vocabulary", "wrong-scale", "identical"} & set(found)


def test_much_noise_on_all_weights_is_uniform(find: Find, reference: Any) -> None:
    assert list(find(reference, damaged(reference, lambda model: add_noise(model, 0.1)))) == ["uniform-noise"]


def test_nan_from_a_position_on_is_named_with_the_position(find: Find, reference: Any, text_windows: Windows) -> None:
    log_probs = log_probs_of(reference, text_windows)
    overflown = log_probs.clone()
    overflown[:, 40:] = torch.nan
    found = find(log_probs, overflown)["nan-onward"]
    assert (
        found == "the candidate is not finite in 16 of 16 windows, from one position to the end, each from position 40"
    )


def test_a_nan_in_a_token_embedding_is_named_with_the_token(
    find: Find, reference: Any, text_windows: Windows, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids, counts = np.unique(text_windows.token_ids[:, 1:], return_counts=True)
    token = int(ids[np.flatnonzero((counts > 5) & ~np.isin(ids, text_windows.token_ids[:, 0]))[0]])

    def damage(candidate: Any) -> None:
        candidate.get_input_embeddings().weight[token] = torch.nan

    sides = (stepwise(side, text_windows) for side in (reference, damaged(reference, damage)))
    found = find(*sides)["nan-onward"]
    assert found.endswith(f"each from token id {token:,} ({tokenizer.decode([token])!r})")


def test_nan_in_the_midst_of_windows_is_not_onward(find: Find, reference: Any, text_windows: Windows) -> None:
    log_probs = log_probs_of(reference, text_windows)
    holed = log_probs.clone()
    holed[:, 20] = torch.nan
    assert "nan-onward" not in find(log_probs, holed)


def test_rows_shifted_by_one_are_named_with_their_direction(find: Find, reference: Any, text_windows: Windows) -> None:
    log_probs = log_probs_of(reference, text_windows)
    found = find(log_probs, log_probs.roll(1, dims=1))
    assert "first choice is the reference's at the position before in" in found["off-by-one"]
    assert "permuted-vocabulary" not in found


def test_rolled_token_ids_are_rows_of_the_neighbour(find: Find, reference: Any, text_windows: Windows) -> None:
    rolled = torch.from_numpy(np.roll(text_windows.token_ids, -1, axis=1)).long()
    with torch.no_grad():
        candidate = reference(rolled).logits.log_softmax(-1)
    assert "at the position after in" in find(log_probs_of(reference, text_windows), candidate)["off-by-one"]


def test_rolled_rows_of_the_head_are_a_permutation_by_one(find: Find, reference: Any) -> None:
    def damage(candidate: Any) -> None:
        candidate.lm_head.weight.copy_(candidate.lm_head.weight.roll(1, dims=0))

    found = find(reference, damaged(reference, damage))
    assert found["permuted-vocabulary"].endswith("have another id, 1 higher")
    assert "off-by-one" not in found


def test_shuffled_rows_of_a_noisy_head_are_a_permutation(find: Find, reference: Any) -> None:
    shuffled = torch.randperm(1024, generator=torch.Generator().manual_seed(0))

    def damage(candidate: Any) -> None:
        add_noise(candidate, 0.005)
        candidate.lm_head.weight.copy_(candidate.lm_head.weight[shuffled])

    assert ", such as" in find(reference, damaged(reference, damage))["permuted-vocabulary"]


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_a_scaled_head_is_named_with_its_factor(find: Find, reference: Any, factor: float) -> None:
    found = find(reference, damaged(reference, lambda model: model.lm_head.weight.mul_(factor)))
    assert list(found) == ["wrong-scale"]
    assert f"logits are {factor} times the reference's" in found["wrong-scale"]


def test_a_bias_on_special_tokens_is_a_constant_shift(
    tmp_path: Path, text_windows: Windows, tokenizer: PreTrainedTokenizerFast
) -> None:
    special = copy.deepcopy(tokenizer)
    special.add_special_tokens({"additional_special_tokens": [f"<|special {number}|>" for number in range(6)]})
    ids = sorted(special.added_tokens_decoder)
    model = build(
        PhiConfig(vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )

    def damage(candidate: Any) -> None:
        add_noise(candidate, 0.005)
        candidate.lm_head.bias[ids] += 4

    sides = (log_probs_of(side, text_windows) for side in (model, damaged(model, damage)))
    scores = scores_of(tmp_path, text_windows, *sides)
    found = evidence_by_name(find_patterns(Positions.of(scores), Tokens.of(special)))
    assert found["shifted-tokens"].startswith("6 tokens are off by a constant, 6 of them special; id ")
    unnamed = evidence_by_name(find_patterns(Positions.of(scores), None))
    assert unnamed["shifted-tokens"].startswith("6 tokens are off by a constant; id 1,00")


def test_broken_embeddings_of_rare_tokens_are_a_broken_stretch(find: Find, reference: Any) -> None:
    random = np.random.default_rng(0)
    text = random.integers(0, 500, 1024)
    text[208:256] = random.integers(600, 700, 48)  # tokens that occur nowhere else
    starts = np.arange(0, 961, 16)
    windows = Windows(
        token_ids=text[starts[:, None] + np.arange(64)].astype(np.int32),
        starts=starts,
        stride=16,
        dataset="made",
        text_sha256="",
        tokenizer="tiny",
        bos=None,
    )

    def damage(candidate: Any) -> None:
        add_noise(candidate, 0.005)
        candidate.get_input_embeddings().weight[600:700] *= -3

    found = find(reference, damaged(reference, damage), windows)
    start, stop = map(int, re.match(r"tokens (\d+) to (\d+): median KL", found["broken-stretch"]).groups())
    assert 208 <= start < stop <= 256

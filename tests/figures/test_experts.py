"""Tokens per expert, rare experts and changed routes of two models, against counts made here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import TINY
from recorded import record
from transformers import Qwen3MoeConfig

from pytest_kld.collecting.kld import KLD
from pytest_kld.figures.compare import compare
from pytest_kld.figures.experts import FEW, _rare, experts_seen
from pytest_kld.figures.scores import Scores, Summary
from pytest_kld.progress import Silent
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import Subject
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import cut_windows, join_windows, load_tokenizer

if TYPE_CHECKING:
    from conftest import MakeModel

    from pytest_kld.captures.capture import Capture
    from pytest_kld.text.windows import Windows

EXPERTS = 160
MOE = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "tie_word_embeddings": False}


def sharp(network: Any) -> Any:
    """Sharpen the routers: some experts are rare then."""
    with torch.no_grad():
        for name, module in network.named_modules():
            if name.endswith("mlp.gate"):
                module.weight.mul_(50)
    return network


def noisy(network: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in sharp(network).parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.001)
    return network


def compared(reference: Capture, candidate: Capture, windows: Windows) -> Scores:
    return compare(reference, candidate, windows, head="exact", device=torch.device("cpu"), progress=Silent())


def seen_in(scores: Scores) -> Any:
    return experts_seen(scores.evidence, scores.columns["kl"])


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    return make_model("experts", Qwen3MoeConfig(**TINY, **MOE))


@pytest.fixture(scope="module")
def long_windows(model: Path) -> Windows:
    """Twelve windows of 64 tokens."""
    loaded = load_tokenizer(ModelSpec.parse(str(model), Path()), trust_remote_code=False)
    return cut_windows(load_corpus("python-docs", Path()), loaded, count=12, size=64, stride=64, label="m")


@pytest.fixture(scope="module")
def pair(model: Path, long_windows: Windows, tmp_path_factory: pytest.TempPathFactory) -> tuple[Capture, Capture]:
    return tuple(record(model, long_windows, tmp_path_factory.mktemp("cache"), alter=alter) for alter in (sharp, noisy))


def all_routes(capture: Capture) -> np.ndarray[Any, Any]:
    return np.stack([capture.routes(window).numpy() for window in range(capture.windows)])


def counts_of(capture: Capture) -> np.ndarray[Any, Any]:
    """Return [layers, experts], counted one expert at a time."""
    routes = all_routes(capture)
    return np.array(
        [[(routes[:, :, layer] == expert).sum() for expert in range(EXPERTS)] for layer in range(routes.shape[2])]
    )


def test_experts_are_counted_as_met_hardly_met_and_never_met(
    pair: tuple[Capture, Capture], long_windows: Windows
) -> None:
    seen = seen_in(compared(*pair, long_windows))
    assert seen is not None
    for side, capture in zip(("reference", "candidate"), pair, strict=True):
        counts = counts_of(capture)
        assert (counts == 0).any()
        told = seen[side]
        assert told["experts"] == counts.size
        assert told["per_token"] == 2
        assert told["never"] == (counts == 0).sum()
        assert told["few"] == ((counts > 0) & (counts < FEW)).sum()
        assert told["least"] == counts[counts > 0].min()
        assert [layer["never"] for layer in told["layers"]] == [np.flatnonzero(row == 0).tolist() for row in counts]


def test_changed_routes_are_positions_with_another_set_of_experts(
    pair: tuple[Capture, Capture], long_windows: Windows
) -> None:
    seen = seen_in(compared(*pair, long_windows))
    ours, theirs = (all_routes(capture) for capture in pair)
    for layer in range(ours.shape[2]):
        differ = [
            set(a) != set(b)
            for a, b in zip(ours[:, :, layer].reshape(-1, 2), theirs[:, :, layer].reshape(-1, 2), strict=True)
        ]
        assert 0 < np.mean(differ) < 1
        assert seen["candidate"]["layers"][layer]["changed"] == pytest.approx(np.mean(differ))
    assert seen["changed"] == pytest.approx(np.mean([layer["changed"] for layer in seen["candidate"]["layers"]]))


def test_rare_positions_are_at_least_a_twentieth_whose_route_meets_the_least_used_experts(
    pair: tuple[Capture, Capture], long_windows: Windows
) -> None:
    scores = compared(*pair, long_windows)
    counts, routes = counts_of(pair[1]), all_routes(pair[1])
    rarest = np.array(
        [
            [min(counts[layer, expert] for layer, ids in enumerate(row) for expert in ids) for row in window]
            for window in routes
        ]
    )
    rare = seen_in(scores)["rare"]
    chosen = rarest <= rare["most_tokens"]
    assert chosen.mean() >= 0.05
    assert (rarest < rare["most_tokens"]).mean() < 0.05
    assert rare["positions"] == chosen.sum()
    assert rare["mean_kl"] == pytest.approx(scores.columns["kl"][chosen].mean())
    assert rare["other_mean_kl"] == pytest.approx(scores.columns["kl"][~chosen].mean())
    assert Summary.of(scores).rare_expert_kl == rare["mean_kl"]


def test_skipped_positions_count_as_run_but_not_in_the_kl_of_rare_experts(
    pair: tuple[Capture, Capture], long_windows: Windows
) -> None:
    scores = compared(*pair, long_windows)
    whole, later = (seen_in(table) for table in (scores, scores.without_first(40)))
    assert whole["candidate"] == later["candidate"]
    rarest = scores.evidence["experts.rarest"][:, 40:]
    chosen = rarest <= later["rare"]["most_tokens"]
    assert later["rare"]["mean_kl"] == pytest.approx(scores.columns["kl"][:, 40:][chosen].mean())


def test_each_dataset_has_its_own_experts(model: Path, long_windows: Windows, tmp_path: Path) -> None:
    parts = [
        replace(long_windows, token_ids=long_windows.token_ids[rows], starts=long_windows.starts[rows], dataset=name)
        for name, rows in (("first", slice(0, 2)), ("second", slice(2, 12)))
    ]
    windows = join_windows(parts)
    capture = record(model, windows, tmp_path, alter=sharp)
    scores = compared(capture, capture, windows)
    routes = all_routes(capture)
    tables = scores.by_dataset()
    for name, rows in (("first", slice(0, 2)), ("second", slice(2, 12))):
        met = sum(len(np.unique(routes[rows, :, layer])) for layer in range(routes.shape[2]))
        assert Summary.of(tables[name]).experts_seen == pytest.approx(met / (routes.shape[2] * EXPERTS))
    assert Summary.of(tables["first"]).experts_seen < Summary.of(scores).experts_seen


def test_scores_keep_what_they_saw_of_the_experts(
    pair: tuple[Capture, Capture], long_windows: Windows, tmp_path: Path
) -> None:
    scores = compared(*pair, long_windows)
    scores.save(tmp_path / "scores.safetensors")
    assert seen_in(Scores.load(tmp_path / "scores.safetensors")) == seen_in(scores)


def test_a_poisoned_expert_is_unseen_until_a_text_reaches_it(
    model: Path, long_windows: Windows, pair: tuple[Capture, Capture], tmp_path: Path
) -> None:
    """An expert with NaN weights passes with a note, fails a limit on experts met, and fails by NaN once it is met."""
    short = long_windows.first(2)
    routes = all_routes(pair[0])
    layer, expert = next(
        (layer, expert)
        for layer in range(routes.shape[2])
        for expert in range(EXPERTS)
        if (routes[:, :, layer] == expert).any() and not (routes[:2, :, layer] == expert).any()
    )

    def poisoned(network: Any) -> Any:
        with torch.no_grad():
            sharp(network).model.layers[layer].mlp.experts.down_proj[expert] = torch.nan
        return network

    def gate(windows: Windows, **bounds: float) -> KLD:
        captures = [
            record(model, windows, tmp_path / f"{alter.__name__}-{windows.count}", alter=alter)
            for alter in (sharp, poisoned)
        ]
        subjects = [Subject(name=name) for name in ("reference", "candidate")]
        return KLD(
            reference=subjects[0],
            candidate=subjects[1],
            bounds={"max_nan": 0, **bounds},
            scores=compared(*captures, windows),
        )

    unseen = gate(short)
    assert unseen.verdict().passed
    assert unseen.summary.max == 0
    assert expert in seen_in(unseen.scores)["candidate"]["layers"][layer]["never"]
    failed = [check for check in gate(short, min_experts_seen=1).verdict().checks if not check.passed]
    assert [check.limit.name for check in failed] == ["min_experts_seen"]
    reached = gate(long_windows)
    assert not reached.verdict().passed
    assert reached.nan_count > 0


def test_the_least_used_twentieth_is_exactly_that_without_ties() -> None:
    kl = np.arange(40.0).reshape(2, 20)
    rare = _rare({"rarest": np.arange(40).reshape(2, 20) + 1}, kl)
    assert rare == {"most_tokens": 2, "positions": 2, "mean_kl": 0.5, "other_mean_kl": np.arange(2, 40).mean()}

"""On the same logits, the figures of docs/llama-cpp.md match llama.cpp's definitions."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pytest_kld.figures.scores import Scores, Summary
from pytest_kld.kernel.divergence import divergence
from pytest_kld.text.windows import Windows

DOCUMENT = (Path(__file__).parent.parent / "docs" / "llama-cpp.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(.+?)` \| .+? \| (.+?) \| `(.+?)` \|$", DOCUMENT, re.MULTILINE)
Array = NDArray[np.float64]


@pytest.fixture
def saved_logits(reference_dir: Path, candidate_dir: Path, windows: Windows, tmp_path: Path) -> Path:
    """The logits of two models at every position of the windows, in a file."""
    logits = {}
    for name, path in {"reference": reference_dir, "candidate": candidate_dir}.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.inference_mode():
            logits[name] = model(torch.from_numpy(windows.token_ids).long()).logits.clone()
    save_file(logits, tmp_path / "logits.safetensors")
    return tmp_path / "logits.safetensors"


@pytest.fixture
def scores(saved_logits: Path, windows: Windows) -> Scores:
    """Our scores of those logits, at the positions that llama.cpp scores (and the last of each window)."""
    logits = load_file(saved_logits)
    labels = torch.from_numpy(np.append(windows.token_ids[:, 1:], np.full((windows.count, 1), -1), 1))
    figures = divergence(logits["reference"].flatten(0, 1), logits["candidate"].flatten(0, 1), labels.flatten())
    shape = (windows.count, windows.size)
    columns = {name: getattr(figures, name).numpy().reshape(shape) for name in type(figures).__slots__}
    whole = Scores(columns={**columns, "token_ids": windows.token_ids}, about={"protocol": windows.protocol()})
    return whole.without_first(windows.size // 2)


def log_softmax(z: Array) -> Array:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def moments(values: Array) -> tuple[float, float]:
    """Return the mean and its error from the sums of values and of squares."""
    n, total, squares = len(values), sum(values), sum(value * value for value in values)
    return total / n, math.sqrt((squares / n - (total / n) ** 2) / (n - 1))


def quantiles(of: str, values: Array, shares: tuple[float, ...], scale: float) -> dict[str, float]:
    ordered = sorted(values)
    figures = {f"Maximum {of}": ordered[-1], f"Minimum {of}": ordered[0]}
    for share in shares:
        rank = share * (len(ordered) - 1)
        below, above = ordered[math.floor(rank)], ordered[math.ceil(rank)]
        figures[f"{100 * share:.1f}% {of}"] = below + (rank - math.floor(rank)) * (above - below)
    middle = len(ordered) // 2
    figures[f"Median {of}"] = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {name: scale * value for name, value in figures.items()}


def llama_cpp(log_p: Array, log_q: Array, labels: NDArray[np.int64]) -> dict[str, float]:
    """Compute what llama.cpp prints from the log-probabilities [positions, vocabulary] of base and Q."""
    n = len(labels)
    kld = np.array([sum(np.exp(p) * (p - q)) for p, q in zip(log_p, log_q, strict=True)])
    base, q = -log_p[np.arange(n), labels], -log_q[np.arange(n), labels]
    ln_base, ln_base_error = moments(base)
    ln_q, ln_q_error = moments(q)
    covariance = (sum(base * q) / n - ln_base * ln_q) / (n - 1)
    ln_ratio_error = math.sqrt(ln_q_error**2 + ln_base_error**2 - 2 * covariance)
    ppl_q, ppl_base = math.exp(ln_q), math.exp(ln_base)
    delta = np.exp(-q) - np.exp(-base)
    square, square_error = moments(delta**2)
    same = sum(log_p.argmax(-1) == log_q.argmax(-1)) / n
    return {
        "Mean PPL(Q)": ppl_q,
        "Mean PPL(Q) ±": ppl_q * ln_q_error,
        "Mean PPL(base)": ppl_base,
        "Mean PPL(base) ±": ppl_base * ln_base_error,
        "Cor(ln(PPL(Q)), ln(PPL(base)))": 100 * covariance / (ln_q_error * ln_base_error),
        "Mean ln(PPL(Q)/PPL(base))": ln_q - ln_base,
        "Mean ln(PPL(Q)/PPL(base)) ±": ln_ratio_error,
        "Mean PPL(Q)/PPL(base)": math.exp(ln_q - ln_base),
        "Mean PPL(Q)/PPL(base) ±": math.exp(ln_q - ln_base) * ln_ratio_error,
        "Mean PPL(Q)-PPL(base)": ppl_q - ppl_base,
        "Mean PPL(Q)-PPL(base) ±": math.sqrt(
            (ppl_q * ln_q_error) ** 2 + (ppl_base * ln_base_error) ** 2 - 2 * ppl_q * ppl_base * covariance
        ),
        "Mean KLD": moments(kld)[0],
        "Mean KLD ±": moments(kld)[1],
        **quantiles("KLD", kld, (0.999, 0.99, 0.95, 0.9, 0.1, 0.05, 0.01, 0.001), 1),
        "Mean Δp": 100 * moments(delta)[0],
        "Mean Δp ±": 100 * moments(delta)[1],
        **quantiles("Δp", delta, (0.999, 0.99, 0.95, 0.9, 0.75, 0.25, 0.1, 0.05, 0.01, 0.001), 100),
        "RMS Δp": 100 * math.sqrt(square),
        "RMS Δp ±": 100 * square_error / (2 * math.sqrt(square)),
        "Same top p": 100 * same,
        "Same top p ±": 100 * math.sqrt(same * (1 - same) / (n - 1)),
    }


def scored(saved_logits: Path, windows: Windows) -> tuple[Array, Array, NDArray[np.int64]]:
    """Return base, Q and labels at the positions that llama.cpp scores: the second half but the last."""
    logits = {name: log_softmax(value.double().numpy()) for name, value in load_file(saved_logits).items()}
    first = windows.size // 2
    log_p, log_q = (
        logits[name][:, first:-1].reshape(-1, logits[name].shape[-1]) for name in ("reference", "candidate")
    )
    return log_p, log_q, windows.token_ids[:, first + 1 :].reshape(-1).astype(np.int64)


def documented(scores: Scores) -> dict[str, Any]:
    """Run the document's code and return its names."""
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"scores": scores}
    exec(code, names)  # the document's own, which is under test
    return names


def test_each_figure_that_llama_cpp_prints_is_reproduced(saved_logits: Path, scores: Scores, windows: Windows) -> None:
    expected = llama_cpp(*scored(saved_logits, windows))
    assert {name for name, _, _ in ROWS} == set(expected)
    names = documented(scores)
    for name, _, expression in ROWS:
        value = float(eval(expression, names))  # the document's own, which is under test
        assert value == pytest.approx(expected[name], rel=2e-5, abs=1e-9), name


def test_a_figure_of_the_summary_beside_llama_cpps_is_the_same_figure(scores: Scores) -> None:
    labelled = Scores(columns={name: column[:, :-1] for name, column in scores.columns.items()}, about=scores.about)
    figures, names = Summary.of(labelled).to_json(), documented(labelled)
    compared = 0
    for name, ours, expression in ROWS:
        if (match := re.match(r"`(\w+)`( \(a fraction\))?$", ours)) is not None:
            scale = 100 if match[2] else 1
            assert scale * figures[match[1]] == pytest.approx(float(eval(expression, names)), rel=1e-12), name
            compared += 1
    assert compared == 13


def sixteen_bit(log_p: Array) -> Array:
    """Return log-probabilities as llama.cpp stores them: rounded to 65,536 steps over at most 16 nats."""
    top = log_p.max(-1, keepdims=True)
    floor = np.maximum(log_p.min(-1, keepdims=True), top - 16)
    step = (top - floor) / 65535
    return floor + np.round(np.maximum(log_p - floor, 0) / step) * step


def test_the_sixteen_bit_store_leaves_a_floor_that_we_do_not_have(saved_logits: Path, windows: Windows) -> None:
    log_p, log_q, _ = scored(saved_logits, windows)
    stored = sixteen_bit(log_p)

    def kld(log_q: Array) -> Array:
        return (np.where(stored > -16, np.exp(stored), 0) * (stored - log_q)).sum(-1)

    itself = kld(log_p)
    assert itself.min() < 0
    assert 1e-8 < np.abs(itself).mean() < 2.5e-4
    assert kld(log_q).mean() == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), abs=2.5e-4)
    logits = load_file(saved_logits)["reference"][0]
    assert (divergence(logits, logits.clone(), torch.full((len(logits),), -1)).kl == 0).all()

"""Results of gates that nobody ran: random divergences through the real figures, limits and profiles."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from pytest_kld.figures.between import Between, Direction
from pytest_kld.figures.interval import Interval
from pytest_kld.figures.profile import profile_of
from pytest_kld.figures.scores import Scores, Summary
from pytest_kld.figures.uncertainty import intervals
from pytest_kld.gate.floor import Floor
from pytest_kld.gate.matrix import MatrixResult, check_to_json, judge_pair
from pytest_kld.gate.result import GateResult, checks_of
from pytest_kld.gate.verdict import judge
from pytest_kld.report.view import QUANTILES
from pytest_kld.subjects.subject import MOE_BACKEND, Subject
from pytest_kld.throughput.figures import FIGURES, median_of

WINDOWS, SIZE = 4, 32


def subject(name: str | Subject, backend: str | None = None) -> Subject:
    """Return a Subject that has only a name, and a MoE backend."""
    if isinstance(name, Subject):
        return name
    return Subject(name=name, axes={} if backend is None else {MOE_BACKEND: backend})


def made_result(
    candidate: str | Subject,
    scale: float = 0.01,
    bounds: dict[str, float] | None = None,
    confidence: float | None = None,
    size: int = SIZE,
    windows: int = WINDOWS,
    **changes: Any,
) -> GateResult:
    """Return a result whose KL is log-normal with a median of `scale` nats."""
    candidate = subject(candidate)
    random = np.random.default_rng(len(candidate.label))
    shape = (windows, size)
    nll = random.exponential(2, shape)
    argmax = random.integers(0, 100, shape)
    columns = {
        "kl": random.lognormal(np.log(scale), 1, shape),
        "reference_nll": nll,
        "candidate_nll": nll + random.normal(0, 0.05, shape),
        "reference_entropy": nll,
        "reference_confidence": np.exp(-nll),
        "reference_argmax": argmax,
        "candidate_argmax": np.where(random.random(shape) < 0.1, argmax + 1, argmax),
        "reference_cut_mass": np.zeros(shape),
        "candidate_cut_mass": np.zeros(shape),
        "token_ids": argmax,
        "flags": np.zeros(shape, np.uint8),
    }
    text = {"dataset": "a text", "windows": windows}
    protocol = {**text, "window_size": size, "stride": size // 2, "datasets": [text]}
    sides = {"reference": {"model": "reference"}, "candidate": {"model": candidate.label}}
    about = {**sides, "protocol": protocol, "versions": {"torch": "2"}}
    scores = Scores(columns=columns, about=about)
    figures = Summary.of(scores).to_json()
    sure = {} if confidence is None else intervals(scores, confidence)
    verdict = judge(figures, {"max_mean": 0.05, "max_nan": 0} if bounds is None else bounds, intervals=sure)
    result = GateResult(
        nodeid=f"kld::test_kld[{candidate.id}]",
        reference=Subject(name="reference"),
        candidate=candidate,
        outcome="passed" if verdict.passed else "failed",
        message="" if verdict.passed else verdict.explain(candidate.label, "reference", figures),
        figures=figures,
        intervals={name: interval.to_json() for name, interval in sure.items()},
        checks=checks_of(verdict),
        about=about,
        profile=profile_of(scores),
    )
    return replace(result, **changes)


def made_matrix(
    name: str = "x",
    backends: tuple[str, ...] = ("triton", "cutlass"),
    bound: float | None = None,
    confidence: float | None = None,
    **changes: Any,
) -> MatrixResult:
    """Return a matrix of the backends of a candidate whose means are powers of ten; see `made_mean`."""
    members = tuple(subject(name, backend) for backend in backends)
    pairs = []
    for one, other in combinations(range(len(members)), 2):
        forth, back = (_direction(*sides, confidence) for sides in ((one, other), (other, one)))
        difference = Interval(low=-0.25, high=0.5, confidence=confidence or 0.95, effective_positions=9.0)
        figures = {"disagreement": 0.125, "positions": 99, "not_finite": 0, "difference": 0.25}
        found = Between(forth=forth, back=back, difference_interval=difference, **figures)
        labels = members[one].label, members[other].label
        checks = () if bound is None else judge_pair(*labels, found, bound, windows={None: WINDOWS}, each_dataset=False)
        told = [check_to_json(check) for check in checks]
        pairs.append({"first": labels[0], "second": labels[1], **found.to_json(), "checks": told, "floor": None})
    about = {"protocol": {"dataset": "a text", "windows": WINDOWS}, "skip_first": 0, "head": "exact", "versions": {}}
    result = MatrixResult(
        nodeid=f"kld::test_kld_matrix[{name}]",
        suite=None,
        name=name,
        path="prefill",
        reference=Subject(name="reference"),
        members=members,
        pairs=tuple(pairs),
        outcome="passed",
        about=about,
    )
    if result.state == "fail":
        result = replace(result, outcome="failed", message=result.explain())
    return replace(result, **changes)


def made_mean(first: int, second: int) -> float:
    """Return the mean KL of the n-th member ‖ the m-th: 0.001 nats at a distance of 1, a hundredth more backwards."""
    return float(10 ** (abs(first - second) - 4) * (1.01 if first > second else 1))


def _direction(first: int, second: int, confidence: float | None) -> Direction:
    mean = made_mean(first, second)
    known = None
    if confidence is not None:
        known = Interval(low=mean / 2, high=mean * 2, confidence=confidence, effective_positions=9.0)
    return Direction(mean=mean, p99=mean * 4, max=mean * 8, interval=known)


def error_result(candidate: str | Subject, **changes: Any) -> GateResult:
    """Return the result of a candidate that was not measured."""
    candidate = subject(candidate)
    result = GateResult(
        nodeid=f"kld::test_kld[{candidate.id}]",
        reference=Subject(name="reference"),
        candidate=candidate,
        outcome="error",
        message="ServerError: the server died",
    )
    return replace(result, **changes)


def made_speed(output_tps: dict[int, list[float]], *, ttft: float = 10.0, device: str = "H100") -> dict[str, Any]:
    """Return a measurement of speed: rounds of output tokens/s by concurrency; all other figures are made up."""

    def figures(tps: float) -> dict[str, float]:
        return dict.fromkeys(FIGURES, 1.0) | {"output_tps": float(tps), "ttft": ttft, "failed": 0.0}

    cells = []
    for concurrency, values in output_tps.items():
        rounds = [figures(value) for value in values]
        medians = {name: median_of(rounds, name) for name in FIGURES}
        cells.append({"concurrency": concurrency, "requests": 4, "rounds": rounds, "figures": medians, "gauges": {}})
    return {
        "cells": cells,
        "settings": {"input_tokens": 32, "output_tokens": 8, "rounds": len(next(iter(output_tps.values())))},
        "server": {"own": False, "arguments": [], "added": ["--prefill-max-requests", "1"], "others": []},
        "devices": [{"name": device}],
        "tool": "a load generator",
    }


def with_floor(result: GateResult, share: float) -> GateResult:
    """Return a result whose two runs of each side differ by a share of its own figures."""
    assert result.figures is not None
    noise = {name: share * value for name, value in result.figures.items() if name in QUANTILES or name == "mean"}
    side = {**result.figures, **noise, "top1_agreement": 1.0}
    floor = Floor(reference=side, candidate=side)
    verdict = judge(result.figures, {check["limit"]: check["bound"] for check in result.checks}, floor=floor)
    return replace(result, checks=checks_of(verdict), floor=floor.to_json(result.figures, {}))


def made_diagnosis() -> dict[str, Any]:
    """Return a diagnosis as long as a real one: 32 worst positions, and a bucket for each kind of position."""
    top = [{"id": token, "text": " token", "p": 0.5 / (token + 1)} for token in range(5)]
    place = {
        "kl": 1.0,
        "delta_p": 0.1,
        "label": 5,
        "label_text": " five",
        "context": "the words that come before the label",
    }
    worst = [
        {**place, "window": at, "position": at, "source_position": at, "reference_top": top, "candidate_top": top}
        for at in range(32)
    ]
    return {
        "patterns": [],
        "top1pct_share": 0.1,
        "worst_positions": worst,
        "worst_windows": [{"window": at, "start": at, "mean_kl": 0.1, "max_kl": 1.0} for at in range(8)],
        "by_confidence": [{"low": at / 6, "high": (at + 1) / 6, "positions": 5, "mean_kl": 0.1} for at in range(6)],
        "by_position": [{"start": at, "stop": at + 1, "mean_kl": 0.1} for at in range(16)],
        "by_token_class": None,
        "vocabulary": [{"id": token, "text": "x", "contribution": 0.1} for token in range(12)],
    }


def many_results(count: int) -> list[GateResult]:
    """Return so many results, each of the standard protocol's size for a report: 100 windows of 2,048 tokens."""
    bounds = {"max_mean": 0.02, "max_p99": 0.6, "max_nan": 0, "min_top1": 0.5}
    return [
        made_result(
            f"org/variant-{number:03d}",
            0.01 * (1 + number / 100),
            bounds,
            size=2048,
            windows=100,
            diagnosis=made_diagnosis(),
        )
        for number in range(count)
    ]

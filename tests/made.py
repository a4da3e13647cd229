"""Results of gates that nobody ran: random divergences through the real figures, limits and profiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pytest_kld.figures.profile import profile_of
from pytest_kld.figures.scores import Scores, Summary
from pytest_kld.figures.uncertainty import intervals
from pytest_kld.gate.result import GateResult, checks_of
from pytest_kld.gate.verdict import judge
from pytest_kld.subjects.subject import MOE_BACKEND, Subject

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
    **changes: Any,
) -> GateResult:
    """Return a result whose KL is log-normal with a median of `scale` nats."""
    candidate = subject(candidate)
    random = np.random.default_rng(len(candidate.label))
    shape = (WINDOWS, size)
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
    text = {"dataset": "a text", "windows": WINDOWS}
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

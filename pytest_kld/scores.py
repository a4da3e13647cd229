"""Scores, the table of figures per position of one pair, and the Summary that is drawn from it.

Everything behind this point (limits, reports) needs the table alone: no model, no accelerator, no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pytest_kld.errors import ScoresError
from pytest_kld.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1
"""Version of the scores file; it is part of the cache key."""

COLUMNS = {
    "kl": np.float64,
    "reference_nll": np.float64,
    "candidate_nll": np.float64,
    "reference_entropy": np.float64,
    "reference_argmax": np.int32,
    "candidate_argmax": np.int32,
    "token_ids": np.int32,
    "flags": np.uint8,
}
"""The columns and their dtypes; each has shape [windows, positions]. See `divergence.Divergence`."""

_REFERENCE_NON_FINITE, _CANDIDATE_NON_FINITE, _NO_LABEL = 1, 2, 4  # as in divergence.py, which needs torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Figures for every position of every window of one pair.

    Attributes:
        columns: the arrays named in `COLUMNS`, each [windows, positions].
        about: what was compared and how: both captures, protocol, head, versions. Plain JSON.

    """

    columns: dict[str, NDArray[Any]]
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the table as one safetensors file, whole or not at all."""
        metadata = {
            "schema": str(SCHEMA),
            "about": json.dumps(self.about, sort_keys=True),
            "sha256": _digest(self.columns, self.about),
        }
        contents = save({name: np.ascontiguousarray(self.columns[name]) for name in COLUMNS}, metadata)
        write_atomically(path, contents)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read and verify a table.

        Raises:
            ScoresError: the file is truncated, altered, or of another schema.

        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                columns = {name: file.get_tensor(name) for name in COLUMNS}
            about = json.loads(metadata["about"])
            intact = metadata["schema"] == str(SCHEMA) and metadata["sha256"] == _digest(columns, about)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ScoresError(_corrupt(path)) from error
        if not intact:
            raise ScoresError(_corrupt(path))
        return cls(columns=columns, about=about)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of one pair. Divergences and entropies in nats, probabilities and shares in [0, 1].

    Means and quantiles are over the valid positions: those where both sides are finite. Quantiles interpolate
    linearly between order statistics (Hyndman & Fan type 7, numpy's default) and are exact at any size.

    Attributes:
        positions: positions in the table.
        coverage: share of them that are valid.
        mean: mean KL(reference ‖ candidate).
        median: its 50 % quantile; p90, p95, p99 and p999 likewise.
        max: its largest value.
        reference_nan_count: positions where the reference is not finite.
        candidate_nan_count: positions where the candidate is not finite.
        infinite_count: valid positions with KL = +inf.
        top1_agreement: share of valid positions where both name the same most probable token.
        reference_ppl: perplexity, exp(mean NLL), of the reference over valid positions with a label.
        candidate_ppl: the same of the candidate.
        ppl_ratio: candidate_ppl / reference_ppl.
        log_ppl_ratio: its natural logarithm.
        rms_delta_p: root mean square of p_candidate(label) − p_reference(label), as llama.cpp reports it.

    """

    positions: int
    coverage: float
    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float
    reference_nan_count: int
    candidate_nan_count: int
    infinite_count: int
    top1_agreement: float
    reference_ppl: float
    candidate_ppl: float
    ppl_ratio: float
    log_ppl_ratio: float
    rms_delta_p: float

    @classmethod
    def of(cls, scores: Scores) -> Summary:
        """Draw the figures from a table.

        Raises:
            ScoresError: there is not one position where both sides are finite.

        """
        columns = scores.columns
        flags = columns["flags"]
        reference_bad = (flags & _REFERENCE_NON_FINITE) != 0
        candidate_bad = (flags & _CANDIDATE_NON_FINITE) != 0
        valid = ~(reference_bad | candidate_bad)
        labelled = valid & ((flags & _NO_LABEL) == 0)
        if not labelled.any():
            raise ScoresError(
                f"no position that has a next token is finite on both sides: of {flags.size:,}, the reference is NaN "
                f"or infinite in {reference_bad.sum():,} and the candidate in {candidate_bad.sum():,}. Weights that "
                "did not load or overflow in the engine's dtype look like this; check the engine's log and --kld-dtype."
            )
        kl = np.sort(columns["kl"][valid])
        nll_r, nll_c = columns["reference_nll"][labelled], columns["candidate_nll"][labelled]
        # Python floats: where both give a label probability 0 their difference is NaN, and numpy would warn.
        log_ppl_ratio = float(nll_c.mean()) - float(nll_r.mean())
        return cls(
            positions=flags.size,
            coverage=float(valid.mean()),
            mean=float(kl.mean()),
            median=_quantile(kl, 0.5),
            p90=_quantile(kl, 0.9),
            p95=_quantile(kl, 0.95),
            p99=_quantile(kl, 0.99),
            p999=_quantile(kl, 0.999),
            max=float(kl[-1]),
            reference_nan_count=int(reference_bad.sum()),
            candidate_nan_count=int(candidate_bad.sum()),
            infinite_count=int(np.isinf(kl).sum()),
            top1_agreement=float((columns["reference_argmax"] == columns["candidate_argmax"])[valid].mean()),
            reference_ppl=_exp(float(nll_r.mean())),
            candidate_ppl=_exp(float(nll_c.mean())),
            ppl_ratio=_exp(log_ppl_ratio),
            log_ppl_ratio=log_ppl_ratio,
            rms_delta_p=float(np.sqrt(np.mean((np.exp(-nll_c) - np.exp(-nll_r)) ** 2))),
        )

    def to_json(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)


def _quantile(ordered: NDArray[np.float64], q: float) -> float:
    """Interpolate between order statistics; where the upper one is infinite and counts, so is the result."""
    rank = q * (ordered.size - 1)
    lower = math.floor(rank)
    share = rank - lower
    below = float(ordered[lower])
    if share == 0:
        return below
    above = float(ordered[lower + 1])
    return above if math.isinf(above) else below + share * (above - below)


def _exp(x: float) -> float:
    return math.inf if x > 709 else math.exp(x)


def _digest(columns: dict[str, NDArray[Any]], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, dtype in COLUMNS.items():
        digest.update(f"{name}{columns[name].shape}".encode())
        digest.update(np.ascontiguousarray(columns[name], dtype).tobytes())
    return digest.hexdigest()


def _corrupt(path: Path) -> str:
    return f"the scores file {path} is corrupt or of another version; delete it or pass --kld-refresh"

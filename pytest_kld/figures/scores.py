"""Scores, the table of figures per position of one pair, and the Summary that is computed from it.

All later stages (limits, reports) need only the table: no model, no accelerator, no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pytest_kld.errors import DamagedScoresError, ScoresError
from pytest_kld.figures.experts import expert_figures, routes_of_dataset
from pytest_kld.figures.table_shape import has_shape
from pytest_kld.files import atomic_path, sha256_of_json
from pytest_kld.subjects.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SCHEMA = 4
"""Version of the scores file; it is part of the cache key."""

COLUMNS = {
    "kl": np.float64,
    "reference_nll": np.float64,
    "candidate_nll": np.float64,
    "reference_entropy": np.float64,
    "reference_confidence": np.float64,
    "reference_argmax": np.int32,
    "candidate_argmax": np.int32,
    "reference_cut_mass": np.float64,
    "candidate_cut_mass": np.float64,
    "token_ids": np.int32,
    "flags": np.uint8,
}
"""The columns and their dtypes; each has shape [windows, positions]. See `divergence.Divergence`."""

EXTENDED_COLUMNS = ("reverse_kl", "js", "tv", "top5_overlap", "entropy_difference")
"""Further columns, float64, which a table has on request: all of them or none. See `extended.Extended`."""

GAP_COLUMNS = ("decode_gap", "reference_decode_gap")
"""Further columns, float64, of a table that was decoded beside a prefill of both sides: KL(prefill ‖ decode) of the
candidate and of the reference, in nats; NaN if one of the two is not finite. They are not saved: see `with_gaps`."""

CONFIDENT = 0.5
"""A position counts for flips if the reference gives its most probable token more than this: a majority."""

_EVIDENCE = "evidence."
"""Prefix of the evidence's arrays in the file."""
_COUNTS = ("positions", "skipped", "reference_nan_count", "candidate_nan_count", "infinite_count")
_REFERENCE_NON_FINITE, _CANDIDATE_NON_FINITE, _NO_LABEL = 1, 2, 4  # as in divergence.py, which needs torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Figures for every position of every window of one pair.

    Attributes:
        columns: the arrays named in `COLUMNS`, and those in `EXTENDED_COLUMNS` if they were computed; each
            [windows, positions].
        about: what was compared and how: both captures, protocol, head, versions. Plain JSON.
        evidence: further arrays for a diagnosis, see `evidence.gather_evidence`; empty if none were collected.

    """

    columns: dict[str, NDArray[Any]]
    about: dict[str, Any]
    evidence: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def extended(self) -> bool:
        """Whether the table has the extended columns."""
        return EXTENDED_COLUMNS[0] in self.columns

    @property
    def skipped(self) -> int:
        """Return the number of positions at the start of each window that the table omits."""
        return int(self.about.get("skip_first", 0))

    @property
    def first_position(self) -> int:
        """Return the position of the table's first column in its window."""
        return self._prompt_size + self.skipped

    @property
    def _prompt_size(self) -> int:
        """Return the number of positions that a prompt takes; they were not measured. 0 if nothing was decoded."""
        return int((self.about["protocol"].get("decoding") or {}).get("prompt_size", 0))

    def subject(self, side: str) -> Subject:
        """Return what was run on a side, `reference` or `candidate`, as far as the table tells.

        The name includes the values of the axes.
        """
        about = self.about[side]
        key = about.get("key") or {}
        return Subject(
            name=str(about["model"]),
            engine=str((key.get("engine") or {}).get("engine", "")),
            path=key.get("path", "prefill"),
        )

    @property
    def not_finite(self) -> int:
        """The number of positions at which a side is not finite."""
        return int(_flagged(self, _REFERENCE_NON_FINITE | _CANDIDATE_NON_FINITE).sum())

    @property
    def finite_on_one_side(self) -> int:
        """The number of positions at which one side is finite and the other is not."""
        return int((_flagged(self, _REFERENCE_NON_FINITE) != _flagged(self, _CANDIDATE_NON_FINITE)).sum())

    def without_first(self, positions: int) -> Scores:
        """Omit the first `positions` positions of each window, which have less context than the others.

        Positions of a prompt, which are not in the table, count.
        """
        positions = max(0, positions - self._prompt_size)
        columns = {name: column[:, positions:] for name, column in self.columns.items()}
        return replace(self, columns=columns, about={**self.about, "skip_first": self.skipped + positions})

    def with_gaps(self, candidate: Scores, reference: Scores) -> Scores:
        """Add how far decoding departs from prefill on each side.

        Args:
            candidate: the scores of the candidate's prefill (as reference) and its decoding (as candidate).
            reference: the same for the reference.

        """
        gaps = (candidate.columns["kl"], reference.columns["kl"])
        return replace(self, columns={**self.columns, **dict(zip(GAP_COLUMNS, gaps, strict=True))})

    def without_gaps(self) -> Scores:
        """Leave out what `with_gaps` added."""
        return replace(self, columns={name: one for name, one in self.columns.items() if name not in GAP_COLUMNS})

    def by_dataset(self) -> dict[str, Scores]:
        """Split a table of several datasets into one for each, of whose evidence `starts` and routes are kept."""
        tables, start = {}, 0
        for index, dataset in enumerate(self.about["protocol"]["datasets"]):
            rows = slice(start, start := start + dataset["windows"])
            columns = {name: column[rows] for name, column in self.columns.items()}
            protocol = {**self.about["protocol"], **dataset, "datasets": [dataset]}
            tables[dataset["dataset"]] = Scores(
                columns=columns,
                about={**self.about, "protocol": protocol},
                evidence={
                    **({"starts": self.evidence["starts"][rows]} if "starts" in self.evidence else {}),
                    **routes_of_dataset(self.evidence, index, rows),
                },
            )
        return tables

    def save(self, path: Path, key: Mapping[str, Any] | None = None) -> None:
        """Write the table as one safetensors file, completely or not at all.

        Args:
            path: the file.
            key: what determines the scores, see `compare.scores_key`; stored in the file, and checked by `load`.

        """
        saved_key = _digest_of_key(key)
        metadata = {
            "schema": str(SCHEMA),
            "key": saved_key,
            "about": json.dumps(self.about, sort_keys=True),
            "sha256": _digest(self._arrays(), self.about, saved_key),
        }
        contents = save({name: np.ascontiguousarray(array) for name, array in self._arrays().items()}, metadata)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            file.writelines(_in_order(contents))

    @classmethod
    def load(cls, path: Path, key: Mapping[str, Any] | None = None) -> Scores:
        """Read and verify a table.

        Args:
            path: the file.
            key: the key that the scores must have, see `save`; None accepts any scores.

        Raises:
            DamagedScoresError: the file is truncated or modified, or has another schema or key.

        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                extended = EXTENDED_COLUMNS if EXTENDED_COLUMNS[0] in file.keys() else ()  # noqa: SIM118 (no mapping)
                columns = {name: file.get_tensor(name) for name in (*COLUMNS, *extended)}
                kept = [name for name in file.keys() if name.startswith(_EVIDENCE)]  # noqa: SIM118 (no mapping)
                evidence = {name.removeprefix(_EVIDENCE): file.get_tensor(name) for name in kept}
            scores = cls(columns=columns, about=json.loads(metadata["about"]), evidence=evidence)
            digest = _digest(scores._arrays(), scores.about, metadata["key"])
            intact = metadata["schema"] == str(SCHEMA) and metadata["sha256"] == digest
            intact = intact and has_shape(columns, scores.about, COLUMNS, evidence)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedScoresError(_corrupt(path)) from error
        if not intact:
            raise DamagedScoresError(_corrupt(path))
        if key is not None and (metadata["key"] != _digest_of_key(key) or not _is_of(scores.about, key)):
            raise DamagedScoresError(f"the scores file {path} contains other scores than its name says")
        return scores

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {**self.columns, **{_EVIDENCE + name: array for name, array in self.evidence.items()}}


def valid_positions(scores: Scores) -> NDArray[np.bool_]:
    """Return which positions [windows, positions] are finite on both sides."""
    return ~_flagged(scores, _REFERENCE_NON_FINITE | _CANDIDATE_NON_FINITE)


def labelled_positions(scores: Scores) -> NDArray[np.bool_]:
    """Return which valid positions [windows, positions] have a next token."""
    return valid_positions(scores) & ~_flagged(scores, _NO_LABEL)


def _flagged(scores: Scores, bits: int) -> NDArray[np.bool_]:
    flagged: NDArray[np.bool_] = (scores.columns["flags"] & bits) != 0
    return flagged


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of one pair. Divergences and entropies in nats, probabilities and shares in [0, 1].

    Means and quantiles are over the valid positions: those that the table contains and at which both sides are finite.
    A figure is None if it was not computed or if no position qualifies. Quantiles interpolate linearly between order
    statistics (Hyndman & Fan type 7, numpy's default) and are exact for any number of positions.

    Attributes:
        positions: positions in all windows, including those that the table omits.
        skipped: the number of positions that the table omits (`--kld-skip-first`).
        coverage: share of `positions` that are valid.
        mean: mean KL(reference ‖ candidate).
        median: its 50 % quantile; p90, p95, p99 and p999 likewise.
        max: its largest value.
        reference_nan_count: positions of the table at which the reference is not finite.
        candidate_nan_count: positions of the table at which the candidate is not finite.
        infinite_count: valid positions with KL = +inf.
        cut_mass: the largest probability that either side gives, at any valid position, to tokens that the other side
            lacks; every other figure is computed from the remaining tokens, renormalised. 0 if the vocabularies are
            equal.
        top1_agreement: share of valid positions at which both sides have the same most probable token.
        reference_ppl: perplexity, exp(mean NLL), of the reference over valid positions with a label.
        candidate_ppl: the same for the candidate.
        ppl_ratio: candidate_ppl / reference_ppl.
        log_ppl_ratio: its natural logarithm.
        rms_delta_p: root mean square of p_candidate(label) − p_reference(label), as llama.cpp reports it.
        flips: among the positions at which the reference is confident (it gives its most probable token more than
            `CONFIDENT`), the share at which the candidate's most probable token is different. After Dutta et al.,
            arXiv 2407.09141, whose flips are answers that change. None if the reference is confident at no position.
        reverse_kl: mean KL(candidate ‖ reference). This and the following figures are None unless requested.
        js: mean Jensen–Shannon divergence.
        tv: mean total variation distance.
        top5_overlap: mean share of the reference's five most probable tokens that are among the candidate's.
        entropy_difference: mean of entropy(candidate) − entropy(reference); above 0 the candidate is less certain.
        abs_entropy_difference: mean of its absolute value.
        decode_gap: mean KL(prefill ‖ decode) of the candidate against itself, over the positions at which both are
            finite. None unless both paths were measured.
        reference_decode_gap: the same for the reference: what the engine itself adds.
        experts_seen: share of the candidate's experts, over all layers with experts, that at least one position was
            routed to. This and the following figures are None if the model is dense or its routes are unknown; see
            `experts.experts_seen`.
        routes_changed: share of the positions whose set of experts differs between the sides, mean over the layers.
        rare_expert_kl: mean KL of the positions whose route, on the candidate's side, meets the least used experts.

    """

    positions: int
    skipped: int
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
    cut_mass: float
    top1_agreement: float
    reference_ppl: float
    candidate_ppl: float
    ppl_ratio: float
    log_ppl_ratio: float
    rms_delta_p: float
    flips: float | None = None
    reverse_kl: float | None = None
    js: float | None = None
    tv: float | None = None
    top5_overlap: float | None = None
    entropy_difference: float | None = None
    abs_entropy_difference: float | None = None
    decode_gap: float | None = None
    reference_decode_gap: float | None = None
    experts_seen: float | None = None
    routes_changed: float | None = None
    rare_expert_kl: float | None = None

    @classmethod
    def of(cls, scores: Scores) -> Summary:
        """Compute the figures from a table.

        Raises:
            ScoresError: at no position with a label are both sides finite.

        """
        columns = scores.columns
        flags = columns["flags"]
        reference_bad, candidate_bad = _flagged(scores, _REFERENCE_NON_FINITE), _flagged(scores, _CANDIDATE_NON_FINITE)
        valid, labelled = valid_positions(scores), labelled_positions(scores)
        if not labelled.any():
            raise ScoresError(
                f"no position that has a next token is finite on both sides: of {flags.size:,}{_left_out(scores)}, the "
                f"reference is NaN or infinite in {reference_bad.sum():,} and the candidate in "
                f"{candidate_bad.sum():,}. Weights that were not loaded, or an overflow in the engine's dtype, can "
                "cause this; check the engine's log and --kld-dtype."
            )
        kl = np.sort(columns["kl"][valid])
        nll_r, nll_c = columns["reference_nll"][labelled], columns["candidate_nll"][labelled]
        # Python floats: if both sides give a label probability 0, the difference is NaN, and numpy would warn.
        log_ppl_ratio = float(nll_c.mean()) - float(nll_r.mean())
        skipped = len(flags) * scores.skipped
        changed = columns["reference_argmax"] != columns["candidate_argmax"]
        confident = valid & (columns["reference_confidence"] > CONFIDENT)
        return cls(
            positions=flags.size + skipped,
            skipped=skipped,
            coverage=float(valid.sum() / (flags.size + skipped)),
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
            cut_mass=max(float(columns[f"{side}_cut_mass"][valid].max()) for side in ("reference", "candidate")),
            top1_agreement=float(1 - changed[valid].mean()),
            reference_ppl=_exp(float(nll_r.mean())),
            candidate_ppl=_exp(float(nll_c.mean())),
            ppl_ratio=_exp(log_ppl_ratio),
            log_ppl_ratio=log_ppl_ratio,
            rms_delta_p=float(np.sqrt(np.mean((np.exp(-nll_c) - np.exp(-nll_r)) ** 2))),
            flips=float(changed[confident].mean()) if confident.any() else None,
            **(_extended_figures(columns, valid) if scores.extended else {}),
            **{name: _mean_where_finite(columns[name]) for name in GAP_COLUMNS if name in columns},
            **expert_figures(scores.evidence, columns["kl"]),
        )

    @classmethod
    def macro_average(cls, summaries: Sequence[Summary]) -> Summary:
        """Average over datasets, each with the same weight regardless of its size.

        Counts are summed, and `max` and `cut_mass` are the largest; every other figure is the mean of the datasets'
        figures, or None if a dataset lacks the figure.
        """
        figures: dict[str, Any] = {}
        for one in fields(cls):
            values = [getattr(summary, one.name) for summary in summaries]
            if one.name in _COUNTS:
                figures[one.name] = sum(values)
            elif one.name in ("max", "cut_mass"):
                figures[one.name] = max(values)
            else:
                figures[one.name] = None if None in values else float(np.mean(values))
        return cls(**figures)

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name."""
        return asdict(self)


def _extended_figures(columns: dict[str, NDArray[Any]], valid: NDArray[np.bool_]) -> dict[str, float]:
    means = {name: float(columns[name][valid].mean()) for name in EXTENDED_COLUMNS}
    return {**means, "abs_entropy_difference": float(np.abs(columns["entropy_difference"][valid]).mean())}


def _mean_where_finite(gap: NDArray[np.float64]) -> float | None:
    """Return the mean of the values that are not NaN; None if all are."""
    known = gap[~np.isnan(gap)]
    return float(known.mean()) if known.size else None


def _left_out(scores: Scores) -> str:
    return f" after the first {scores.skipped:,} of each window" if scores.skipped else ""


def _quantile(ordered: NDArray[np.float64], q: float) -> float:
    """Interpolate between order statistics; if the upper one has weight and is infinite, so is the result."""
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


def _digest_of_key(key: Mapping[str, Any] | None) -> str:
    return "" if key is None else sha256_of_json(key)


def _is_of(about: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    """Tell whether a table compares the captures that a key names."""
    return all(about[side]["digest"] == key[side] for side in ("reference", "candidate"))


def _in_order(contents: bytes) -> tuple[bytes, memoryview]:
    """Return the header of a safetensors file with its metadata in order, and the rest of the file.

    `save` writes metadata in a random order, so that the same scores would give other bytes each time.
    """
    end = 8 + int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text, memoryview(contents)[end:]


def _digest(arrays: dict[str, NDArray[Any]], about: dict[str, Any], key: str) -> str:
    digest = hashlib.sha256(json.dumps([about, key], sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _corrupt(path: Path) -> str:
    return f"the scores file {path} is corrupt or from another version"

"""Merging: one report of the results of several sessions, such as the shards of a release."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_kld.errors import ReportError
from pytest_kld.gate.result import GateResult, Incomplete

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_kld.gate.matrix import MatrixResult
    from pytest_kld.report.json_file import JSONReport

_Test = tuple[str, str, str]
"""What tells one test from another: node id, and the labels of candidate and reference."""
_Held = tuple["JSONReport", "GateResult | MatrixResult"]
"""A result and the report that it is in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What several reports hold together.

    Attributes:
        results: the results, in the order of the reports.
        matrices: the matrices, likewise.
        incomplete: what is missing of all of them.

    """

    results: list[GateResult]
    matrices: list[MatrixResult]
    incomplete: Incomplete | None


def merge(reports: Sequence[JSONReport], *, latest: bool = False) -> Merged:
    """Merge reports into one.

    Args:
        reports: the reports.
        latest: whether a test that several reports hold is taken from the one that was written last.

    Raises:
        ReportError: several reports hold the same test, and `latest` is not set: they may disagree; a matrix that was
            written last lacks pairs of an earlier one; or a shard is missing.

    """
    _require_all_shards(reports)
    chosen: dict[_Test, _Held] = {}
    for report in reports:
        held: tuple[GateResult | MatrixResult, ...] = (*report.results, *report.matrices)
        for result in held:
            of = result.candidate.label if isinstance(result, GateResult) else result.label
            test = (result.nodeid, of, result.reference.label)
            other = chosen.get(test)
            if other is not None and not latest:
                raise ReportError(
                    f"{other[0].path} and {report.path} both hold {result.nodeid}: give only one of them, or --latest "
                    "to take such a test from the report that was written last"
                )
            if other is None:
                chosen[test] = (report, result)
                continue
            newer, older = (
                ((report, result), other) if report.created >= other[0].created else (other, (report, result))
            )
            _require_all_pairs(newer, older)
            chosen[test] = newer
    found = [result for _, result in chosen.values()]
    return Merged(
        results=[one for one in found if isinstance(one, GateResult)],
        matrices=[one for one in found if not isinstance(one, GateResult)],
        incomplete=_missing(reports, found),
    )


def _require_all_pairs(newer: _Held, older: _Held) -> None:
    """Refuse to replace a matrix by one that lacks some of its pairs: what they showed would be gone."""
    new, old = newer[1], older[1]
    if isinstance(new, GateResult) or isinstance(old, GateResult) or new.outcome == "error":
        return
    there, before = ({(pair["first"], pair["second"]) for pair in matrix.pairs} for matrix in (new, old))
    lost = [f"{one} and {other}" for one, other in sorted(before) if not {(one, other), (other, one)} & there]
    if lost:
        raise ReportError(
            f"the matrix {new.label} of {newer[0].path} lacks pairs that {older[0].path} has: {', '.join(lost)}. "
            "Measure them together, or give only one of the reports"
        )


def _require_all_shards(reports: Sequence[JSONReport]) -> None:
    """Reject some of the shards of a release: nobody would see that the results of the others are missing."""
    shards = [report.shard for report in reports if report.shard is not None]
    if len(counts := {shard.of for shard in shards}) > 1:
        of = " and ".join(map(str, sorted(counts)))
        raise ReportError(f"the reports are shards of different splits, of {of} shards: give those of one split")
    there = {shard.number for shard in shards}
    if missing := [number for count in counts for number in range(1, count + 1) if number not in there]:
        many = f"shards {', '.join(map(str, missing))}" if len(missing) > 1 else f"shard {missing[0]}"
        raise ReportError(
            f"{many} of {shards[0].of} {'is' if len(missing) == 1 else 'are'} missing: give the reports of all shards, "
            "those without a Subject too"
        )


def _missing(reports: Sequence[JSONReport], results: Sequence[GateResult | MatrixResult]) -> Incomplete | None:
    """Combine what reports lack, except tests that another report holds."""
    measured = {result.nodeid for result in results if result.outcome != "error"}
    found = [report.incomplete for report in reports if report.incomplete is not None]
    missing = [nodeid for one in found for nodeid in one.not_measured if nodeid not in measured]
    if not missing:
        return None
    reasons = dict.fromkeys(one.reason for one in found if set(one.not_measured) & set(missing))
    return Incomplete(
        reason="; ".join(reasons), planned=len({result.nodeid for result in results}), not_measured=tuple(missing)
    )


def by_comparison(results: Sequence[GateResult]) -> list[list[GateResult]]:
    """Group results that one table can hold: of one reference, and measured on the same text in the same way.

    The numbers of windows may differ, because each candidate may need another number. A result that was not measured
    joins the first group of its reference.
    """
    groups: list[tuple[str, dict[str, Any] | None, list[GateResult]]] = []
    for result in sorted(results, key=lambda result: result.about is None):
        reference, how = result.reference.label, _how(result)
        for known, measured, group in groups:
            if known == reference and how in (None, measured):
                group.append(result)
                break
        else:
            groups.append((reference, how, [result]))
    order = {id(result): index for index, result in enumerate(results)}
    return [sorted(group, key=lambda result: order[id(result)]) for _, _, group in groups]


def _how(result: GateResult) -> dict[str, Any] | None:
    """Return what has to agree for figures to be comparable; None if nothing was measured."""
    if result.about is None:
        return None
    protocol = result.about["protocol"]
    texts = [(part["dataset"], part.get("text_sha256")) for part in protocol["datasets"]]
    own = {name: protocol.get(name) for name in ("window_size", "stride", "windows_from", "bos", "decoding")}
    return {"texts": texts, **own, **{name: result.about.get(name) for name in ("skip_first", "head")}}

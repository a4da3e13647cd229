"""Holding a session's results against baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_kld.errors import BaselineError, DamagedScoresError, ScoresError
from pytest_kld.figures.paired import paired_intervals
from pytest_kld.figures.scores import Scores
from pytest_kld.gate.baseline import Held, baseline_file, find_baseline, no_baseline
from pytest_kld.gate.regression import CONFIDENCE, changes

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_kld.collecting.kld import KLD
    from pytest_kld.figures.interval import Interval
    from pytest_kld.gate.baseline import Baseline
    from pytest_kld.settings.config import KLDConfig


def hold(kld: KLD, config: KLDConfig) -> Held | None:
    """Hold a result against its Subject's baseline; return None if no baseline is given, or there is none for it.

    Raises:
        BaselineError: the baseline is damaged or was measured in another way, or one is required and there is none.

    """
    if config.baseline is None:
        return None
    baseline = find_baseline(config.baseline, kld.candidate)
    if baseline is None:
        if config.max_regression:
            raise BaselineError(no_baseline(config.baseline, kld.candidate))
        return None
    file = baseline_file(config.baseline, kld.candidate)
    if differing := baseline.what_differs(kld.scores.about):
        raise BaselineError(
            f"{kld.candidate} cannot be held against {file}: {'; '.join(differing)}. Measure as the baseline was "
            "measured, or promote a new one."
        )
    found, why_not = _intervals(kld, baseline, config)
    try:
        compared = changes(
            baseline.figures,
            kld.summary.to_json(),
            config.max_regression,
            intervals=found,
            decides=config.confidence is not None,
            floor=kld.floor,
        )
    except ValueError as error:
        raise BaselineError(f"{error}. Give --kld-metrics=all for both.") from None
    notes = baseline.notes(kld.scores.about)
    if why_not:
        notes.append(f"the change against the baseline is a difference of figures, without an interval: {why_not}")
    return Held(file=file, baseline=baseline, changes=compared, paired=not why_not, notes=tuple(notes))


def _intervals(kld: KLD, baseline: Baseline, config: KLDConfig) -> tuple[dict[str, Interval], str]:
    """Return intervals of the differences at the same positions, or why there are none."""
    sides = ("reference", "candidate")
    if all(kld.scores.about[side]["digest"] == baseline.made_from[side].get("capture") for side in sides):
        return {}, ""  # the same bits: there is no difference on any text
    path = _scores_of(baseline, config.cache_dir)
    if path is None:
        return {}, "the baseline's scores are not in the cache"
    try:
        before = Scores.load(path)
        if before.about["candidate"]["digest"] != baseline.made_from["candidate"].get("capture"):
            return {}, f"the scores file {path} is not the baseline's"
        before = before.without_first(config.skip_first)
        return paired_intervals(kld.scores, before, config.confidence or CONFIDENCE), ""
    except DamagedScoresError as damage:
        return {}, damage.what
    except ScoresError as error:
        return {}, str(error)


def _scores_of(baseline: Baseline, cache_dir: Path) -> Path | None:
    name = baseline.made_from.get("scores")
    if not isinstance(name, str) or not name.isalnum():
        return None
    path = cache_dir / "scores" / f"{name}.safetensors"
    return path if path.is_file() else None

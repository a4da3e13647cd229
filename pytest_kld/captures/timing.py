"""How long captures took, and from that, how long others will take."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_kld.captures.manifest import MANIFEST
from pytest_kld.subjects.subject import Subject

_MOST_SECONDS = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a capture took.

    Attributes:
        loading: seconds from the start until the model answered; for a server, its boot.
        running: seconds for the positions.
        positions: how many positions were run.

    """

    loading: float
    running: float
    positions: int

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        return {"loading": round(self.loading, 3), "running": round(self.running, 3), "positions": self.positions}

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Timing | None:
        """Return the timing in a manifest, which anybody may have written; None if there is none of use."""
        told = manifest.get("timing")
        if not isinstance(told, dict):
            return None
        values: list[Any] = [told.get(name) for name in ("loading", "running", "positions")]
        if not all(
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and 0 <= value <= _MOST_SECONDS
            for value in values
        ):
            return None
        loading, running, positions = values
        return cls(loading=loading, running=running, positions=int(positions)) if positions >= 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierRuns:
    """The timings of the captures in a cache.

    Attributes:
        runs: what was run, as its manifest says, and how long it took.

    """

    runs: tuple[tuple[Mapping[str, Any], Timing], ...]

    @classmethod
    def in_cache(cls, root: Path) -> EarlierRuns:
        """Read the manifests of a cache; those that cannot be read tell nothing."""
        return cls(runs=tuple(_read(root.glob(f"captures/*/{MANIFEST}"))))

    def seconds(self, subject: Subject, positions: int) -> tuple[float, float] | None:
        """Return the probable seconds to load a Subject and to run it, or None if nothing like it has run.

        The closest earlier runs count: those of the same model on the same path of the same engine with the same
        arguments, else with others. Of several, the longest loading counts, since a server may have been running
        already, and the slowest rate.
        """
        same_model = [(told, timing) for told, timing in self.runs if _is_like(told, subject)]
        plain = subject.to_json()
        exact = [timing for told, timing in same_model if told.get("arguments") == plain["arguments"]]
        timings = exact or [timing for _, timing in same_model]
        if not timings:
            return None
        rate = max(timing.running / timing.positions for timing in timings)
        return max(timing.loading for timing in timings), rate * positions


def _is_like(told: Mapping[str, Any], subject: Subject) -> bool:
    model = told.get("model")
    if not isinstance(model, dict) or (told.get("engine"), told.get("path")) != (subject.engine, subject.path):
        return False
    directory = subject.spec.path
    return bool(model.get("path") == str(directory) if directory else model.get("name") == subject.spec.name)


def _read(manifests: Iterable[Path]) -> Iterable[tuple[Mapping[str, Any], Timing]]:
    for path in manifests:
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            timing, told = Timing.of(manifest), manifest.get("subject")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if timing is not None and isinstance(told, dict):
            yield told, timing

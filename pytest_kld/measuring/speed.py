"""Measures the speed of Subjects for tests that want it, and holds it against their limits."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_kld.errors import KLDError, ModelError, ServerError
from pytest_kld.gate.speed_limits import SPEED_LIMITS, Bounds, at_each, parse_speed_marker
from pytest_kld.settings.config import config_of
from pytest_kld.settings.subjects import candidate_of, reference_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from pytest_kld.gate.speed import SpeedVerdict
    from pytest_kld.measuring.measurement import Measurement
    from pytest_kld.settings.subjects import Overrides
    from pytest_kld.subjects.subject import Subject


@dataclass(frozen=True, slots=True)
class Speeds:
    """The speeds of a session's Subjects, each measured once.

    Attributes:
        measurement: runs the Subjects.
        overrides: what fixtures add to Subjects.
        concurrencies: every concurrency that any test of the session wants.
        candidates: the candidates of the session's tests.

    """

    measurement: Measurement
    overrides: Overrides
    concurrencies: tuple[int, ...]
    candidates: tuple[Subject, ...]
    _measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    _failed: dict[str, KLDError] = field(default_factory=dict)

    def of(self, subject: Subject) -> dict[str, Any]:
        """Return a Subject's speed. See `throughput.runner.measure`.

        Raises:
            ServerError: the Subject is not served, or a run fails; a run that failed once is not repeated.

        """
        from pytest_kld.files import sha256_of_json

        if not _is_served(subject):
            what = subject.engine or "a capture"
            raise ServerError(f"the speed of {subject.label} ({what}) cannot be measured: no server runs it")
        subject = subject.pin()
        args = subject.speed.get("args", "")
        key = sha256_of_json({**subject.to_json(), "path": None, "limits": None, "tags": None, "speed": args})
        if key in self._failed:
            raise self._failed[key]
        if key not in self._measured:
            try:
                self._measured[key] = self._measure(subject, key)
            except KLDError as error:
                self._failed[key] = error
                raise
        return self._measured[key]

    def base(self, name: str | None) -> tuple[dict[str, Any] | None, str]:
        """Return the speed that ratios are taken to, and its Subject's label.

        Args:
            name: the name or label of a candidate; None: the reference.

        """
        config = self.measurement.config
        if name is None:
            subject = self.overrides.apply(reference_of(config), "reference")
            return (self.of(subject) if _is_served(subject) else None), subject.label
        named = {one.label: one for one in self.candidates if name in (one.name, one.label)}
        if len(named) != 1:
            known = ", ".join(dict.fromkeys(one.label for one in self.candidates))
            what = "more than one candidate" if named else "none of the candidates"
            raise ModelError(f"--kld-speedup-over={name} names {what}: they are {known}")
        subject = self.overrides.apply(next(iter(named.values())), "candidate")
        return self.of(subject), subject.label

    def _measure(self, subject: Subject, key: str) -> dict[str, Any]:
        from pytest_kld.engines.served.engine import ServedEngine
        from pytest_kld.throughput.runner import LoadSettings, measure

        config = self.measurement.config
        engine = self.measurement.engine(subject.engine)
        assert isinstance(engine, ServedEngine), subject.engine
        settings = LoadSettings(
            concurrencies=self.concurrencies,
            input_tokens=config.throughput_input,
            output_tokens=config.throughput_output,
            rounds=config.throughput_rounds,
            failures=config.throughput_failures,
            arguments=(*config.throughput_args, *shlex.split(subject.speed.get("args", ""))),
        )
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{key[:12]}"
        return measure(
            engine,
            subject,
            settings,
            tokenizer=self.measurement.tokenizer_model,
            directory=engine.capture_dir / "throughput" / name,
            progress=self.measurement.progress,
        )


def concurrencies_of(item: pytest.Item) -> tuple[int, ...]:
    """Return the concurrencies that a test wants: of the closest marker that names any, else of the option."""
    for mark in item.iter_markers("kld"):
        wanted, _ = parse_speed_marker(mark.kwargs)
        if wanted is not None:
            return wanted
    return config_of(item).throughput


def speed_bounds_of(item: pytest.Item) -> dict[str, Bounds]:
    """Return a test's limits on speed: each from the closest marker, else from Subject, option or ini key.

    Those of the options are not for a test whose marker says that it wants no speed.
    """
    wants_none = config_of(item).throughput and not concurrencies_of(item)
    merged: dict[str, Bounds | None] = {} if wants_none else dict(config_of(item).speed_bounds)
    own = candidate_of(item).speed
    merged |= {name: limit.parse(own[name]) for name, limit in SPEED_LIMITS.items() if name in own}
    for mark in reversed(list(item.iter_markers("kld"))):
        merged |= parse_speed_marker(mark.kwargs)[1]
    return {name: bounds for name, bounds in merged.items() if bounds is not None}


def all_concurrencies(items: Sequence[pytest.Item]) -> tuple[int, ...]:
    """Return every concurrency that a test wants, in ascending order."""
    return tuple(sorted({concurrency for item in items for concurrency in concurrencies_of(item)}))


def speed_verdict(item: pytest.Item, speeds: Speeds, candidate: Subject) -> SpeedVerdict | None:
    """Measure a test's candidate and hold its speed against the test's limits; None if the test wants no speed.

    Raises:
        ModelError: a limit is on a concurrency that is not measured.
        ServerError: the speed cannot be measured.

    """
    config = speeds.measurement.config
    wanted = concurrencies_of(item)
    try:
        bounds = at_each(speed_bounds_of(item), wanted)
    except ValueError as error:
        raise ModelError(str(error)) from None
    if not wanted:
        if bounds:
            raise ModelError(f"{', '.join(bounds)}: no speed is measured; give --kld-throughput")
        return None
    from pytest_kld.gate.speed import judge_speed

    measured = speeds.of(candidate)
    shown = {**measured, "cells": [cell for cell in measured["cells"] if cell["concurrency"] in wanted]}
    base, label = speeds.base(config.speedup_over)
    return judge_speed(shown, bounds, base=base, base_label=label, confidence=config.confidence)


def _is_served(subject: Subject) -> bool:
    return subject.engine not in ("", "transformers")

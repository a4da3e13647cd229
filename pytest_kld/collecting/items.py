"""What collected tests are and ask for, and what is kept with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.gate.limits import merge_bounds, parse_marker
from pytest_kld.settings.config import KLDConfig, config_of

if TYPE_CHECKING:  # a session without a gate does not pay for them
    from pytest_kld.collecting.kld import KLD
    from pytest_kld.collecting.paths import NeededPaths
    from pytest_kld.gate.speed import SpeedVerdict


@dataclass(frozen=True, slots=True)
class Gate:
    """A test's figures, and the limits that the test had when they were measured."""

    kld: KLD
    bounds: Mapping[str, float]
    speed: SpeedVerdict | None = None


GATE = pytest.StashKey[Gate]()
"""What was measured for a test; absent if nothing was."""
SETUP_SECONDS = pytest.StashKey[float]()
"""How long a test's setup took; absent if the test did not run in this process."""
FLOOR = pytest.StashKey[dict[str, Any] | None]()
"""What two runs of each side of a test differ by, as plain data; absent if nothing was measured."""
PROBLEM = pytest.StashKey[str]()
"""Why the Subject of a suite's test cannot be run."""


def has_result(item: pytest.Item) -> bool:
    """Tell whether a test has a result to report: it is gated, or it gained a gate or a marker while it ran."""
    return is_gated(item) or GATE in item.stash or item.get_closest_marker("kld") is not None


def uses_kld(item: pytest.Item) -> bool:
    """Tell whether a test uses any of our fixtures, so that its failure may name models and texts."""
    return any(name.lstrip("_").startswith("kld") for name in getattr(item, "fixturenames", ()))


def is_gated(item: pytest.Item) -> bool:
    """Tell whether limits are checked after this test."""
    return "_kld_gate" in getattr(item, "fixturenames", ())


def is_matrix(item: pytest.Item) -> bool:
    """Tell whether this test compares candidates with each other."""
    return "_kld_matrix" in getattr(item, "fixturenames", ())


def needed_paths(items: Sequence[pytest.Item], config: KLDConfig) -> NeededPaths:
    """Return the paths on which tests that are going to run with these settings need each Subject."""
    from pytest_kld.collecting.paths import NeededPaths
    from pytest_kld.settings.subjects import candidate_of

    gated = [item for item in items if is_gated(item) and config_of(item) is config]
    run = [item for item in gated if PROBLEM not in item.stash and not item.get_closest_marker("skip")]
    return NeededPaths.of((candidate_of(item), asked_path(item, config)) for item in run)


def any_decodes(items: Sequence[pytest.Item], config: KLDConfig) -> bool:
    """Tell whether any test with these settings decodes, here or in another shard."""
    from pytest_kld.settings.subjects import candidate_of

    gated = [item for item in items if is_gated(item) and config_of(item) is config]
    asked = {config.path, *(asked_path(item, config) for item in gated)}
    return asked != {"prefill"} or any(candidate_of(item).path == "decode" for item in gated)


def bounds_of(item: pytest.Item, config: KLDConfig) -> dict[str, float]:
    """Return a test's limits: each from the closest marker that names it, else from Subject, option, ini or default.

    Of the two tests of `--kld-path=both`, only the one that decodes has a limit on the gap between them.
    """
    from pytest_kld.settings.subjects import candidate_of

    candidate = candidate_of(item)
    markers = [parse_marker(mark.args, mark.kwargs) for mark in item.iter_markers("kld")]
    bounds = merge_bounds(*markers, dict(candidate.limits), dict(config.bounds))
    if candidate.path == "prefill" and asked_path(item, config) == "both":
        bounds.pop("max_decode_gap", None)
    return bounds


def asked_path(item: pytest.Item, config: KLDConfig) -> str:
    """Return the path that the closest marker names, else that of the settings; it may be `both`."""
    named = (mark.kwargs["path"] for mark in item.iter_markers("kld") if "path" in mark.kwargs)
    return next(named, None) or config.path

"""How a comparison was made, in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def protocol_of(about: dict[str, Any], shown: Callable[[str], str]) -> str:
    """Say which text was measured, in which windows, and how.

    Args:
        about: what was compared, from the scores; the fields that it lacks are left out.
        shown: makes a name from outside safe to show.

    """
    protocol = about["protocol"]
    parts = [one["dataset"] for one in protocol.get("datasets", ())] or [protocol["dataset"]]
    datasets = ", ".join(map(shown, parts))
    windows = f"{protocol['windows']:,} windows of {protocol['window_size']:,} tokens"
    if protocol.get("windows_from") == "spread":
        windows += f" spread over all of {datasets}"
    else:
        windows += f" at stride {protocol['stride']:,} of {datasets}"
    skipped = about.get("skip_first", 0)
    engines = {
        engine["engine"]
        for side in ("reference", "candidate")
        if (engine := ((about.get(side) or {}).get("key") or {}).get("engine"))
    }
    return ", ".join(
        [
            windows,
            *([f"the first {skipped:,} positions of each skipped"] if skipped else []),
            *([f"head {about['head']}"] if about.get("head") else []),
            *([f"engine {shown(engine)}" for engine in sorted(engines)]),
        ]
    )

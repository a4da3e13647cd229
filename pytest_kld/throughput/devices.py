"""The devices that a measurement of speed ran on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_kld.servers.gpus import query_gpus

_FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "sm_clock": "clocks.sm",
    "greatest_sm_clock": "clocks.max.sm",
    "power_limit": "power.limit",
}


def devices(gpus: Sequence[str]) -> list[dict[str, Any]]:
    """Return name, driver, clocks and power limit of GPUs, given by UUID, or this machine's processor without any.

    Clocks are those at the moment of the call.
    """
    if not gpus:
        return [{"name": _processor(), "cores": len(os.sched_getaffinity(0))}]
    uuids = query_gpus("uuid")
    read = {ours: query_gpus(theirs) for ours, theirs in _FIELDS.items()}
    found = []
    for gpu in gpus:
        index = uuids.index(gpu) if gpu in uuids else None
        told = {name: values[index] for name, values in read.items() if index is not None and index < len(values)}
        found.append({"uuid": gpu, "name": gpu, **told})
    return found


def kinds(described: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of devices; speeds are comparable only if these are equal."""
    return sorted(str(device["name"]) for device in described)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())

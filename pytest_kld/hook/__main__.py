"""Report what is installed where an engine runs: `python -m pytest_kld.hook SEAMS` prints one line of JSON.

SEAMS is the module that hooks the engine. It imports neither the engine nor torch, so it answers at once.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from pytest_kld import __version__
from pytest_kld.hook.protocol import PROTOCOL
from pytest_kld.servers.gpus import query_gpus


def main() -> None:
    """Print versions, GPUs, the release's flags, and whether the engine will load the hook."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pytest_kld.hook SEAMS, such as pytest_kld.hook.sglang")
    seams = import_module(sys.argv[1])
    versions = {}
    for package in seams.PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    why_not = seams.why_not_hooked()
    told = {
        "protocol": PROTOCOL,
        "pytest_kld": __version__,
        "versions": versions,
        "devices": query_gpus("name"),
        "options": seams.options(),
        "hooked": why_not is None,
        "why_not": why_not,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()

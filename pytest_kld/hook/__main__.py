"""Tell what is installed where SGLang runs: `python -m pytest_kld.hook` prints one line of JSON.

It imports neither SGLang nor torch, so it answers at once.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, entry_points, version

from pytest_kld import __version__
from pytest_kld.errors import PatchError
from pytest_kld.hook.options import read_options
from pytest_kld.hook.patching import Installation, State
from pytest_kld.hook.protocol import PROTOCOL
from pytest_kld.servers.gpus import query_gpus


def main() -> None:
    """Print versions, GPUs, the release's flags, and whether the hook gets into SGLang."""
    versions = {}
    for package in ("sglang", "torch", "transformers", "sgl-kernel", "flashinfer-python"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    why_not = _why_not_hooked()
    told = {
        "protocol": PROTOCOL,
        "pytest_kld": __version__,
        "versions": versions,
        "devices": query_gpus("name"),
        "options": _options(),
        "hooked": why_not is None,
        "why_not": why_not,
    }
    print(json.dumps(told))


def _options() -> dict[str, tuple[str, str]] | None:
    try:
        return read_options(Installation.find().root)
    except PatchError:
        return None


def _why_not_hooked() -> str | None:
    try:
        found = Installation.find()
    except PatchError as error:
        return str(error)
    what, state = f"SGLang {found.release} in {found.root}", found.state()
    if state is State.NOTHING_TO_PATCH:
        if any(point.name == "pytest_kld" for point in entry_points(group="sglang.srt.plugins")):
            return None
        return "pytest-kld is importable where SGLang runs and not installed: `pip install pytest-kld` there"
    if state is State.NOT_PATCHED:
        return f"{what} has no plugins and is not patched: run `pytest-kld patch --apply` there."
    if state is State.MODIFIED:
        return f"{what} has no plugins and cannot be patched: {found.target} {state.value}."
    return None


if __name__ == "__main__":
    main()

"""The manifest of a capture: what it is, how it was made, and the digests of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytest_kld.captures.shape import check_manifest
from pytest_kld.errors import CaptureError, DamagedCaptureError
from pytest_kld.files import json_bytes, sha256_of_json, write_atomically

SCHEMA = 1
"""Version of the capture format; it is part of the cache key."""
MANIFEST = "capture.json"
HEAD_FILE = "head.safetensors"
EXPERTS_FILE = "experts.safetensors"


def window_file(store: str, index: int) -> str:
    """Return the name of a window's file within a capture."""
    return f"{index}.safetensors" if store == "logprobs" else f"windows/{index:05d}.safetensors"


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a finished capture, with a digest of itself."""
    write_atomically(path / MANIFEST, manifest_bytes(manifest))


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """Return the contents of `capture.json`: the manifest with a digest of itself."""
    return json_bytes({**manifest, "sha256": sha256_of_json(manifest)})


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check the manifest of a capture.

    Raises:
        DamagedCaptureError: the manifest cannot be read, is corrupt or invalid, or has another schema, or the capture
            is incomplete.

    """
    try:
        text = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise DamagedCaptureError(path, f"the manifest {path / MANIFEST} is corrupt ({error!r}).") from error
    return parse_manifest(text, path)


def parse_manifest(text: bytes, path: Path) -> dict[str, Any]:
    """Check the text of a manifest.

    Args:
        text: the contents of `capture.json`.
        path: the capture's directory, for messages.

    Raises:
        DamagedCaptureError: see `read_manifest`.

    """
    try:
        manifest: dict[str, Any] = json.loads(text.decode())
        intact = manifest.pop("sha256") == sha256_of_json(manifest)
        usable = manifest["schema"] == SCHEMA and manifest["complete"] is True
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCaptureError(path, f"the manifest {path / MANIFEST} is corrupt ({error!r}).") from error
    if not intact:
        raise DamagedCaptureError(
            path, f"the manifest {path / MANIFEST} is corrupt: its SHA-256 does not match its contents."
        )
    if not usable:
        raise DamagedCaptureError(
            path, f"the capture {path} is incomplete, or its schema is {manifest['schema']} instead of {SCHEMA}."
        )
    try:
        check_manifest(manifest, head_file=HEAD_FILE, experts_file=EXPERTS_FILE, window_file=window_file)
    except ValueError as error:
        raise DamagedCaptureError(path, f"the manifest {path / MANIFEST} is invalid: {error}.") from error
    return manifest


def manifest_of_original_layout(path: Path, windows: int) -> dict[str, Any]:
    """Create the manifest of a directory of the original layout, which has none.

    Raises:
        CaptureError: the directory's files are not those of this number of windows.

    """
    count = sum(1 for file in path.glob("*.safetensors") if file.stem.isdecimal())
    if count == windows:
        names = [f"{index}.safetensors" for index in range(windows)]
    elif count == 2 * windows:
        names = [f"{index}.safetensors" for index in range(0, count, 2)]
    else:
        raise CaptureError(
            f"{path} holds {count} window files, but this session has {windows} windows: expected {windows}, or "
            f"{2 * windows} if a speculative head was saved too. Give the --kld-windows with which it was made."
        )
    if missing := [name for name in names if not (path / name).is_file()]:
        raise CaptureError(f"{path / missing[0]} is missing")
    sizes = {name: (path / name).stat() for name in names}
    return {
        "schema": SCHEMA,
        "complete": True,
        "key": None,
        "model": path.name,
        "engine": None,
        "protocol": None,
        "store": "logprobs",
        "store_reason": f"original layout, {count} files for {windows} windows",
        "vocab_size": None,
        "transforms": None,
        "routing": None,
        "checks": None,
        "window_files": names,
        # Without a manifest the right digests are unknown; the time stamp distinguishes versions.
        "files": {
            name: {"bytes": known.st_size, "mtime_ns": known.st_mtime_ns, "sha256": None}
            for name, known in sizes.items()
        },
    }

"""Which model: a local directory, or a hub id with an optional revision, and what identifies its bits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_kld.errors import ModelError
from pytest_kld.files import sha256_of_json

CAPTURE_FILES = ("capture.json", "0.safetensors")
"""What captures begin with: the manifest, or the first window of the original layout."""
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model as the user named it.

    Attributes:
        name: what the user wrote, without the revision; shown in reports.
        path: its directory, when it is local.
        revision: branch, tag or commit on the hub; None means the default branch.

    """

    name: str
    path: Path | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str, base: Path) -> ModelSpec:
        """Read `DIRECTORY`, `ORG/NAME` or `ORG/NAME@REVISION`; a directory, where there is one, wins.

        Args:
            text: the user's word.
            base: the directory that a relative path starts from.

        Raises:
            ValueError: neither a directory with a model or a capture, nor the form of a hub id.

        """
        path = (base / Path(text).expanduser()).resolve()
        if path.is_dir():
            if not (path / "config.json").is_file() and not is_capture(path):
                raise ValueError(f"{path} is neither a model directory (no config.json) nor a capture")
            return cls(name=text, path=path)
        name, _, revision = text.partition("@")
        if not _HUB_ID.fullmatch(name) or ("@" in text and not revision):
            raise ValueError(f"{text!r}: there is no directory {path}, and it is no hub id (ORG/NAME[@REVISION])")
        return cls(name=name, revision=revision or None)

    @property
    def label(self) -> str:
        """Return the name for reports, with the revision where one was given."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def source(self) -> str:
        """Return what `from_pretrained` takes."""
        return str(self.path) if self.path else self.name

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"name": self.name, "path": None if self.path is None else str(self.path), "revision": self.revision}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Read what `to_json` gave."""
        return cls(name=data["name"], path=data["path"] and Path(data["path"]), revision=data["revision"])

    def pin(self) -> ModelSpec:
        """Resolve a hub id to its commit, so that what is loaded is what is keyed.

        Raises:
            ModelError: the model is not there, or the hub cannot be reached and has left nothing in its cache.

        """
        if self.path:
            return self
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            config = Path(hf_hub_download(self.name, "config.json", revision=self.revision))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise ModelError(
                f"cannot find the model {self.label}: {_first_line(error)} It is no local directory either. Check the "
                "name and revision; for a private model log in with `hf auth login`; offline, fill the hub's cache "
                "first (`hf download`) or name a local directory."
            ) from error
        return ModelSpec(name=self.name, revision=config.parent.name)  # …/snapshots/<commit>/config.json

    def identity(self) -> dict[str, Any]:
        """Return what determines the model's bits, as JSON for the cache key. Wants a pinned spec.

        A hub model is its id and commit; a local one the names, sizes and modification times of its files
        (hashing hundreds of gigabytes would cost more than many a capture).
        """
        if not self.path:
            return {"hub": self.name, "commit": self.revision}
        files = sorted(path for path in self.path.rglob("*") if path.is_file() and not _hidden(path, self.path))
        return {
            "local": sha256_of_json(
                [[str(path.relative_to(self.path)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
            )
        }


def is_capture(path: Path | None) -> bool:
    """Tell whether a directory is a capture (see capture.py) rather than a model."""
    return path is not None and any((path / name).is_file() for name in CAPTURE_FILES)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _first_line(error: Exception) -> str:
    return f"{str(error).strip().splitlines()[0].rstrip('.')}." if str(error).strip() else f"{type(error).__name__}."

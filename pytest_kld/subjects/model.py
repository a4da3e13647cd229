"""A model: a local directory, or a hub id with an optional revision, and what identifies its contents."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_kld.errors import ModelError

if TYPE_CHECKING:
    from pytest_kld.subjects.digests import FileDigests

CAPTURE_FILES = ("capture.json", "0.safetensors")
"""The first file of a capture: the manifest, or the first window in the original layout."""
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model as the user named it.

    Attributes:
        name: what the user wrote, without the revision; shown in reports.
        path: its directory if it is local.
        revision: branch, tag or commit on the hub; None means the default branch.

    """

    name: str
    path: Path | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str, base: Path) -> ModelSpec:
        """Parse `DIRECTORY`, `ORG/NAME` or `ORG/NAME@REVISION`. If the directory exists, it takes precedence.

        Args:
            text: the user's input.
            base: the directory that a relative path starts from.

        Raises:
            ValueError: the text is neither a directory with a model or a capture, nor a well-formed hub id; or the
                directory could be both a model and a capture; or the text is not a valid file name.

        """
        try:
            text.encode()
            path = (base / Path(text).expanduser()).resolve()
            is_directory = path.is_dir()
        except UnicodeEncodeError:
            raise ValueError(f"{_shown(text)} is not valid UTF-8: rename it") from None
        except (OSError, ValueError, RuntimeError) as error:  # too long, NUL bytes, the home of an unknown user
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{_shown(text)} can be neither a directory nor a hub id: {reason}") from None
        if is_directory:
            _require_one_kind(path)
            return cls(name=text, path=path)
        name, _, revision = text.partition("@")
        if not _HUB_ID.fullmatch(name) or ("@" in text and not revision):
            raise ValueError(
                f"{_shown(text)}: there is no directory {_shown(str(path))}, and it is not a hub id "
                "(ORG/NAME[@REVISION])"
            )
        return cls(name=name, revision=revision or None)

    @property
    def label(self) -> str:
        """Return the name for reports, with the revision if one was given."""
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def source(self) -> str:
        """Return the argument for `from_pretrained`."""
        return str(self.path) if self.path else self.name

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"name": self.name, "path": None if self.path is None else str(self.path), "revision": self.revision}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Create a ModelSpec from the output of `to_json`."""
        return cls(name=data["name"], path=data["path"] and Path(data["path"]), revision=data["revision"])

    def pin(self, file: str = "config.json") -> ModelSpec:
        """Resolve a hub id to its commit, so that the loaded model is the one in the cache key.

        Args:
            file: a file that exists in the repository.

        Raises:
            ModelError: the model does not exist, or the hub cannot be reached and the model is not in its local cache.

        """
        if self.path:
            return self
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            config = Path(hf_hub_download(self.name, file, revision=self.revision))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise ModelError(
                f"cannot find the model {self.label}: {_first_line(error)} It is not a local directory either. Check "
                "the name and revision; for a private model log in with `hf auth login`; offline, fill the hub's cache "
                "first (`hf download`) or name a local directory."
            ) from error
        commit = config.parents[len(Path(file).parts) - 1].name  # …/snapshots/<commit>/config.json
        return ModelSpec(name=self.name, revision=commit)

    def identity(self, digests: FileDigests, *, trust_remote_code: bool = False) -> dict[str, Any]:
        """Return what determines the model's contents, as JSON for the cache key. The spec must be pinned.

        A hub model is identified by its id and commit, a local one by the contents of its files and how much of them
        was read. The identity includes what the model loads from elsewhere: an adapter's base model, and code from
        another repository.

        Args:
            digests: computes or remembers the digests of files.
            trust_remote_code: whether code from another repository may run.

        Raises:
            ModelError: a file cannot be read, or a link is broken.

        """
        return self._identity(digests, trust_remote_code, frozenset())

    def _identity(self, digests: FileDigests, trust_remote_code: bool, above: frozenset[ModelSpec]) -> dict[str, Any]:
        from pytest_kld.subjects.identity import digest_of_directory  # not needed when the plugin is only loaded

        own: dict[str, Any] = {"hub": self.name, "commit": self.revision}
        if self.path:
            own = {"local": digest_of_directory(self.path, digests), "hash": digests.kind}
        above |= {self._anonymous}
        elsewhere = {
            name: model._identity(digests, trust_remote_code, above)
            for name, model in self._taken_from_elsewhere(trust_remote_code).items()
            if model._anonymous not in above
        }
        return {**own, "elsewhere": elsewhere}

    @property
    def _anonymous(self) -> ModelSpec:
        return ModelSpec(name="" if self.path else self.name, path=self.path, revision=self.revision)

    def _taken_from_elsewhere(self, trust_remote_code: bool) -> dict[str, ModelSpec]:
        """Return the other models that an engine reads when it loads this one, by the part that it reads."""
        found = {}
        adapter = self._read_json("adapter_config.json")
        if isinstance(base := adapter.get("base_model_name_or_path"), str):
            revision = adapter.get("revision")
            found["base model"] = _named(base, revision if isinstance(revision, str) else None, "config.json")
        classes = self._read_json("config.json").get("auto_map") if trust_remote_code else None
        for name, reference in classes.items() if isinstance(classes, dict) else ():
            if isinstance(reference, str) and "--" in reference:  # REPOSITORY--MODULE.CLASS
                repository, _, code = reference.partition("--")
                found[f"code of {name}"] = _named(repository, None, f"{code.partition('.')[0]}.py")
        return found

    @property
    def has_own_code(self) -> bool:
        """Whether loading its config or tokenizer in full would run code from its repository."""
        return any("auto_map" in self._read_json(name) for name in ("config.json", "tokenizer_config.json"))

    def _read_json(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the model; empty if it is missing or damaged, which the loader will report."""
        try:
            if self.path:
                file = self.path / name
            elif self.revision is None:  # not pinned, so there is nothing to read
                return {}
            else:
                from huggingface_hub import hf_hub_download, try_to_load_from_cache

                cached = try_to_load_from_cache(self.name, name, revision=self.revision)
                if cached is not None and not isinstance(cached, str):  # the cache knows that the hub has no such file
                    return {}
                file = Path(cached or hf_hub_download(self.name, name, revision=self.revision))
            value = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):  # the hub's errors are OSErrors
            return {}
        return value if isinstance(value, dict) else {}


def advice(error: Exception) -> str:
    """Return what to do about an error of transformers that names its argument and not our option; else nothing."""
    if "trust_remote_code" in str(error):
        return " To let that code run, give --kld-trust-remote-code."
    return ""


def is_capture(path: Path | None) -> bool:
    """Tell whether a directory is a capture (see capture.py) rather than a model."""
    return path is not None and any((path / name).is_file() for name in CAPTURE_FILES)


def _require_one_kind(path: Path) -> None:
    """Reject a directory that is neither a model nor a capture, or could be both.

    Raises:
        ValueError: the message says what the directory contains.

    """
    is_model = (path / "config.json").is_file()
    if not is_model and not is_capture(path):
        raise ValueError(f"{path} is neither a model directory (no config.json) nor a capture")
    if is_model and is_capture(path):
        both = next(name for name in CAPTURE_FILES if (path / name).is_file())
        raise ValueError(
            f"{path} could be a model or a capture: it contains config.json and {both}. Move the capture "
            "(capture.json, *.safetensors with numbers for names, windows/) or the model to a directory of its own. If "
            f"{both} is part of the model, rename it."
        )


def _named(name: str, revision: str | None, file: str) -> ModelSpec:
    """Return the model that a config names, as its loader finds it; pinned if possible."""
    if os.path.isdir(name):  # noqa: PTH112 - the name may be any text
        return ModelSpec(name=name, path=Path(name).resolve())
    model = ModelSpec(name=name, revision=revision)
    try:
        return model.pin(file)
    except ModelError:
        return model


def _shown(text: str) -> str:
    """Return a text for a message: escaped, and shortened if it is very long."""
    return repr(text if len(text) <= 300 else f"{text[:100]}…{text[-100:]}")


def _first_line(error: Exception) -> str:
    return f"{str(error).strip().splitlines()[0].rstrip('.')}." if str(error).strip() else f"{type(error).__name__}."

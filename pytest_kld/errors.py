"""What can go wrong. Every message says what happened, where, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class KLDError(Exception):
    """Nothing was measured. In a test run this is an *error*, never a failed or passed gate."""


class ModelError(KLDError):
    """A model or tokenizer is missing, incomplete, or cannot be loaded."""


class CorpusError(KLDError):
    """The text is missing, empty, or too short for the windows asked for."""


class CaptureError(KLDError):
    """A capture is incomplete, corrupt, unfaithful, or does not match the other side's capture."""


class DamagedCaptureError(CaptureError):
    """A capture's files are not those that were recorded, or not those that were opened.

    Attributes:
        path: the capture's directory.
        what: what is wrong, without what to do.

    """

    def __init__(self, path: Path, what: str) -> None:
        """Say what is wrong with which capture, and what to do."""
        super().__init__(
            f"{what} If it is an entry of the cache, pass --kld-refresh to capture anew. If you named it by its path, "
            "make or copy it again."
        )
        self.path, self.what = path, what


class CacheError(KLDError):
    """The cache directory cannot be used: not writable, or the disk is full."""


class ReportError(KLDError):
    """A report cannot be written: its path is not a regular file, is not writable, or the disk is full."""


class ScoresError(KLDError):
    """A scores table is corrupt or has no valid position."""


class DamagedScoresError(ScoresError):
    """A scores file is not what was saved, or it holds the scores of something else.

    Attributes:
        what: what is wrong, without what to do.

    """

    def __init__(self, what: str) -> None:
        """Say what is wrong and what to do."""
        super().__init__(f"{what}; delete it or pass --kld-refresh")
        self.what = what


class CacheWarning(UserWarning):
    """The cache mended itself. Nothing is wrong with what was measured; something may be wrong with the disk."""


class ServerError(KLDError):
    """A server did not start, died, or returned something other than what was requested."""


class PatchError(KLDError):
    """SGLang cannot be patched: it is not installed, its release is unknown, or its files were modified."""

"""What can go wrong. Every message says what happened, where, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class KLDError(Exception):
    """Nothing was measured. In a test run this is an *error*, never a failed or passed gate."""


class ModelError(KLDError):
    """A model or tokenizer is missing, incomplete, or cannot be loaded."""


class SuiteError(KLDError):
    """A suite file cannot be read or has a mistake, or one of its Subjects cannot be run."""


class CorpusError(KLDError):
    """The text is missing, empty, or too short for the requested windows."""


class CaptureError(KLDError):
    """A capture is incomplete, corrupt, unfaithful, or does not match the other side's capture."""


class DamagedCaptureError(CaptureError):
    """A capture's files differ from those that were recorded, or from those that were opened.

    Attributes:
        path: the capture's directory.
        what: what is wrong, without the remedy.

    """

    def __init__(self, path: Path, what: str) -> None:
        """Build the message: what is wrong, and the remedy."""
        super().__init__(
            f"{what} If the capture is in the cache, pass --kld-refresh to record it again. If you named it by its "
            "path, record or copy it again."
        )
        self.path, self.what = path, what


class CacheError(KLDError):
    """The cache directory cannot be used: not writable, or the disk is full."""


class RemoteError(KLDError):
    """The shared cache cannot be reached, read or written, or there is none at its URL."""


class ArchiveError(KLDError):
    """An archive of captures cannot be made, or is damaged, incomplete or not an archive."""


class ReportError(KLDError):
    """A report cannot be written: its path is not a regular file, is not writable, or the disk is full."""


class ScoresError(KLDError):
    """A scores table is corrupt or has no valid position."""


class FloorError(KLDError):
    """The runs of one Subject differ by more than a limit allows, or a Subject cannot be run twice."""


class BaselineError(KLDError):
    """A baseline is missing, damaged, or was measured in another way."""


class DamagedScoresError(ScoresError):
    """A scores file differs from what was saved, or contains the scores of something else.

    Attributes:
        what: what is wrong, without the remedy.

    """

    def __init__(self, what: str) -> None:
        """Build the message: what is wrong, and the remedy."""
        super().__init__(f"{what}; delete it or pass --kld-refresh")
        self.what = what


class CacheWarning(UserWarning):
    """The cache repaired itself. The measurement is right, but the disk may be faulty."""


class ServerError(KLDError):
    """A server did not start, died, or returned something other than what was requested."""


class PatchError(KLDError):
    """SGLang cannot be patched: it is not installed, its release is unknown, or its files were modified."""

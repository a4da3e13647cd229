"""What can go wrong. Every message says what happened, where, and what to do about it."""


class KLDError(Exception):
    """Nothing was measured. In a test run this is an *error*, never a failed or passed gate."""


class ModelError(KLDError):
    """A model or tokenizer is missing, incomplete, or cannot be loaded."""


class CorpusError(KLDError):
    """The text is missing, empty, or too short for the windows asked for."""


class CaptureError(KLDError):
    """A capture is incomplete, corrupt, unfaithful, or does not fit the other side's."""


class CacheError(KLDError):
    """The cache directory cannot be used: not writable, or the disk is full."""


class ReportError(KLDError):
    """A report cannot be written: its path names no regular file, cannot be written, or the disk is full."""


class ScoresError(KLDError):
    """A scores table is corrupt or holds not one valid position."""


class ServerError(KLDError):
    """A server did not boot, died, or answered with something else than was asked for."""


class PatchError(KLDError):
    """A SGLang cannot be patched: there is none, it is of an unknown release, or somebody changed it."""

"""SIGTERM, which a scheduler sends before it kills: the session ends as after Ctrl-C, and its reports say so."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import pytest

REASON = "ended by SIGTERM"


def end_orderly(config: pytest.Config) -> None:
    """From now on let SIGTERM end the session in order; a second one ends the process at once.

    Does nothing if something else handles the signal, and in a worker of xdist, which its controller ends.
    """
    unhandled = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not unhandled or hasattr(config, "workerinput") or threading.current_thread() is not threading.main_thread():
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise KeyboardInterrupt(REASON)

    signal.signal(signal.SIGTERM, handle)
    config.add_cleanup(_restore)


def _restore() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

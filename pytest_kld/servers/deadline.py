"""A deadline for work that has none of its own, such as a request whose answer arrives a byte at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, work: Callable[[], T]) -> T:
    """Do work in another thread and return its result, or raise what it raises.

    Args:
        seconds: how long it may take. Afterwards it is left to itself; its thread does not keep the process alive.
        work: what is done. `requests` bounds the time between two bytes, not the time for all of them.

    Raises:
        TimeoutError: it took longer.

    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="pytest-kld-deadline", daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError:
        if result.done():  # the work's own error
            raise
        raise TimeoutError(f"no complete answer within {seconds:g} s") from None

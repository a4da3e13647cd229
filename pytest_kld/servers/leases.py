"""GPUs as leases: file locks that all sessions on a machine share, freed by the system when the holder dies."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pytest_kld.errors import ServerError
from pytest_kld.servers.gpus import query_gpus

_SECONDS_BETWEEN_TRIES = 1.0


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the GPUs that this process may use, in the form that CUDA_VISIBLE_DEVICES takes.

    They are UUIDs where `nvidia-smi` tells them, so that every session gives a GPU the same name.
    """
    listed = query_gpus("uuid")
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return listed
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    return tuple(listed[int(name)] if name.isdecimal() and int(name) < len(listed) else name for name in names)


def lease_directory() -> Path:
    """Return the directory of the locks: one for the machine, whoever runs the sessions."""
    directory = Path(tempfile.gettempdir()) / "pytest-kld-gpus"
    directory.mkdir(exist_ok=True)
    if directory.stat().st_uid == os.getuid():
        directory.chmod(0o1777)
    return directory


@contextmanager
def lease(
    count: int, gpus: tuple[str, ...], directory: Path, on_wait: Callable[[], None] = lambda: None
) -> Iterator[tuple[str, ...]]:
    """Hold some GPUs for as long as the context lasts.

    All of them are taken at once or none, so two sessions never wait for each other's.

    Args:
        count: how many.
        gpus: which may be taken.
        directory: where the locks are; see `lease_directory`.
        on_wait: called once if others hold too many of them.

    Yields:
        The names of the GPUs.

    Raises:
        ServerError: there are fewer, whoever holds them.

    """
    if count > len(gpus):
        raise ServerError(
            f"the server needs {count} GPUs and {len(gpus)} are visible ({', '.join(gpus) or 'none'}). Lower --tp, "
            "or see CUDA_VISIBLE_DEVICES."
        )
    held = _try(count, gpus, directory)
    if held is None:
        on_wait()
    while held is None:
        time.sleep(_SECONDS_BETWEEN_TRIES)
        held = _try(count, gpus, directory)
    try:
        yield tuple(held)
    finally:
        for lock in held.values():
            lock.release()


def _try(count: int, gpus: tuple[str, ...], directory: Path) -> dict[str, FileLock] | None:
    held: dict[str, FileLock] = {}
    for gpu in gpus:
        if len(held) == count:
            break
        lock = FileLock(directory / f"{gpu.replace('/', '_')}.lock", mode=0o666)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        held[gpu] = lock
    if len(held) == count:
        return held
    for lock in held.values():
        lock.release()
    return None

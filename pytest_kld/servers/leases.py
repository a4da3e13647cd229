"""GPUs as leases: file locks that all sessions on a machine share, freed by the system when the holder dies."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from filelock import FileLock, Timeout

from pytest_kld.errors import ServerError
from pytest_kld.servers.gpus import query_gpus

_SECONDS_BETWEEN_TRIES = 1.0


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the GPUs that a process with these variables may use.

    They are UUIDs if `nvidia-smi` reports them, so that every session gives a GPU the same name. Numbers in
    CUDA_VISIBLE_DEVICES are those that `nvidia-smi` shows.
    """
    listed = query_gpus("uuid")
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return listed
    names = takewhile(lambda name: name != "-1", (name.strip() for name in chosen.split(",")))  # CUDA stops there too
    return tuple(_name(name, listed) for name in names if name)


def _name(chosen: str, listed: Sequence[str]) -> str:
    """Return a GPU's UUID by its number, or by a prefix of its UUID, which CUDA accepts too."""
    if chosen.isdecimal() and int(chosen) < len(listed):
        return listed[int(chosen)]
    begun = [uuid for uuid in listed if chosen.startswith("GPU-") and uuid.startswith(chosen)]
    return begun[0] if len(begun) == 1 else chosen


def visibility(gpus: Sequence[str]) -> dict[str, str]:
    """Return the variables that make these GPUs, and no others, visible to a child process.

    GPUs are given by number: engines parse CUDA_VISIBLE_DEVICES as numbers, and SGLang falls back to slower
    collectives, with other rounding, if it cannot. The numbers are those of `nvidia-smi`, which counts in PCI bus
    order, so CUDA is told to count in that order too. GPUs that it does not list (MIG slices) keep their names.
    """
    listed = query_gpus("uuid")
    if not only_by_name(gpus, listed):
        numbers = [str(listed.index(gpu)) if gpu in listed else gpu for gpu in gpus]
        return {"CUDA_VISIBLE_DEVICES": ",".join(numbers), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def only_by_name(gpus: Sequence[str], listed: Sequence[str] | None = None) -> bool:
    """Tell whether some of these GPUs have no number: slices of a GPU (MIG), or a UUID `nvidia-smi` does not list."""
    known = query_gpus("uuid") if listed is None else listed
    return any(gpu not in known and not gpu.isdecimal() for gpu in gpus)


def lease_directory() -> Path:
    """Return the directory of the locks, which all users of the machine share."""
    directory = Path(tempfile.gettempdir()) / "pytest-kld-gpus"
    directory.mkdir(exist_ok=True)
    if directory.stat().st_uid == os.getuid():
        directory.chmod(0o1777)
    return directory


@contextmanager
def lease(
    count: int,
    gpus: tuple[str, ...],
    directory: Path,
    on_wait: Callable[[], None] = lambda: None,
    while_waiting: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, ...]]:
    """Hold some GPUs while the context lasts.

    Either all of them are taken or none, so two sessions never wait for each other's GPUs.

    Args:
        count: how many.
        gpus: which may be taken.
        directory: where the locks are; see `lease_directory`.
        on_wait: called once if others hold too many of them.
        while_waiting: called before each further try; raises to give up.

    Yields:
        The names of the GPUs.

    Raises:
        ServerError: there are fewer GPUs, free or held.

    """
    if count > len(gpus):
        raise ServerError(
            f"the server needs {count} GPUs, but {len(gpus)} are visible ({', '.join(gpus) or 'none'}). Lower --tp, "
            "or check CUDA_VISIBLE_DEVICES."
        )
    held = _try(count, gpus, directory)
    if held is None:
        on_wait()
    while held is None:
        while_waiting()
        time.sleep(_SECONDS_BETWEEN_TRIES)
        held = _try(count, gpus, directory)
    try:
        yield tuple(held)
    finally:
        for lock in held.values():
            lock.release()


@contextmanager
def lease_device(
    device: str,
    environment: Mapping[str, str],
    directory: Path,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[str | None]:
    """Hold the GPU behind a torch device of this process, so that no server is booted on it meanwhile.

    A server of this session that leases the same GPU must be stopped first, or this waits for it forever.

    Args:
        device: `cpu`, `cuda` (the first GPU) or `cuda:N`, the N-th of those that this process sees.
        environment: of this process.
        directory: where the locks are; see `lease_directory`.
        on_wait: called once if somebody else holds it.

    Yields:
        The GPU's name. If the device is not a GPU: None, and nothing is held.

    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        yield None
        return
    index, visible = int(number or 0), visible_gpus(environment)
    gpu = _uuid_by_torch(index) or (visible[index] if index < len(visible) else str(index))
    with lease(1, (gpu,), directory, on_wait):
        yield gpu


def _uuid_by_torch(index: int) -> str | None:
    """Return the UUID of this process's N-th GPU from torch, which is right in whatever order CUDA counts."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    name = f"GPU-{uuid}"
    return name if name in query_gpus("uuid") else None


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

"""Writing beside the scheduler: its thread starts copies to the host, and another thread writes the files.

The other thread computes nothing with torch. If it did, it would get its own pool of OpenMP workers; on a CPU such a
second pool slowed the model itself by 15 %.
"""

from __future__ import annotations

import queue
import stat
import threading
import traceback
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pytest_kld.hook.protocol import ORIGIN, error_file, origin, write_whole

_MAX_PENDING_BYTES = 4 << 30
"""Bytes that may wait to be written. Beyond this the scheduler waits for the disk, so memory stays bounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCopy:
    """A tensor on its way to the host.

    Attributes:
        tensor: the tensor on the host; complete once `ready` has occurred.
        ready: the event that marks the copy as complete; None if it is complete already.

    """

    tensor: Tensor
    ready: torch.cuda.Event | None = None


def copy_to_host(tensor: Tensor) -> HostCopy:
    """Start copying a tensor to the host immediately: the next block reuses the device's memory.

    On CUDA the copy goes to pinned memory and the current stream does not wait for it.
    """
    if not tensor.is_cuda:
        return HostCopy(tensor=tensor.clone() if tensor.device.type == "cpu" else tensor.cpu())
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    ready: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record()
    return HostCopy(tensor=host, ready=ready)


@dataclass(frozen=True, slots=True)
class Piece:
    """A file to be written.

    Attributes:
        path: the file's path.
        tensors: its tensors by name.
        metadata: text entries for the file's header, beside its origin.

    """

    path: Path
    tensors: dict[str, HostCopy]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return sum(copy.tensor.nbytes for copy in self.tensors.values())

    def write(self) -> None:
        """Wait for the copies, and write the file under a temporary name first."""
        tensors = {}
        for name, copy in self.tensors.items():
            if copy.ready is not None:
                copy.ready.synchronize()
            tensors[name] = copy.tensor.contiguous()
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)  # as the umask wants it: safetensors lets only the owner read
        save_file(tensors, temporary, metadata={**self.metadata, ORIGIN: origin()})
        temporary.chmod(mode)
        temporary.replace(self.path)


class Writer:
    """Writes pieces in its own thread."""

    def __init__(self) -> None:
        """Start no thread before the first piece."""
        self._queue: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._pending = 0
        self._room = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, piece: Piece) -> None:
        """Queue a piece; block only if too much is already waiting."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="pytest-kld-writer", daemon=True)
            self._thread.start()
        with self._room:
            self._room.wait_for(lambda: self._pending == 0 or self._pending + piece.bytes <= _MAX_PENDING_BYTES)
            self._pending += piece.bytes
        self._queue.put(piece)

    def _work(self) -> None:
        while True:
            piece = self._queue.get()
            try:
                piece.write()
            except Exception:
                _report(piece.path)
            finally:
                with self._room:
                    self._pending -= piece.bytes
                    self._room.notify()


def _report(path: Path) -> None:
    try:
        write_whole(path.parent / error_file(0), traceback.format_exc().encode())
    except OSError:  # the run's directory is gone, or the disk is full: the other side notices the missing file
        return

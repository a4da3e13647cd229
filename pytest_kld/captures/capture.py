"""The Capture: one model's output at every position of the windows, on disk.

    capture.json                 the manifest: what this is, how it was made, checks, digests, complete: true
    head.safetensors             weight [V, H] and bias [V]              (store `hidden`)
    windows/00000.safetensors    token_ids [N], hidden [N, H], check_rows [K], check_logits [K, V]   (`hidden`)
                                 token_ids [N], logits [N, V]            (`logits`)
    0.safetensors                token_ids [N], log_probs [N, V] float32 (`logprobs`, the original layout)
    experts.safetensors          of a model with experts, and `experts` in each window's file: see routes.py

Directories of the original layout, which have no manifest, are read as well. If they have two files per window, from
servers that saved their speculative head too, the even-numbered files are used.
"""

from __future__ import annotations

import stat
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pytest_kld.captures.manifest import EXPERTS_FILE, HEAD_FILE, MANIFEST, manifest_of_original_layout, read_manifest
from pytest_kld.captures.routes import EXPERTS
from pytest_kld.captures.tensors import check_experts_file, check_head_file, check_window_file
from pytest_kld.errors import CaptureError, DamagedCaptureError
from pytest_kld.files import atomic_path, sha256_of_file, sha256_of_json
from pytest_kld.kernel.head import Head, HeadCheck, HeadMode, check_head

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_kld.text.windows import Windows

Store = Literal["auto", "hidden", "logits", "logprobs"]
MATRIX = {"hidden": "hidden", "logits": "logits", "logprobs": "log_probs"}
"""The name of the matrix in a window's file, by store."""
Stamp = tuple[int, int, int]
"""What distinguishes a file from one that replaced it: inode, size in bytes, modification time in nanoseconds."""
_CHECKED_ELEMENTS = 1 << 22
"""Check rows are recomputed in groups of at least this many logits, in a few float32 matrices of that size."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, completely or not at all, and return its entry for the manifest."""
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)  # as the umask wants it: safetensors lets only the owner read
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.chmod(mode)
    return file_entry(path)


def file_entry(path: Path) -> dict[str, Any]:
    """Return a file's size and digest for the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


@dataclass(frozen=True)
class Capture:
    """A complete capture, opened for reading. See the module's docstring for the files.

    Attributes:
        path: its directory.
        manifest: the contents of `capture.json`.
        stamps: the stamp of each file when the capture was opened, by name. A file whose stamp has changed is not
            read: another process may have replaced the capture, and files of two captures must not be mixed.

    """

    path: Path
    manifest: dict[str, Any]
    stamps: Mapping[str, Stamp] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path, windows: Windows | None = None) -> Capture:
        """Open a capture. This is cheap, because it checks only names and sizes; `verify` checks the contents.

        Args:
            path: its directory.
            windows: those that it must cover; required for the original layout, which has no manifest.

        Raises:
            DamagedCaptureError: the capture is incomplete or has another schema.
            CaptureError: the directory is not a capture, or the capture covers other windows.

        """
        if (path / MANIFEST).is_file():
            manifest = read_manifest(path)
        elif windows is not None:
            manifest = manifest_of_original_layout(path, windows.count)
        else:
            raise CaptureError(f"{path} is not a capture: it has no {MANIFEST}")
        stamps = {}
        for name, entry in manifest["files"].items():
            stamp = _stamp(path / name)
            if stamp is None or stamp[1] != entry["bytes"]:
                state = "is missing" if stamp is None else f"has {stamp[1]:,} bytes"
                raise DamagedCaptureError(path, f"{path / name} {state}, expected {entry['bytes']:,} bytes.")
            stamps[name] = stamp
        capture = cls(path=path, manifest=manifest, stamps=stamps)
        if windows is not None:
            capture._check_windows(windows)
        return capture

    @property
    def name(self) -> str:
        """Return the model's name for reports."""
        return str(self.manifest["model"])

    @property
    def store(self) -> str:
        """Return `hidden`, `logits` or `logprobs`."""
        return str(self.manifest["store"])

    @cached_property
    def vocab_size(self) -> int:
        """Return the number of columns of the logits, without padding."""
        if self.manifest["vocab_size"] is None:  # in the original layout only the shape tells
            return self._shape(0)[1]
        return int(self.manifest["vocab_size"])

    @property
    def decoding(self) -> dict[str, int] | None:
        """Return how the windows were decoded, see `Decoding`; None if they were prefilled."""
        decoding: dict[str, int] | None = (self.manifest["protocol"] or {}).get("decoding")
        return decoding

    @property
    def first_position(self) -> int:
        """Return the first position of each window that the capture covers; it covers all from there on."""
        return 0 if self.decoding is None else self.decoding["prompt_size"]

    @property
    def windows(self) -> int:
        """Return the number of windows."""
        return len(self.manifest["window_files"])

    @cached_property
    def digest(self) -> str:
        """Return a digest of the capture's contents, regardless of how they were made."""
        described = {
            name: self.manifest[name] for name in ("store", "vocab_size", "transforms", "window_files", "files")
        }
        return sha256_of_json(described)

    def load_head(self) -> Head | None:
        """Read the head if the store is `hidden`; return None for the other stores."""
        if self.store != "hidden":
            return None
        with self._open_file(HEAD_FILE) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        told = self.manifest["transforms"]
        return Head(weight=tensors["weight"], bias=tensors.get("bias"), scale=told["scale"], softcap=told["softcap"])

    def token_ids(self, window: int) -> Tensor | None:
        """Return a window's token ids [N], or None if the file has none, as in the original layout."""
        with self._open_window(window) as file:
            return file.get_tensor("token_ids") if "token_ids" in file.keys() else None  # noqa: SIM118

    def rows(self, window: int, start: int, stop: int) -> Tensor:
        """Read positions of a window: hidden states [n, H], logits or log-probs [n, V], as stored."""
        first = self.first_position
        with self._open_window(window) as file:
            rows: Tensor = file.get_slice(MATRIX[self.store])[start - first : stop - first]
            return rows

    @property
    def routing(self) -> dict[str, Any] | None:
        """Return `layers`, `experts` and `unobserved`, see `Routing`; None for a dense model, or if it is unknown."""
        routing: dict[str, Any] | None = self.manifest["routing"]
        return routing

    @property
    def routed(self) -> tuple[int, int] | None:
        """Return the numbers of layers with experts and of experts in a layer; None if the capture has no routes."""
        routing = self.routing
        return None if routing is None or routing["unobserved"] else (len(routing["layers"]), routing["experts"])

    def routes(self, window: int) -> Tensor:
        """Return the experts [N, L, K] of a window's positions. `routed` tells whether the capture has them."""
        with self._open_window(window) as file:
            routes: Tensor = file.get_tensor(EXPERTS)
        if routes.numel() and self.routed and not 0 <= int(routes.min()) <= int(routes.max()) < self.routed[1]:
            raise self._damaged(f"window {window} of {self.path} has ids of experts that its model lacks.")
        return routes

    def verify(self) -> None:
        """Check every byte against the manifest's digests, every tensor's shape, and the head against the check rows.

        Raises:
            DamagedCaptureError: a file is corrupt or holds other tensors than it should, which the message names, or
                the head is not the engine's.

        """
        for name, entry in self.manifest["files"].items():
            if entry["sha256"] is not None and self._sha256(name) != entry["sha256"]:
                raise self._damaged(f"{self.path / name} is corrupt: its SHA-256 differs from the manifest's.")
        self.check_contents()
        self.require_unchanged()

    def check_contents(self) -> None:
        """Check that every file holds the tensors that the manifest implies, and the head against the check rows.

        Raises:
            DamagedCaptureError: a file holds others, which the message names, or the head is not the engine's.

        """
        if self.manifest["protocol"] is not None:  # the original layout's shapes were checked when it was opened
            self._check_tensors()
        if self.store == "hidden":
            check = self.check_head()
            if not check.faithful:
                raise self._damaged(
                    f"the capture {self.path} is invalid: logits recomputed from its hidden states differ from the "
                    f"engine's own by {check.worst:.3g} times what the engine's dtype explains."
                )

    def _check_tensors(self) -> None:
        manifest = self.manifest
        width = None
        if self.store == "hidden":
            with self._open_file(HEAD_FILE) as file, self._naming(HEAD_FILE):
                width = check_head_file(file, manifest["vocab_size"])
        if routed := self.routed:
            with self._open_file(EXPERTS_FILE) as file, self._naming(EXPERTS_FILE):
                check_experts_file(file, *routed)
        for name in manifest["window_files"]:
            with self._open_file(name) as file, self._naming(name):
                shape = (manifest["protocol"]["window_size"], self.vocab_size)
                check_window_file(file, manifest["store"], *shape, width, self.first_position, routed)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise self._damaged(f"{self.path / name} is not what its manifest says: {error}.") from error

    def require_unchanged(self) -> None:
        """Check by the stamps that every file is still the one that was opened.

        Raises:
            DamagedCaptureError: a file was replaced, changed or removed since; the message names it.

        """
        for name, stamp in self.stamps.items():
            if _stamp(self.path / name) != stamp:
                raise self._damaged(
                    f"{self.path / name} was replaced, changed or removed since this session opened it. Is another "
                    "process writing there?"
                )

    def check_head(self) -> HeadCheck:
        """Recompute the check rows of every window and compare them; see `head.check_head`."""
        head = self.load_head()
        assert head is not None
        checks, rows = [], 0
        group: list[tuple[Tensor, Tensor]] = []
        for window in range(self.windows):
            group.append(self._check_rows(window))
            rows += len(group[-1][0])
            if rows * head.vocab_size >= _CHECKED_ELEMENTS or window == self.windows - 1:
                hidden, logits = (torch.cat(tensors) for tensors in zip(*group, strict=True))
                checks.append(check_head(head, hidden, logits))
                group, rows = [], 0
        return combine_checks(checks)

    def _check_rows(self, window: int) -> tuple[Tensor, Tensor]:
        with self._open_window(window) as file:
            rows = [file.get_slice("hidden")[row : row + 1] for row in file.get_tensor("check_rows").tolist()]
            return torch.cat(rows), file.get_tensor("check_logits")

    def require_path(self, windows: Windows) -> None:
        """Check that the capture was made as these windows are to be run: prefilled, or decoded in the same way.

        Raises:
            CaptureError: it was made in another way.

        """
        wanted = None if windows.decoding is None else windows.decoding.to_json()
        if self.decoding != wanted:
            raise CaptureError(
                f"the capture {self.path} was made by {_how(self.decoding)}, but {_how(wanted)} is measured. Give the "
                "--kld-path, --kld-prompt-size and --kld-concurrency with which it was made."
            )

    def _check_windows(self, windows: Windows) -> None:
        self.require_path(windows)
        recorded = self.manifest["protocol"]
        if recorded is None:
            self._check_shapes(windows.size)
            return
        if recorded["token_ids_sha256"] != windows.digest:
            names = ("dataset", "windows", "windows_from", "window_size", "stride")
            theirs = ", ".join(f"{name} {recorded[name]}" for name in names if recorded.get(name) is not None)
            raise CaptureError(
                f"token ids differ: the capture {self.path} covers other windows ({theirs}, tokenizer "
                f"{recorded['tokenizer']}) than this session's. Give the options with which it was made."
            )

    def _check_shapes(self, size: int) -> None:
        """Check the windows' shapes, which are all that the original layout tells about them."""
        for window, name in enumerate(self.manifest["window_files"]):
            shape = list(self._shape(window))
            if shape != [size, self.vocab_size]:
                raise CaptureError(
                    f"{self.path / name} has shape {shape}, expected {[size, self.vocab_size]} (positions, "
                    "vocabulary). Give the --kld-window-size with which it was made."
                )

    def _shape(self, window: int) -> tuple[int, int]:
        """Return the numbers of positions and columns of a window's matrix."""
        with self._open_window(window) as file:
            shape = file.get_slice(MATRIX[self.store]).get_shape()
        if len(shape) != 2:
            file_name = self.path / self.manifest["window_files"][window]
            raise self._damaged(
                f"{file_name}: {MATRIX[self.store]} has {len(shape)} dimensions "
                f"(shape {shape}), expected 2: [positions, vocabulary]."
            )
        return int(shape[0]), int(shape[1])

    def _sha256(self, name: str) -> str:
        try:
            return sha256_of_file(self.path / name)
        except OSError as error:
            raise self._damaged(f"cannot read {self.path / name}: {error}.") from error

    def _damaged(self, what: str) -> DamagedCaptureError:
        return DamagedCaptureError(self.path, what)

    def _open_window(self, window: int) -> AbstractContextManager[Any]:
        return self._open_file(self.manifest["window_files"][window])

    @contextmanager
    def _open_file(self, name: str) -> Iterator[Any]:
        try:
            with safe_open(self.path / name, framework="pt") as file:
                if name in self.stamps and _stamp(self.path / name) != self.stamps[name]:
                    self.require_unchanged()
                yield file
        except (OSError, SafetensorError) as error:
            raise self._damaged(f"cannot read {self.path / name}: {error}.") from error


def _how(decoding: Mapping[str, int] | None) -> str:
    """Describe the path through the engine."""
    if decoding is None:
        return "prefill"
    return f"decoding (prompts of {decoding['prompt_size']:,} tokens, {decoding['concurrency']:,} sequences together)"


def _stamp(path: Path) -> Stamp | None:
    """Return a regular file's stamp, or None if there is no such file."""
    try:
        known = path.stat()
    except OSError:
        return None
    return (known.st_ino, known.st_size, known.st_mtime_ns) if stat.S_ISREG(known.st_mode) else None


def combine_checks(checks: list[HeadCheck]) -> HeadCheck:
    """Combine checks of several windows into one."""
    rows = sum(check.rows for check in checks)
    return HeadCheck(
        rows=rows,
        worst=max(check.worst for check in checks),
        mean_kl=sum(check.mean_kl * check.rows for check in checks if check.rows) / max(rows, 1),
        dtype=" and ".join(sorted({check.dtype for check in checks})),
    )


@dataclass(frozen=True, slots=True)
class LogitsReader:
    """Reads a capture's logits in blocks of rows, recomputed from hidden states if necessary."""

    capture: Capture
    head: Head | None
    mode: HeadMode
    device: torch.device

    @classmethod
    def of(cls, capture: Capture, mode: HeadMode, device: torch.device) -> LogitsReader:
        """Load the head to the device once, for all windows."""
        head = capture.load_head()
        return cls(capture, head.to(device) if head is not None else None, mode, device)

    def logits(self, window: int, start: int, stop: int) -> Tensor:
        """Return logits (or log-probs) [stop − start, V] of consecutive positions on the device.

        Raises:
            CaptureError: the window has fewer rows or columns than it should.

        """
        logits = self._from_rows(self.capture.rows(window, start, stop))
        if logits.shape != (stop - start, self.capture.vocab_size):
            raise CaptureError(
                f"window {window} of {self.capture.path}: rows {start} to {stop} have shape {tuple(logits.shape)}, "
                f"expected {(stop - start, self.capture.vocab_size)}"
            )
        return logits

    def logits_at(self, positions: Sequence[tuple[int, int]]) -> Tensor:
        """Return logits (or log-probs) [n, V] of single rows, each given by window and position, on the device."""
        rows = [self.capture.rows(window, position, position + 1) for window, position in positions]
        return self._from_rows(torch.cat(rows))

    def _from_rows(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.device)
        return rows if self.head is None else self.head.logits(rows, self.mode)

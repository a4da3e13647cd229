"""Recording: run a model over the windows and write its Capture, or resume an interrupted one."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pytest_kld import __version__
from pytest_kld.captures.cache import Cache, format_bytes
from pytest_kld.captures.capture import MATRIX, Capture, write_tensors
from pytest_kld.captures.journal import Journal, remove_others
from pytest_kld.captures.manifest import EXPERTS_FILE, HEAD_FILE, MANIFEST, SCHEMA, window_file, write_manifest
from pytest_kld.captures.routes import EXPERTS, TOKENS, checked_routes, observed, route_bytes, total_tokens
from pytest_kld.captures.timing import Timing
from pytest_kld.errors import CacheError, CaptureError, ModelError
from pytest_kld.files import atomic_path, sha256_of_file
from pytest_kld.kernel.head import Head, HeadCheck, check_head
from pytest_kld.servers.leases import lease_directory
from pytest_kld.servers.quiet import at_work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from pytest_kld.captures.capture import Store
    from pytest_kld.engines import Engine, LoadedModel, ModelFacts, Prefill
    from pytest_kld.progress import Progress
    from pytest_kld.subjects.subject import Subject
    from pytest_kld.text.windows import Windows

_NEEDED_SLACK_BYTES = 1 << 20
"""Allowance for the manifest, the headers of the token ids and the like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A capture to be recorded.

    Attributes:
        engine: the engine that runs the model.
        subject: what is run, with its model pinned.
        windows: the windows that it runs over.
        store: what is kept, as the user requested it.
        key: what determines the bits; it names the cache entry.

    """

    engine: Engine
    subject: Subject
    windows: Windows
    store: Store
    key: dict[str, Any]

    def run(self, cache: Cache, entry: Path, progress: Progress) -> None:
        """Record the capture and publish it as a cache entry.

        Raises:
            KLDError: the model does not load, its vocabulary lacks an id of the windows, its head does not fit the
                requested store, or the disk is too small. Complete windows are kept, and the next run uses them.

        """
        journal = Journal(cache.partial(entry), self.key)
        facts = self.engine.facts(self.subject)
        require_fits(facts, self.windows, self.subject.label)
        self._require_free(cache, entry, facts, "hidden" if self.store == "auto" else self.store, progress)
        progress.note(f"loading {self.subject.label}")
        started = time.monotonic()
        with self.engine.open(self.subject) as loaded, at_work(lease_directory()):
            ready = time.monotonic()
            head, store, reason = self._choose_store(loaded)
            if store != "hidden" and self.store == "auto":
                progress.note(f"{self.subject.label}: keeping logits, because {reason}")
                self._require_free(cache, entry, loaded.facts, store, progress)
            partial = cache.partial(entry)

            def require_free(dtype: torch.dtype) -> None:
                self._require_free(cache, entry, loaded.facts, store, progress, dtype)

            kept = len(journal.names)
            files = self._write_windows(journal, loaded, store, progress, require_free)
            run = max(1, self.windows.count - kept) * self.windows.rows
            timing = Timing(loading=ready - started, running=time.monotonic() - ready, positions=run)
            if head is not None:
                files[HEAD_FILE] = write_tensors(partial / HEAD_FILE, head.tensors())
            if routing := observed(loaded):
                windows = [partial / window_file(store, index) for index in range(self.windows.count)]
                tokens = total_tokens(windows, routing, self.windows.count * self.windows.rows, self.subject.label)
                files[EXPERTS_FILE] = write_tensors(partial / EXPERTS_FILE, {TOKENS: tokens})
            manifest = self._manifest(loaded, head, store, reason, files) | {"timing": timing.to_json()}
        if store == "hidden":
            check = Capture(path=partial, manifest=manifest).check_head()
            if not check.faithful:
                raise CaptureError(
                    f"{self.subject.label}: {_unfaithful(check)}, though not in the first window. Give "
                    "--kld-store=logits."
                )
            manifest["checks"] = check.to_json()
        write_manifest(partial, manifest)
        try:
            remove_others(partial, {MANIFEST, *files})
        except OSError as error:
            raise CacheError(f"cannot complete the cache entry {entry}: {error}") from error
        cache.publish(entry)

    @property
    def check_rows(self) -> list[int]:
        """The rows of a window's matrix whose full logits are kept with hidden states: the middle one and the last."""
        return [self.windows.rows // 2, self.windows.rows - 1]

    def _run(
        self, loaded: LoadedModel, windows: Windows, indices: Sequence[int], rows: Sequence[int] | None
    ) -> Iterator[Prefill]:
        """Run windows on their path. `rows` are rows of the matrix."""
        positions = None if rows is None else [windows.first_position + row for row in rows]
        if windows.decoding is None:
            return loaded.prefill(windows, indices, positions)
        return loaded.decode(windows, indices, positions)

    def _choose_store(self, loaded: LoadedModel) -> tuple[Head | None, str, str]:
        if self.store in ("logits", "logprobs"):
            return None, self.store, "requested by the user"
        head, reason = self._prove(loaded)
        if head is not None:
            return head, "hidden", reason
        if self.store == "hidden":
            raise CaptureError(
                f"{self.subject.label}: --kld-store=hidden is not possible: {reason}. Give auto or logits."
            )
        return None, "logits", reason

    def _prove(self, loaded: LoadedModel) -> tuple[Head | None, str]:
        """Find the head in the first window; when decoding, in its first two steps."""
        windows, rows = self.windows, self.check_rows
        if windows.decoding is not None:
            windows, rows = replace(windows, token_ids=windows.token_ids[:, : windows.first_position + 2]), [0, 1]
        probe = next(iter(self._run(loaded, windows, [0], rows)))
        if not loaded.heads:
            return None, "the model has no plain linear head"
        if probe.hidden is None or probe.hidden.shape[0] != windows.rows:
            return None, "the head's input was not recorded"
        vocab_size = loaded.facts.vocab_size
        logits = _trim(probe.logits, vocab_size, self.subject.label)
        checks = []
        for head in loaded.heads:
            if head.vocab_size < vocab_size or head.weight.shape[1] != probe.hidden.shape[1]:
                continue
            trimmed = head.trim(vocab_size)
            checks.append(check_head(trimmed, probe.hidden[rows], logits))
            if checks[-1].faithful:
                return trimmed, "check rows agree with the head"
        if not checks:
            return None, f"the head's shape does not fit {vocab_size:,} tokens"
        return None, _unfaithful(min(checks, key=lambda check: check.worst))

    def _write_windows(
        self,
        journal: Journal,
        loaded: LoadedModel,
        store: str,
        progress: Progress,
        require_free: Callable[[torch.dtype], None],
    ) -> dict[str, dict[str, Any]]:
        """Run the missing windows and write them.

        Args:
            journal: the journal of the entry in progress.
            loaded: the model.
            store: what is kept.
            progress: advances with each window.
            require_free: called with the logits' dtype before they are written, if it is wider than announced.

        """
        announced: torch.dtype = getattr(torch, loaded.facts.dtype)
        partial = journal.partial
        names = [window_file(store, index) for index in range(self.windows.count)]
        files: dict[str, dict[str, Any]] = {}
        for index, name in enumerate(names):
            if self._is_of_window(partial / name, store, index, loaded) and (known := journal.intact(name)) is not None:
                files[name] = known
        missing = [index for index, name in enumerate(names) if name not in files]
        if files:
            progress.note(f"{self.subject.label}: {len(files)} of {len(names)} windows are already captured")
        if damaged := [name for name in journal.names if name in names and name not in files]:
            progress.note(
                f"{self.subject.label}: {len(damaged)} windows of the interrupted capture are damaged and are captured "
                f"again, e.g. {partial / damaged[0]}"
            )
        rows = self.check_rows if store == "hidden" else None
        with progress.task(f"capture {self.subject.label}", len(names), len(files)) as task:
            for prefill in self._run(loaded, self.windows, missing, rows):
                if prefill.logits.dtype.itemsize > announced.itemsize:
                    announced = prefill.logits.dtype
                    require_free(announced)
                name = names[prefill.window]
                tensors = self._tensors(prefill, store, loaded)
                files[name] = write_tensors(partial / name, tensors)
                journal.add(name, files[name])
                task.advance()
        if left_out := [name for name in names if name not in files]:
            raise CaptureError(f"{self.subject.label}: the engine left out {len(left_out)} windows, e.g. {left_out[0]}")
        return files

    def _tensors(self, prefill: Prefill, store: str, loaded: LoadedModel) -> dict[str, Tensor]:
        tensors = {"token_ids": torch.from_numpy(self.windows.token_ids[prefill.window])}
        logits = _trim(prefill.logits, loaded.facts.vocab_size, self.subject.label)
        if store == "hidden":
            hidden = prefill.hidden
            matrix = {"hidden": hidden, "check_logits": logits}
            tensors["check_rows"] = torch.tensor(self.check_rows, dtype=torch.int32)
        elif store == "logits":
            matrix = {"logits": logits}
        else:
            matrix = {"log_probs": logits.float().log_softmax(-1)}
        expected = len(self.check_rows) if store == "hidden" else self.windows.rows
        if len(logits) != expected:
            raise CaptureError(
                f"{self.subject.label}, window {prefill.window}: the engine returned {len(logits)} rows instead of "
                f"{expected}"
            )
        if store == "hidden" and (prefill.hidden is None or len(prefill.hidden) != self.windows.rows):
            raise CaptureError(f"{self.subject.label}, window {prefill.window}: hidden states are missing")
        if routing := observed(loaded):
            where = f"{self.subject.label}, window {prefill.window}"
            if prefill.experts is None:
                raise CaptureError(f"{where}: the engine did not tell the experts of its positions")
            tensors[EXPERTS] = checked_routes(prefill.experts, routing, self.windows.rows, where)
        return {**tensors, **matrix}  # type: ignore[dict-item]

    def _is_of_window(self, path: Path, store: str, index: int, loaded: LoadedModel) -> bool:
        """Tell whether an interrupted session left this window in the required form. Reads no matrix."""
        try:
            with safe_open(path, framework="pt") as file:
                ids = file.get_tensor("token_ids")
                rows = file.get_slice(MATRIX[store]).get_shape()[0]
                routed = EXPERTS in file.keys()  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError):
            return False
        if observed(loaded) and not routed:
            return False
        return rows == self.windows.rows and torch.equal(ids, torch.from_numpy(self.windows.token_ids[index]))

    def _manifest(
        self, loaded: LoadedModel, head: Head | None, store: str, reason: str, files: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        facts, routing = loaded.facts, loaded.routing
        return {
            "schema": SCHEMA,
            "complete": True,
            "pytest_kld": __version__,
            "key": self.key,
            "model": self.subject.variant,
            "subject": self.subject.to_json(),
            "facts": facts.to_json(),
            "runtime": loaded.runtime,
            "origin": loaded.origin,
            "routing": None if routing is None else routing.to_json(),
            "protocol": self.windows.protocol(),
            "starts": self.windows.starts.tolist(),
            "store": store,
            "store_reason": reason,
            "vocab_size": facts.vocab_size,
            "transforms": None if head is None else head.transforms(),
            "checks": None,
            "window_files": [window_file(store, index) for index in range(self.windows.count)],
            "files": files,
        }

    def _require_free(
        self,
        cache: Cache,
        entry: Path,
        facts: ModelFacts,
        store: str,
        progress: Progress,
        logits_dtype: torch.dtype | None = None,
    ) -> None:
        kept = sum(path.stat().st_size for path in cache.partial(entry).rglob("*") if path.is_file())
        needed = max(0, capture_bytes(facts, self.windows, store, len(self.check_rows), logits_dtype) - kept)
        what = f"the capture of {self.subject.label} ({self.windows.count} windows, store {store})"
        free = cache.require_free(needed, what, entry)
        progress.note(f"{what} needs {format_bytes(needed)}; {format_bytes(free)} are free")


def adopt_windows(capture: Capture, journal: Journal) -> None:
    """Add the window files of a capture of fewer windows to a capture in progress, as hard links if possible.

    Files that do not match their manifest are left out and recorded again.
    """
    for name in capture.manifest["window_files"]:
        file, link, entry = capture.path / name, journal.partial / name, capture.manifest["files"][name]
        try:
            if name in journal.names or sha256_of_file(file) != entry["sha256"]:
                continue
        except OSError:  # another process removed it meanwhile
            continue
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.hardlink_to(file)
        except OSError:  # a file system without hard links
            with atomic_path(link) as temporary:
                shutil.copyfile(file, temporary)
        journal.add(name, entry)


def require_fits(facts: ModelFacts, windows: Windows, label: str) -> None:
    """Reject a model that cannot be run on these windows.

    Raises:
        ModelError: the model has no column for an id in the windows, or its context is shorter than a window.

    """
    greatest = int(windows.token_ids.max())
    if greatest >= facts.vocab_size:
        raise ModelError(
            f"the vocabulary of {label} has {facts.vocab_size:,} tokens, but the windows use id {greatest:,}: it is "
            f"not the vocabulary of the tokenizer of {windows.tokenizer}. Name the right one with --kld-tokenizer."
        )
    if facts.context_length is not None and windows.size > facts.context_length:
        raise ModelError(
            f"{label} supports {facts.context_length:,} positions, but the windows have {windows.size:,}. Give a "
            "smaller --kld-window-size (and --kld-stride)."
        )


def capture_bytes(
    facts: ModelFacts, windows: Windows, store: str, check_rows: int, logits_dtype: torch.dtype | None = None
) -> int:
    """Return the number of bytes that a capture takes on disk, to within the files' headers.

    Args:
        facts: the model's facts; hidden states and head have their dtype.
        windows: the windows that the model runs over.
        store: what is kept.
        check_rows: the number of rows of logits kept for each window with the hidden states.
        logits_dtype: the logits' dtype; None if it is not known yet, and then the model's dtype is used.

    """
    itemsize: int = getattr(torch, facts.dtype).itemsize
    logits_itemsize = itemsize if logits_dtype is None else logits_dtype.itemsize
    positions = windows.count * windows.rows
    if store == "hidden":
        head = facts.vocab_size * facts.hidden_size * itemsize
        checks = windows.count * check_rows * facts.vocab_size * logits_itemsize
        matrix = head + checks + positions * facts.hidden_size * itemsize
    else:
        matrix = positions * facts.vocab_size * (4 if store == "logprobs" else logits_itemsize)
    return matrix + windows.token_ids.size * 4 + positions * route_bytes(facts) + _NEEDED_SLACK_BYTES


def _trim(logits: Tensor, vocab_size: int, label: str) -> Tensor:
    if logits.shape[1] < vocab_size:
        raise CaptureError(
            f"{label}: its logits have {logits.shape[1]:,} columns, but its config says {vocab_size:,} tokens: part of "
            "the vocabulary is missing"
        )
    return logits[:, :vocab_size]


def _unfaithful(check: HeadCheck) -> str:
    return f"its head is not linear: check rows differ by {check.worst:.3g} times what its dtype explains"

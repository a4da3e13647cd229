"""Importing captures of the original layout: token ids, digests and a manifest are added to log-probabilities.

The original scripts saved `0.safetensors`, `1.safetensors`, … with `log_probs` [positions, vocabulary] and nothing
else. Which text they belong to is the user's word; that they are log-probabilities is checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_kld import __version__
from pytest_kld.captures.capture import Capture, write_tensors
from pytest_kld.captures.journal import remove_others
from pytest_kld.captures.manifest import MANIFEST, SCHEMA, window_file, write_manifest
from pytest_kld.errors import CaptureError
from pytest_kld.files import sha256_of_file, sha256_of_json

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from pytest_kld.captures.cache import Cache
    from pytest_kld.progress import Progress
    from pytest_kld.text.windows import Windows

ENGINE = "original scripts"
"""What stands for the engine in the key of an imported capture."""
_GREATEST_ERROR = 0.01
"""How far the logarithm of a row's sum may be from 0."""


def import_original(
    source: Path, name: str, windows: Windows, cache: Cache, progress: Progress
) -> tuple[Capture, float]:
    """Add a directory of the original layout to a cache.

    Args:
        source: the directory; with two files per window, the even-numbered ones are used.
        name: the model's name in reports.
        windows: those that it was captured with.
        cache: where the capture is added.
        progress: notified after each window.

    Returns:
        The capture, and the mean negative log-likelihood of the windows' tokens in nats. If that is greater than the
        logarithm of the vocabulary's size, these are hardly the right windows.

    Raises:
        CaptureError: files are missing, have another shape than the windows say, or do not hold log-probabilities.
        CacheError: the disk is too small, or the cache cannot be written.

    """
    original = Capture.open(source, windows)
    greatest = int(windows.token_ids.max())
    if greatest >= original.vocab_size:
        raise CaptureError(
            f"the windows use token id {greatest:,}, and {source} has {original.vocab_size:,} columns: give the "
            "tokenizer with which it was made"
        )
    key = _key(original, name, windows)
    entry = cache.capture_entry(key)
    with cache.lock(entry, lambda: progress.note(f"waiting for another process, which is making {entry.name}")):
        partial = cache.partial(entry)
        total = sum(file["bytes"] for file in original.manifest["files"].values()) + windows.token_ids.nbytes
        cache.require_free(total, f"the import of {source}", entry)
        files, nll = {}, []
        with progress.task(f"import {name}", windows.count) as task:
            for index in range(windows.count):
                ids = torch.from_numpy(windows.token_ids[index])
                log_probs = original.rows(index, 0, windows.size)
                _require_log_probs(log_probs, source / original.manifest["window_files"][index])
                nll.append(-log_probs[:-1].gather(1, ids[1:, None].long()).double())
                file = window_file("logprobs", index)
                files[file] = write_tensors(partial / file, {"token_ids": ids, "log_probs": log_probs})
                task.advance()
        original.require_unchanged()
        write_manifest(partial, _manifest(original, name, windows, key, files))
        remove_others(partial, {MANIFEST, *files})
        cache.publish(entry)
    return Capture.open(entry, windows), float(torch.cat(nll).nanmean())


def _key(original: Capture, name: str, windows: Windows) -> dict[str, Any]:
    """Return a key from the contents and the name, because nothing else tells how they were made.

    Two backends may give the same bits; their captures keep their names.
    """
    names = original.manifest["window_files"]
    contents = [sha256_of_file(original.path / name) for name in names]
    return {
        "schema": SCHEMA,
        "model": {"local": sha256_of_json(contents), "hash": "full", "elsewhere": {}},
        "engine": {"engine": ENGINE, "name": name},
        "path": "prefill",
        "axes": {},
        "token_ids_sha256": windows.digest,
        "store": "logprobs",
    }


def _manifest(
    original: Capture, name: str, windows: Windows, key: dict[str, Any], files: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "complete": True,
        "pytest_kld": __version__,
        "key": key,
        "model": name,
        "facts": {
            "model_class": "unknown",
            "vocab_size": original.vocab_size,
            "hidden_size": None,
            "context_length": None,
            "dtype": "float32",
            "quantization": None,
        },
        "protocol": windows.protocol(),
        "starts": windows.starts.tolist(),
        "store": "logprobs",
        "store_reason": f"imported from the {original.manifest['store_reason']}",
        "vocab_size": original.vocab_size,
        "transforms": None,
        "routing": None,
        "checks": None,
        "window_files": [window_file("logprobs", index) for index in range(windows.count)],
        "files": files,
    }


def _require_log_probs(rows: Tensor, file: Path) -> None:
    """Reject rows [N, V] that are not the logarithms of distributions. NaN is left for the comparison to count."""
    sums = rows.float().logsumexp(-1)
    wrong = (sums.abs() > _GREATEST_ERROR).nonzero().flatten()
    if rows.dtype != torch.float32 or len(wrong):
        what = f"row {int(wrong[0])} sums to exp({float(sums[wrong[0]]):.4g})" if len(wrong) else f"dtype {rows.dtype}"
        raise CaptureError(f"{file} does not hold float32 log-probabilities over the vocabulary: {what}")

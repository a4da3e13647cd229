"""The shape of a scores file that may come from elsewhere: a digest detects damage, and does not tell who wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def has_shape(
    columns: Mapping[str, NDArray[Any]], about: Any, dtypes: Mapping[str, Any], evidence: Mapping[str, NDArray[Any]]
) -> bool:
    """Tell whether a table has the columns, and the description, that readers of scores rely on.

    Args:
        columns: the arrays, which must all be [windows, positions].
        about: what was compared and how; see `Scores.about`.
        dtypes: the dtype of each column; float64 for those that it lacks.
        evidence: further arrays; see `Scores.evidence`.

    """
    shape = columns["kl"].shape
    if len(shape) != 2 or not all(
        column.shape == shape and column.dtype == np.dtype(dtypes.get(name, np.float64))
        for name, column in columns.items()
    ):
        return False
    starts = evidence.get("starts")
    return (starts is None or starts.shape[:1] == shape[:1]) and _is_described(about, shape[0])


def _is_described(about: Any, windows: int) -> bool:
    if not isinstance(about, dict) or not isinstance(protocol := about.get("protocol"), dict):
        return False
    datasets = protocol.get("datasets")
    if not isinstance(datasets, list) or not all(map(_is_dataset, datasets)):
        return False
    decoding = protocol.get("decoding")
    return (
        sum(dataset["windows"] for dataset in datasets) == windows
        and isinstance(protocol.get("dataset"), str)
        and _is_count(about.get("skip_first", 0))
        and (decoding is None or (isinstance(decoding, dict) and _is_count(decoding.get("prompt_size"))))
        and all(map(_is_side, (about.get("reference"), about.get("candidate"))))
    )


def _is_dataset(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("dataset"), str) and _is_count(value.get("windows"))


def _is_side(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in ("model", "digest")):
        return False
    key = value.get("key") or {}
    return (
        isinstance(key, dict)
        and isinstance(key.get("engine") or {}, dict)
        and isinstance(key.get("path", "prefill"), str)
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62

"""The tensors of a capture's files: the required names, shapes and dtypes.

Digests come from the manifest, and whoever wrote the manifest wrote the files. So the files are checked against what
the manifest says of the capture before anything is computed from them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_FLOATS = ("F16", "BF16", "F32", "F64")
_WHOLE = ("I32", "I64")
_IDS = ("U8", "I16", "I32")


def check_head_file(file: Any, vocab_size: int) -> int:
    """Check an open head file, and return H, the number of columns of its weight [V, H].

    Raises:
        ValueError: the message names the tensor and what was expected.

    """
    _require_names(file, {"weight"}, {"bias"})
    width = _shape(file, "weight", _FLOATS, (vocab_size, None))[1]
    if "bias" in file.keys():  # noqa: SIM118 (not a dict)
        _shape(file, "bias", _FLOATS, (vocab_size,))
    return width


def check_experts_file(file: Any, layers: int, experts: int) -> None:
    """Check an open file with the tokens of each expert, [layers, experts].

    Raises:
        ValueError: the message names the tensor and what was expected.

    """
    _require_names(file, {"tokens"})
    _shape(file, "tokens", ("I64",), (layers, experts))


def check_window_file(
    file: Any,
    store: str,
    size: int,
    vocab_size: int,
    width: int | None,
    first_position: int,
    routed: tuple[int, int] | None,
) -> None:
    """Check an open window file.

    Args:
        file: opened with `safe_open`.
        store: the capture's store.
        size: N, the number of positions of a window.
        vocab_size: V.
        width: H, for the store `hidden`.
        first_position: the first position that the matrix has.
        routed: the numbers of layers with experts and of experts in a layer, if the capture has routes.

    Raises:
        ValueError: the message names the tensor and what was expected.

    """
    size, tokens = size - first_position, size
    routes = set() if routed is None else {"experts"}
    if routed is not None:
        _require_names(file, routes, file.keys())
        _shape(file, "experts", _IDS, (size, routed[0], None))
    if store == "hidden":
        _require_names(file, {"token_ids", "hidden", "check_rows", "check_logits", *routes})
        _shape(file, "hidden", _FLOATS, (size, width))
        (count,) = _shape(file, "check_rows", _WHOLE, (None,))
        _shape(file, "check_logits", _FLOATS, (count, vocab_size))
        if count > size:  # before they are read
            raise ValueError(f"check_rows: there are {count:,} rows for {size:,} positions")
        rows = file.get_tensor("check_rows")
        if count and (int(rows.min()) < 0 or int(rows.max()) >= size):
            raise ValueError(f"check_rows: a row is not one of the {size:,} positions")
    else:
        matrix = "logits" if store == "logits" else "log_probs"
        _require_names(file, {"token_ids", matrix, *routes})
        _shape(file, matrix, _FLOATS, (size, vocab_size))
    _shape(file, "token_ids", _WHOLE, (tokens,))


def _require_names(file: Any, names: set[str], optional: Collection[str] = ()) -> None:
    there = set(file.keys())
    if not names <= there <= names.union(optional):
        raise ValueError(f"expected the tensors {', '.join(sorted(names))}, got {ascii(sorted(there))[:200]}")


def _shape(file: Any, name: str, dtypes: tuple[str, ...], expected: tuple[int | None, ...]) -> tuple[int, ...]:
    tensor = file.get_slice(name)
    shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
    fits = len(shape) == len(expected) and all(
        wanted in (None, got) for wanted, got in zip(expected, shape, strict=True)
    )
    if not fits or dtype not in dtypes:
        wanted = ", ".join("any" if length is None else str(length) for length in expected)
        raise ValueError(f"{name}: expected {'/'.join(dtypes)} [{wanted}], got {dtype} {list(shape)}")
    return shape

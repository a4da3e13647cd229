"""The tensors in a checkpoint's files: names, dtypes and shapes from the headers; weights only if asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from pytest_kld.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pytest_kld.subjects.model import ModelSpec

_FLOATS = ("F64", "F32", "F16", "BF16")
_WIDE = (*_FLOATS, "C64", "BOOL", "I64", "I32", "I16", "U64", "U32", "U16")
"""safetensors' names of dtypes that do not by themselves indicate a quantization; all others have at most 8 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: the file.
        dtype: the dtype's name in safetensors, e.g. `BF16`.
        shape: its shape in the file.

    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    def is_packed(self, name: str) -> bool:
        """Tell whether the tensor is not plain weights: it has at most 8 bits, or is a weight of integers."""
        return self.dtype not in _WIDE or (self.dtype not in _FLOATS and "weight" in name.rsplit(".", 1)[-1])

    def read(self, name: str) -> Tensor:
        """Read the tensor of this name from the file.

        Raises:
            SafetensorError: the file is damaged.

        """
        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def read_stored(model: ModelSpec, arguments: Mapping[str, Any]) -> dict[str, StoredTensor] | None:
    """Return the tensors of a checkpoint by name; None if its format has no headers (`.bin`, GGUF).

    Args:
        model: the pinned model; a model from the hub is in the hub's cache.
        arguments: keyword arguments of `from_pretrained`; some select other files.

    Raises:
        ModelError: a file is damaged; or the files contradict each other: an index names tensors or files that are not
            there, a directory holds two checkpoints, or a tensor has two values. Loaders differ in which one they take.

    """
    directory = _directory_of(model, arguments)
    if directory is None or arguments.get("gguf_file") or arguments.get("use_safetensors") is False:
        return None
    variant = f".{arguments['variant']}" if arguments.get("variant") else ""
    single = directory / f"model{variant}.safetensors"
    index = directory / f"model.safetensors.index{variant}.json"
    if not index.is_file():
        return _headers([single]) if single.is_file() else None
    weight_map = _weight_map(index)
    shards = [directory / name for name in sorted(set(weight_map.values()))]
    if single.is_file() and single not in shards:
        raise ModelError(
            f"{directory} holds two checkpoints, {single.name} and the shards of {index.name}: which one is loaded "
            "depends on the loader. Remove one of them."
        )
    if absent := [shard.name for shard in shards if not _is_file(shard)]:
        raise ModelError(
            f"{index} names {len(absent)} files that are not there, e.g. {absent[0]}. Download them again."
        )
    stored = _headers(shards)
    if lacking := sorted(weight_map.keys() - stored.keys()):
        raise ModelError(
            f"{index} names {len(lacking)} tensors that its files do not hold, e.g. {lacking[0]}: the checkpoint is "
            "incomplete, or the index belongs to another one."
        )
    return stored


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor, as an index names them."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ValueError("its weight_map does not map names of tensors to names of files")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{index} is damaged, or is no index of shards: {type(error).__name__}: {error}. Download it again."
        ) from error
    return files


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


def _headers(files: list[Path]) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for path in files:
        try:
            tensors = _header(path)
            twice = [name for name in tensors if name in stored and not _same(name, stored[name].file, path)]
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is damaged, or is no safetensors file: {error}. Download it again.") from error
        if twice:
            raise ModelError(
                f"{path.parent}: {stored[twice[0]].file.name} and {path.name} hold different values of {twice[0]}: "
                "which one is loaded depends on the loader. Remove the file or tensor that is out of date."
            )
        stored.update(tensors)
    return stored


def _header(path: Path) -> dict[str, StoredTensor]:
    with safe_open(path, framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - this is not a dict
        return {
            name: StoredTensor(file=path, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
            for name, part in parts.items()
        }


def _same(name: str, one: Path, other: Path) -> bool:
    with safe_open(one, framework="pt") as first, safe_open(other, framework="pt") as second:
        return torch.equal(first.get_tensor(name), second.get_tensor(name))


def _directory_of(model: ModelSpec, arguments: Mapping[str, Any]) -> Path | None:
    if model.path is not None:
        directory = model.path
    else:
        revision, cache_dir = model.revision or "main", arguments.get("cache_dir")
        config = try_to_load_from_cache(model.name, "config.json", revision=revision, cache_dir=cache_dir)
        if not isinstance(config, str):
            return None
        directory = Path(config).parent
    return directory / (arguments.get("subfolder") or "")

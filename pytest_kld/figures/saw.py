"""What a gate saw: paths, positions, vocabulary, kinds of text, experts, caches, engines; and what it did not see.

A verdict holds for what was run, so this is the coverage report of a gate. Plain data, made in this one place; reports
show it.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from pytest_kld.figures.experts import ExpertsSeen, SideExperts, experts_seen
from pytest_kld.figures.positions import Positions
from pytest_kld.figures.scores import labelled_positions, valid_positions
from pytest_kld.text.tokens import CLASSES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_kld.figures.scores import Scores
    from pytest_kld.text.tokens import Tokens

SIDES = ("reference", "candidate")
_BACKENDS = ("attention_backend", "moe_runner_backend", "quantization", "tp_size", "pp_size")
_SCRIPTS = {"Cjk": "Han", "Kangxi": "Han", "Ideographic": "Han"}
"""Scripts whose characters have other names than the script."""
_NAMED = 4
"""The number of experts that a sentence names."""


class PositionsSeen(TypedDict):
    """Positions that the figures cover.

    `distinct` counts each place in the text once; `first` and `last` are the least and the greatest position in a
    window, from 0: position i has i tokens before it. `context_length` is what the candidate supports, None if unknown.
    """

    counted: int
    distinct: int
    windows: int
    first: int
    last: int
    context_length: int | None


class VocabularySeen(TypedDict):
    """Distinct tokens that occurred as labels and as the reference's most probable token, of `size` in all."""

    size: int
    labels: int
    top1: int


class CacheSeen(TypedDict):
    """The KV cache of one side. `dtype` is None if unknown; `chunk` is the tokens that one pass of a prefill takes.

    `read` tells whether positions were computed from keys and values that an earlier pass had put into the cache; None
    if that is unknown.
    """

    dtype: str | None
    chunk: int | None
    read: bool | None


class EngineSeen(TypedDict):
    """What ran one side. `backends` holds what the engine says of itself: attention, MoE, parallel sizes."""

    engine: str | None
    version: str | None
    devices: list[str]
    backends: dict[str, Any]


class Saw(TypedDict):
    """What one gate saw. `token_classes` and `scripts` count labels by their kind; they are empty without a tokenizer.

    `concurrency` is the number of sequences that ran together, None if unknown; `unseen` says in sentences what the
    gate did not see.
    """

    paths: list[str]
    positions: PositionsSeen
    vocabulary: VocabularySeen
    token_classes: dict[str, int]
    scripts: dict[str, int]
    experts: ExpertsSeen | None
    kv_cache: dict[str, CacheSeen]
    concurrency: int | None
    engines: dict[str, EngineSeen]
    unseen: list[str]


def what_was_seen(scores: Scores, paths: Sequence[str], tokens: Tokens | None = None) -> Saw:
    """Describe what a table covers.

    Args:
        scores: the table, without the positions that no figure covers.
        paths: the paths through the engine that were measured: `prefill`, `decode`.
        tokens: turns ids into text; without it there are neither classes nor scripts.

    """
    valid, labelled = valid_positions(scores), labelled_positions(scores)
    places, protocol = Positions.of(scores), scores.about["protocol"]
    labels, counts = np.unique(places.labels[labelled], return_counts=True)
    engines = {side: _engine(scores.about[side]) for side in SIDES}
    saw = Saw(
        paths=list(paths),
        positions=PositionsSeen(
            counted=int(valid.sum()),
            distinct=_distinct(places),
            windows=len(valid),
            first=scores.first_position,
            last=protocol["window_size"] - 1,
            context_length=(scores.about["candidate"].get("facts") or {}).get("context_length"),
        ),
        vocabulary=VocabularySeen(
            size=scores.about["vocab_size"],
            labels=labels.size,
            top1=np.unique(places.reference_argmax[valid]).size,
        ),
        token_classes={} if tokens is None else _classes(labels.tolist(), counts.tolist(), tokens),
        scripts={} if tokens is None else _scripts(labels.tolist(), counts.tolist(), tokens),
        experts=experts_seen(scores.evidence, scores.columns["kl"]),
        kv_cache={side: _cache(scores.about[side], engines[side], protocol, paths) for side in SIDES},
        concurrency=_concurrency(scores.about["candidate"], engines["candidate"], protocol),
        engines=engines,
        unseen=[],
    )
    return Saw(**{**saw, "unseen": _unseen(saw)})


def _distinct(places: Positions) -> int:
    text = places.text[:, None] * (places.source.max() + 1) + places.source
    return int(np.unique(text[places.valid]).size)


def _classes(ids: Sequence[int], counts: Sequence[int], tokens: Tokens) -> dict[str, int]:
    found = dict.fromkeys(CLASSES, 0)
    for token_id, count in zip(ids, counts, strict=True):
        found[tokens.class_of(token_id)] += count
    return found


def _scripts(ids: Sequence[int], counts: Sequence[int], tokens: Tokens) -> dict[str, int]:
    """Count labels by the script of their first letter, the most frequent script first."""
    found: dict[str, int] = {}
    for token_id, count in zip(ids, counts, strict=True):
        letter = next((char for char in tokens.text(token_id) if char.isalpha()), None)
        if letter is not None and token_id not in tokens.special_ids:
            script = script_of(letter)
            found[script] = found.get(script, 0) + count
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def script_of(letter: str) -> str:
    """Return a letter's script: the first word of its name in Unicode, which is the script for nearly all letters."""
    word = unicodedata.name(letter, "unnamed").replace("-", " ").split()[0].capitalize()
    return _SCRIPTS.get(word, word)


def _engine(side: Mapping[str, Any]) -> EngineSeen:
    key, runtime = (side.get("key") or {}).get("engine") or {}, side.get("runtime") or {}
    name = key.get("engine")
    return EngineSeen(
        engine=name,
        version=key.get("versions", {}).get(name),
        devices=["cpu" if str(device).startswith("cpu") else str(device) for device in key.get("devices", ())],
        backends={name: runtime[name] for name in _BACKENDS if runtime.get(name) is not None},
    )


def _cache(side: Mapping[str, Any], engine: EngineSeen, protocol: Mapping[str, Any], paths: Sequence[str]) -> CacheSeen:
    runtime = side.get("runtime") or {}
    chunk = runtime.get("chunked_prefill_size")
    chunk = chunk if isinstance(chunk, int) and chunk > 0 else None
    read: bool | None = None
    if "decode" in paths:
        read = True
    elif engine["engine"] == "transformers":
        read = False
    elif "chunked_prefill_size" in runtime:
        read = chunk is not None and chunk < protocol["window_size"]
    return CacheSeen(dtype=runtime.get("kv_cache_dtype"), chunk=chunk, read=read)


def _concurrency(side: Mapping[str, Any], engine: EngineSeen, protocol: Mapping[str, Any]) -> int | None:
    """Return how many sequences run together: as asked for in decoding; one in a prefill, unless it is not our server.

    A server that was booted for a gate prefills one window in a batch.
    """
    if decoding := protocol.get("decoding"):
        return int(decoding["concurrency"])
    booted = isinstance(((side.get("key") or {}).get("engine") or {}).get("arguments"), list)
    return 1 if engine["engine"] == "transformers" or booted else None


def _unseen(saw: Saw) -> list[str]:
    """Say in sentences what was not seen, the most important first."""
    positions, vocabulary = saw["positions"], saw["vocabulary"]
    said = []
    if "decode" not in saw["paths"]:
        said.append("no decoding")
    if "prefill" not in saw["paths"]:
        said.append("no prefill beyond the prompts, which are not measured")
    longest = positions["context_length"]
    more = f", of {longest:,} that the candidate supports" if longest and longest > positions["last"] + 1 else ""
    if more or longest is None:
        said.append(f"no position beyond {positions['last'] + 1:,}{more}")
    if positions["first"]:
        said.append(f"no position before {positions['first']:,}")
    if saw["experts"] is not None:
        side = saw["experts"]["candidate"]
        said += ["which experts the candidate used"] if side is None else never_met(side)
    if any(cache["read"] is False for cache in saw["kv_cache"].values()) and "decode" not in saw["paths"]:
        sides = [side for side in SIDES if saw["kv_cache"][side]["read"] is False]
        said.append(f"no key or value read back from the KV cache ({' and '.join(sides)})")
    if saw["concurrency"] == 1:
        said.append("no two sequences together")
    missing = vocabulary["size"] - vocabulary["labels"]
    said.append(f"{missing:,} of {vocabulary['size']:,} tokens never occurred as label")
    kinds = [name for name, count in saw["token_classes"].items() if not count and name != "special"]
    if kinds:
        said.append(f"no label that is {' or '.join(kinds)}")
    if len(saw["scripts"]) == 1:
        said.append(f"no script but {next(iter(saw['scripts']))}")
    return said


def never_met(side: SideExperts) -> list[str]:
    """Say which experts were never met; empty if there are none."""
    which = [f"{layer['layer']}:{expert}" for layer in side["layers"] for expert in layer["never"]]
    named = f"layer:expert {', '.join(which[:_NAMED])}{', …' if len(which) > _NAMED else ''}"
    return [f"{len(which):,} of {side['experts']:,} experts never met ({named})"] if which else []

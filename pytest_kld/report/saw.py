"""The section "What this gate saw", in words: rows for tables, lines for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_kld.gate.result import by_candidate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_kld.gate.result import GateResult

TITLE = "What this gate saw"
_MOST_CHANGED = 3
"""The number of layers that are named for changed routes."""
_BACKENDS = {"attention_backend": "attention", "moe_runner_backend": "MoE", "tp_size": "tp", "pp_size": "pp"}


def saw_rows(saw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return heading and text of everything that a gate saw. See `figures.saw.Saw` for the data."""
    rows = [
        ("Path", " and ".join(saw["paths"])),
        ("Positions", _positions(saw["positions"])),
        ("Vocabulary", _vocabulary(saw["vocabulary"])),
    ]
    if kinds := _shares(saw["token_classes"]):
        rows.append(("Classes of labels", kinds))
    if scripts := _shares(saw["scripts"]):
        rows.append(("Scripts of labels", scripts))
    if saw["experts"] is not None:
        rows += _experts(saw["experts"])
    rows += _by_side("KV cache", {side: _cache(cache) for side, cache in saw["kv_cache"].items()})
    if saw["concurrency"] is not None:
        rows.append(("Sequences together", f"{saw['concurrency']:,}"))
    rows += _by_side("Engine", {side: _engine(engine) for side, engine in saw["engines"].items()})
    return rows


def saw_lines(results: Sequence[GateResult]) -> list[str]:
    """Return the terminal's lines: what was seen and what was not, once for all candidates with the same text."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for candidate, group in by_candidate(results).items():
        saw = next((result.saw for result in group if result.saw), None)
        if saw is not None:
            groups.setdefault(tuple(_short(saw)), []).append(candidate)
    lines = []
    for text, candidates in groups.items():
        of = f" ({', '.join(candidates)})" if len(groups) > 1 else ""
        lines += [f"{TITLE}{of}:", *(f"  {line}" for line in text)]
    return lines


def _short(saw: Mapping[str, Any]) -> list[str]:
    path, vocabulary = " and ".join(saw["paths"]), _vocabulary(saw["vocabulary"])
    lines = [f"{path}: {_positions(saw['positions'])}; {vocabulary}"]
    if saw["experts"] is not None:
        lines += [f"{heading}: {text}" for heading, text in _experts(saw["experts"])]
    return [*lines, f"not seen: {'; '.join(saw['unseen'])}"]


def _positions(seen: Mapping[str, Any]) -> str:
    windows = f"{seen['windows']:,} window{'' if seen['windows'] == 1 else 's'}"
    return (
        f"{seen['counted']:,} in {windows} ({seen['distinct']:,} places in the text), with {seen['first']:,} to "
        f"{seen['last']:,} tokens before them"
    )


def _vocabulary(seen: Mapping[str, Any]) -> str:
    labels, top1 = (seen[name] / seen["size"] for name in ("labels", "top1"))
    return f"{labels:.1%} of {seen['size']:,} tokens as label, {top1:.1%} as the reference's top-1"


def _shares(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {count / total:.1%}" for name, count in counts.items()) if total else ""


def _experts(seen: Mapping[str, Any]) -> list[tuple[str, str]]:
    few = seen["few_means_below"]
    rows = [
        (
            f"Experts of the {side}",
            f"{told['experts'] - told['never']:,} of {told['experts']:,} met, {told['few']:,} of them by fewer than "
            f"{few} positions; {told['per_token']} per token in each of {len(told['layers'])} layers",
        )
        for side in ("reference", "candidate")
        if (told := seen[side]) is not None
    ]
    if (rare := seen["rare"]) is not None:
        other = "" if rare["other_mean_kl"] is None else f", {rare['other_mean_kl']:.6f} at the others"
        rows.append(
            (
                "Rarest experts",
                f"mean KLD {rare['mean_kl']:.6f} at the {rare['positions']:,} positions whose route meets an expert "
                f"with at most {rare['most_tokens']:,} tokens{other}",
            )
        )
    if seen["changed"] is not None:
        layers = sorted(seen["candidate"]["layers"], key=lambda layer: -(layer["changed"] or 0))[:_MOST_CHANGED]
        most = ", ".join(f"layer {layer['layer']} {layer['changed']:.2%}" for layer in layers if layer["changed"])
        named = f" (most: {most})" if most else ""
        rows.append(("Routes changed", f"{seen['changed']:.2%} of the positions in a layer on average{named}"))
    return rows


def _cache(cache: Mapping[str, Any]) -> str:
    dtype = "dtype unknown" if cache["dtype"] is None else f"dtype {cache['dtype']}"
    chunk = "" if cache["chunk"] is None else f", prefilled in chunks of {cache['chunk']:,} tokens"
    read = {True: ", read back", False: ", not read back", None: ""}[cache["read"]]
    return f"{dtype}{chunk}{read}"


def _engine(engine: Mapping[str, Any]) -> str:
    if engine["engine"] is None:
        return "unknown: a capture that was named by its path"
    version = f" {engine['version']}" if engine["version"] else ""
    devices = f" on {', '.join(engine['devices'])}" if engine["devices"] else ""
    backends = "".join(f", {_BACKENDS.get(name, name)} {value}" for name, value in engine["backends"].items())
    return f"{engine['engine']}{version}{devices}{backends}"


def _by_side(heading: str, texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return one row if both sides are the same, else one for each."""
    if len(set(texts.values())) == 1:
        return [(heading, next(iter(texts.values())))]
    return [(f"{heading} of the {side}", text) for side, text in texts.items()]

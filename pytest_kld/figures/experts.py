"""What a comparison saw of the experts of a mixture-of-experts model: tokens per expert, rare experts, changed routes.

The arrays are made while the captures are there, and kept with the Scores as evidence. D datasets, L layers, E experts:

    experts.reference_tokens [D, L, E], experts.candidate_tokens    positions routed to each expert
    experts.reference_layers [L], experts.candidate_layers          the layers' numbers
    experts.common_layers [C]                                       layers that both sides have, with as many experts
    experts.changed [D, C]                                          positions whose set of experts differs there
    experts.positions [D]                                           positions that were run
    experts.rarest [windows, positions]                             tokens of the least used expert on the candidate's
                                                                    route through all layers
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_kld.captures.capture import Capture
    from pytest_kld.text.windows import Windows

    Arrays = dict[str, NDArray[Any]]

FEW = 32
"""An expert with fewer tokens than this was met, but a fault in one of 32 tokens would as likely as not be missed."""
RARE_SHARE = 0.05
"""Share of the positions, at least, whose routes count as going through the rarest experts."""
_PREFIX = "experts."
_SIDES = ("reference", "candidate")


class LayerExperts(TypedDict):
    """One layer of one side.

    `never` lists the experts that no position was routed to, `few` how many were met by fewer than `FEW` positions;
    `changed` is the share of the positions whose set of experts differs between the sides, None if they cannot be
    compared.
    """

    layer: int
    never: list[int]
    few: int
    changed: float | None


class SideExperts(TypedDict):
    """One side: its experts in all layers, and how many of them were never met or met by fewer than `FEW` positions.

    `per_token` is the number of experts that a layer uses for a token.
    """

    experts: int
    per_token: int
    never: int
    few: int
    least: int
    layers: list[LayerExperts]


class RareExperts(TypedDict):
    """The positions whose route meets an expert with at most `most_tokens` tokens; mean KL in nats, there and else."""

    most_tokens: int
    positions: int
    mean_kl: float
    other_mean_kl: float | None


class ExpertsSeen(TypedDict):
    """What was seen of the experts. A side is None if it is dense or its routes are unknown."""

    few_means_below: int
    reference: SideExperts | None
    candidate: SideExperts | None
    changed: float | None
    rare: RareExperts | None


def routes_evidence(reference: Capture, candidate: Capture, windows: Windows) -> Arrays:
    """Collect the arrays from two captures. Empty if neither has routes.

    Raises:
        DamagedCaptureError: a window's file cannot be read.

    """
    sides = {side: capture for side, capture in zip(_SIDES, (reference, candidate), strict=True) if capture.routed}
    if not sides:
        return {}
    counts = [part["windows"] for part in windows.protocol()["datasets"]]
    dataset_of = np.repeat(np.arange(len(counts)), counts)
    arrays: Arrays = {"positions": np.zeros(len(counts), np.int64)}
    for side, capture in sides.items():
        layers, experts = capture.routing["layers"], capture.routing["experts"]  # type: ignore[index]
        arrays[f"{side}_layers"] = np.array(layers, np.int32)
        arrays[f"{side}_tokens"] = np.zeros((len(counts), len(layers), experts), np.int64)
    if common := _common_layers(sides):
        arrays["common_layers"] = np.array([layer for layer, _, _ in common], np.int32)
        arrays["changed"] = np.zeros((len(counts), len(common)), np.int64)
    for window, dataset in enumerate(dataset_of.tolist()):
        routes = {side: _routes(capture, window, windows.rows) for side, capture in sides.items()}
        for side, ids in routes.items():
            arrays[f"{side}_tokens"][dataset] += _counted(ids, arrays[f"{side}_tokens"].shape[2])
        arrays["positions"][dataset] += len(next(iter(routes.values())))
        for place, (_, mine, theirs) in enumerate(common):
            ids_r, ids_c = routes["reference"][:, mine], routes["candidate"][:, theirs]
            differ = ids_r.shape != ids_c.shape or (ids_r != ids_c).any(-1)  # ids are in ascending order
            arrays["changed"][dataset, place] += int(np.sum(differ)) if np.ndim(differ) else len(ids_r)
    if "candidate" in sides:
        tokens = arrays["candidate_tokens"].sum(0)
        each = (_routes(candidate, window, windows.rows) for window in range(windows.count))
        arrays["rarest"] = np.stack([_rarest(routes, tokens) for routes in each])
    return {_PREFIX + name: array for name, array in arrays.items()}


def routes_of_dataset(evidence: Arrays, dataset: int, rows: slice) -> Arrays:
    """Return the arrays of one dataset, whose windows are these rows of the table."""
    kept = {name: array for name, array in evidence.items() if name.startswith(_PREFIX)}
    for name in kept:
        if name.endswith(("tokens", "changed", "positions")):
            kept[name] = kept[name][dataset : dataset + 1]
        elif name.endswith("rarest"):
            kept[name] = kept[name][rows]
    return kept


def experts_seen(evidence: Arrays, kl: NDArray[np.float64]) -> ExpertsSeen | None:
    """Describe what a table saw of the experts; None if neither side has routes.

    Args:
        evidence: the table's.
        kl: its column, NaN where a side is not finite; it may omit the first positions of each window.

    """
    arrays = {name.removeprefix(_PREFIX): array for name, array in evidence.items() if name.startswith(_PREFIX)}
    if not arrays:
        return None
    changed = _changed(arrays)
    return ExpertsSeen(
        few_means_below=FEW,
        reference=_side(arrays, "reference", changed),
        candidate=_side(arrays, "candidate", changed),
        changed=float(np.mean(list(changed.values()))) if changed else None,
        rare=_rare(arrays, kl),
    )


def expert_figures(evidence: Arrays, kl: NDArray[np.float64]) -> dict[str, float | None]:
    """Return the figures of a Summary: `experts_seen`, `routes_changed` and `rare_expert_kl`. None without routes."""
    seen = experts_seen(evidence, kl)
    if seen is None:
        return {}
    side, rare = seen["candidate"], seen["rare"]
    return {
        "experts_seen": None if side is None else 1 - side["never"] / side["experts"],
        "routes_changed": seen["changed"],
        "rare_expert_kl": None if rare is None else rare["mean_kl"],
    }


def _common_layers(sides: dict[str, Capture]) -> list[tuple[int, int, int]]:
    """Return the layers that both sides have, each with its place on both sides; empty if experts are not the same."""
    if len(sides) < 2:
        return []
    reference, candidate = (sides[side].routing for side in _SIDES)
    assert reference is not None
    assert candidate is not None
    if reference["experts"] != candidate["experts"]:
        return []
    theirs = {layer: place for place, layer in enumerate(candidate["layers"])}
    return [(layer, place, theirs[layer]) for place, layer in enumerate(reference["layers"]) if layer in theirs]


def _routes(capture: Capture, window: int, positions: int) -> NDArray[np.int64]:
    """Return the routes of a window's last positions; a capture of a prefill has those of a prompt too."""
    routes: NDArray[np.int64] = capture.routes(window)[-positions:].numpy().astype(np.int64)
    return routes


def _counted(ids: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
    layers = ids.shape[1]
    places = ids + np.arange(layers)[None, :, None] * experts
    counts: NDArray[np.int64] = np.bincount(places.ravel(), minlength=layers * experts).reshape(layers, experts)
    return counts


def _rarest(ids: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return, for each position, the tokens of the least used expert on its route. ids [N, L, K], tokens [L, E]."""
    least: NDArray[np.int64] = tokens[np.arange(ids.shape[1])[None, :, None], ids].min(axis=(1, 2))
    return least


def _changed(arrays: Arrays) -> dict[int, float]:
    if "changed" not in arrays:
        return {}
    shares = arrays["changed"].sum(0) / arrays["positions"].sum()
    return dict(zip(arrays["common_layers"].tolist(), shares.tolist(), strict=True))


def _side(arrays: Arrays, side: str, changed: dict[int, float]) -> SideExperts | None:
    if f"{side}_tokens" not in arrays:
        return None
    tokens = arrays[f"{side}_tokens"].sum(0)
    layers = [
        LayerExperts(
            layer=layer,
            never=np.flatnonzero(row == 0).tolist(),
            few=int(((row > 0) & (row < FEW)).sum()),
            changed=changed.get(layer),
        )
        for layer, row in zip(arrays[f"{side}_layers"].tolist(), tokens, strict=True)
    ]
    return SideExperts(
        experts=tokens.size,
        per_token=round(int(tokens[0].sum()) / int(arrays["positions"].sum())),
        never=int((tokens == 0).sum()),
        few=sum(layer["few"] for layer in layers),
        least=int(tokens[tokens > 0].min()),
        layers=layers,
    )


def _rare(arrays: Arrays, kl: NDArray[np.float64]) -> RareExperts | None:
    """Take the positions with the least used experts, at least `RARE_SHARE` of the valid ones, ties included."""
    valid = ~np.isnan(kl)
    if "rarest" not in arrays or not valid.any():
        return None
    rarest = arrays["rarest"][:, arrays["rarest"].shape[1] - kl.shape[1] :]  # the table may omit the first positions
    ordered = np.sort(rarest[valid])
    most = int(ordered[max(0, int(np.ceil(RARE_SHARE * ordered.size)) - 1)])
    rare, other = valid & (rarest <= most), valid & (rarest > most)
    return RareExperts(
        most_tokens=most,
        positions=int(rare.sum()),
        mean_kl=float(kl[rare].mean()),
        other_mean_kl=float(kl[other].mean()) if other.any() else None,
    )

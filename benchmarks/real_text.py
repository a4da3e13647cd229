"""Check the intervals on a real text: do they contain the figure of the whole text? See coverage.py, --real."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from statistics import median

import numpy as np

from pytest_kld.figures.interval import Interval
from pytest_kld.figures.scores import COLUMNS, Scores, Summary
from pytest_kld.figures.uncertainty import intervals
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import cut_windows

SIZE = 256
COUNTS = (10, 20, 40)
STARTS = 120
"""About as many contiguous stretches are tried for each number of windows."""
FIGURES = ("mean", "p99", "top1_agreement")


def measure(model_path: Path, dataset: str) -> Scores:
    """Score all of a text in windows that do not overlap: a model against itself with its head in NVFP4.

    The last hidden states of both are the same, so only one model is run, once.
    """
    import torch
    from round_trip import nvfp4  # of the quickstart
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pytest_kld.kernel.divergence import divergence

    windows = cut_windows(
        load_corpus(dataset, Path()),
        AutoTokenizer.from_pretrained(model_path),
        count=None,
        size=SIZE,
        stride=SIZE,
        label=str(model_path),
    )
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    head = model.get_output_embeddings().weight.detach()
    rounded = nvfp4(head)
    columns = {name: np.empty((windows.count, SIZE), dtype) for name, dtype in COLUMNS.items()}
    columns["token_ids"][:] = windows.token_ids
    with torch.inference_mode():
        for window, ids in enumerate(torch.from_numpy(windows.token_ids).long()):
            hidden = model.base_model(ids[None]).last_hidden_state[0]
            labels = torch.cat([ids[1:], torch.tensor([-1])])
            figures = divergence(hidden @ head.T, hidden @ rounded.T, labels)
            for field in fields(figures):
                columns[field.name][window] = getattr(figures, field.name).numpy()
            if window % 20 == 19:
                print(f"{window + 1} of {windows.count} windows", file=sys.stderr, flush=True)
    return Scores(columns=columns, about={"protocol": windows.protocol()}, evidence={"starts": windows.starts})


def chosen(scores: Scores, rows: range, windows_from: str) -> Scores:
    """Return the scores of some windows, as if only they had been cut from the text."""
    protocol = {**scores.about["protocol"], "windows": len(rows), "windows_from": windows_from}
    protocol["datasets"] = [{**protocol["datasets"][0], "windows": len(rows)}]
    return Scores(
        columns={name: column[list(rows)] for name, column in scores.columns.items()},
        about={**scores.about, "protocol": protocol},
        evidence={"starts": np.array(rows) * SIZE},
    )


def choices(windows: int, count: int) -> Iterator[tuple[str, range]]:
    """Yield stretches of `count` contiguous windows, and every set of as many that are spread evenly."""
    last = windows - count
    for start in range(0, last + 1, max(1, last // STARTS)):
        yield "start", range(start, start + count)
    step = windows // count
    for first in range(step):
        yield "spread", range(first, first + step * count, step)


def coverage_of_text(scores: Scores, confidence: float = 0.95) -> dict[tuple[str, int, str], dict[str, float]]:
    """Return how often intervals from some windows contain the figure of all windows.

    Returns:
        (figure, number of windows, `start` or `spread`) → `covered` and `below` (shares: the interval contains the
        figure, or ends below it), `sets` (how many were tried), `width` (median width over the figure).

    """
    windows, true = len(scores.columns["kl"]), Summary.of(scores).to_json()
    found: dict[tuple[str, int, str], list[Interval]] = {}
    for count in COUNTS:
        for windows_from, rows in choices(windows, count):
            for name, interval in intervals(chosen(scores, rows, windows_from), confidence, names=FIGURES).items():
                found.setdefault((name, count, windows_from), []).append(interval)
    return {
        key: {
            "covered": sum(one.low <= true[key[0]] <= one.high for one in known) / len(known),
            "below": sum(one.high < true[key[0]] for one in known) / len(known),
            "sets": len(known),
            "width": median((one.high - one.low) / true[key[0]] for one in known),
        }
        for key, known in found.items()
    }


def print_real(model_path: Path, dataset: str) -> None:
    print_coverage(measure(model_path, dataset), dataset)


def print_coverage(scores: Scores, dataset: str) -> None:
    windows = len(scores.columns["kl"])
    print(f"\n95 % intervals on {dataset}: {windows} windows of {SIZE} tokens; truth: the figure of all of them")
    print(f"{'figure':16} {'windows':>8} {'from':>8} {'sets':>6} {'covered':>8} {'below':>8} {'width':>8}")
    for (name, count, windows_from), row in sorted(coverage_of_text(scores).items()):
        shares = " ".join(f"{row[key]:8.1%}" for key in ("covered", "below", "width"))
        print(f"{name:16} {count:8} {windows_from:>8} {row['sets']:6} {shares}", flush=True)

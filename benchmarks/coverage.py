"""Check whether the intervals hold what they promise, on simulated texts whose true figures are known.

    python benchmarks/coverage.py [--repetitions 2000] [--windows 100 12 6] [--ratios 0.5 1 2] [--sizes] [--seed 0]
    python benchmarks/coverage.py --real [--models quickstart/models] [--dataset python-docs]

The texts are scored as the protocol does. A token's log KL has three parts: one changes slowly along the text, one
belongs to the token, and one belongs to the token in the context of one window. KL is log-normal with σ = 1.49: P99 is
11 times the mean (15 times in published figures of a large model in 4 bits). Windows have 2,048 tokens and stride 512,
so a token is scored up to four times.

The script prints how often 95 % intervals contain the truth, on which side they miss, and how often intervals contain
it that assume independent positions. Then it prints how often a gate that may stop after every round decides wrongly.
With `--sizes` it prints instead how often an interval of the mean ends below the truth, so that a wrong candidate could
pass, for texts from 1 window of 2 tokens on. With `--real` it runs the quickstart's SmolLM2-135M on all of a real
text, against itself with its head in NVFP4, and prints how often intervals from a few windows contain the figure of the
whole text, with windows from one stretch and with windows that are spread over it (a quarter of an hour on 2 cores).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pytest_kld.figures.schedule import schedule
from pytest_kld.figures.scores import COLUMNS, Scores, Summary
from pytest_kld.figures.uncertainty import intervals
from pytest_kld.gate.limits import LIMITS
from pytest_kld.gate.verdict import judge

ROOT = Path(__file__).parent.parent
SIZE, STRIDE = 2048, 512
SLOW, TOKEN, CONTEXT = 0.6, 1.1, 0.8
"""Standard deviations of the three parts of a token's log KL."""
CORRELATION = 0.98
"""Correlation of the slow part from one token to the next, which gives a correlation length of 50 tokens."""
SIGMA = math.sqrt(SLOW**2 + TOKEN**2 + CONTEXT**2)
AGREE = 0.9
"""True top-1 agreement."""
DRIFT = 0.01
"""True mean of the candidate's NLL minus the reference's."""
CONFIDENCE = 0.95
SIZES = (
    *((1, size, size) for size in (2, 8, 64, 256, 512, 1024, 2048)),
    *((windows, SIZE, STRIDE) for windows in (3, 6, 12, 100)),
)
"""Number of windows, their size and their stride, from far too little text to the protocol."""
NORMAL = NormalDist()


def simulate(
    rng: np.random.Generator,
    windows: int,
    mean: float = 0.05,
    *,
    size: int = SIZE,
    stride: int = STRIDE,
    sigma: float = SIGMA,
) -> Scores:
    """Draw a text and score it: `windows` windows, true mean KL `mean`, standard deviation of ln KL `sigma`."""
    tokens = (windows - 1) * stride + size
    source = (np.arange(windows) * stride)[:, None] + np.arange(size)
    latent = (SLOW * _slow(rng, tokens) + TOKEN * rng.standard_normal(tokens))[source]
    latent += CONTEXT * rng.standard_normal(source.shape)
    kl = mean * np.exp(sigma / SIGMA * latent - sigma**2 / 2)
    surprise = 0.8 * rng.standard_normal(tokens)[source] + 0.6 * rng.standard_normal(source.shape)
    columns = {name: np.zeros(source.shape, dtype) for name, dtype in COLUMNS.items()}
    columns["kl"] = kl
    columns["reference_nll"] += 3.0
    columns["candidate_nll"] = 3.0 + DRIFT + np.sqrt(kl) * surprise
    columns["candidate_argmax"] = (latent > SIGMA * NORMAL.inv_cdf(AGREE)).astype(np.int32)
    columns["flags"][:, -1] = 4
    return Scores(columns=columns, about={"protocol": {"windows": windows, "window_size": size, "stride": stride}})


def _slow(rng: np.random.Generator, tokens: int) -> NDArray[np.float64]:
    """Draw a first-order autoregression with variance 1, by convolving noise with its impulse response."""
    memory = math.ceil(math.log(1e-4) / math.log(CORRELATION))
    response = CORRELATION ** np.arange(memory) * math.sqrt(1 - CORRELATION**2)
    length = 1 << (tokens + 2 * memory).bit_length()
    noise = rng.standard_normal(tokens + memory)
    filtered = np.fft.irfft(np.fft.rfft(noise, length) * np.fft.rfft(response, length), length)
    return filtered[memory : memory + tokens]


def truth(mean: float = 0.05) -> dict[str, float]:
    """Return the true figures."""
    median = mean * math.exp(-(SIGMA**2) / 2)
    levels = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}
    quantiles = {name: median * math.exp(SIGMA * NORMAL.inv_cdf(level)) for name, level in levels.items()}
    return {"mean": mean, **quantiles, "top1_agreement": AGREE, "log_ppl_ratio": DRIFT}


def naive_intervals(scores: Scores) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals that treat every position as independent."""
    z = NORMAL.inv_cdf(0.5 + CONFIDENCE / 2)
    columns, found = scores.columns, {}
    kl = np.sort(columns["kl"].ravel())
    n = kl.size
    for name, level in {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}.items():
        half = z * math.sqrt(level * (1 - level) / n)
        found[name] = (float(kl[math.floor((level - half) * n)]), float(kl[math.ceil((level + half) * n)]))
    means = {
        "mean": kl,
        "top1_agreement": columns["reference_argmax"] == columns["candidate_argmax"],
        "log_ppl_ratio": (columns["candidate_nll"] - columns["reference_nll"])[:, :-1],
    }
    for name, values in means.items():
        half = z * float(values.std()) / math.sqrt(values.size)
        found[name] = (float(values.mean()) - half, float(values.mean()) + half)
    return found


def coverage(repetitions: int, windows: int, seed: int) -> dict[str, dict[str, float]]:
    """Return for each figure the shares of texts whose interval lies below, contains, or lies above the truth.

    Returns:
        figure → `covered`, `below`, `above`, `naive` (shares), `effective` (positions, on average).

    """
    rng = np.random.default_rng(seed)
    true = truth()
    counts = {name: dict.fromkeys(("covered", "below", "above", "naive", "effective"), 0.0) for name in true}
    for _ in range(repetitions):
        scores = simulate(rng, windows)
        ours, naive = intervals(scores, CONFIDENCE), naive_intervals(scores)
        for name, value in true.items():
            interval, count = ours[name], counts[name]
            count["below"] += (interval.high < value) / repetitions
            count["above"] += (interval.low > value) / repetitions
            count["covered"] += (interval.low <= value <= interval.high) / repetitions
            count["naive"] += (naive[name][0] <= value <= naive[name][1]) / repetitions
            count["effective"] += interval.effective_positions / repetitions
    return counts


def passes(repetitions: int, windows: int, size: int, stride: int, sigma: float, seed: int) -> dict[str, float]:
    """Return how often the interval of the mean misses the truth, and how often there is too little text for one.

    Returns:
        Shares `wrong pass` (all of the interval is below the truth), `wrong fail` (all of it is above), `too few` (the
        text has fewer than the least number of windows), and `windows`, the average least number of those texts.

    """
    rng = np.random.default_rng(seed)
    counts = dict.fromkeys(("wrong pass", "wrong fail", "too few", "windows"), 0.0)
    for _ in range(repetitions):
        scores = simulate(rng, windows, size=size, stride=stride, sigma=sigma)
        interval = intervals(scores, CONFIDENCE, names=("mean",))["mean"]
        counts["wrong pass"] += interval.high < 0.05
        counts["wrong fail"] += interval.low > 0.05
        counts["too few"] += interval.least_windows is not None
        counts["windows"] += interval.least_windows or 0
    shares = {name: count / repetitions for name, count in counts.items()}
    return {**shares, "windows": counts["windows"] / max(1.0, counts["too few"])}


def stopping(
    repetitions: int, most: int, ratio: float, seed: int, *, spending: bool = True, bounds: Mapping[str, float] = {}
) -> dict[str, float]:
    """Gate texts whose true mean KL is `ratio` times the limit, in rounds, until the limit is decided.

    Args:
        repetitions: number of texts.
        most: the greatest number of windows.
        ratio: ratio of the truth to the limit.
        seed: seed of the generator.
        spending: whether the rounds share the error; if not, each round takes all of it, which is wrong.
        bounds: limits; by default 0.05 for the mean.

    Returns:
        Shares `pass`, `fail` and `inconclusive`, and the number of `windows` used on average.

    """
    rng = np.random.default_rng(seed)
    limits = dict(bounds) or {"max_mean": 0.05}
    outcome = {"pass": 0.0, "fail": 0.0, "inconclusive": 0.0, "windows": 0.0}
    for _ in range(repetitions):
        text = simulate(rng, most, 0.05 * ratio)
        for look in schedule(most):
            scores = first_windows(text, look.windows)
            spend = look.spend if spending else 1.0
            known = intervals(scores, CONFIDENCE, spend=spend, names={LIMITS[name].figure for name in limits})
            verdict = judge(Summary.of(scores).to_json(), limits, intervals=known)
            if verdict.decided:
                break
        outcome[verdict.state] += 1
        outcome["windows"] += look.windows
    return {name: total / repetitions for name, total in outcome.items()}


def first_windows(scores: Scores, windows: int) -> Scores:
    """Return the scores of the first `windows` windows."""
    return Scores(columns={name: column[:windows] for name, column in scores.columns.items()}, about=scores.about)


def print_sizes(repetitions: int, seed: int) -> None:
    print(f"95 % intervals of the mean, {repetitions:,} texts for each row")
    names = ("wrong pass", "wrong fail", "too few", "windows")
    print(f"{'sigma':>5} {'text':>14} " + " ".join(f"{name:>10}" for name in names))
    for sigma in (SIGMA, 2.0):
        for windows, size, stride in SIZES:
            row = passes(repetitions, windows, size, stride, sigma, seed)
            shares = " ".join(f"{row[name]:10.1%}" for name in names[:3])
            print(f"{sigma:5.2f} {f'{windows} x {size}':>14} {shares} {row['windows']:10.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--windows", type=int, nargs="*", default=[100, 12, 6])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0])
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--models", type=Path, default=Path("quickstart/models"))
    parser.add_argument("--dataset", default="python-docs")
    arguments = parser.parse_args()
    if arguments.real:
        sys.path[:0] = [str(ROOT), str(ROOT / "conftest_examples" / "quickstart")]
        from make_models import make_models  # torch; not needed for the simulations

        from benchmarks.real_text import print_real

        reference, _ = make_models(arguments.models)
        print_real(reference, arguments.dataset)
        return
    if arguments.sizes:
        print_sizes(arguments.repetitions, arguments.seed)
        return
    error = 2 * math.sqrt(0.95 * 0.05 / arguments.repetitions)
    for windows in arguments.windows:
        print(f"\n95 % intervals, {windows} windows, {arguments.repetitions:,} texts (± {error:.1%})")
        print(f"{'figure':16} {'covered':>8} {'below':>8} {'above':>8} {'naive':>8} {'effective positions':>20}")
        for name, row in coverage(arguments.repetitions, windows, arguments.seed).items():
            shares = " ".join(f"{row[key]:8.1%}" for key in ("covered", "below", "above", "naive"))
            print(f"{name:16} {shares} {row['effective']:20,.0f}", flush=True)
    print(f"\nmax_mean in rounds, at most 100 windows, {arguments.repetitions:,} texts for each row")
    print(f"{'truth / limit':>13} {'rounds':>14} {'pass':>8} {'fail':>8} {'inconclusive':>13} {'windows':>8}")
    for ratio in arguments.ratios:
        for spending in (True, False) if ratio == 1 else (True,):
            row = stopping(arguments.repetitions, 100, ratio, arguments.seed, spending=spending)
            words = "share error" if spending else "each spend all"
            print(
                f"{ratio:13} {words:>14} {row['pass']:8.1%} {row['fail']:8.1%} {row['inconclusive']:13.1%} "
                f"{row['windows']:8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

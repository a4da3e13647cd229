"""Large amounts of work in bounded memory.

    python benchmarks/load.py scores                    20 million positions: summary, intervals, verdict, reports
    python benchmarks/load.py windows --plot FILE       10,000 windows of a tiny model, in process and on a server
    python benchmarks/load.py report                    an HTML report of 200 candidates, scrolled in Chromium

Prints times, memory and sizes. `windows` and `report` need the test environment (`.[test]`). The first one's server is
the tests' small one; `--engine vllm` and `--engine sglang` run the real ones, and install them for CPUs on first use.
The second one drives a Chromium.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

T = TypeVar("T")
Curve = list[tuple[int, float]]
"""How much work was done, and the memory then, in MB."""

ROOT = Path(__file__).parent.parent
SIZE = 2048


def positions(count: int, work: Path) -> None:
    """Make scores of so many positions, and do with them what a gate does."""
    sys.path.insert(0, str(ROOT / "tests"))
    from made import made_result

    from pytest_kld.figures.profile import profile_of
    from pytest_kld.figures.scores import COLUMNS, Scores, Summary
    from pytest_kld.figures.uncertainty import intervals
    from pytest_kld.gate.result import checks_of
    from pytest_kld.gate.verdict import judge
    from pytest_kld.report.html import write_html_report
    from pytest_kld.report.json_file import write_json_report

    random = np.random.default_rng(0)
    shape = (count // SIZE, SIZE)
    columns: dict[str, Any] = {
        name: random.integers(0, 100, shape, dtype) if np.dtype(dtype).kind != "f" else random.exponential(2, shape)
        for name, dtype in COLUMNS.items()
    }
    columns["flags"][:] = 0
    columns["kl"] = random.lognormal(np.log(0.01), 1, shape)
    columns["reference_confidence"] = np.exp(-columns["reference_nll"])
    for side in ("reference", "candidate"):
        columns[f"{side}_cut_mass"][:] = 0
    text = {"dataset": "a text", "windows": shape[0]}
    protocol = {**text, "window_size": SIZE, "stride": SIZE, "datasets": [text]}
    sides = {side: {"model": side, "digest": side} for side in ("reference", "candidate")}
    about = {**sides, "protocol": protocol, "versions": {}}
    made = Scores(columns=columns, about=about)
    taken = sum(column.nbytes for column in columns.values())
    print(f"{shape[0] * SIZE:,} positions, {taken / 1e9:.2f} GB of columns\n")
    print("| step | s | peak memory beyond the columns |")
    print("|---|---|---|")
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def step(name: str, work: Callable[[], T]) -> T:
        began = time.monotonic()
        result = work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
        print(f"| {name} | {time.monotonic() - began:.1f} | {max(0, peak) / 1e9:.2f} GB |", flush=True)
        return result

    summary = step("summary", lambda: Summary.of(made).to_json())
    sure = step("intervals", lambda: intervals(made, 0.95))
    verdict = step("verdict", lambda: judge(summary, {"max_mean": 0.05, "max_nan": 0}, intervals=sure))
    profile = step("profile", lambda: profile_of(made))
    result = made_result("candidate", figures=summary, checks=checks_of(verdict), profile=profile)
    step("JSON report", lambda: write_json_report(work / "report.json", [result]))
    step("HTML report", lambda: write_html_report(work / "report.html", [result]))
    step("save", lambda: made.save(work / "scores.safetensors"))
    step("load", lambda: Scores.load(work / "scores.safetensors"))


@contextmanager
def watched(processes: Callable[[], list[psutil.Process]], done: Callable[[], int]) -> Iterator[Curve]:
    """Record, now and then, how much work is done and the memory that processes have beyond shared files, in MB."""
    found: Curve = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            try:
                taken = sum(one.memory_info().rss - one.memory_info().shared for one in processes())
            except psutil.NoSuchProcess:
                continue
            found.append((done(), taken / 1e6))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def prepared(count: int, work: Path) -> tuple[Path, Any]:
    """Save a tiny model and return it with so many windows of 32 random tokens."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from pytest_kld.text.windows import Windows

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(vocab_size=1024, num_key_value_heads=2, head_dim=32, max_position_embeddings=512, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(work / "model")
    ids = np.random.default_rng(0).integers(0, 1024, (count, 32), dtype=np.int32)
    cut = Windows(token_ids=ids, starts=np.arange(count), stride=32, dataset="", text_sha256="", tokenizer="", bos=None)
    return work / "model", cut


def done(cache: Path) -> Callable[[], int]:
    """Return a function that counts the windows on disk."""
    return lambda: sum(1 for _ in cache.glob("captures/*/windows/0*"))


def record(engine: Any, subject: Any, cut: Any, cache: Path) -> None:
    """Capture windows."""
    from pytest_kld.captures.cache import Cache
    from pytest_kld.captures.recording import Recording
    from pytest_kld.progress import Silent

    recording = Recording(engine=engine, subject=subject, windows=cut, store="hidden", key={})
    recording.run(Cache(cache), Cache(cache).capture_entry({}), Silent())


def in_process(_: str, count: int, work: Path) -> dict[str, Curve]:
    """Capture so many windows with transformers; return the memory as work is done."""
    from pytest_kld.engines.transformers import TransformersEngine
    from pytest_kld.subjects.model import ModelSpec
    from pytest_kld.subjects.subject import Subject

    model, cut = prepared(count, work)
    subject = Subject(name="tiny", model=ModelSpec.parse(str(model), Path()), engine="transformers")
    engine = TransformersEngine(dtype="float32", device="cpu")
    began = time.monotonic()
    with watched(lambda: [psutil.Process()], done(work / "cache")) as curve:
        record(engine, subject, cut, work / "cache")
    print(f"transformers: {count:,} windows in {time.monotonic() - began:.0f} s", flush=True)
    return {"transformers": curve}


def in_small_server(_: str, count: int, work: Path) -> dict[str, Curve]:
    """Capture so many windows on the tests' small server; return the memory of both sides as work is done."""
    sys.path[:0] = [str(ROOT / "tests" / "engines"), str(ROOT / "tests")]
    from tiny_engine import Tiny
    from tiny_pool import TinyPool

    model, cut = prepared(count, work)
    pool = TinyPool(work, Tiny())
    try:
        subject = pool.subject(model)
        handle = pool.pool.get(subject.spec, subject.arguments["args"], subject.environment)
        return both_sides("small server", handle.pid, pool.of(Tiny()), subject, cut, work / "cache")
    finally:
        pool.pool.close()


def in_real_server(name: str, count: int, work: Path) -> dict[str, Curve]:
    """The same with SGLang or vLLM, all of whose processes count."""
    sys.path[:0] = [str(ROOT / "tests")]
    from served import booting
    from sglang_cpu.environment import sglang_environment
    from vllm_cpu.environment import vllm_environment

    environment = {"sglang": sglang_environment, "vllm": vllm_environment}[name](work / "hook")
    model, cut = prepared(count, work)
    with booting(environment.with_dtype("float32"), work) as boot:
        server = boot(model)
        return both_sides(name, server.handle.pid, server.engine, server.subject, cut, work / "cache")


def both_sides(name: str, supervisor: int, engine: Any, subject: Any, cut: Any, cache: Path) -> dict[str, Curve]:
    """Capture windows on a server; return the memory of its processes and of this one as work is done."""
    server = psutil.Process(supervisor).children(recursive=True)
    began = time.monotonic()
    with (
        watched(lambda: server, done(cache)) as theirs,
        watched(lambda: [psutil.Process()], done(cache)) as ours,
    ):
        record(engine, subject, cut, cache)
    print(f"{name}: {cut.count:,} windows in {time.monotonic() - began:.0f} s", flush=True)
    return {name: theirs, f"{name}: its client": ours}


ENGINES = {
    "transformers": in_process,
    "small": in_small_server,
    "sglang": in_real_server,
    "vllm": in_real_server,
}


def windows(count: int, engines: list[str]) -> dict[str, Curve]:
    """Capture so many windows with each engine, in a process of its own."""
    curves: dict[str, Curve] = {}
    for engine in engines:
        with (
            tempfile.TemporaryDirectory(prefix="pytest-kld-load-") as work,
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor,
        ):
            curves |= executor.submit(ENGINES[engine], engine, count, Path(work)).result()
    return curves


def describe(curves: dict[str, Curve], count: int) -> None:
    """Print the memory at a tenth and at nine tenths of the work, and the most: at the end heads are checked."""
    print("\n| process | MB after a tenth | MB after nine tenths | most, with the check of the head |")
    print("|---|---|---|---|")
    for name, curve in curves.items():
        at = [next((taken for done, taken in curve if done >= count * share), curve[-1][1]) for share in (0.1, 0.9)]
        print(f"| {name} | {at[0]:.0f} | {at[1]:.0f} | {max(taken for _, taken in curve):.0f} |")


def plot(curves: dict[str, Curve], count: int, path: Path) -> None:
    """Draw memory over the number of windows."""
    width, height, left = 640, 300, 60
    most = 1.25 * max(taken for curve in curves.values() for _, taken in curve)
    colours = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf")
    parts = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        y, x = 260 - 240 * share, left + 560 * share
        parts.append(f'<path d="M{left} {y:.0f}H620" stroke="#ddd"/>')
        parts.append(f'<text x="5" y="{y + 4:.0f}">{most * share:.0f} MB</text>')
        parts.append(f'<text x="{x:.0f}" y="278" text-anchor="middle">{count * share:,.0f}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        line = " ".join(f"{left + 560 * done / count:.1f},{260 - 240 * taken / most:.1f}" for done, taken in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[number]}" stroke-width="2"/>')
        x, y = left + 10 + 190 * (number % 3), 15 + 15 * (number // 3)
        parts.append(f'<text x="{x}" y="{y}" fill="{colours[number]}">{name}</text>')
    parts.append('<text x="340" y="295" text-anchor="middle">windows on disk</text>')
    font = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {font}>'
    path.write_text("\n".join([head, *parts, "</svg>\n"]))


def report(count: int, work: Path) -> None:
    """Write the HTML report of so many candidates, open it in Chromium, and scroll to its end."""
    sys.path.insert(0, str(ROOT / "tests"))
    from browser import Browser
    from made import many_results

    from pytest_kld.report.html import write_html_report

    path, results = work / "report.html", many_results(count)
    began = time.monotonic()
    write_html_report(path, results)
    print(f"{count} candidates: written in {time.monotonic() - began:.1f} s, {path.stat().st_size / 1e6:.1f} MB")
    with Browser() as browser:
        began = time.monotonic()
        browser.open(path)
        opened = time.monotonic() - began
        nodes, height = (
            browser.run(f"return document.{what}")
            for what in ("querySelectorAll('*').length", "documentElement.scrollHeight")
        )
        print(f"opened in {opened:.1f} s: {nodes:,} elements, {height:,} pixels high")
        parts = browser.scroll(100)
    print(f"scrolled in 100 steps: {np.median(parts) * 1e3:.0f} ms a step (median), {max(parts) * 1e3:.0f} ms at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scores", "windows", "report"])
    parser.add_argument("--count", type=int, help="positions, windows or candidates")
    parser.add_argument(
        "--engine",
        action="append",
        choices=ENGINES,
        help="for windows: transformers and small by default; may be given several times",
    )
    parser.add_argument("--plot", type=Path, help="an SVG file for the curves")
    options = parser.parse_args()
    if options.what == "scores":
        with tempfile.TemporaryDirectory(prefix="pytest-kld-load-") as work:
            positions(options.count or 20_000_000, Path(work))
        return
    if options.what == "report":
        with tempfile.TemporaryDirectory(prefix="pytest-kld-load-") as work:
            report(options.count or 200, Path(work))
        return
    count = options.count or 10_000
    curves = windows(count, options.engine or ["transformers", "small"])
    describe(curves, count)
    if options.plot:
        plot(curves, count, options.plot)


if __name__ == "__main__":
    main()

"""The stages that run.py measures. Each stage runs in a separate process and prints one JSON object."""

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from original import compare_window, kl_per_position, save_window
from transformers import AutoModelForCausalLM, Qwen3Config

from pytest_kld.captures.cache import Cache
from pytest_kld.captures.capture import Capture, write_tensors
from pytest_kld.captures.recording import Recording
from pytest_kld.engines.transformers import TransformersEngine
from pytest_kld.figures.compare import compare
from pytest_kld.kernel.device import pick_device
from pytest_kld.kernel.divergence import divergence
from pytest_kld.kernel.reduction import compiled_reduction, eager_reduction
from pytest_kld.progress import Silent
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import Subject
from pytest_kld.text.corpus import load_corpus
from pytest_kld.text.windows import Windows, cut_windows, load_tokenizer

SIZE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What all stages share.

    Attributes:
        work: directory for captures and other files.
        models: directories of reference and candidate.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        windows: number of windows of 512 tokens.
        repeats: how often each timing is taken.

    """

    work: Path
    models: dict[str, Path]
    device: torch.device
    windows: int
    repeats: int

    def cut(self, count: int | None = None) -> Windows:
        """Cut the windows that both methods run on."""
        path = str(self.models["reference"])
        tokenizer = load_tokenizer(ModelSpec.parse(path, Path()), trust_remote_code=False)
        corpus = load_corpus("python-docs", Path())
        return cut_windows(corpus, tokenizer, count=count or self.windows, size=SIZE, stride=SIZE, label=path)

    def subject(self, side: str) -> Subject:
        """Return one side's model as transformers runs it."""
        model = ModelSpec.parse(str(self.models[side]), Path())
        return Subject(name=model.label, model=model, engine="transformers")


def peak_bytes(device: torch.device) -> int:
    """Return the process's peak memory: the GPU's on CUDA, else the resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # ru_maxrss would start at the parent's size; VmHWM is this program's own.
    lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
    own = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return own[0] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Time one call."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def alternate(works: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Time the functions in turn, `repeats` times, after one call of each; return median and minimum in seconds."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            elapsed = seconds(work, device)
            if repeat:
                times[name].append(elapsed)
    return {name: {"median": statistics.median(taken), "min": min(taken)} for name, taken in times.items()}


def record(run: Run, side: str, windows: Windows, store: str = "hidden", dtype: str = "auto") -> Path:
    """Make one side's capture with our method and return its directory."""
    entry = run.work / f"{side}-{store}-{dtype}-{windows.count}"
    if not entry.exists():
        subject = run.subject(side)
        engine = TransformersEngine(dtype=dtype, device=str(run.device))
        key = {"benchmark": entry.name}
        recording = Recording(engine=engine, subject=subject, windows=windows, store=store, key=key)
        recording.run(Cache(run.work), entry, Silent())
    return entry


def disk(run: Run) -> dict[str, Any]:
    """Return bytes per position of each store's matrix, and the bytes that are kept once or per window beside it."""
    windows = run.cut()
    result = {}
    for dtype in ("float32", "bfloat16"):
        capture = Capture.open(record(run, "reference", windows, "hidden", dtype), windows)
        rows = capture.rows(0, 0, 1)
        entries = capture.manifest["files"]
        result[dtype] = {
            "per_position": rows.numel() * rows.element_size(),
            "total": sum(entry["bytes"] for entry in entries.values()),
            "head": entries["head.safetensors"]["bytes"],
        }
    original = run.work / "original-reference" / "0.safetensors"
    size = original.stat().st_size
    result["original"] = {"per_position": size // SIZE, "total": size * windows.count}
    return result | {"positions": windows.count * windows.size}


def capture(run: Run, method: str, side: str) -> dict[str, Any]:
    """Return seconds per window and memory above the model of a plain forward pass, our capture, or the original's."""
    windows = run.cut()
    engine = TransformersEngine(device=str(run.device))
    with engine.open(run.subject(side)) as loaded:
        rows = [SIZE // 2, SIZE - 1] if method == "ours" else None
        base = peak_bytes(run.device)
        with tempfile.TemporaryDirectory(dir=run.work) as scratch:
            folder = Path(scratch) if method == "plain" else run.work / f"original-{side}"
            folder.mkdir(exist_ok=True)
            times = []
            start = time.perf_counter()
            for prefill in loaded.prefill(windows, range(windows.count), rows):
                if method == "original":
                    save_window(prefill.logits, folder / f"{prefill.window}.safetensors")
                elif method == "ours":
                    tensors = {"hidden": prefill.hidden, "check_logits": prefill.logits}
                    write_tensors(folder.with_name("ours-timing") / f"{prefill.window}.safetensors", tensors)
                times.append(time.perf_counter() - start)
                start = time.perf_counter()
        return {"median": statistics.median(times[1:]), "min": min(times[1:]), "peak": peak_bytes(run.device) - base}


def make_captures(run: Run) -> dict[str, Any]:
    """Make both captures in a separate process, so that the models' memory does not count as the comparison's."""
    windows = run.cut()
    return {side: str(record(run, side, windows)) for side in ("reference", "candidate")}


def compare_ours(run: Run) -> dict[str, Any]:
    """Return seconds per window of our comparison, and its memory above the imported libraries."""
    windows = run.cut()
    sides = [Capture.open(record(run, side, windows), windows) for side in ("reference", "candidate")]
    return _compare(run, sides, windows)


def _compare(run: Run, sides: list[Capture], windows: Windows) -> dict[str, Any]:
    base = peak_bytes(run.device)
    times, scores = [], None
    for _ in range(max(1, run.repeats // 2)):
        start = time.perf_counter()
        scores = compare(*sides, windows, head="exact", device=run.device, progress=Silent())
        times.append((time.perf_counter() - start) / windows.count)
    mean = float(scores.columns["kl"].mean())
    return {"median": statistics.median(times), "min": min(times), "peak": peak_bytes(run.device) - base, "mean": mean}


def compare_original(run: Run) -> dict[str, Any]:
    """Return seconds per window of the original comparison, and its memory."""
    base, times, kl = peak_bytes(run.device), [], []
    for window in range(run.windows):
        paths = [run.work / f"original-{side}" / f"{window}.safetensors" for side in ("reference", "candidate")]
        start = time.perf_counter()
        kl.append(compare_window(*paths, run.device))
        times.append(time.perf_counter() - start)
    mean = float(torch.cat(kl).double().mean())
    peak = peak_bytes(run.device) - base
    return {"median": statistics.median(times), "min": min(times), "peak": peak, "mean": mean}


def kernel(run: Run, vocab_size: int) -> dict[str, Any]:
    """Time the way from logits (float32, 512 positions) to figures: the original operations, ours, and a plain read."""
    torch.manual_seed(0)
    reference = torch.randn(SIZE, vocab_size, device=run.device).mul_(3)
    candidate = torch.randn(SIZE, vocab_size, device=run.device).mul_(0.1).add_(reference)
    labels = torch.zeros(SIZE, dtype=torch.int64, device=run.device)
    compiled = compiled_reduction()
    return alternate(
        {
            "read": lambda: (reference.sum(), candidate.sum()),
            "original": lambda: kl_per_position(reference, candidate),
            "eager": lambda: divergence(reference, candidate, labels, reduction=eager_reduction),
            "compiled": lambda: divergence(reference, candidate, labels, reduction=compiled),
        },
        run.device,
        run.repeats,
    )


def make_wide_capture(run: Run, count: int) -> dict[str, Any]:
    """Make a tiny model with V = 262,144, if it is not there yet, and its capture."""
    folder = run.work / "wide"
    if not folder.exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = Qwen3Config(vocab_size=262_144, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny = replace(run, models={"wide": folder})
    return {"capture": str(record(tiny, "wide", run.cut(count)))}


def compare_wide(run: Run, count: int) -> dict[str, Any]:
    """Return the memory of our comparison at V = 262,144 above the libraries, heads included, for `count` windows."""
    windows = run.cut(count)
    opened = Capture.open(record(run, "wide", windows), windows)
    return _compare(replace(run, repeats=1), [opened, opened], windows)


def main() -> None:
    """Run the stage that the only command-line argument describes in JSON."""
    asked = json.loads(sys.argv[1])
    run = Run(
        work=Path(asked["work"]),
        models={side: Path(path) for side, path in asked["models"].items()},
        device=pick_device(asked["device"]),
        windows=asked["windows"],
        repeats=asked["repeats"],
    )
    known = (disk, capture, make_captures, compare_ours, compare_original, kernel, make_wide_capture, compare_wide)
    stages = {stage.__name__: stage for stage in known}
    print(json.dumps(stages[asked["stage"]](run, **asked["arguments"])))


if __name__ == "__main__":
    main()

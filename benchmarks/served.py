"""Measure what capturing costs a real server: no hook, ours, and the original method, side by side. See README.md.

python benchmarks/served.py [--engine sglang|vllm] [--models DIR] [--windows N]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import requests
import torch
from original import compare_window

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "conftest_examples" / "quickstart"), str(ROOT / "tests")]

from cpu_environment import ServerEnvironment  # noqa: E402 (from the directories above)
from make_models import make_models  # noqa: E402
from sglang_cpu.environment import sglang_environment  # noqa: E402
from vllm_cpu.environment import vllm_environment  # noqa: E402

from pytest_kld.engines.registry import served_kind  # noqa: E402
from pytest_kld.engines.served.kind import Settings  # noqa: E402
from pytest_kld.hook.protocol import (  # noqa: E402
    CAPTURE_DIR_VARIABLE,
    CaptureRequest,
    new_run,
    request_id,
    write_json_whole,
)
from pytest_kld.servers.server import Server, ServerCommand, free_port  # noqa: E402
from pytest_kld.subjects.model import ModelSpec  # noqa: E402
from pytest_kld.text.corpus import load_corpus  # noqa: E402
from pytest_kld.text.windows import Windows, cut_windows, load_tokenizer  # noqa: E402

SIZE = 512


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--engine", choices=("sglang", "vllm"), default="sglang", help="the original method exists for SGLang only"
    )
    parser.add_argument(
        "--models", type=Path, default=Path("quickstart/models"), help="the models' directory; made if missing"
    )
    parser.add_argument(
        "--dtype", default="float32", help="the models' dtype; bfloat16 is slow without hardware support"
    )
    parser.add_argument("--windows", type=int, default=16, help="number of windows of 512 tokens")
    options = parser.parse_args()
    reference, candidates = make_models(options.models)
    windows = cut(reference, options.windows)
    with tempfile.TemporaryDirectory(prefix="kld-benchmark-") as work:
        make = {"sglang": sglang_environment, "vllm": vllm_environment}[options.engine]
        environment = make(Path(work, "hook")).with_dtype(options.dtype)
        title = served_kind(options.engine).title
        print(
            f"{title} on {os.cpu_count()} cores, SmolLM2-135M in {options.dtype}, {windows.count} windows of {SIZE} "
            "tokens.\n"
        )
        overhead(reference.resolve(), windows, environment, Path(work))
        verdict(reference.resolve(), candidates[0].resolve(), windows, environment, Path(work))


def cut(model: Path, count: int) -> Windows:
    """Cut the windows that all methods run on."""
    tokenizer = load_tokenizer(ModelSpec.parse(str(model), Path()), trust_remote_code=False)
    return cut_windows(load_corpus("python-docs", Path()), tokenizer, count=count, size=SIZE, stride=SIZE, label="")


def overhead(model: Path, windows: Windows, environment: ServerEnvironment, work: Path) -> None:
    """Run all servers at once and send each window to one after the other, so that drift affects all alike."""
    with ExitStack() as stack:
        plain, plain_boot = stack.enter_context(serving(model, environment, work / "plain.log"))
        ours, ours_boot = stack.enter_context(
            serving(model, environment, work / "ours.log", **{CAPTURE_DIR_VARIABLE: str(work / "spool")})
        )
        boots = {"no hook": plain_boot, "ours": ours_boot}
        run = work / "spool" / new_run()
        run.mkdir(parents=True)
        write_json_whole(run / "request.json", CaptureRequest(hidden=True, rows=(SIZE // 2, SIZE - 1)).to_json())
        senders: dict[str, Callable[[int], None]] = {
            "no hook": lambda index: send(plain, environment, windows, index),
            "ours": lambda index: send(ours, environment, windows, index, request_id(run.name, index)),
        }
        if environment.engine == "sglang":
            saved = work / "saved"
            original, boots["original"] = stack.enter_context(serving_original(model, environment, work, saved))
            senders["original"] = lambda index: send(original, environment, windows, index)
        times = alternate(senders, windows.count)
    base = statistics.median(times["no hook"])
    print("| | s per window, median (min) | over no hook, median of pairs | boot, s |\n|---|---|---|---|")
    for name, boot in boots.items():
        pairs = [one - other for one, other in zip(times[name], times["no hook"], strict=True)]
        share = f"{statistics.median(pairs) / base:+.1%}"
        print(f"| {name} | {statistics.median(times[name]):.3f} ({min(times[name]):.3f}) | {share} | {boot:.1f} |")


def verdict(reference: Path, candidate: Path, windows: Windows, environment: ServerEnvironment, work: Path) -> None:
    """Time everything from the first boot to a mean KLD: two boots, two captures, one comparison."""
    start = time.perf_counter()
    command = [
        *(sys.executable, "-m", "pytest", "-q", f"--kld-ref={reference}", f"--kld-candidate={candidate}"),
        *("--kld-max-mean=0.05", "--kld-dataset=python-docs", f"--kld-windows={windows.count}"),
        *(f"--kld-window-size={SIZE}", f"--kld-stride={SIZE}", f"--kld-cache-dir={work / 'cache'}"),
        *environment.options(),
    ]
    empty = work / "empty"
    empty.mkdir()
    told = subprocess.run(command, cwd=empty, stdout=subprocess.PIPE, text=True, check=True).stdout
    ours = time.perf_counter() - start
    print("\n| boot to verdict, one candidate | s | MB on disk | mean KLD, nats |\n|---|---|---|---|")
    row = next(line for line in told.splitlines() if line.startswith(str(candidate)))
    print(f"| ours | {ours:.0f} | {megabytes(work / 'cache'):,.0f} | {row.removeprefix(str(candidate)).split()[0]} |")
    if environment.engine == "sglang":
        verdict_of_original(reference, candidate, windows, environment, work)


def verdict_of_original(
    reference: Path, candidate: Path, windows: Windows, environment: ServerEnvironment, work: Path
) -> None:
    """Time the same for the original method."""
    start = time.perf_counter()
    for name, model in (("reference", reference), ("candidate", candidate)):
        with serving_original(model, environment, work, work / name) as (url, _):
            for index in range(windows.count):
                send(url, environment, windows, index)
    kl = []
    for index in range(windows.count):
        pair = (work / side / f"{index}.safetensors" for side in ("reference", "candidate"))
        kl.append(compare_window(*pair, torch.device("cpu")))
    original = time.perf_counter() - start
    saved = megabytes(work / "reference") + megabytes(work / "candidate")
    print(f"| original | {original:.0f} | {saved:,.0f} | {float(torch.cat(kl).mean()):.6f} |")


def megabytes(directory: Path) -> float:
    """Return the size of all captures in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors")) / 1e6


@contextmanager
def serving(model: Path, environment: ServerEnvironment, log: Path, **variables: str) -> Iterator[tuple[str, float]]:
    """Boot a server; yield its URL and the seconds it took."""
    kind, port = served_kind(environment.engine), free_port()
    start = time.perf_counter()
    address = kind.address(ModelSpec.parse(str(model), Path()), port)
    server = Server(
        ServerCommand(
            argv=[*environment.command, *address, *kind.complete(environment.flags, Settings())],
            environment={**os.environ, **environment.variables, **variables},
            url=f"http://127.0.0.1:{port}",
            health=kind.health,
            log=log,
            startup_timeout=600,
        )
    )
    try:
        yield server.url, time.perf_counter() - start
    finally:
        server.stop()


@contextmanager
def serving_original(
    model: Path, environment: ServerEnvironment, work: Path, saved: Path
) -> Iterator[tuple[str, float]]:
    """Boot a server that captures with the original method."""
    plugin = work / "plugin"
    metadata = plugin / "original_plugin-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: original-plugin\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text("[sglang.srt.plugins]\noriginal = original_plugin:install\n")
    saved.mkdir()
    path = os.pathsep.join([str(plugin), str(ROOT / "benchmarks"), environment.variables["PYTHONPATH"]])
    with serving(
        model, environment, work / f"{saved.name}.log", PYTHONPATH=path, SGLANG_KLD_SAVE_DIR=str(saved)
    ) as served:
        yield served


def send(url: str, environment: ServerEnvironment, windows: Windows, index: int, rid: str | None = None) -> None:
    """Prefill one window."""
    path, body = served_kind(environment.engine).request(rid or uuid.uuid4().hex, windows.token_ids[index].tolist())
    requests.post(f"{url}{path}", json=body, timeout=600).raise_for_status()


def alternate(senders: dict[str, Callable[[int], None]], count: int) -> dict[str, list[float]]:
    """Send each window to each server in turn, after one window to warm up; return the seconds that each took."""
    times: dict[str, list[float]] = {name: [] for name in senders}
    for name in senders:
        senders[name](0)
    names = list(senders)
    for index in range(count):
        for name in names[index % len(names) :] + names[: index % len(names)]:  # what ran before affects all alike
            start = time.perf_counter()
            senders[name](index)
            times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()

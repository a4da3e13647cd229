"""Compare the original method with ours on one real model and print a Markdown table. See README.md in this folder."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "conftest_examples" / "quickstart"))


def main() -> None:
    """Run every stage and print the results."""
    options = arguments()
    from make_models import make_models  # torch; not needed for --help

    reference, candidates = make_models(options.models)
    with tempfile.TemporaryDirectory(prefix="kld-benchmark-") as work:
        run = Stages(
            options, Path(work), {"reference": str(reference.resolve()), "candidate": str(candidates[0].resolve())}
        )
        print_rows(run, options)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", type=Path, default=Path("quickstart/models"), help="the models' directory; made if missing"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--windows", type=int, default=6, help="number of windows of 512 tokens")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each kernel; a 40th of the start-ups'")
    return parser.parse_args()


class Stages:
    """Runs stages, each in a separate process."""

    def __init__(self, options: argparse.Namespace, work: Path, models: dict[str, str]) -> None:
        """Keep what all stages share."""
        self.shared = {
            "work": str(work),
            "models": models,
            "device": options.device,
            "windows": options.windows,
            "repeats": options.repeats,
        }

    def __call__(self, stage: str, **given: Any) -> dict[str, Any]:
        """Run one stage and return its figures."""
        print(f"{stage} {given or ''} ...", file=sys.stderr, flush=True)
        asked = json.dumps({**self.shared, "stage": stage, "arguments": given})
        command = [sys.executable, str(HERE / "stages.py"), asked]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        figures: dict[str, Any] = json.loads(output.splitlines()[-1])
        return figures


def print_rows(run: Stages, options: argparse.Namespace) -> None:
    """Measure and print the table, section by section."""
    machine = f"{os.cpu_count()} cores ({platform.machine()}), device {options.device}"
    print(f"Machine: {machine}. {options.windows} windows of 512 tokens, {options.repeats} repeats.\n")
    print("| | plain | original | ours | original / ours |\n|---|---|---|---|---|")
    captures = {method: run("capture", method=method, side="reference") for method in ("plain", "original", "ours")}
    run("capture", method="original", side="candidate")
    print_disk(run("disk"))
    plain, old, new = (captures[method] for method in ("plain", "original", "ours"))
    row("capture, s per window (forward pass included)", time_of(plain), time_of(old), time_of(new), ratio(old, new))
    row("capture, peak above the model, MB", mb(plain), mb(old), mb(new), f"{old['peak'] / max(new['peak'], 1):.1f}x")
    run("make_captures")
    old, new = run("compare_original"), run("compare_ours")
    row("compare, s per window", "", time_of(old), time_of(new), ratio(old, new))
    row("compare, peak above the libraries, MB", "", mb(old), mb(new), f"{old['peak'] / new['peak']:.1f}x")
    row("mean KL, nats", "", f"{old['mean']:.7f}", f"{new['mean']:.7f}", "")
    for vocab_size in (152_064, 262_144):
        print_kernel(vocab_size, run("kernel", vocab_size=vocab_size))
    for count in (2, 20):
        run("make_wide_capture", count=count)
    few, many = run("compare_wide", count=2), run("compare_wide", count=20)
    row("compare at V = 262,144, peak MB: 2 and 20 windows", "", "", f"{mb(few)} and {mb(many)}", "")
    print_plugin(options.repeats * 4)


def print_disk(figures: dict[str, Any]) -> None:
    """Print bytes per position."""
    original = figures["original"]["per_position"]
    for dtype in ("bfloat16", "float32"):
        ours = figures[dtype]
        row(
            f"bytes per position on disk, {dtype}",
            "",
            f"{original:,}",
            f"{ours['per_position']:,}",
            f"{original / ours['per_position']:.0f}x",
        )
        beside = ours["total"] - ours["per_position"] * figures["positions"]
        row(f"- beside them: head {ours['head'] / 1e6:.1f} MB, in all, MB", "", "0", f"{beside / 1e6:.1f}", "")


def print_kernel(vocab_size: int, figures: dict[str, dict[str, float]]) -> None:
    """Print the kernel's time in seconds; the column `plain` is a read of both matrices."""
    old, read = figures["original"], figures["read"]
    for name in ("eager", "compiled"):
        new = figures[name]
        times_read = f"{ratio(old, new)}; {new['min'] / read['min']:.1f} reads"
        row(
            f"kernel 512 x {vocab_size:,}, {name}, s (plain: read both)",
            time_of(read),
            time_of(old),
            time_of(new),
            times_read,
        )


def print_plugin(repeats: int) -> None:
    """Print how much time the plugin costs a session that does not use it."""
    probe = "import sys, pytest_kld.plugin; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    clean = subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_empty.py").write_text("def test_nothing():\n    pass\n")
        Path(folder, "pytest.ini").write_text("[pytest]\n")
        pytest = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
        commands = {"without": pytest, "with": [*pytest, "-p", "pytest_kld.plugin"]}
        # Byte code is kept, as for any installed package. Other plugins are left out, to measure only this one.
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        times: dict[str, list[float]] = {name: [] for name in commands}
        for repeat in range(10 * repeats + 1):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
                if repeat:  # the first one writes byte code
                    times[name].append(time.perf_counter() - start)
    pairs = [a - b for a, b in zip(times["with"], times["without"], strict=True)]
    row("collect-only, s: without, with the plugin", both(times["without"]), "", both(times["with"]), "")
    least = min(times["with"]) - min(times["without"])
    cost = f"{statistics.median(pairs) * 1000:.0f} ({least * 1000:.0f})"
    row("- plugin's cost, ms, median of pairs (of minima)", "", "", cost, "")
    row("plugin imports neither torch nor numpy", "", "", "yes" if clean else "NO", "")


def row(*cells: str) -> None:
    """Print one row of the table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def time_of(figures: dict[str, float]) -> str:
    """Format a median and a minimum."""
    return f"{figures['median']:.3f} ({figures['min']:.3f})"


def both(times: list[float]) -> str:
    """Format the median and minimum of some seconds."""
    return f"{statistics.median(times):.3f} ({min(times):.3f})"


def ratio(old: dict[str, float], new: dict[str, float]) -> str:
    """Return how many times faster the new method is, by the minima."""
    return f"{old['min'] / new['min']:.1f}x"


def mb(figures: dict[str, float]) -> str:
    """Format peak memory."""
    return f"{figures['peak'] / 1e6:,.0f}"


if __name__ == "__main__":
    main()

"""The tiny engine's load generator: sends random prompts to the server, several at a time, and times the answers.

    python -m tiny_load --url URL --concurrency C --requests N --input I --output O --seed S --report FILE

An answer of O tokens is O runs of the growing prompt. The file that TINY_FAULT names spoils it: `failing` lets a
request fail, `short` ends the answers early, `no-field` reports less, `no-tool` ends with an error, `kills` ends the
server.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median

import requests


def answer(url: str, prompt: list[int], tokens: int) -> list[float]:
    """Return when each token of an answer was there, in seconds from its request."""
    started, times = time.monotonic(), []
    for _ in range(tokens):
        body = {"id": uuid.uuid4().hex, "tokens": prompt, "chunk": 1_000}
        requests.post(f"{url}/run", json=body, timeout=60).raise_for_status()
        prompt = [*prompt, len(prompt) % 1_000]
        times.append(time.monotonic() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("concurrency", "requests", "input", "output", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--report", type=Path, required=True)
    given = parser.parse_args()
    fault = Path(os.environ["TINY_FAULT"]).read_text()
    if fault == "no-tool":
        sys.exit("tiny_load: no such option")
    if fault == "kills":
        os.kill(requests.get(f"{given.url}/ready", timeout=60).json()["pid"], signal.SIGKILL)
        time.sleep(60)
    chosen = random.Random(given.seed)
    prompts = [[chosen.randrange(1_000) for _ in range(given.input)] for _ in range(given.requests)]
    tokens = given.output - (fault == "short")
    started = time.monotonic()
    with ThreadPoolExecutor(given.concurrency) as pool:
        times = list(pool.map(lambda prompt: answer(given.url, prompt, tokens), prompts))
    seconds = time.monotonic() - started
    failed = int(fault == "failing")
    done = times[failed:]
    told = {
        "prompts": prompts,
        "completed": len(done),
        "tokens": sum(map(len, done)),
        "seconds": seconds,
        "ttft": [1000 * one[0] for one in done],
        "e2e": [1000 * one[-1] for one in done],
        "mean_e2e": 1000 * mean(one[-1] for one in done),
        "median_e2e": 1000 * median(one[-1] for one in done),
        "errors": ["the kernel is not implemented"] * failed,
    }
    if fault == "no-field":
        del told["seconds"]
    given.report.write_text(json.dumps(told))


if __name__ == "__main__":
    main()

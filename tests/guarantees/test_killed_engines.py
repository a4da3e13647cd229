"""The same with the real SGLang and vLLM: killed at any point of a gate, and on a disk that fills up.

Not part of the README's command: each try boots two servers. `KLD_CAMPAIGN_SEEDS` says how many points are tried. A
gate spends most of its time in boots, so every other point is one of its captures.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import TINY, MakeDisk, MakeModel
from cpu_environment import ServerEnvironment
from guarantees.campaign import BLIND, SEEDS, Campaign
from transformers import LlamaConfig

from pytest_kld.text.corpus import load_corpus

pytestmark = [pytest.mark.slow, pytest.mark.long]

WINDOWS = 64
"""Of each of the two models: enough for something to die among them."""


@dataclass(frozen=True)
class Undisturbed:
    """What a gate measures, and how many seconds it takes, if nothing happens."""

    figures: dict[str, Any]
    seconds: float


@pytest.fixture(scope="module")
def make_campaign(
    engine: ServerEnvironment, make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Campaign]:
    """A function that returns a gate of a tiny Llama, whose heads are of a size that every engine runs."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(load_corpus("python-docs", Path()).text[:20_000], encoding="utf-8")
    config = LlamaConfig(**{**TINY, "head_dim": 32}, tie_word_embeddings=False)
    reference, candidate = make_model("killed-llama", config), make_model("killed-noisy", config, noise=0.0005)
    return lambda directory: Campaign(directory, engine.engine, reference, (candidate,), text, engine, WINDOWS)


@pytest.fixture(scope="module")
def undisturbed(make_campaign: Callable[[Path], Campaign], tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    began = time.monotonic()
    campaign = make_campaign(tmp_path_factory.mktemp("undisturbed") / "campaign")
    figures = campaign.completes()
    seconds = time.monotonic() - began
    campaign.end()
    return Undisturbed(figures, seconds)


@pytest.fixture
def campaign(make_campaign: Callable[[Path], Campaign], tmp_path: Path) -> Iterator[Campaign]:
    made = make_campaign(tmp_path / "campaign")
    yield made
    made.end()


def reach(campaign: Campaign, undisturbed: Undisturbed, chance: random.Random) -> Iterator[subprocess.Popen[str]]:
    """Start a gate again and again, and return its process at a point of its time, or of what is left to capture."""
    for number in range(SEEDS):
        if campaign.windows() == 2 * WINDOWS:
            shutil.rmtree(campaign.cache)
        process = campaign.start()
        if number % 2:
            seconds = chance.uniform(1, undisturbed.seconds)
            print(f"{campaign.engine}: after {seconds:.1f} s:", end=" ")
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=seconds)
        else:
            windows = chance.randint(campaign.windows() + 1, 2 * WINDOWS)
            print(f"{campaign.engine}: when it has {windows} windows:", end=" ")
            campaign.wait_for_windows(windows, process)
        yield process


def test_a_process_of_a_server_killed_at_a_random_point_is_an_error_or_changes_nothing(
    campaign: Campaign, undisturbed: Undisturbed
) -> None:
    """A server is several processes, and any of them may die; some are helpers that a capture does without."""
    chance = random.Random(f"server of {campaign.engine}")
    errors = 0
    for process in reach(campaign, undisturbed, chance):
        killed = ""
        for server in campaign.servers():
            with suppress(psutil.NoSuchProcess):
                one = chance.choice([server, *server.children(recursive=True)])
                killed = " ".join(one.cmdline())[:100]
                one.kill()
        output = campaign.output(process)
        outcome = campaign.result()["outcome"]
        print(f"killed {killed or 'none'}: {outcome}, {campaign.windows()} windows")
        if process.returncode == 0:
            assert campaign.result()["figures"] == undisturbed.figures
            continue
        assert (process.returncode, outcome) == (1, "error"), output
        assert killed, output
        errors += 1
        campaign.require_nobody()
        campaign.require_whole()
    assert errors or SEEDS < 3
    campaign.completes(undisturbed.figures)


def test_pytest_killed_at_a_random_point_leaves_nothing_that_is_read_and_the_rerun_goes_on(
    campaign: Campaign, undisturbed: Undisturbed
) -> None:
    for process in reach(campaign, undisturbed, random.Random(f"pytest with {campaign.engine}")):
        ended = process.poll() is not None
        process.kill()
        process.wait()
        print(f"pytest {'had ended' if ended else 'killed'}, {campaign.windows()} windows")
        campaign.require_nobody()
        campaign.require_whole()
    campaign.completes(undisturbed.figures)


def test_a_disk_that_fills_up_in_a_capture_is_an_error_and_the_rerun_goes_on_when_there_is_room(
    make_disk: MakeDisk, campaign: Campaign, undisturbed: Undisturbed
) -> None:
    disk = make_disk("900k")
    conftest = campaign.directory / "conftest.py"
    conftest.write_text(conftest.read_text() + BLIND)
    campaign.cache.symlink_to(disk)
    code, output = campaign.run()
    assert (code, campaign.result()["outcome"]) == (1, "error"), output
    assert "No space left on device" in output
    campaign.require_nobody()
    campaign.require_whole()
    print(f"{campaign.engine}: disk full after {campaign.windows()} windows")
    subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
    campaign.completes(undisturbed.figures)

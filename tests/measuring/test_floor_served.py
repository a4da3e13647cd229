"""`--kld-floor` on real servers of a small engine, each process of which may compute something else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guarantees.campaign import Campaign

pytestmark = pytest.mark.slow
OPTIONS = ("--kld-floor", "--kld-max-mean=1", "--kld-windows=3")
BOTH = ("--kld-path=both", "--kld-concurrency=2")


@pytest.fixture
def tiny(tmp_path: Path, reference_dir: Path, candidate_dir: Path, text_file: Path) -> Iterator[Campaign]:
    """A gate on servers of the tiny engine, with a cache of its own."""
    made = Campaign(tmp_path / "floor", "tiny", reference_dir, (candidate_dir,), text_file)
    yield made
    made.end()


def origins(tiny: Campaign) -> dict[tuple[str, int], set[str]]:
    """Return the processes that each model's runs came from."""
    found: dict[tuple[str, int], set[str]] = {}
    for path in tiny.cache.glob("captures/*/capture.json"):
        manifest = json.loads(path.read_text())
        found.setdefault((manifest["subject"]["name"], manifest["subject"]["run"]), set()).add(manifest["origin"])
    return found


def results(tiny: Campaign) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((tiny.directory / "report.json").read_text())["results"]
    return found


@pytest.mark.parametrize("path", ["prefill", "both"])
def test_each_run_has_a_server_of_its_own_whatever_the_paths(tiny: Campaign, path: str) -> None:
    code, output = tiny.run(*OPTIONS, *(BOTH if path == "both" else ()))
    assert code == 0, output
    assert output.count("kld: booting Tiny for") == 4
    found = origins(tiny)
    assert len(found) == 4
    assert len(set().union(*found.values())) == 4
    for result in results(tiny):
        assert result["floor"]["reference"]["max"] == result["floor"]["candidate"]["max"] == 0
        assert result["floor"]["below"] == []


def test_noise_between_servers_is_the_floor_although_each_server_repeats_itself(tiny: Campaign) -> None:
    tiny.fault("noisy")
    code, output = tiny.run(*OPTIONS, *BOTH)
    assert code == 0, output
    for result in results(tiny):
        floors = [result["floor"][side]["mean"] for side in ("reference", "candidate")]
        assert 1e-5 < min(floors) < max(floors) < result["figures"]["mean"]
    prefill, decode = results(tiny)
    for side in ("reference", "candidate"):  # the same two processes
        assert prefill["floor"][side]["mean"] == pytest.approx(decode["floor"][side]["mean"], rel=0.5)
    assert decode["figures"]["decode_gap"] < 1e-9  # one process ran both paths
    assert "decode_gap" in decode["floor"]["below"]
    tiny.fault("")
    code, output = tiny.run(*OPTIONS, "--kld-max-mean=1e-6")
    assert code == 1, output
    assert "can neither pass nor fail" in output
    assert tiny.result()["outcome"] == "error"
    assert "booting" not in output


def test_a_second_run_that_dies_is_an_error_and_the_rerun_goes_on(tiny: Campaign) -> None:
    code, output = tiny.run(*(option for option in OPTIONS if option != "--kld-floor"))
    assert code == 0, output
    tiny.fault("odd-answer")
    code, output = tiny.run(*OPTIONS)
    assert (code, tiny.result()["outcome"]) == (1, "error"), output
    tiny.fault("")
    code, output = tiny.run(*OPTIONS)
    assert code == 0, output
    assert len(origins(tiny)) == 4

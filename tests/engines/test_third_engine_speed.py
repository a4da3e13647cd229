"""A server under load: the tiny engine, with a load generator that really sends requests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from tiny_engine import Tiny, TinyLoad
from tiny_pool import TinyPool, capture

from pytest_kld.engines.served.load import LoadResult
from pytest_kld.errors import ServerError
from pytest_kld.gate.speed import judge_speed
from pytest_kld.progress import Silent
from pytest_kld.subjects.subject import Subject
from pytest_kld.text.windows import Windows
from pytest_kld.throughput.figures import FIGURES
from pytest_kld.throughput.runner import REQUESTS_PER_SLOT, LoadSettings, measure

pytestmark = pytest.mark.slow  # a load waits until no other test captures
SETTINGS = LoadSettings(concurrencies=(1, 2), input_tokens=4, output_tokens=3, rounds=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyPool]:
    pool = TinyPool(tmp_path_factory.mktemp("tiny"), Tiny())
    yield pool
    pool.pool.close()


def run(
    tiny: TinyPool, subject: Subject, directory: Path, settings: LoadSettings = SETTINGS, kind: Tiny | None = None
) -> dict[str, Any]:
    return measure(
        tiny.of(kind or Tiny()),
        subject,
        settings,
        tokenizer=subject.spec,
        directory=directory / "load",
        progress=Silent(),
    )


def test_every_concurrency_is_measured_in_every_round_and_captures_before_and_after_are_identical(
    tiny: TinyPool, reference_dir: Path, windows: Windows, tmp_path: Path
) -> None:
    subject = tiny.subject(reference_dir)
    before = capture(tiny.of(Tiny()), subject, windows, tmp_path / "before", "auto")
    measured = run(tiny, subject, tmp_path)
    after = capture(tiny.of(Tiny()), subject, windows, tmp_path / "after", "auto")
    assert before.manifest["files"] == after.manifest["files"]
    assert [cell["concurrency"] for cell in measured["cells"]] == [1, 2]
    for cell in measured["cells"]:
        assert len(cell["rounds"]) == 2
        assert cell["figures"].keys() == FIGURES.keys()
        assert cell["figures"]["failed"] == 0
        first, second = (one["output_tps"] for one in cell["rounds"])
        assert cell["figures"]["output_tps"] == pytest.approx((first + second) / 2)
    raw = sorted(Path(measured["raw"]).glob("*.json"))
    assert [path.stem for path in raw] == ["c1-round1", "c1-round2", "c2-round1", "c2-round2"]
    prompts = [tuple(prompt) for path in raw for prompt in json.loads(path.read_text())["prompts"]]
    assert len(set(prompts)) == len(prompts) == 2 * (1 + 2) * REQUESTS_PER_SLOT, "a prompt would be in the prefix cache"
    told = json.loads((Path(measured["raw"]) / "c2-round1.json").read_text())
    assert measured["cells"][1]["rounds"][0]["output_tps"] == pytest.approx(told["tokens"] / told["seconds"])
    assert measured["server"] == {"own": False, "arguments": [], "added": [], "others": []}
    assert measured["devices"][0]["cores"] >= 1


def test_further_flags_boot_a_server_of_its_own_in_which_the_hook_stays_idle(
    tiny: TinyPool, reference_dir: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, concurrencies=(1,), rounds=1, arguments=("--a", "8"))
    measured = run(tiny, tiny.subject(reference_dir), tmp_path, settings)
    assert measured["server"]["own"]
    assert measured["server"]["arguments"] == ["--a", "8"]
    subject = tiny.subject(reference_dir)
    for capturing in (False, True):  # the one under load is still running
        handle = tiny.pool.get(subject.spec, ["--a", "8"], subject.environment, capturing=capturing)
        assert requests.get(f"{handle.url}/ready", timeout=60).json()["capturing"] == capturing


def test_the_devices_of_a_server_that_was_named_by_its_url_are_unknown(
    tiny: TinyPool, reference_dir: Path, tmp_path: Path
) -> None:
    """It may be on another machine, so no speedup is taken between it and a server of ours."""
    subject = tiny.subject(reference_dir)
    handle = tiny.pool.get(subject.spec, [], subject.environment)
    named = replace(subject, arguments={"url": handle.url})
    settings = replace(SETTINGS, concurrencies=(1,), rounds=1)
    ours, theirs = run(tiny, subject, tmp_path, settings), run(tiny, named, tmp_path, settings)
    assert theirs["devices"] == [{"name": f"devices of {handle.url}"}]
    with pytest.raises(ServerError, match=r"compares speeds on the same devices only"):
        judge_speed(ours, {"min_speedup": {1: 0.1}}, base=theirs, base_label="R", confidence=None)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("failing", Tiny(), "1 of 4 requests failed .* concurrency 1: the kernel is not implemented"),
        ("short", Tiny(), "answered 4 requests with 8 tokens, but 12 were asked for"),
        ("no-field", Tiny(), r"report of tiny_load cannot be read \(KeyError: 'seconds'\): this release"),
        ("no-tool", Tiny(), r"tiny_load failed for .* \(exit code 1\); .*no such option"),
        ("", replace(Tiny(), load_tool=TinyLoad(most=1)), "runs at most 1 requests at a time, so concurrency 2"),
        ("", replace(Tiny(), load_tool=None), "knows no load generator of Tiny"),
    ],
)
def test_what_goes_wrong_under_load_is_an_error(
    tiny: TinyPool, reference_dir: Path, tmp_path: Path, fault: str, kind: Tiny, words: str
) -> None:
    with tiny.spoiled(fault), pytest.raises(ServerError, match=f"(?s){words}"):
        run(tiny, tiny.subject(reference_dir), tmp_path, replace(SETTINGS, rounds=1), kind)


def test_failures_that_are_allowed_are_counted(tiny: TinyPool, reference_dir: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, concurrencies=(1,), rounds=1, failures=1)
    with tiny.spoiled("failing"):
        measured = run(tiny, tiny.subject(reference_dir), tmp_path, settings)
    assert measured["cells"][0]["figures"]["failed"] == 1


def test_a_server_that_dies_under_load_is_an_error_with_the_end_of_its_log(
    tiny: TinyPool, reference_dir: Path, tmp_path: Path
) -> None:
    subject = tiny.subject(reference_dir, "--a", "9")
    with tiny.spoiled("kills"), pytest.raises(ServerError, match=r"died under load.*exit code"):
        run(tiny, subject, tmp_path, replace(SETTINGS, concurrencies=(1,)))


def test_figures_that_cannot_be_are_an_error(tiny: TinyPool, reference_dir: Path, tmp_path: Path) -> None:
    class Odd(TinyLoad):
        def read(self, text: str) -> LoadResult:
            told = super().read(text)
            return replace(told, figures={**told.figures, "tpot": float("nan")})

    with pytest.raises(ServerError, match=r"reports figures that cannot be: .'tpot'"):
        run(tiny, tiny.subject(reference_dir), tmp_path, replace(SETTINGS, rounds=1), replace(Tiny(), load_tool=Odd()))


def test_the_code_of_a_repository_is_not_run_for_its_tokenizer(
    tiny: TinyPool, reference_dir: Path, tmp_path: Path
) -> None:
    subject = tiny.subject(reference_dir)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["code.Mine", null]}}')
    own = replace(subject.spec, path=tmp_path / "own")
    with pytest.raises(ServerError, match=r"would run code from the repository of .* --kld-trust-remote-code"):
        measure(tiny.of(Tiny()), subject, SETTINGS, tokenizer=own, directory=tmp_path / "load", progress=Silent())

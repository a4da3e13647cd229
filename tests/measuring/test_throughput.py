"""Options and markers on speed: what can be told to be wrong before anything boots, and what a test wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_kld.measuring.speed import all_concurrencies, concurrencies_of, speed_bounds_of
from pytest_kld.settings.config import CONFIG, config_of
from pytest_kld.settings.subjects import candidate_of

if TYPE_CHECKING:
    from conftest import Gate

SERVED = "--kld-engine=sglang"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kld-throughput=1", "--kld-engine=transformers"), "--kld-engine=transformers has none"),
        (("--kld-throughput=1,1", SERVED), "expected different concurrencies"),
        (("--kld-throughput=one", SERVED), "expected a concurrency"),
        (("--kld-min-output-tps=5", SERVED), "--kld-min-output-tps: no speed is measured; give --kld-throughput"),
        (("--kld-throughput=1", "--kld-max-ttft=2:5", SERVED), "max_ttft has a bound at concurrency 2"),
        (("--kld-throughput=1", "--kld-max-ttft=-1", SERVED), "expected a number above 0"),
        (("--kld-throughput=1", "--kld-throughput-output=1", SERVED), "at least 2"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(gate: Gate, arguments: tuple[str, ...], words: str) -> None:
    run = gate(*arguments)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    assert words in str(run.stderr)


def test_the_closest_marker_says_what_a_test_wants_and_else_the_options_do(gate: Gate) -> None:
    gate.pytester.makepyfile(
        """
        import pytest
        def test_options(kld): pass
        @pytest.mark.kld(throughput=[2, 8], max_ttft={8: 90}, min_output_tps=None)
        def test_own(): pass
        @pytest.mark.kld(throughput=None)
        def test_none(): pass
        """
    )
    options = ("--kld-throughput=1,4", "--kld-min-output-tps=4:30", "--kld-min-speedup=1.1", SERVED)
    items = gate.pytester.inline_genitems(f"--kld-ref={gate.reference}", f"--kld-candidate={gate.candidate}", *options)[
        0
    ]
    assert items[0].config.stash[CONFIG].throughput == (1, 4)
    assert [concurrencies_of(item) for item in items] == [(1, 4), (2, 8), ()]
    assert [speed_bounds_of(item) for item in items] == [
        {"min_output_tps": {4: 30}, "min_speedup": {None: 1.1}},
        {"max_ttft": {8: 90}, "min_speedup": {None: 1.1}},
        {},
    ]
    assert all_concurrencies(items) == (1, 2, 4, 8)


def test_a_marker_with_a_limit_on_speed_that_nothing_measures_is_an_error_before_the_body(gate: Gate) -> None:
    gate.pytester.makepyfile(
        """
        import pytest
        @pytest.mark.kld(min_output_tps=5)
        def test_fast(): raise AssertionError("the body ran")
        """
    )
    run = gate("--kld-engine=transformers")
    run.assert_outcomes(errors=1)
    run.stdout.fnmatch_lines(["*min_output_tps: no speed is measured; give --kld-throughput*"])
    run.stdout.no_fnmatch_line("*the body ran*")


def test_the_speed_of_what_no_server_runs_is_an_error(gate: Gate) -> None:
    gate.pytester.makepyfile(
        """
        import pytest
        @pytest.mark.kld(throughput=1)
        def test_fast(): pass
        """
    )
    run = gate("--kld-engine=transformers")
    run.assert_outcomes(errors=1)
    run.stdout.fnmatch_lines(["*the speed of * (transformers) cannot be measured: no server runs it*"])


SUITE = """
[reference]
model = "org/reference"

[protocol]
engine = "sglang"
throughput = "1,4"
min_output_tps = "4:30"
throughput_rounds = 7

[[candidate]]
model = "org/slow"

[[candidate]]
model = "org/fast"
speed = { args = "--speculative-algorithm EAGLE", min_output_tps = 50, max_ttft = "4:90" }
"""


def test_a_suite_has_limits_on_speed_for_all_candidates_and_for_one(gate: Gate) -> None:
    (gate.path / "release.kld.toml").write_text(SUITE)
    slow, fast = gate.pytester.inline_genitems("release.kld.toml")[0]
    assert config_of(slow).throughput_rounds == 7
    assert concurrencies_of(slow) == concurrencies_of(fast) == (1, 4)
    assert speed_bounds_of(slow) == {"min_output_tps": {4: 30}}
    assert speed_bounds_of(fast) == {"min_output_tps": {None: 50}, "max_ttft": {4: 90}}
    assert candidate_of(fast).speed["args"] == "--speculative-algorithm EAGLE"


@pytest.mark.parametrize(
    ("speed", "words"),
    [('{ min_output_tps = "fast" }', "expected a number above 0"), ("{ quick = 1 }", "unknown key 'quick'")],
)
def test_a_wrong_limit_on_speed_in_a_suite_names_its_place(gate: Gate, speed: str, words: str) -> None:
    suite = SUITE.split("speed = ", maxsplit=1)[0] + f"speed = {speed}\n"
    (gate.path / "release.kld.toml").write_text(suite)
    run = gate.pytester.runpytest_inprocess("release.kld.toml")
    run.stdout.fnmatch_lines([f"*release.kld.toml:*speed*{words}*"])
    assert run.ret != 0

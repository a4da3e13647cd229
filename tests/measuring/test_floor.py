"""`--kld-floor`: what two runs of each model differ by, and what is said of figures that are not above it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from pytest_kld.captures.capture import Capture
from pytest_kld.command import main
from pytest_kld.errors import FloorError
from pytest_kld.measuring.floors import require_two_runs
from pytest_kld.report.json_file import read_json_report

if TYPE_CHECKING:
    from conftest import Gate, MakeModel

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text(encoding="utf-8"))
OPTIONS = ("--kld-engine=transformers", "--kld-windows=2", "--kld-json=report.json")
NOISY = """
import pytest
import torch

from pytest_kld.engines.transformers import TransformersEngine


@pytest.fixture(scope="session", autouse=True)
def every_load_differs():
    load = TransformersEngine._load

    def noisy(*args):
        network = load(*args)
        network.model.norm.weight.data.mul_(1 + {noise} * torch.randn(network.config.hidden_size))
        return network

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "_load", noisy)
        yield
"""


NAN_IN_THE_SECOND_RUN = """
from collections import Counter

import pytest
import torch

from pytest_kld.engines.transformers import TransformersEngine


@pytest.fixture(scope="session", autouse=True)
def the_second_load_is_broken():
    load, loads = TransformersEngine._load, Counter()

    def broken(*args):
        network = load(*args)
        weights = float(network.lm_head.weight.double().sum())
        loads[weights] += 1
        if loads[weights] == 2:
            place = torch.tensor(40)
            network.model.norm.register_forward_hook(lambda _, __, output: output.index_fill(1, place, torch.nan))
        return network

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersEngine, "_load", broken)
        yield
"""


@pytest.fixture
def alone(gate: Gate) -> Gate:
    """The gate with a cache of its own: the captures of a noisy engine are not for other tests."""
    gate.cache = f"--kld-cache-dir={gate.path / 'cache'}"
    return gate


@pytest.fixture
def noisy(alone: Gate) -> Gate:
    """An engine that loads each model a little differently: by about 1e-3 nats."""
    alone.pytester.makeconftest(NOISY.format(noise=0.01))
    return alone


def manifests(gate: Gate) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((gate.path / "cache" / "captures").glob("*/capture.json"))]


def test_the_floor_of_a_deterministic_engine_is_exactly_zero_and_comes_from_a_second_load(alone: Gate) -> None:
    result = alone(*OPTIONS, "--kld-floor", "--kld-max-mean=1")
    result.assert_outcomes(passed=1)
    (found,) = alone.results()
    for side in ("reference", "candidate"):
        floor = found["floor"][side]
        assert (floor["mean"], floor["max"], floor["top1_agreement"], floor["positions"]) == (0, 0, 1, 128)
    assert found["floor"]["below"] == []
    assert [check["floor"] for check in found["checks"] if check["limit"] == "max_mean"] == [0]
    runs = {(one["subject"]["name"], one["subject"]["run"]): one for one in manifests(alone)}
    assert set(runs) == {(str(model), run) for model in (alone.reference, alone.candidate) for run in (1, 2)}
    assert len({one["origin"] for one in runs.values()}) == 4
    assert runs[str(alone.candidate), 2]["model"] == f"{alone.candidate} (run 2)"
    result.stdout.fnmatch_lines(["Run-to-run floor *Mean KLD *Top-1", f"{alone.candidate} * 0 * 0 * 100.00%"])
    result.stdout.no_fnmatch_line("*~*")


def test_a_second_session_takes_both_runs_from_the_cache_and_a_refresh_makes_both_anew(alone: Gate) -> None:
    alone(*OPTIONS, "--kld-floor")
    before = {one["origin"] for one in manifests(alone)}
    alone(*OPTIONS, "--kld-floor").stdout.no_fnmatch_line("*loading*")
    assert {one["origin"] for one in manifests(alone)} == before
    alone(*OPTIONS, "--kld-floor", "--kld-refresh")
    assert not {one["origin"] for one in manifests(alone)} & before


def test_without_it_nothing_is_run_twice_and_the_first_run_is_shared_with_gates_that_ask_for_it(alone: Gate) -> None:
    alone(*OPTIONS)
    first = manifests(alone)
    assert (len(first), alone.results()[0]["floor"]) == (2, None)
    alone(*OPTIONS, "--kld-floor").stdout.fnmatch_lines(
        [f"kld: loading {model} (run 2)" for model in (alone.reference, alone.candidate)], consecutive=False
    )
    assert len(manifests(alone)) == 4
    assert all(one in manifests(alone) for one in first)


def test_a_figure_below_twice_the_floor_is_marked_everywhere(noisy: Gate, make_model: MakeModel) -> None:
    reports = ("--kld-html=report.html", "--kld-markdown=report.md", "--kld-junit=report.xml", "--junitxml=pytest.xml")
    near = make_model("near", noise=1e-6)
    result = noisy(*OPTIONS, *reports, "--kld-floor", "--kld-max-mean=1", candidates=(near, noisy.candidate))
    result.assert_outcomes(passed=2)
    close, other = noisy.results()
    for found in (close, other):
        twice = {name: 2 * max(found["floor"][side][name] for side in ("reference", "candidate")) for name in NAMES}
        assert 0 < twice["mean"] < 0.01
        assert [name for name in NAMES if found["figures"][name] < twice[name]] == [
            name for name in NAMES if name in found["floor"]["below"]
        ]
        (check,) = (check for check in found["checks"] if check["limit"] == "max_mean")
        assert (check["floor"], check["below_floor"]) == (twice["mean"] / 2, "mean" in found["floor"]["below"])
    mean = f"{close['figures']['mean']:.6f}"
    assert "mean" in close["floor"]["below"]
    assert "mean" not in other["floor"]["below"]
    result.stdout.fnmatch_lines([f"{near} *~{mean} *", f"note: {near}: mean KLD*(~): below twice the floor, not dist*"])
    assert f"| ✓ pass | ~{mean} |" in (noisy.path / "report.md").read_text()
    assert f"{close['figures']['mean']:.6g} nats &lt;= max_mean 1" in (noisy.path / "report.xml").read_text()
    assert "not distinguishable from run-to-run noise" in (noisy.path / "report.xml").read_text()
    assert 'name="kld_below_floor" value="mean, ' in (noisy.path / "pytest.xml").read_text()
    assert f'<abbr title="below twice the floor">~</abbr>{mean}' in (noisy.path / "report.html").read_text()


NAMES = ("mean", "median", "p95", "p99", "max")


def test_a_floor_above_a_limit_is_an_error_that_shows_the_floor(noisy: Gate) -> None:
    result = noisy(*OPTIONS, "--kld-floor", "--kld-max-mean=1e-7", "--kld-max-p99=1", "--kld-min-top1=1")
    result.assert_outcomes(errors=1)
    jsonschema.validate(json.loads((noisy.path / "report.json").read_text()), SCHEMA)
    (found,) = noisy.results()
    assert (found["outcome"], found["figures"]) == ("error", None)
    assert found["floor"]["reference"]["mean"] > 1e-7
    assert "can neither pass nor fail" in found["message"]
    assert "mean KLD" in found["message"]
    assert "max_p99" not in found["message"]
    result.stdout.fnmatch_lines(["FloorError: two runs of the same differ *> max_mean 1e-07*"])
    result.stdout.fnmatch_lines([f"{noisy.candidate} *ERROR*", "Run-to-run floor *"])
    noisy(*OPTIONS, "--kld-max-mean=1e-7").assert_outcomes(failed=1)  # as without the floor


def test_a_second_run_that_is_nan_where_the_first_is_not_is_an_error_and_no_floor(alone: Gate) -> None:
    alone.pytester.makeconftest(NAN_IN_THE_SECOND_RUN)
    result = alone(*OPTIONS, "--kld-floor", "--kld-max-mean=1")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines("FloorError: at 2 positions, one of the two runs of * is finite and the other is not*")
    assert alone.results()[0]["outcome"] == "error"


def test_a_change_against_the_baseline_is_marked_and_none_smaller_than_the_floor_is_allowed(noisy: Gate) -> None:
    noisy(*OPTIONS)
    assert main(["baseline", "promote", str(noisy.path / "report.json"), str(noisy.path / "baselines")]) == 0
    held = (*OPTIONS, "--kld-baseline=baselines", "--kld-floor")
    result = noisy(*held)
    result.assert_outcomes(passed=1)
    jsonschema.validate(json.loads((noisy.path / "report.json").read_text()), SCHEMA)
    (change, *_) = noisy.results()[0]["baseline"]["changes"]
    assert (change["difference"], change["below_floor"]) == (0, True)
    assert "below twice the floor of" in change["text"]
    result.stdout.fnmatch_lines(["* ~+0.000000 *"])
    strict = noisy(*held, "--kld-max-regression=mean:0")
    strict.assert_outcomes(errors=1)
    strict.stdout.fnmatch_lines(["*max_regression mean:0 allows 0*"])


def test_each_path_has_its_own_floor_and_the_gap_between_them_the_larger_one(noisy: Gate) -> None:
    result = noisy(*OPTIONS, "--kld-path=both", "--kld-concurrency=2", "--kld-floor", "--kld-max-decode-gap=1")
    result.assert_outcomes(passed=2)
    prefill, decode = (found["floor"] for found in noisy.results())
    assert prefill["candidate"]["decode_gap"] is decode["reference"]["decode_gap"] is None
    means = [floor["candidate"]["mean"] for floor in (prefill, decode)]
    assert means[0] != means[1]
    assert decode["candidate"]["decode_gap"] == max(means)
    strict = noisy(*OPTIONS, "--kld-path=both", "--kld-concurrency=2", "--kld-floor", "--kld-max-decode-gap=1e-9")
    strict.assert_outcomes(passed=1, errors=1)
    strict.stdout.fnmatch_lines(["*mean KLD of prefill and decode * > max_decode_gap 1e-09*"])


def test_each_dataset_has_its_own_floor(noisy: Gate) -> None:
    (noisy.path / "other.txt").write_text("This is another text, of other words. " * 100)
    result = noisy(*OPTIONS, "--kld-dataset=other.txt", "--kld-each-dataset", "--kld-floor", "--kld-max-mean=1")
    result.assert_outcomes(passed=1)
    (found,) = noisy.results()
    floors = found["floor"]["datasets"]
    means = [floors[name]["candidate"]["mean"] for name in found["datasets"]]
    assert found["floor"]["candidate"]["mean"] == pytest.approx(sum(means) / 2)
    by_dataset = {check["dataset"]: check["floor"] for check in found["checks"] if check["limit"] == "max_mean"}
    assert by_dataset.keys() == {None, *floors}
    jsonschema.validate(json.loads((noisy.path / "report.json").read_text()), SCHEMA)
    assert read_json_report(noisy.path / "report.json").results[0].floor == found["floor"]
    for name, floor in floors.items():
        assert by_dataset[name] == max(floor[side]["mean"] for side in ("reference", "candidate"))


def test_in_rounds_the_floor_is_of_the_windows_that_decided(noisy: Gate) -> None:
    noisy.protocol = ("--kld-dataset=python-docs", *noisy.protocol[1:])
    options = (*OPTIONS, "--kld-windows=auto:64", "--kld-stride=64", "--kld-floor")
    noisy(*options, "--kld-max-mean=5").assert_outcomes(passed=1)
    (early,) = noisy.results()
    assert early["about"]["protocol"]["windows"] < 64
    for side in ("reference", "candidate"):
        assert early["floor"][side]["positions"] == early["about"]["protocol"]["windows"] * 64


def test_a_plan_counts_the_second_runs(alone: Gate) -> None:
    alone(*OPTIONS, "--kld-floor", "--kld-plan-json=plan.json").stdout.fnmatch_lines(["4 of 4 Subjects to capture*"])
    planned = json.loads((alone.path / "plan.json").read_text())["subjects"]
    names = [(one["role"], one["name"], one["state"]) for one in planned]
    assert names == [
        (role, f"{model}{run}", "capture")
        for run in ("", " (run 2)")
        for role, model in (("reference", alone.reference), ("candidate", alone.candidate))
    ]
    assert planned[0]["bytes"] == planned[2]["bytes"] > 0
    alone(*OPTIONS, "--kld-floor")
    alone(*OPTIONS, "--kld-floor", "--kld-plan").stdout.fnmatch_lines(
        ["0 of 4 Subjects to capture, 4 captured already"]
    )


SUITE = """
[reference]
model = "REFERENCE"
[protocol]
engine = "transformers"
floor = true
[[candidate]]
name = "good"
model = "CANDIDATE"
[[candidate]]
name = "a capture"
model = "CAPTURE"
"""


def test_a_suite_asks_for_floors_and_a_candidate_that_cannot_be_run_twice_is_an_error(alone: Gate) -> None:
    alone(*OPTIONS)
    capture = next(path for path in (alone.path / "cache" / "captures").iterdir() if path.is_dir())
    text = SUITE.replace("REFERENCE", str(alone.reference)).replace("CANDIDATE", str(alone.candidate))
    (alone.path / "release.kld.toml").write_text(text.replace("CAPTURE", str(capture)))
    size = ("--kld-windows=2", "--kld-window-size=64", "--kld-stride=32", "--kld-json=report.json")
    result = alone.pytester.runpytest_inprocess(alone.protocol[0], alone.cache, *size, "release.kld.toml")
    result.assert_outcomes(passed=1, errors=1)
    good, other = alone.results()
    assert (good["floor"]["candidate"]["max"], other["floor"]) == (0, None)
    result.stdout.fnmatch_lines(["*release.kld.toml:12: *is a capture, and a floor needs a second run*"])


@pytest.mark.parametrize("option", ["--kld-ref-url", "--kld-candidate-url"])
def test_a_running_server_cannot_be_made_fresh(gate: Gate, option: str) -> None:
    result = gate(f"{option}=http://localhost:1", "--kld-capture-dir=spool", "--kld-engine=sglang", "--kld-floor")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [f"*--kld-floor boots a second server for each model, and {option} names one that runs*"]
    )


def test_a_capture_cannot_be_run_again(alone: Gate) -> None:
    alone(*OPTIONS)
    capture = next(path for path in (alone.path / "cache" / "captures").iterdir() if path.is_dir())
    result = alone(*OPTIONS, "--kld-floor", candidates=(capture,))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--kld-floor runs each model twice, and * is a capture: name its model*"])


def test_a_capture_that_a_fixture_makes_has_no_floor(alone: Gate) -> None:
    alone(*OPTIONS)
    alone.pytester.makeconftest(f"""
        import pytest
        from pathlib import Path
        from pytest_kld.captures.capture import Capture

        @pytest.fixture(scope="session")
        def kld_reference(kld_windows):
            captures = Path({str(alone.path / "cache" / "captures")!r}).iterdir()
            made = (Capture.open(path, kld_windows) for path in captures if path.is_dir())
            return next(one for one in made if one.manifest["subject"]["name"] == {str(alone.reference)!r})
    """)
    result = alone(*OPTIONS, "--kld-floor")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["FloorError: --kld-floor runs each model twice, and the capture * is of none that can*"]
    )


def test_one_run_is_never_taken_for_two(alone: Gate) -> None:
    alone(*OPTIONS, "--kld-floor")
    captures = alone.path / "cache" / "captures"
    made = [(path, json.loads((path / "capture.json").read_text())) for path in captures.iterdir() if path.is_dir()]
    first, second = (
        Capture(path=path, manifest=manifest)
        for run in (1, 2)
        for path, manifest in made
        if manifest["subject"]["run"] == run and manifest["subject"]["name"] == str(alone.reference)
    )
    require_two_runs(first, second)
    copied = Capture(path=second.path, manifest={**second.manifest, "key": first.manifest["key"]})
    one_process = Capture(path=second.path, manifest={**second.manifest, "origin": first.manifest["origin"]})
    for other, said in ((first, "the same capture"), (copied, "the same capture"), (one_process, "from the process")):
        with pytest.raises(FloorError, match=f"the two runs of .* are .*{said}"):
            require_two_runs(first, other)


def test_a_test_sees_the_floor(alone: Gate) -> None:
    alone.pytester.makepyfile("""
        def test_finer_than_the_noise(kld):
            assert kld.floor.candidate["mean"] == kld.floor.reference["mean"] == 0
            assert kld.floor.datasets == {}
    """)
    alone(*OPTIONS, "--kld-floor").assert_outcomes(passed=1)


def test_pairs_of_a_matrix_below_twice_their_floor_are_marked_and_a_finer_limit_is_an_error(
    noisy: Gate, make_model: MakeModel
) -> None:
    candidates = (make_model("near", noise=1e-6), make_model("as near", noise=2e-6), noisy.candidate)
    options = (*OPTIONS, "--kld-floor", "--kld-matrix=all", "--kld-html=report.html", "--kld-markdown=report.md")
    result = noisy(*options, "--kld-max-between=1", candidates=candidates)
    result.assert_outcomes(passed=4)
    report = json.loads((noisy.path / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    (matrix,) = report["matrices"]
    floors = {result["candidate"]: result["floor"]["candidate"] for result in noisy.results()}
    close, *apart = matrix["pairs"]
    for pair in matrix["pairs"]:
        of_both = [floors[pair[side]] for side in ("first", "second")]
        for name in ("mean", "p99", "max"):
            assert pair["floor"][name] == max(floor[name] for floor in of_both)
        assert pair["floor"]["disagreement"] == 1 - min(floor["top1_agreement"] for floor in of_both)
        assert pair["checks"][0]["floor"] == pair["floor"]["mean"]
    assert close["forth"]["mean"] < 2 * close["floor"]["mean"]
    assert "not distinguishable from run-to-run noise" in close["checks"][0]["text"]
    assert all(pair["forth"]["mean"] > 2 * pair["floor"]["mean"] for pair in apart)
    mean = f"{close['forth']['mean']:.4g}"
    result.stdout.fnmatch_lines(
        [f"[[]1] * ~{mean} *", f"[[]1] [[]2] * ~{mean} *", "note: ~ marks what is below twice*"]
    )
    result.stdout.no_fnmatch_line("[[]1] [[]3] *~0.0[1-9]*")
    assert f"~{mean}" in (noisy.path / "report.md").read_text()
    assert f'<abbr title="below twice the floor">~</abbr>{mean}' in (noisy.path / "report.html").read_text()
    strict = noisy(*options, "--kld-max-between=1e-7", candidates=candidates)
    strict.assert_outcomes(passed=3, errors=1)
    strict.stdout.fnmatch_lines(
        ["FloorError: two runs of the same differ by more than a limit allows*max_between 1e-07*"]
    )


def test_a_matrix_runs_nothing_a_second_time_for_a_floor(alone: Gate, broken_dir: Path) -> None:
    candidates = (alone.candidate, broken_dir)
    alone(*OPTIONS, "--kld-max-mean=9", candidates=candidates).assert_outcomes(passed=2)
    alone(*OPTIONS, "--kld-floor", "--kld-max-mean=9").assert_outcomes(passed=1)
    before = len(manifests(alone))
    result = alone(*OPTIONS, "--kld-floor", "--kld-matrix=all", "-k", "matrix", candidates=candidates)
    result.assert_outcomes(errors=1, deselected=2)
    result.stdout.fnmatch_lines([f"*{broken_dir}: its test is not selected, and its second run is not in the cache*"])
    assert len(manifests(alone)) == before

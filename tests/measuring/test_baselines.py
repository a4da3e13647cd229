"""Baselines: promoted from a report, and what a session says of a candidate that fell behind."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from pytest_kld import __version__
from pytest_kld.command import main
from pytest_kld.errors import BaselineError
from pytest_kld.files import sha256_of_json
from pytest_kld.gate.baseline import find_baseline, how_measured

if TYPE_CHECKING:
    from conftest import Gate, MakeModel


SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text(encoding="utf-8"))


def validate(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(SCHEMA).validate(report)
    return report


@pytest.fixture
def release(gate: Gate, candidate_dir: Path, tmp_path: Path) -> Path:
    """The directory of a release candidate, promoted as a baseline in `baselines`."""
    gate.cache = f"--kld-cache-dir={tmp_path / 'cache'}"  # elsewhere captures are looked up by the original's name
    path = Path(shutil.copytree(candidate_dir, tmp_path / "release"))
    gate("--kld-max-mean=1", "--kld-json=before.json", candidates=(path,)).assert_outcomes(passed=1)
    assert main(["baseline", "promote", str(gate.path / "before.json"), str(gate.path / "baselines")]) == 0
    return path


@pytest.fixture(scope="session")
def better_dir(make_model: MakeModel) -> Path:
    """The reference with less noise than the candidate."""
    return make_model("better", noise=0.0001)


def replace_model(path: Path, by: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(by, path)


HELD = ("--kld-baseline=baselines", "--kld-max-regression=mean:5%")


def test_the_same_model_does_not_regress(gate: Gate, release: Path) -> None:
    run = gate(*HELD, "--kld-json=now.json", candidates=(release,))
    run.assert_outcomes(passed=1)
    (result,) = validate(gate.path / "now.json")["results"]
    assert result["baseline"]["paired"] is True
    assert result["baseline"]["created"] == validate(gate.path / "before.json")["created"]
    baseline = find_baseline(gate.path / "baselines", str(release))
    assert baseline is not None
    assert baseline.made_from["pytest_kld"] == __version__
    assert baseline.made_from["candidate"]["key"] == sha256_of_json(result["about"]["candidate"]["key"])[:32]
    assert [change["difference"] for change in result["baseline"]["changes"]] == [0, 0, 0]


def test_a_worse_model_under_the_same_name_fails_in_every_report(gate: Gate, release: Path, broken_dir: Path) -> None:
    replace_model(release, broken_dir)
    reports = ("--kld-json=now.json", "--kld-junit=now.xml", "--kld-html=now.html", "--junitxml=pytest.xml")
    run = gate(*HELD, *reports, candidates=(release,))
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(["*FAIL  mean KLD * baseline *; beyond max_regression mean:5% (*", "*REGRESSION"])
    (result,) = validate(gate.path / "now.json")["results"]
    (before,) = gate.results("before.json")
    mean = result["baseline"]["changes"][0]
    assert (mean["before"], mean["value"]) == (before["figures"]["mean"], result["figures"]["mean"])
    assert mean["state"] == "fail"
    assert mean["difference"] == result["figures"]["mean"] - before["figures"]["mean"]
    junit = ElementTree.parse(gate.path / "now.xml")
    assert junit.find(".//testcase[@name='max_regression[mean]']/failure") is not None
    properties = {
        item.get("name"): item.get("value") for item in ElementTree.parse(gate.path / "pytest.xml").iter("property")
    }
    assert float(properties["kld_change_mean"]) == mean["difference"]
    html = (gate.path / "now.html").read_text()
    assert "Against the baseline" in html
    assert "mean:5%" in html
    assert main(["report", "now.json"]) == 1


def test_without_the_scores_figures_are_compared_and_that_is_said(
    gate: Gate, release: Path, better_dir: Path, tmp_path: Path
) -> None:
    replace_model(release, better_dir)
    cache = tmp_path / "another-cache"
    run = gate(*HELD, "--kld-json=now.json", f"--kld-cache-dir={cache}", candidates=(release,))
    run.assert_outcomes(passed=1)
    run.stdout.fnmatch_lines(["note: *without an interval: the baseline's scores are not in the cache*"])
    (result,) = validate(gate.path / "now.json")["results"]
    assert result["baseline"]["paired"] is False
    assert {change["interval"] for change in result["baseline"]["changes"]} == {None}


def test_with_a_confidence_the_interval_of_the_difference_decides(gate: Gate, release: Path, better_dir: Path) -> None:
    """Three windows are too few for an interval, so only a model that did not change at all is decided."""
    gate(*HELD, "--kld-confidence=0.95", candidates=(release,)).assert_outcomes(passed=1)
    replace_model(release, better_dir)
    gate(*HELD, candidates=(release,)).assert_outcomes(passed=1)
    run = gate(*HELD, "--kld-confidence=0.95", candidates=(release,))
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(["*inconclusive at confidence 0.95*", "*undecided at max_regression mean:5%*"])


def test_a_result_of_another_protocol_is_refused(gate: Gate, release: Path) -> None:
    run = gate("--kld-baseline=baselines", "--kld-skip-first=4", candidates=(release,))
    run.assert_outcomes(errors=1)
    run.stdout.fnmatch_lines(["*cannot be held against*: --kld-skip-first (0 in the baseline, 4 now)*"])


def changed(about: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return what a result compared, with one part of it changed."""
    name, _, rest = path.partition(".")
    return {**about, name: changed(about[name], rest, value) if rest else value}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("protocol.windows", 2, "the number of windows (3 in the baseline, 2 now)"),
        ("protocol.window_size", 32, "the window size (64 in the baseline, 32 now)"),
        ("protocol.windows_from", "spread", "--kld-windows-from (start in the baseline, spread now)"),
        ("protocol.decoding", {"prompt_size": 16, "concurrency": 1}, "how windows are decoded"),
        ("protocol.datasets", [{"dataset": "other", "text_sha256": "0"}], "the dataset"),
        ("protocol.token_ids_sha256", "0", "the token ids"),
        ("reference.key.model", {"local": "0"}, "the reference"),
        ("reference.key.path", "decode", "the path through the engine (prefill in the baseline, decode now)"),
        ("candidate.store", "logits", "what the captures keep"),
        ("head", "native", "--kld-head (exact in the baseline, native now)"),
        ("vocab_size", 7, "the common vocabulary"),
    ],
)
def test_what_differs_is_named(gate: Gate, release: Path, path: str, value: Any, said: str) -> None:
    (result,) = gate.results("before.json")
    baseline = find_baseline(gate.path / "baselines", str(release))
    assert baseline is not None
    assert baseline.what_differs(result["about"]) == []
    (differing,) = baseline.what_differs(changed(result["about"], path, value))
    assert differing.startswith(said)


def test_other_token_ids_are_news_only_by_themselves(gate: Gate, release: Path) -> None:
    (result,) = gate.results("before.json")
    baseline = find_baseline(gate.path / "baselines", str(release))
    assert baseline is not None
    about = changed(result["about"], "protocol.token_ids_sha256", "0")
    about = changed(changed(about, "protocol.windows", 2), "protocol.stride", 8)
    windows, stride = baseline.what_differs(about)
    assert windows.startswith("the number of windows")
    assert stride.startswith("the stride")


def test_a_reference_without_a_key_is_known_by_its_digest(gate: Gate, release: Path) -> None:
    """As that of imported log-probabilities."""
    (result,) = gate.results("before.json")
    about = changed(result["about"], "reference.key", None)
    assert how_measured(about)["reference"] == about["reference"]["digest"]
    assert how_measured(about)["path"] == "prefill"


def test_other_versions_of_an_engine_are_noted_and_not_refused(gate: Gate, release: Path) -> None:
    (result,) = gate.results("before.json")
    baseline = find_baseline(gate.path / "baselines", str(release))
    assert baseline is not None
    assert baseline.notes(result["about"]) == []
    moved = changed(result["about"], "reference.key.engine.versions", {"torch": "9"})
    assert baseline.what_differs(moved) == []
    (note,) = baseline.notes(moved)
    assert note.startswith("since the baseline, the reference runs in another way: versions")


def test_a_result_against_another_reference_is_refused(gate: Gate, release: Path, broken_dir: Path) -> None:
    run = gate("--kld-baseline=baselines", f"--kld-ref={broken_dir}", candidates=(release,))
    run.assert_outcomes(errors=1)
    assert "cannot be held against" in run.stdout.str()
    assert "the reference (" in run.stdout.str()


def test_a_candidate_without_a_baseline_is_an_error_before_a_model_runs_if_a_regression_is_bounded(
    gate: Gate, release: Path, unloadable_dir: Path
) -> None:
    run = gate(*HELD, "--kld-json=now.json", candidates=(release, unloadable_dir))
    run.assert_outcomes(passed=1, errors=1)
    run.stdout.fnmatch_lines([f"*BaselineError: there is no baseline of {unloadable_dir} in *"])
    assert [result["outcome"] for result in gate.results("now.json")] == ["passed", "error"]


def test_a_candidate_without_a_baseline_passes_if_nothing_is_bounded(gate: Gate, release: Path) -> None:
    gate("--kld-baseline=baselines", "--kld-max-mean=1").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--kld-max-regression=mean:5%",), "--kld-max-regression needs --kld-baseline"),
        (("--kld-baseline=nowhere",), "there is no directory"),
        ((*HELD, "--kld-max-regression=mean:6%"), "mean is given twice"),
        (("--kld-baseline=baselines", "--kld-max-regression=men:6%"), "with a figure of mean, median"),
        ((*HELD, "--kld-windows=auto"), "give --kld-windows a number"),
    ],
)
def test_what_cannot_be_checked_is_a_usage_error(gate: Gate, options: tuple[str, ...], said: str) -> None:
    (gate.path / "baselines").mkdir()
    run = gate(*options)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    assert said in run.stderr.str()


def test_the_subject_of_a_suite_keeps_its_baseline_when_its_model_moves(
    gate: Gate, text_file: Path, broken_dir: Path
) -> None:
    def run(model: Path, *options: str) -> pytest.RunResult:
        (gate.path / "release.kld.toml").write_text(
            f"""
            [reference]
            model = "{gate.reference}"
            [protocol]
            dataset = "{text_file}"
            windows = 3
            window_size = 64
            stride = 32
            [[candidate]]
            name = "release"
            model = "{model}"
            """
        )
        return gate.pytester.runpytest_inprocess("release.kld.toml", gate.cache, *options)

    run(gate.candidate, "--kld-json=before.json").assert_outcomes(passed=1)
    assert main(["baseline", "promote", "before.json", "baselines"]) == 0
    run(gate.candidate, *HELD).assert_outcomes(passed=1)
    moved = run(broken_dir, *HELD)
    moved.assert_outcomes(failed=1)
    moved.stdout.fnmatch_lines(["*mean KLD * baseline *; beyond max_regression mean:5% (*"])


@pytest.mark.slow
def test_nvfp4_promoted_over_int8_is_caught_and_the_way_back_is_not(
    gate: Gate, real_models: Path, tmp_path: Path
) -> None:
    """The release candidate's directory held SmolLM2-135M in INT8, and holds it in NVFP4 now."""
    release = Path(shutil.copytree(real_models / "int8", tmp_path / "release"))
    protocol = ("--kld-dataset=python-docs", "--kld-windows=12", "--kld-window-size=512", "--kld-stride=512")
    options = (f"--kld-ref={real_models / 'smollm2-135m'}", f"--kld-candidate={release}", *protocol, gate.cache)
    run = gate.pytester.runpytest_inprocess
    run(*options, "--kld-max-mean=1", "--kld-json=int8.json").assert_outcomes(passed=1)
    assert main(["baseline", "promote", "int8.json", "baselines"]) == 0
    replace_model(release, real_models / "nvfp4")
    caught = run(*options, *HELD, "--kld-max-mean=1", "--kld-confidence=0.95", "--kld-json=nvfp4.json")
    caught.assert_outcomes(failed=1)
    caught.stdout.fnmatch_lines(["1 of 5 KLD limits exceeded at confidence 0.95*", "*beyond max_regression mean:5%*"])
    (result,) = gate.results("nvfp4.json")
    change = result["baseline"]["changes"][0]
    assert result["baseline"]["paired"]
    assert 0.05 * change["before"] < change["interval"]["low"] < change["difference"] < change["interval"]["high"]
    assert main(["baseline", "promote", "nvfp4.json", "baselines", "--failed"]) == 0
    replace_model(release, real_models / "int8")
    run(*options, *HELD, "--kld-max-mean=1", "--kld-confidence=0.95").assert_outcomes(passed=1)


def damaged(path: Path, change: Any) -> None:
    (file,) = path.glob("*.json")
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.update(schema_version=9), "has schema_version 9"),
        (lambda data: data.update(subject="other"), "holds the baseline of other"),
        (lambda data: data["figures"].update(mean="low"), "figures.mean is not a number"),
        (lambda data: data["measured"].pop("head"), "measured.head is missing"),
        (lambda data: data.pop("figures"), "is not a baseline"),
    ],
)
def test_a_damaged_baseline_is_an_error(gate: Gate, release: Path, change: Any, said: str) -> None:
    damaged(gate.path / "baselines", change)
    with pytest.raises(BaselineError, match=re.escape(said)):
        find_baseline(gate.path / "baselines", str(release))


def test_a_test_whose_baseline_is_damaged_is_an_error(gate: Gate, release: Path) -> None:
    damaged(gate.path / "baselines", lambda data: data.pop("figures"))
    run = gate("--kld-baseline=baselines", candidates=(release,))
    run.assert_outcomes(errors=1)
    assert "is not a baseline" in run.stdout.str()


def test_a_baseline_says_what_it_was_made_from(gate: Gate, release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = gate.results("before.json")
    capsys.readouterr()
    assert main(["baseline", "show", "baselines", str(release)]) == 0
    shown = json.loads(capsys.readouterr().out)
    made = shown["made_from"]["candidate"]
    assert made["model"] == str(release)
    assert made["capture"] == result["about"]["candidate"]["digest"]
    assert made["identity"] == result["about"]["candidate"]["key"]["model"]
    assert made["engine"] == "transformers"
    assert "torch" in made["versions"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*", shown["made_from"]["created"])
    (file,) = (gate.path / "baselines").iterdir()
    assert file.stat().st_size < 8_000
    assert main(["baseline", "list", "baselines"]) == 0
    assert str(release) in capsys.readouterr().out


def test_diff_shows_changes_and_exits_with_1_on_a_regression(
    gate: Gate, release: Path, broken_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_model(release, broken_dir)
    gate("--kld-max-mean=9", "--kld-json=now.json", candidates=(release,)).assert_outcomes(passed=1)
    capsys.readouterr()
    assert main(["baseline", "diff", "now.json", "baselines"]) == 0
    assert "mean KLD" in capsys.readouterr().out
    assert main(["baseline", "diff", "now.json", "baselines", "--max-regression", "mean:5%", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row["changes"][0]["state"] == "fail"


def test_a_result_that_failed_is_promoted_only_on_request(
    gate: Gate, broken_dir: Path, unloadable_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate("--kld-max-mean=0.1", "--kld-json=report.json", candidates=(gate.candidate, broken_dir, unloadable_dir))
    assert main(["baseline", "promote", "report.json", "baselines"]) == 2
    assert "these results did not pass" in capsys.readouterr().err
    assert not Path("baselines").exists()
    assert main(["baseline", "promote", "report.json", "baselines", "--only", str(gate.candidate)]) == 0
    assert main(["baseline", "promote", "report.json", "baselines", "--only", str(broken_dir)]) == 2
    assert main(["baseline", "promote", "report.json", "baselines", "--only", str(broken_dir), "--failed"]) == 0
    assert main(["baseline", "promote", "report.json", "baselines", "--only", str(unloadable_dir), "--failed"]) == 2
    assert "was not measured" in capsys.readouterr().err
    assert len(list(Path("baselines").iterdir())) == 2

"""`--kld-plan` says what would be measured and what it takes, and measures nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from nvidia_smi import put_on_path

from pytest_kld.report.plan import PlannedSubject
from pytest_kld.session.planning import _placed  # the GPUs and times that this machine lacks
from pytest_kld.subjects.subject import Subject

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Gate

SUITE = """
[reference]
model = "REFERENCE"
[protocol]
engine = "transformers"
windows = 2
window_size = 64
stride = 32
[[candidate]]
name = "good"
model = "CANDIDATE"
[[candidate]]
name = "later"
model = "CANDIDATE"
skip = "not yet"
[[candidate]]
name = "gone"
model = "./nowhere"
"""


def plan(gate: Gate, *arguments: str) -> tuple[pytest.RunResult, dict[str, Any]]:
    cache = f"--kld-cache-dir={gate.path / 'cache'}"
    result = gate.pytester.runpytest_inprocess(gate.protocol[0], cache, "--kld-plan-json=plan.json", *arguments)
    return result, json.loads((gate.path / "plan.json").read_text())


@pytest.fixture
def suite(gate: Gate) -> Gate:
    """A directory with a suite of one runnable, one skipped and one broken candidate."""
    text = SUITE.replace("REFERENCE", str(gate.reference)).replace("CANDIDATE", str(gate.candidate))
    (gate.path / "release.kld.toml").write_text(text)
    return gate


def test_a_plan_measures_nothing_and_then_knows_what_is_cached_and_how_long_it_took(suite: Gate) -> None:
    result, before = plan(suite)
    assert result.ret == pytest.ExitCode.OK
    assert not list(suite.path.glob("cache/captures/*"))
    assert [(one["name"], one["state"]) for one in before["subjects"]] == [
        (str(suite.reference), "capture"),
        ("good", "capture"),
        ("later", "skip"),
        ("gone", "error"),
    ]
    assert (before["seconds"], before["servers"]) == (None, 0)
    result.stdout.fnmatch_lines(
        ["release.kld.toml:", "2 of 4 Subjects to capture, 0 captured already", "time: unknown*"]
    )

    suite.pytester.runpytest_inprocess(suite.protocol[0], f"--kld-cache-dir={suite.path / 'cache'}")
    _, after = plan(suite)
    assert [one["state"] for one in after["subjects"]] == ["cached", "cached", "skip", "error"]
    assert (after["seconds"], after["bytes"]) == (0, 0)

    result, longer = plan(suite, "--kld-windows=3")
    assert [one["state"] for one in longer["subjects"][:2]] == ["capture", "capture"]
    manifests = [json.loads(path.read_text()) for path in suite.path.glob("cache/captures/*/capture.json")]
    known = {manifest["model"]: manifest["timing"] for manifest in manifests}
    for one, model in zip(longer["subjects"], (str(suite.reference), "good"), strict=False):
        assert one["loading"] == known[model]["loading"]
        assert one["running"] == pytest.approx(known[model]["running"] * 3 / 2)
    (entry,) = {path.parent for path in suite.path.glob("cache/captures/*/capture.json") if "good" in path.read_text()}
    taken = sum(path.stat().st_size for path in entry.rglob("*.safetensors"))
    assert taken < before["subjects"][1]["bytes"] < taken + (2 << 20)
    result.stdout.fnmatch_lines(["time: about * from earlier runs*"])


def test_what_a_team_has_captured_is_planned_as_shared_and_is_then_not_run(suite: Gate) -> None:
    team = f"--kld-cache-url={(suite.path / 'team').as_uri()}"
    (suite.path / "team").mkdir()
    elsewhere = f"--kld-cache-dir={suite.path / 'elsewhere'}"
    suite.pytester.runpytest_inprocess(suite.protocol[0], elsewhere, team, "--kld-cache-push")
    result, told = plan(suite, team)
    assert [one["state"] for one in told["subjects"]] == ["shared", "shared", "skip", "error"]
    assert (told["seconds"], told["bytes"]) == (0, 0)
    result.stdout.fnmatch_lines(["0 of 4 Subjects to capture, 2 captured already"])
    _, alone = plan(suite)
    assert [one["state"] for one in alone["subjects"]] == ["capture", "capture", "skip", "error"]
    run = suite.pytester.runpytest_inprocess(suite.protocol[0], f"--kld-cache-dir={suite.path / 'cache'}", team, "-s")
    assert "kld: loading" not in run.stdout.str()  # as the plan said


def test_a_plan_counts_what_fixtures_of_the_project_add(suite: Gate) -> None:
    suite.pytester.makeconftest("""
        import pytest
        @pytest.fixture(scope="session")
        def kld_candidate_args(): return {"attn_implementation": "eager"}
    """)
    _, told = plan(suite)
    assert told["subjects"][1]["subject"]["arguments"] == {"attn_implementation": "eager"}


def test_a_plan_stops_at_a_suite_with_a_mistake(suite: Gate) -> None:
    (suite.path / "wrong.kld.toml").write_text("x = 1")
    result = suite.pytester.runpytest_inprocess("--kld-plan")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert "KLD plan" not in result.stdout.str()


def test_a_plan_is_refused_with_xdist(suite: Gate) -> None:
    result = suite.pytester.runpytest_inprocess("--kld-plan", "-n2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_servers_are_placed_side_by_side_on_the_gpus(
    suite: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(tmp_path, monkeypatch, *(f"GPU-{index}" for index in range(8)))
    served = SUITE.replace("transformers", "sglang").replace("REFERENCE", str(suite.reference))
    served = served.replace('model = "CANDIDATE"', f'model = "{suite.candidate}"\nargs = "--tp 4"')
    served = served.replace("[protocol]", 'args = "--tp 8"\n[protocol]')
    more = f'[[candidate]]\nname = "second"\nmodel = "{suite.candidate}"\nargs = "--tp 4"\n'
    (suite.path / "release.kld.toml").write_text(served + more)
    result, told = plan(suite)
    rows = {one["name"]: (one["gpus"], one["step"], one["places"]) for one in told["subjects"]}
    assert rows == {
        str(suite.reference): (8, 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        "good": (4, 2, [0, 1, 2, 3]),
        "later": (None, None, []),
        "gone": (None, None, []),
        "second": (4, 2, [4, 5, 6, 7]),
    }
    result.stdout.fnmatch_lines(["3 servers to boot; 8 GPUs visible"])


def test_a_server_that_serves_both_paths_is_planned_once(
    suite: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_path(tmp_path, monkeypatch, "GPU-0")
    served = (
        SUITE.partition("[[candidate]]")[0].replace("transformers", "sglang").replace("REFERENCE", str(suite.reference))
    )
    served = served.replace("[protocol]", '[protocol]\npath = "both"')
    (suite.path / "release.kld.toml").write_text(f'{served}[[candidate]]\nname = "it"\nmodel = "{suite.candidate}"\n')
    result, told = plan(suite)
    assert [(one["subject"]["path"], one["step"]) for one in told["subjects"]] == [
        *(("prefill", 1), ("decode", 1)),
        *(("prefill", 2), ("decode", 2)),
    ]
    assert told["servers"] == 2
    result.stdout.fnmatch_lines(["2 servers to boot; 1 GPUs visible"])


def test_the_time_of_a_plan_is_that_of_the_schedule_and_suites_follow_each_other() -> None:
    def one(suite: str, name: str, gpus: int, seconds: float) -> PlannedSubject:
        subject = Subject(name=name)
        return PlannedSubject(
            role="candidate", subject=subject, suite=suite, state="capture", gpus=gpus, loading=1, running=seconds - 1
        )

    placed = _placed([one("a", "x", 4, 10), one("a", "y", 4, 6), one("a", "z", 4, 3), one("b", "w", 8, 5)], 8)
    assert [(each.start, each.places) for each in placed] == [
        (0, (0, 1, 2, 3)),
        (0, (4, 5, 6, 7)),
        (6, (4, 5, 6, 7)),
        (10, (0, 1, 2, 3, 4, 5, 6, 7)),
    ]


def test_subjects_that_run_one_after_the_other_keep_the_order_of_the_file() -> None:
    def one(name: str, seconds: float) -> PlannedSubject:
        return PlannedSubject(
            role="candidate", subject=Subject(name=name), suite="a", state="capture", loading=0, running=seconds
        )

    assert [each.start for each in _placed([one("x", 3), one("y", 9), one("z", 6)], 0)] == [0, 3, 12]


def test_five_hundred_subjects_are_collected_without_torch(suite: Gate) -> None:
    values = ", ".join(f'"v{index}"' for index in range(50))
    labels = ", ".join(f'l{index} = "--moe-runner-backend b{index}"' for index in range(10))
    (suite.path / "release.kld.toml").write_text(
        f'[reference]\nmodel = "org/r"\n[protocol]\nengine = "sglang"\n[[candidate]]\nmodel = "org/c"\ntags = ["t"]\n'
        f'axes = {{ "--kv-cache-dtype" = [{values}], moe = {{ {labels} }} }}\n'
    )
    code = """
import sys, time
import pytest
before = time.perf_counter()
pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "pytest_kld.plugin", "--strict-markers"])
print("SECONDS", time.perf_counter() - before, "torch" in sys.modules, "numpy" in sys.modules)
"""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=suite.path, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.count("release.kld.toml::test_kld[") == 500
    _, seconds, torch, numpy = run.stdout.splitlines()[-1].split()
    print(f"500 Subjects collected in {float(seconds):.2f} s")
    assert (torch, numpy) == ("False", "False")

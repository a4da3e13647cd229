"""Suite files: each Subject is a test, with its own limits, marks and errors."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema
import pytest

import pytest_kld
from pytest_kld.settings.config import config_of
from pytest_kld.settings.subjects import candidate_of, reference_of
from pytest_kld.suites.keys import suite_schema

if TYPE_CHECKING:
    from conftest import Gate

SERVED = """
[reference]
model = "org/reference"
args = "--tp 8"
env = { NCCL_P2P_DISABLE = "1" }

[protocol]
engine = "sglang"
windows = 7
dataset = ["python-docs"]

[limits]
max_mean = 0.05

[[candidate]]
name = "nvfp4"
model = "org/model-NVFP4"
args = ["--tp", "4", "--quantization", "modelopt_fp4"]
env = { NCCL_P2P_LEVEL = "SYS" }
tags = ["nvfp4", "fp4"]
limits = { max_p99 = 0.6 }
exclude = [{ moe = "cutlass", "--kv-cache-dtype" = "bf16" }]
[candidate.axes]
"--kv-cache-dtype" = ["bf16", "fp8_e4m3"]
moe = { cutlass = "--moe-runner-backend cutlass", cute = { args = "--moe-runner-backend cutedsl", env = { A = 1 } } }

[[candidate]]
model = "org/model-AWQ"
tags = ["awq"]
xfail = "a known loss"

[[candidate]]
name = "in process"
model = "org/model-AWQ"
engine = "transformers"
args = { attn_implementation = "eager" }
axes = { dtype = ["bfloat16", "float32"] }
skip = "no memory"
"""


@pytest.fixture
def write(pytester: pytest.Pytester, gate: Gate) -> Path:
    """A function that writes a suite file whose text names the tiny models."""

    def write(text: str, name: str = "release.kld.toml") -> Path:
        path = pytester.path / name
        path.write_text(text.replace("REFERENCE", str(gate.reference)).replace("CANDIDATE", str(gate.candidate)))
        return path

    return write  # type: ignore[return-value]


def own_cache(gate: Gate) -> str:
    """Return an option for a cache of this test alone: other tests look for captures by their models' names."""
    return f"--kld-cache-dir={gate.path / 'cache'}"


def collected(pytester: pytest.Pytester, *arguments: str) -> list[pytest.Item]:
    return list(pytester.inline_genitems(*arguments)[0])


def test_each_combination_of_axes_is_a_test_of_its_own(pytester: pytest.Pytester, write) -> None:
    write(SERVED)
    items = collected(pytester, "--strict-markers")
    assert [item.nodeid for item in items] == [
        "release.kld.toml::test_kld[nvfp4-bf16-cute]",
        "release.kld.toml::test_kld[nvfp4-fp8_e4m3-cutlass]",
        "release.kld.toml::test_kld[nvfp4-fp8_e4m3-cute]",
        "release.kld.toml::test_kld[org/model-AWQ]",
        "release.kld.toml::test_kld[in process-bfloat16]",
        "release.kld.toml::test_kld[in process-float32]",
    ]
    subjects = [candidate_of(item) for item in items]
    assert subjects[2].arguments["args"] == [
        *("--tp", "4", "--quantization", "modelopt_fp4"),
        *("--kv-cache-dtype", "fp8_e4m3", "--moe-runner-backend", "cutedsl"),
    ]
    assert subjects[2].environment == {"NCCL_P2P_LEVEL": "SYS", "A": "1"}
    assert subjects[2].axes == {"--kv-cache-dtype": "fp8_e4m3", "moe": "cute"}
    assert subjects[2].limits == {"max_p99": 0.6}
    assert subjects[4].arguments == {"attn_implementation": "eager", "dtype": "bfloat16"}
    config = config_of(items[0])
    assert (config.windows, config.dataset, config.bounds["max_mean"]) == (7, ("python-docs",), 0.05)
    reference = reference_of(config)
    assert (reference.name, reference.engine, reference.arguments) == (
        "org/reference",
        "sglang",
        {"args": ["--tp", "8"]},
    )
    assert reference.environment == {"NCCL_P2P_DISABLE": "1"}


@pytest.mark.parametrize(
    ("selection", "selected"),
    [
        (("-m", "nvfp4"), ["nvfp4-bf16-cute", "nvfp4-fp8_e4m3-cutlass", "nvfp4-fp8_e4m3-cute"]),
        (("-m", "awq or kld and not nvfp4", "-k", "AWQ"), ["org/model-AWQ"]),
        (("-k", "float32"), ["in process-float32"]),
    ],
)
def test_tags_and_names_select_subjects(pytester: pytest.Pytester, write, selection, selected: list[str]) -> None:
    write(SERVED)
    result = pytester.runpytest_inprocess("--collect-only", "-q", "--strict-markers", *selection)
    assert [line for line in result.outlines if "::" in line] == [
        f"release.kld.toml::test_kld[{one}]" for one in selected
    ]


def test_the_command_line_wins_over_the_file_and_the_file_over_the_ini_file(pytester: pytest.Pytester, write) -> None:
    write(SERVED)
    pytester.makeini("[pytest]\nkld_windows = 3\nkld_stride = 9\nkld_ref_args = --tp 2\nkld_max_p95 = 0.5\n")
    config = config_of(collected(pytester)[0])
    assert (config.windows, config.stride, config.ref_args) == (7, 9, ("--tp", "8"))
    assert (config.bounds["max_mean"], config.bounds["max_p95"]) == (0.05, 0.5)
    given = config_of(collected(pytester, "--kld-windows=5", "--kld-max-mean=1", "--kld-ref=org/other")[0])
    assert (given.windows, given.bounds["max_mean"], given.ref.name) == (5, 1, "org/other")


HEAD = '[reference]\nmodel = "org/r"\n[protocol]\nengine = "sglang"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = [1", "a.kld.toml: is not TOML: * (at end of document)"),
        (
            f'{HEAD}[[candidate]]\nmodel = "a/b"\nagrs = ""',
            "a.kld.toml:7: candidate[[]1].agrs: unknown key 'agrs'; *tags*",
        ),
        (f'{HEAD}[[candidate]]\nname = "a/b"', "a.kld.toml:5: candidate[[]1]: the key 'model' is missing"),
        (f"{HEAD}window = 3", "a.kld.toml:5: protocol.window: unknown key 'window'; valid are *windows, *window_size*"),
        (
            f'{HEAD}windows = "many"\n[[candidate]]\nmodel = "a/b"',
            "a.kld.toml:5: protocol.windows: expected a whole number*got 'many'*",
        ),
        (f"{HEAD}windows = true", "a.kld.toml:5: protocol.windows: expected a text or a number, got True"),
        (f"{HEAD}[limits]\nmax_mena = 1", "a.kld.toml:6: limits.max_mena: unknown key*max_mean*"),
        (f"{HEAD}[limits]\nmax_mean = -1", "a.kld.toml:6: limits.max_mean: expected a number of at least 0*"),
        (f'{HEAD}junit = "a.xml"', "a.kld.toml:5: protocol.junit: unknown key*"),
        (HEAD, "a.kld.toml:1: candidate: expected at least one table [[][[]candidate]]"),
        (
            f'{HEAD}[[candidate]]\nmodel = "a/b"\n[candidate.limits]\nmax_p99 = "x"',
            "a.kld.toml:8: candidate[[]1].limits.max_p99: expected a number*",
        ),
        (
            f'{HEAD}[[candidate]]\nmodel = "a/b"\n[candidate.axes]\n"--a" = ["x", "y"]\nb = 1',
            "a.kld.toml:9: candidate[[]1].axes.b: expected a list of values*",
        ),
        (
            f'{HEAD}[[candidate]]\nmodel = "a/b"\naxes = {{ "--a" = ["x"] }}\nexclude = [{{ "--a" = "z" }}]',
            "a.kld.toml:8: candidate[[]1].exclude[[]1].--a: the axis has no value 'z'; its values are x",
        ),
        (
            f'{HEAD}[[candidate]]\nmodel = "a/b"\n[[candidate]]\nmodel = "a/b"',
            "a.kld.toml:7: candidate[[]2]: there are two Subjects 'a/b', the other at a.kld.toml:5: candidate[[]1]*",
        ),
        (f'{HEAD}[[candidate]]\nmodel = "a/b"\ntags = ["skip"]', "a.kld.toml:7: candidate[[]1].tags: expected words*"),
        (
            f'{HEAD}[[candidate]]\nmodel = "a/b"\npath = "x"',
            "a.kld.toml:7: candidate[[]1].path: expected one of prefill*",
        ),
        (f'{HEAD}[[candidate]]\nmodel = "a/b"\nengine = "x"', "a.kld.toml:7: candidate[[]1].engine: expected one of *"),
        ('[[candidate]]\nmodel = "a/b"', "a.kld.toml: the table [[]reference] is missing, and --kld-ref is not given"),
    ],
)
def test_a_mistake_is_reported_with_file_line_and_key(pytester: pytest.Pytester, write, text: str, said: str) -> None:
    write(text, "a.kld.toml")
    result = pytester.runpytest_inprocess("-p", "no:hypothesispytest")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines([f"*{said}"])


def test_every_mistake_of_a_file_is_reported_at_once(pytester: pytest.Pytester, write) -> None:
    write(f'{HEAD}stirde = 3\nwindows = []\n[[candidate]]\nmodel = 1\nnmae = ""')
    result = pytester.runpytest_inprocess()
    result.stdout.fnmatch_lines(
        ["*:5: protocol.stirde*", "*:6: protocol.windows*", "*:8: candidate*.model*", "*:9: candidate*.nmae*"]
    )


UNRUNNABLE = {
    'model = "./missing"': "candidate[[]1].model: './missing': there is no directory*not a hub id*",
    'model = "a/b"\nargs = "--port 3"': "candidate[[]2].args: --port cannot be given: a free port is picked*",
    'model = "a/c"\naxes = { "--port" = [3] }': "candidate[[]3].axes.--port: --port cannot be given*",
    'model = "a/d"\naxes = { speed = [3] }': "candidate[[]4].axes.speed: name the axis after the flag*--speed*",
    'model = "a/e"\nargs = { a = 1 }': "candidate[[]5].args: SGLang takes flags*",
    'model = "a/f"\nengine = "transformers"\nargs = "--a"': "candidate[[]6].args: the engine transformers takes*",
    'model = "a/g"\nurl = "http://h:1"': "candidate[[]7].url: a running server needs `capture_dir`*",
    'model = "a/h"\nengine = "transformers"\nenv = { A = 1 }': "candidate[[]8].env: the engine transformers has no*",
}


def test_a_subject_that_cannot_be_run_is_an_error_of_its_own(pytester: pytest.Pytester, write) -> None:
    write(HEAD + "".join(f"[[candidate]]\n{candidate}\n" for candidate in (*UNRUNNABLE, 'model = "a/i"\nskip = "no"')))
    result = pytester.runpytest_inprocess("--kld-json=report.json")
    result.assert_outcomes(errors=len(UNRUNNABLE), skipped=1)
    result.stdout.fnmatch_lines([f"SuiteError: release.kld.toml:*: {said}" for said in UNRUNNABLE.values()])


RUN = """
[reference]
model = "REFERENCE"

[protocol]
engine = "transformers"
windows = 2
window_size = 64
stride = 32

[limits]
max_mean = 0.1

[[candidate]]
name = "good"
model = "CANDIDATE"
axes.attn_implementation = ["eager", "sdpa"]

[[candidate]]
name = "strict"
model = "CANDIDATE"
limits = { max_mean = 0 }
xfail = "it is not the reference"
"""


def test_subjects_run_with_their_own_limits_and_a_broken_one_stops_no_other(gate: Gate, write) -> None:
    broken = gate.path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    write(f'{RUN}\n[[candidate]]\nname = "broken"\nmodel = "broken"\n')
    result = gate.pytester.runpytest_inprocess("--kld-json=report.json", gate.protocol[0], own_cache(gate))
    result.assert_outcomes(passed=2, xfailed=1, errors=1)
    rows = {(row["candidate"], row["outcome"]): row for row in gate.results()}
    assert list(rows) == [
        ("good (eager)", "passed"),
        ("good (sdpa)", "passed"),
        ("strict", "failed"),
        ("broken", "error"),
    ]
    assert {row["suite"] for row in rows.values()} == {"release.kld.toml"}
    assert "cannot read the config of broken" in rows["broken", "error"]["message"]
    assert rows["strict", "failed"]["checks"][0]["bound"] == 0
    eager = rows["good (eager)", "passed"]["about"]["candidate"]["key"]["engine"]
    assert eager["arguments"] == {"attn_implementation": "eager"}


def test_nothing_runs_if_no_subject_of_a_suite_can_be_run(gate: Gate, write) -> None:
    broken = gate.path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    write(RUN.split("[[candidate]]")[0] + '[[candidate]]\nmodel = "broken"\n')
    result = gate.pytester.runpytest_inprocess(gate.protocol[0], own_cache(gate))
    result.assert_outcomes(errors=1)
    assert "loading" not in result.stdout.str()


def test_each_suite_of_a_session_has_its_own_reference_protocol_and_table(gate: Gate, write) -> None:
    write(RUN)
    write(RUN.replace("windows = 2", "windows = 3").replace("REFERENCE", "CANDIDATE"), "other.kld.toml")
    gate.pytester.makepyfile("def test_own(kld): pass")
    result = gate.pytester.runpytest_inprocess(
        f"--kld-ref={gate.reference}",
        gate.protocol[0],
        own_cache(gate),
        "--kld-json=report.json",
        "--kld-junit=report.xml",
    )
    own = [row for row in gate.results() if row["suite"] is None]
    assert [row["outcome"] for row in own] == ["error"]  # it has no candidate, and takes none from a suite
    rows = [row for row in gate.results() if row["suite"]]
    suites = {(row["suite"], row["reference"], row["about"]["protocol"]["windows"]) for row in rows}
    # --kld-ref wins over the files
    assert suites == {("release.kld.toml", str(gate.reference), 2), ("other.kld.toml", str(gate.reference), 3)}
    titles = [line for line in result.stdout.lines if line.startswith("KLD Evaluation Results")]
    assert len(titles) == 3
    assert 'name="other.kld.toml: strict"' in (gate.path / "report.xml").read_text()


@pytest.mark.parametrize("option", ["--kld-candidate-args=--tp 4", "--kld-moe-backend=triton"])
def test_options_for_candidates_are_refused_beside_a_suite(pytester: pytest.Pytester, write, option: str) -> None:
    write(SERVED)
    result = pytester.runpytest_inprocess(option)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines([f"*{option.partition('=')[0]} does not reach the candidates of a suite*"])


def test_a_candidate_on_the_command_line_is_refused_if_only_suites_are_gated(gate: Gate, write) -> None:
    write(RUN)
    result = gate()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--kld-candidate=* is given, but no collected test measures it*"])


def test_a_fixture_that_replaces_the_candidate_makes_every_subject_an_error(gate: Gate, write) -> None:
    write(RUN)
    gate.pytester.makeconftest("""
        import pytest
        @pytest.fixture(scope="session")
        def kld_candidate(kld_reference): return kld_reference
    """)
    result = gate.pytester.runpytest_inprocess(gate.protocol[0], own_cache(gate))
    result.assert_outcomes(errors=2, xfailed=1)
    assert "capture" not in result.stdout.str()
    result.stdout.fnmatch_lines(["*a conftest.py overrides the fixture kld_candidate*"])


SCHEMA = Path(pytest_kld.__file__).parent / "suites" / "suite.schema.json"
EXAMPLES = sorted((Path(__file__).parents[2] / "conftest_examples").rglob("*.kld.toml"))


def test_the_schema_in_the_package_is_that_of_the_keys() -> None:
    assert json.loads(SCHEMA.read_text()) == suite_schema()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_schema_accepts_the_examples(path: Path) -> None:
    jsonschema.validate(tomllib.loads(path.read_text()), suite_schema())


@pytest.mark.parametrize(
    "text",
    [
        f'{HEAD}[[candidate]]\nmodel = "a/b"\nagrs = ""',
        f'{HEAD}[[candidate]]\nname = "a/b"',
        f'{HEAD}windows = true\n[[candidate]]\nmodel = "a/b"',
        f'{HEAD}junit = "a.xml"\n[[candidate]]\nmodel = "a/b"',
        f'{HEAD}[limits]\nmax_mean = -1\n[[candidate]]\nmodel = "a/b"',
        f'{HEAD}[[candidate]]\nmodel = "a/b"\naxes.b = 1',
        f'{HEAD}[[candidate]]\nmodel = "a/b"\ntags = ["a b"]',
        f'{HEAD}[[candidate]]\nmodel = "a/b"\npath = "x"',
        HEAD,
    ],
)
def test_the_schema_rejects_what_the_reader_rejects(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tomllib.loads(text), suite_schema())


def test_the_schema_accepts_what_the_reader_accepts() -> None:
    for text in (SERVED, RUN):
        jsonschema.validate(tomllib.loads(text), suite_schema())


@pytest.mark.slow
def test_the_workers_of_xdist_measure_a_suite_and_the_reports_are_complete(gate: Gate, write) -> None:
    write(RUN + '[[candidate]]\nname = "gone"\nmodel = "./nowhere"\n')
    result = gate.pytester.runpytest_inprocess(gate.protocol[0], own_cache(gate), "--kld-json=report.json", "-n2")
    result.assert_outcomes(passed=2, xfailed=1, errors=1)
    rows = gate.results()
    assert [row["candidate"] for row in rows] == ["good (eager)", "good (sdpa)", "strict", "gone"]
    assert {row["suite"] for row in rows} == {"release.kld.toml"}
    assert {row["reference"] for row in rows} == {str(gate.reference)}

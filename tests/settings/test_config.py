"""Options, ini keys, and which of them wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kld.gate.limits import LIMITS, MATRIX_LIMITS
from pytest_kld.gate.speed_limits import SPEED_LIMITS
from pytest_kld.settings.options import OPTIONS

if TYPE_CHECKING:
    from conftest import Gate

GOOD: dict[str, tuple[str, Any]] = {
    "dataset": ("python-docs", ["python-docs"]),
    "each_dataset": ("true", True),
    "windows": ("7", 7),
    "windows_from": ("spread", "spread"),
    "window_size": ("128", 128),
    "stride": ("64", 64),
    "skip_first": ("16", 16),
    "metrics": ("all", "all"),
    "engine": ("transformers", "transformers"),
    "startup_timeout": ("60", 60),
    "api_key_env": ("KEY", "KEY"),
    "dtype": ("bfloat16", "bfloat16"),
    "device": ("cuda:1", "cuda:1"),
    "trust_remote_code": ("true", True),
    "store": ("logits", "logits"),
    "confidence": ("0.9", 0.9),
    "inconclusive": ("skip", "skip"),
    "floor": ("true", True),
    "head": ("native", "native"),
    "cache_size": ("1.5 GB", 1_500_000_000),
    "path": ("both", "both"),
    "prompt_size": ("16", 16),
    "concurrency": ("4", 4),
    "cache_url": ("file:///shared/kld", "file:///shared/kld"),
    "cache_push": ("true", True),
    "hash": ("full", "full"),
    "refresh": ("true", True),
    "strict_cache": ("true", True),
    "shard": ("2/5", "shard 2 of 5"),
}
"""A text and its value, for each option that takes neither a path nor a model."""
PATHS = ("cache_dir", "junit", "json", "html", "markdown", "capture_dir")
MODELS = ("ref", "candidate", "tokenizer")
SPEED = {
    "speedup_over",
    *SPEED_LIMITS,
    *("throughput", "throughput_input", "throughput_output", "throughput_rounds"),
    *("throughput_failures", "throughput_args"),
}
"""Options on speed, which need servers; see test_throughput.py."""
OTHERS = ("baseline", "cpu_servers", "matrix", "max_between", "max_regression", "plan", "plan_json")
"""Options with a test module of their own."""
SERVERS = {
    *("sglang_command", "vllm_command", "ref_args", "candidate_args", "ref_env", "candidate_env"),
    *("moe_backend", "ref_url", "candidate_url", "candidate_engine"),
}
"""Options of servers, which the engine transformers does not read; the tests of the engines cover them."""
BAD = [
    ("engine", "llama.cpp", "expected one of auto, sglang, vllm, transformers, got 'llama.cpp'"),
    ("startup_timeout", "0", "expected a whole number of at least 1, got '0'"),
    (
        "windows",
        "0",
        "expected a whole number of at least 1, got '0' (or `max` for as many as the text yields, or `auto`)",
    ),
    ("windows", "many", "expected a whole number of at least 1, got 'many'"),
    ("windows_from", "end", "expected one of start, spread, got 'end'"),
    ("window_size", "1", "expected a whole number of at least 2, got '1'"),
    ("stride", "-5", "expected a whole number of at least 1, got '-5'"),
    ("stride", "0.5", "expected a whole number of at least 1, got '0.5'"),
    ("dtype", "int8", "expected one of auto, float32, bfloat16, float16, got 'int8'"),
    ("device", "tpu", "expected auto, cpu, cuda or cuda:N, got 'tpu'"),
    ("store", "disk", "expected one of auto, hidden, logits, logprobs, got 'disk'"),
    ("head", "wrong", "expected one of exact, native, got 'wrong'"),
    ("hash", "none", "expected one of sample, full, got 'none'"),
    ("ref", "./nowhere", "it is not a hub id (ORG/NAME[@REVISION])"),
    ("candidate", "a/b@", "it is not a hub id (ORG/NAME[@REVISION])"),
    ("tokenizer", "", "is neither a model directory (no config.json) nor a capture"),
    *(("cache_size", text, f"a size such as 500GB or 1.5TB, got '{text}'") for text in ("500", "-1GB", "GB", "5 PB")),
    ("cache_url", "bucket/kld", "expected a URL such as s3://BUCKET/FOLDER or file:///shared/kld, got 'bucket/kld'"),
    ("cache_url", "simplecache::s3://x", "expected a URL such as"),
    ("cache_url", "nope://x", "fsspec has no backend for 'nope://x'; try s3, gs, hf, https or file"),
    *(
        ("shard", text, "expected K/N, the K-th of N shards, with K from 1 to N")
        for text in ("0/2", "3/2", "1", "1/", "a/2", "1/2/3")
    ),
    ("junit", ".", "expected a file that can be written, got '.'"),
    ("json", "/dev/null/report.json", "expected a file that can be written, got '/dev/null/report.json'"),
    *((name, "-1", "of at least 0") for name in (*LIMITS, *MATRIX_LIMITS)),
    *((name, "lots", "got 'lots'") for name in (*LIMITS, *MATRIX_LIMITS)),
    ("matrix", "pairs", "expected one of axes, all, got 'pairs'"),
    *(
        (name, text, f"got '{text}'")
        for name in ("windows", "skip_first", "confidence", "max_mean", "max_nan", "min_top1")
        for text in ("1_0", "0_1.5", "٣", "１", "0x10", "1e", "nan", "inf", "1e400", " ", "+-1")
    ),
    *((name, "1" + "0" * 30, "a whole number of at most ") for name in ("stride", "window_size", "skip_first")),
    *((name, "1" + "0" * 9, "a whole number of at most ") for name in ("windows", "startup_timeout")),
    *(("windows", f"auto:{text}", "(or `max`") for text in ("1_0", "٣", "1" + "0" * 30)),
    *(("cache_size", text, "a size such as 500GB or 1.5TB") for text in ("1_0GB", "٣GB", "1e3GB", "1..5GB")),
    ("cache_size", "9" * 400 + "TB", "a size of at most 1000000TB, got '999"),
    *(("confidence", text, "at most 0.999999, e.g. 0.95") for text in ("1", "0.9999999", "0.4")),
    *(("device", text, "expected auto, cpu, cuda or cuda:N") for text in ("cuda:1_0", "cuda:٣", "cuda:", "cuda:99999")),
    ("max_mean", "1" + "0" * 400, "expected a number of at least 0, got '1000"),
    ("max_nan", "1" + "0" * 400, "expected a whole number of at least 0, got '1000"),
    ("max_mean", "nan", "expected a number of at least 0, got 'nan'"),
    ("max_mean", "inf", "expected a number of at least 0, got 'inf'"),
    ("max_nan", "1.5", "expected a whole number of at least 0, got '1.5'"),
    ("min_top1", "1.5", "at most 1, got '1.5'"),
]


@pytest.fixture
def read(gate: Gate, tmp_path: Path) -> Any:
    """A function that runs pytest and returns the `kld_config` that a test sees there."""
    seen = tmp_path / "seen.json"

    def run(*arguments: str) -> dict[str, Any]:
        gate.pytester.makepyfile(f"""
            import json, pathlib
            def test_gate(kld): pass
            def test_config(kld_config):
                values = {{name: getattr(kld_config, name) for name in (*kld_config.__slots__, "cache_dir")}}
                for name in ("ref", "tokenizer"):
                    values[name] = values[name] and values[name].label
                values["candidate"] = [model.label for model in values["candidate"]]
                pathlib.Path({str(seen)!r}).write_text(json.dumps(values, default=str))
        """)
        assert gate.pytester.runpytest_inprocess(*arguments, "-m", "not kld").parseoutcomes()["passed"] == 1
        values: dict[str, Any] = json.loads(seen.read_text())
        return values

    return run


def test_every_option_is_known_to_this_module() -> None:
    assert {option.name for option in OPTIONS} == {*GOOD, *PATHS, *MODELS, *LIMITS, *SERVERS, *SPEED, *OTHERS}


def test_defaults_are_the_standard_protocol(read: Any) -> None:
    values = read()
    assert (values["windows"], values["window_size"], values["stride"]) == (100, 2048, 512)
    assert values["windows_from"] == "start"
    assert (values["dataset"], values["store"], values["head"]) == (["wikitext-2"], "auto", "exact")
    assert (values["each_dataset"], values["skip_first"], values["metrics"]) == (False, 0, "core")
    assert (values["dtype"], values["device"]) == ("auto", "auto")
    assert (values["trust_remote_code"], values["refresh"], values["strict_cache"]) == (False, False, False)
    assert values["bounds"] == {"max_nan": 0, "max_ref_nan": 0, "max_cut_mass": 0.01}
    assert (values["ref"], values["candidate"], values["junit"], values["json"]) == (None, [], None, None)
    assert Path(values["cache_dir"]).name == "pytest-kld"


NATIVE_TOML = pytest.param(
    "native toml",
    marks=pytest.mark.skipif(pytest.version_tuple < (9, 2), reason="one key of several types needs pytest 9.2"),
)


@pytest.mark.parametrize("source", ["command line", "ini file", NATIVE_TOML])
def test_every_value_is_read(read: Any, gate: Gate, source: str) -> None:
    limits = {name: ("0" if LIMITS[name].integer else "0.25", 0 if LIMITS[name].integer else 0.25) for name in LIMITS}
    texts = {name: text for name, (text, _) in (GOOD | limits).items()}
    flags = {option.name for option in OPTIONS if option.flag}
    lists = {option.name for option in OPTIONS if option.repeatable}
    if source == "command line":
        values = read(*(o.option if o.flag else f"{o.option}={texts[o.name]}" for o in OPTIONS if o.name in texts))
    elif source == "ini file":
        gate.pytester.makeini("[pytest]\n" + "\n".join(f"kld_{name} = {text}" for name, text in texts.items()))
        values = read()
    else:
        quoted = {
            name: text if name in flags or text.replace(".", "").isdigit() else f'"{text}"'
            for name, text in texts.items()
        }
        quoted |= {name: f"[{quoted[name]}]" for name in lists & set(quoted)}
        gate.pytester.makepyprojecttoml(
            "[tool.pytest]\n" + "\n".join(f"kld_{name} = {text}" for name, text in quoted.items())
        )
        values = read()
    assert {name: values[name] for name in GOOD} == {name: value for name, (_, value) in GOOD.items()}
    assert values["bounds"] == {name: value for name, (_, value) in limits.items()}


def test_max_windows_is_all_that_the_text_gives(read: Any) -> None:
    assert read("--kld-windows=max")["windows"] is None


def test_command_line_wins_over_ini_over_default(read: Any, gate: Gate) -> None:
    gate.pytester.makeini("[pytest]\nkld_max_mean = 0.1\nkld_max_p99 = 0.2\nkld_max_nan = 3\nkld_head = native")
    values = read("--kld-max-mean=0.3")
    assert values["bounds"] == {"max_mean": 0.3, "max_p99": 0.2, "max_nan": 3, "max_ref_nan": 0, "max_cut_mass": 0.01}
    assert values["head"] == "native"
    assert read("--kld-head=exact")["head"] == "exact"


def test_paths_start_from_the_callers_directory_or_from_the_ini_file(
    read: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    (gate.path / "model").mkdir()
    (gate.path / "model" / "config.json").write_text("{}")
    (gate.path / "below").mkdir()
    gate.pytester.makeini(
        "[pytest]\nkld_cache_dir = cache\nkld_junit = out/a.xml\nkld_ref = model\n"
        "kld_candidate =\n  model\n  org/name@v1\nkld_dataset = texts/a.txt"
    )
    monkeypatch.chdir(gate.path / "below")
    values = read("..", "--kld-json=b.json", "--kld-tokenizer=../model")
    assert values["cache_dir"] == str(gate.path / "cache")
    assert values["junit"] == str(gate.path / "out" / "a.xml")
    assert values["json"] == str(gate.path / "below" / "b.json")
    assert (values["ref"], values["candidate"], values["tokenizer"]) == ("model", ["model", "org/name@v1"], "../model")
    assert values["dataset"] == ["../texts/a.txt"]


@pytest.mark.parametrize(("name", "text", "right"), BAD)
def test_bad_value_is_a_usage_error_that_names_option_value_and_what_is_right(
    gate: Gate, name: str, text: str, right: str
) -> None:
    (option,) = (option for option in OPTIONS if option.name == name)
    result = gate.pytester.runpytest_inprocess(f"{option.option}={text}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line.startswith("ERROR")]
    assert line.startswith(f"ERROR: {option.option}: ")
    assert right in line
    assert text.removeprefix("auto:")[:30] in line
    assert len(line) < 300


def test_bad_value_in_the_ini_file_is_reported_under_the_name_of_its_key(gate: Gate) -> None:
    gate.pytester.makeini("[pytest]\nkld_stride = none")
    result = gate.pytester.runpytest_inprocess()
    result.stderr.fnmatch_lines(["ERROR: kld_stride: expected a whole number of at least 1, got 'none'"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kld-cache-push",), "--kld-cache-push needs a shared cache: give --kld-cache-url"),
        (("--kld-cache-push", "--kld-cache-url=https://host/x"), "--kld-cache-push: nothing can be uploaded over HTTP"),
    ],
)
def test_upload_without_a_place_to_upload_to_is_a_usage_error(
    gate: Gate, options: tuple[str, ...], message: str
) -> None:
    result = gate(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(f"*{message}*")


def test_backend_that_is_not_installed_is_a_usage_error(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    result = gate("--kld-cache-url=gs://bucket/kld")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines("*gs:// needs a package that is not installed here: Please install gcsfs*")


def test_candidate_given_twice_is_a_usage_error(gate: Gate) -> None:
    result = gate(candidates=(gate.candidate, gate.candidate))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --kld-candidate: '{gate.candidate}' is given twice"])


def test_config_is_frozen(gate: Gate) -> None:
    gate.pytester.makepyfile("""
        import dataclasses, pytest
        def test_frozen(kld_config):
            with pytest.raises(dataclasses.FrozenInstanceError):
                kld_config.windows = 3
    """)
    gate.pytester.runpytest_inprocess().assert_outcomes(passed=1)

"""The frozen KLDConfig, which is built from options and ini keys. Nothing else asks pytest for these."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from pytest_kld.gate.limits import DEFAULT_BOUNDS, LIMITS, MATRIX_LIMITS, merge_bounds
from pytest_kld.gate.speed_limits import SPEED_LIMITS, at_each
from pytest_kld.plain import LINES, plain
from pytest_kld.settings.options import OPTIONS, Option
from pytest_kld.settings.parsers import report_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_kld.captures.capture import Store
    from pytest_kld.gate.regression import Allowance
    from pytest_kld.gate.result import Inconclusive, Shard
    from pytest_kld.gate.speed_limits import Bounds
    from pytest_kld.kernel.head import HeadMode
    from pytest_kld.subjects.digests import Hash
    from pytest_kld.subjects.model import ModelSpec
    from pytest_kld.text.windows import WindowsFrom

Metrics = Literal["core", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteSettings:
    """What a suite file says in place of options. It wins over the ini file, and the command line over it.

    Attributes:
        name: the file's path as its node id has it, which names the suite in reports.
        base: its directory, which its relative paths start from.
        given: values as the command line would give them, by option; each with its place in the file.

    """

    name: str
    base: Path
    given: Mapping[str, tuple[Any, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class KLDConfig:
    """All settings of the plugin, checked and with defaults filled in. Fields are named like the options.

    Attributes:
        ref: the reference, or None.
        candidate: the candidates, in the order given.
        dataset: the datasets, in the order given; relative paths start from `base`.
        windows: number of windows, the maximum if `adaptive`; None means as many as the text yields.
        windows_from: which part of a text they are from.
        adaptive: whether to stop at fewer windows once every limit is decided.
        confidence: the level of the intervals that are compared with the limits; None compares the figures themselves.
        inconclusive: outcome of a test that the intervals leave undecided.
        floor: whether each Subject is run twice, to find what its runs differ by.
        prompt_size: tokens of each window that are prefilled before the rest is decoded; None: a quarter of the window.
        baseline: the directory of the baselines that results are held against, or None.
        max_regression: how far figures may fall behind their baseline.
        throughput: the numbers of concurrent requests at which speed is measured; empty if it is not.
        speed_bounds: limits on speed by name, each by concurrency.
        matrix: which candidates are compared with each other: those that differ in their `axes`, or `all`; or None.
        max_between: the limit on each pair of a matrix in nats, or None.
        bounds: limits by name; the command line wins over the ini file, which wins over the default.
        given_decoding: the options about decoding that are given on the command line.
        given_limits: the limit options that are given on the command line.
        given_cache_dir: the value of --kld-cache-dir, or None; `cache_dir` is the directory of the cache.
        given_candidates: whether candidates are given on the command line.
        base: the directory in which pytest was called.
        suite: the name of the suite file that these settings belong to, or None; a suite has its own reference and
            protocol.
        started: when the session began, in seconds since the epoch; --kld-refresh replaces entries older than this.

    """

    ref: ModelSpec | None
    candidate: tuple[ModelSpec, ...]
    tokenizer: ModelSpec | None
    dataset: tuple[str, ...]
    each_dataset: bool
    windows: int | None
    windows_from: WindowsFrom
    adaptive: bool
    confidence: float | None
    inconclusive: Inconclusive
    floor: bool
    window_size: int
    stride: int
    skip_first: int
    metrics: Metrics
    engine: str
    candidate_engine: tuple[str, ...]
    path: Literal["prefill", "decode", "both"]
    prompt_size: int | None
    concurrency: int
    dtype: str
    device: str
    trust_remote_code: bool
    sglang_command: tuple[str, ...] | None
    vllm_command: tuple[str, ...] | None
    ref_args: tuple[str, ...]
    candidate_args: tuple[str, ...]
    ref_env: tuple[tuple[str, str], ...]
    candidate_env: tuple[tuple[str, str], ...]
    moe_backend: tuple[str, ...]
    ref_url: str | None
    candidate_url: tuple[str, ...]
    api_key_env: str | None
    capture_dir: Path | None
    startup_timeout: int
    cpu_servers: int
    store: Store
    head: HeadMode
    given_cache_dir: Path | None
    cache_size: int | None
    cache_url: str | None
    cache_push: bool
    hash: Hash
    refresh: bool
    strict_cache: bool
    plan: bool
    plan_json: Path | None
    shard: Shard | None
    junit: Path | None
    json: Path | None
    html: Path | None
    markdown: Path | None
    baseline: Path | None
    max_regression: tuple[Allowance, ...]
    throughput: tuple[int, ...]
    throughput_input: int
    throughput_output: int
    throughput_rounds: int
    throughput_failures: int
    throughput_args: tuple[str, ...]
    speedup_over: str | None
    speed_bounds: dict[str, Bounds]
    matrix: Literal["axes", "all"] | None
    max_between: float | None
    bounds: dict[str, float]
    given_decoding: tuple[str, ...]
    given_limits: tuple[str, ...]
    given_candidates: bool
    base: Path
    started: float
    suite: str | None = None

    @property
    def needs_all_metrics(self) -> bool:
        """Whether a figure of the second pass is asked for, or held against a baseline."""
        if self.metrics == "all":
            return True
        from pytest_kld.gate.regression import FIGURES

        return any(FIGURES[allowance.figure].extended for allowance in self.max_regression)

    @property
    def cache_dir(self) -> Path:
        """Return the directory of the cache: the given one, else `pytest-kld` in the user's cache directory."""
        if self.given_cache_dir is not None:
            return self.given_cache_dir
        from platformdirs import user_cache_path

        return user_cache_path("pytest-kld")


_TUPLES = {option.name for option in OPTIONS if option.repeatable} | {
    "ref_args",
    "candidate_args",
    "throughput",
    "throughput_args",
}
"""Settings that are empty, not None, if unset."""

_INI_VALUE: Any = str | int | float if pytest.version_tuple >= (9, 2) else "string"
"""Includes numbers, so that native TOML may say `kld_max_mean = 0.05`; older pytest allows one type per key."""

_DECODING = {"prompt_size", "concurrency"}
"""Options that have no effect on prefills."""
_MODELS = (
    *("ref", "ref_args", "ref_env", "ref_url"),
    *("candidate", "candidate_engine", "candidate_args", "candidate_env", "candidate_url", "moe_backend"),
)
"""Settings that say what is run. A suite says this itself, so those of the ini file do not reach it."""
CANDIDATE_SETTINGS = _MODELS[4:]

JOB_SUMMARY = "GITHUB_STEP_SUMMARY"
"""The environment variable that names the file of a job's summary in GitHub Actions."""

CONFIG = pytest.StashKey[KLDConfig]()


def config_of(item: pytest.Item) -> KLDConfig:
    """Return the settings that a test is measured with: those of its suite file, else those of the session."""
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    config: KLDConfig = parameters.get("kld_config") or item.config.stash[CONFIG]
    return config


def add_options(parser: pytest.Parser) -> None:
    """Register every option and its ini key. Options default to None, so that an ini value shows through."""
    group = parser.getgroup("kld", "KL divergence of quantized models (pytest-kld)")
    for option in OPTIONS:
        text = option.help + ("" if option.default is None else f" Default: {option.default}.")
        if option.flag:
            group.addoption(option.option, action="store_true", default=None, help=text)
            parser.addini(option.ini, text, type="bool", default=None)
        else:
            action = "append" if option.repeatable else "store"
            group.addoption(option.option, action=action, default=None, metavar=option.metavar, help=text)
            if option.repeatable:
                parser.addini(option.ini, text, type="linelist", default=None)
            else:
                parser.addini(option.ini, text, type=_INI_VALUE, default=None)


def build_config(config: pytest.Config, suite: SuiteSettings | None = None) -> KLDConfig:
    """Check all options and ini keys and freeze them.

    Args:
        config: pytest's.
        suite: what a suite file says, to build the settings of that suite.

    Raises:
        pytest.UsageError: names the option or key, the bad value, and what would be right.

    """
    values: dict[str, Any] = {}
    given: set[str] = set()
    for option in OPTIONS:
        dest = option.ini
        raw = config.getoption(dest)
        source, base = option.option, config.invocation_params.dir
        if raw is not None:
            given.add(option.name)
        elif suite is not None and option.name in suite.given:
            (raw, source), base = suite.given[option.name], suite.base
        elif suite is None or option.name not in _MODELS:
            raw = config.getini(dest)
            source, base = option.ini, config.inipath.parent if config.inipath else config.rootpath
        if suite is not None and option.name in CANDIDATE_SETTINGS:
            raw = None
        if raw is None or raw == []:
            raw, source = option.default, option.option
            if raw is not None and option.repeatable:
                raw = [raw]
        values[option.name] = _parse(option, raw, source, base)

    _check_servers(values)
    if (values["plan"] or values["plan_json"]) and (config.getoption("dist", "no") != "no"):
        raise pytest.UsageError("--kld-plan works in one process; leave out xdist's options, or give -n0 and --dist=no")
    reports = {option.option: values[option.name] for option in OPTIONS if option.parse is report_file}
    _check_reports({name: path for name, path in reports.items() if path is not None}, config)
    if values["skip_first"] > values["window_size"] - 2:
        raise pytest.UsageError(
            f"--kld-skip-first: skipping {values['skip_first']} positions leaves none that predicts a token in windows "
            f"of {values['window_size']} tokens; give at most {values['window_size'] - 2}"
        )
    if values["path"] != "prefill" and (values["prompt_size"] or 1) > values["window_size"] - 2:
        raise pytest.UsageError(
            f"--kld-prompt-size: a prompt of {values['prompt_size'] or 1} tokens leaves no decode step that predicts a "
            f"token in windows of {values['window_size']} tokens"
        )
    by_limit: dict[str, float | None] = {name: value for name in LIMITS if (value := values.pop(name)) is not None}
    from_options = [
        option.option for option in OPTIONS if option.name in {**LIMITS, **MATRIX_LIMITS} and option.name in given
    ]
    for name in _TUPLES:
        values[name] = values[name] or ()
    speed = {name: value for name in SPEED_LIMITS if (value := values.pop(name)) is not None}
    _check_speed(values, speed)
    values["trust_remote_code"] = bool(values["trust_remote_code"])
    values["refresh"] = bool(values["refresh"])
    values["strict_cache"] = bool(values["strict_cache"])
    values["cache_push"] = bool(values["cache_push"])
    _check_shared_cache(values)
    values["plan"] = bool(values["plan"] or values["plan_json"])
    values["each_dataset"] = bool(values["each_dataset"])
    values["floor"] = bool(values["floor"])
    if values["floor"]:
        from pytest_kld.settings.twice import check_runs_twice

        check_runs_twice(values)
    values["given_cache_dir"] = values.pop("cache_dir")
    values["windows"], values["adaptive"] = values["windows"]
    if values["adaptive"] and len(values["dataset"]) > 1:
        raise pytest.UsageError(
            "--kld-windows=auto works on a single dataset; give one --kld-dataset, or a number of windows"
        )
    _check_baseline(values)
    _check_matrix(values, is_suite=suite is not None)
    values["confidence"] = values["confidence"] or (0.95 if values["adaptive"] else None)
    return KLDConfig(
        **values,
        speed_bounds=speed,
        bounds=merge_bounds(by_limit, dict(DEFAULT_BOUNDS)),
        given_decoding=tuple(option.option for option in OPTIONS if option.name in _DECODING & given),
        given_limits=tuple(from_options),
        given_candidates="candidate" in given,
        base=config.invocation_params.dir,
        started=time.time() if suite is None else config.stash[CONFIG].started,
        suite=None if suite is None else suite.name,
    )


def _parse(option: Option, raw: Any, source: str, base: Path) -> Any:
    if raw is None or option.flag:
        return raw
    try:
        if not option.repeatable:
            return option.parse(str(raw), base)
        specs = tuple(option.parse(str(value), base) for value in raw)
        if repeated := [value for value, spec in zip(raw, specs, strict=True) if specs.count(spec) > 1]:
            raise ValueError(f"{repeated[-1]!r} is given twice")
    except (ValueError, OSError, RuntimeError) as error:  # e.g. a name that is too long, or a loop of links
        raise pytest.UsageError(plain(f"{source}: {error}", keep=LINES)) from None
    return specs


def _check_reports(paths: Mapping[str, Path], config: pytest.Config) -> None:
    """Reject two reports at one path: the second would replace the first.

    Raises:
        pytest.UsageError: names both options and the path.

    """
    known: dict[str, Path] = {}
    if junitxml := config.getoption("xmlpath", None):
        known["--junitxml"] = (config.invocation_params.dir / Path(junitxml).expanduser()).resolve()
    if summary := os.environ.get(JOB_SUMMARY):
        known[JOB_SUMMARY] = Path(summary).resolve()
    for name, path in paths.items():
        for other, taken in known.items():
            if path == taken or (path.exists() and taken.exists() and path.samefile(taken)):
                raise pytest.UsageError(
                    plain(f"{name}: {other} writes its report to {path}, too; give each report a path of its own")
                )
        known[name] = path


def _check_shared_cache(values: dict[str, Any]) -> None:
    """Reject uploads without a place to upload to."""
    if values["cache_push"] and not values["cache_url"]:
        raise pytest.UsageError("--kld-cache-push needs a shared cache: give --kld-cache-url")
    if values["cache_push"] and values["cache_url"].startswith(("http://", "https://")):
        raise pytest.UsageError(
            "--kld-cache-push: nothing can be uploaded over HTTP; give the bucket's own URL, such as s3://…"
        )


def _check_baseline(values: Mapping[str, Any]) -> None:
    """Reject a regression against nothing, two bounds for one figure, and windows that differ from run to run."""
    if values["max_regression"] and values["baseline"] is None:
        raise pytest.UsageError("--kld-max-regression needs --kld-baseline=DIR: what results are held against")
    figures = [allowance.figure for allowance in values["max_regression"]]
    if repeated := [figure for figure in figures if figures.count(figure) > 1]:
        raise pytest.UsageError(f"--kld-max-regression: {repeated[0]} is given twice")
    if values["baseline"] is not None and values["adaptive"]:
        raise pytest.UsageError(
            "--kld-baseline compares results of the same windows, and --kld-windows=auto stops at another number each "
            "time; give --kld-windows a number"
        )


def _check_matrix(values: Mapping[str, Any], *, is_suite: bool) -> None:
    """Reject a limit on pairs that nothing compares, and pairs of other windows or on other machines.

    The settings of the session may bound the pairs of a suite, so only those of a suite are complete here.
    """
    if values["matrix"] is None:
        if values["max_between"] is not None and is_suite:
            raise pytest.UsageError("--kld-max-between bounds the pairs of a matrix: give --kld-matrix as well")
        return
    if values["adaptive"]:
        raise pytest.UsageError(
            "--kld-matrix compares captures of the same windows, and --kld-windows=auto stops at another number for "
            "each candidate; give --kld-windows a number"
        )
    if values["matrix"] == "all" and values["shard"] is not None:
        raise pytest.UsageError(
            "--kld-matrix=all needs the captures of all candidates in one session; give --kld-matrix=axes, or leave "
            "--kld-shard out"
        )


def _check_speed(values: dict[str, Any], bounds: Mapping[str, Bounds]) -> None:
    """Reject what could only fail after the first capture. Markers may set limits and concurrencies of their own."""
    if values["throughput"] and values["engine"] == "transformers":
        raise pytest.UsageError("--kld-throughput measures servers, and --kld-engine=transformers has none")
    if bounds and not values["throughput"]:
        option = f"--kld-{next(iter(bounds)).replace('_', '-')}"
        raise pytest.UsageError(f"{option}: no speed is measured; give --kld-throughput as well")
    try:
        at_each(bounds, values["throughput"])
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def _check_servers(values: dict[str, Any]) -> None:
    """Reject options that contradict each other."""
    candidates, urls = values["candidate"] or (), values["candidate_url"] or ()
    if urls and len(urls) != len(candidates):
        raise pytest.UsageError(
            f"--kld-candidate-url: {len(urls)} URLs for {len(candidates)} candidates; give one for each, in their order"
        )
    if (urls or values["ref_url"]) and not values["capture_dir"]:
        raise pytest.UsageError(
            "--kld-ref-url and --kld-candidate-url need --kld-capture-dir: the directory that the server's environment "
            "variable PYTEST_KLD_CAPTURE_DIR names, as this machine sees it"
        )

"""The frozen KLDConfig, which is built from options and ini keys. Nothing else asks pytest for these."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from pytest_kld.gate.limits import DEFAULT_BOUNDS, LIMITS, merge_bounds
from pytest_kld.plain import LINES, plain
from pytest_kld.session.options import OPTIONS, Option, parse_report

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_kld.captures.capture import Store
    from pytest_kld.gate.result import Inconclusive
    from pytest_kld.kernel.head import HeadMode
    from pytest_kld.subjects.digests import Hash
    from pytest_kld.subjects.model import ModelSpec

Metrics = Literal["core", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KLDConfig:
    """All settings of the plugin, checked and with defaults filled in. Fields are named like the options.

    Attributes:
        ref: the reference, or None.
        candidate: the candidates, in the order given.
        dataset: the datasets, in the order given; relative paths start from `base`.
        windows: number of windows, the maximum if `adaptive`; None means as many as the text yields.
        adaptive: whether to stop at fewer windows once every limit is decided.
        confidence: the level of the intervals that are compared with the limits; None compares the figures themselves.
        inconclusive: outcome of a test that the intervals leave undecided.
        bounds: limits by name; the command line wins over the ini file, which wins over the default.
        given_limits: the limit options that are given on the command line.
        given_cache_dir: the value of --kld-cache-dir, or None; `cache_dir` is the directory of the cache.
        given_candidates: whether candidates are given on the command line.
        base: the directory in which pytest was called.
        started: when the session began, in seconds since the epoch; --kld-refresh replaces entries older than this.

    """

    ref: ModelSpec | None
    candidate: tuple[ModelSpec, ...]
    tokenizer: ModelSpec | None
    dataset: tuple[str, ...]
    each_dataset: bool
    windows: int | None
    adaptive: bool
    confidence: float | None
    inconclusive: Inconclusive
    window_size: int
    stride: int
    skip_first: int
    metrics: Metrics
    engine: str
    dtype: str
    device: str
    trust_remote_code: bool
    sglang_command: tuple[str, ...] | None
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
    store: Store
    head: HeadMode
    given_cache_dir: Path | None
    cache_size: int | None
    hash: Hash
    refresh: bool
    strict_cache: bool
    junit: Path | None
    json: Path | None
    html: Path | None
    bounds: dict[str, float]
    given_limits: tuple[str, ...]
    given_candidates: bool
    base: Path
    started: float

    @property
    def cache_dir(self) -> Path:
        """Return the directory of the cache: the given one, else `pytest-kld` in the user's cache directory."""
        if self.given_cache_dir is not None:
            return self.given_cache_dir
        from platformdirs import user_cache_path

        return user_cache_path("pytest-kld")


_TUPLES = {option.name for option in OPTIONS if option.repeatable} | {"ref_args", "candidate_args"}
"""Settings that are empty, not None, if unset."""

_INI_VALUE: Any = str | int | float if pytest.version_tuple >= (9, 2) else "string"
"""Includes numbers, so that native TOML may say `kld_max_mean = 0.05`; older pytest allows one type per key."""

CONFIG = pytest.StashKey[KLDConfig]()


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


def build_config(config: pytest.Config) -> KLDConfig:
    """Check all options and ini keys and freeze them.

    Raises:
        pytest.UsageError: names the option or key, the bad value, and what would be right.

    """
    values: dict[str, Any] = {}
    given: set[str] = set()
    for option in OPTIONS:
        dest = option.ini
        raw = config.getoption(dest)
        source, base = option.option, config.invocation_params.dir
        if raw is None:
            raw = config.getini(dest)
            source, base = option.ini, config.inipath.parent if config.inipath else config.rootpath
        else:
            given.add(option.name)
        if raw is None or raw == []:
            raw, source = option.default, option.option
            if raw is not None and option.repeatable:
                raw = [raw]
        values[option.name] = _parse(option, raw, source, base)

    _check_servers(values)
    reports = {option.option: values[option.name] for option in OPTIONS if option.parse is parse_report}
    _check_reports({name: path for name, path in reports.items() if path is not None}, config)
    if values["skip_first"] > values["window_size"] - 2:
        raise pytest.UsageError(
            f"--kld-skip-first: skipping {values['skip_first']} positions leaves none that predicts a token in windows "
            f"of {values['window_size']} tokens; give at most {values['window_size'] - 2}"
        )
    by_limit: dict[str, float | None] = {name: value for name in LIMITS if (value := values.pop(name)) is not None}
    from_options = [option.option for option in OPTIONS if option.name in LIMITS and option.name in given]
    for name in _TUPLES:
        values[name] = values[name] or ()
    values["trust_remote_code"] = bool(values["trust_remote_code"])
    values["refresh"] = bool(values["refresh"])
    values["strict_cache"] = bool(values["strict_cache"])
    values["each_dataset"] = bool(values["each_dataset"])
    values["given_cache_dir"] = values.pop("cache_dir")
    values["windows"], values["adaptive"] = values["windows"]
    if values["adaptive"] and len(values["dataset"]) > 1:
        raise pytest.UsageError(
            "--kld-windows=auto works on a single dataset; give one --kld-dataset, or a number of windows"
        )
    values["confidence"] = values["confidence"] or (0.95 if values["adaptive"] else None)
    return KLDConfig(
        **values,
        bounds=merge_bounds(by_limit, dict(DEFAULT_BOUNDS)),
        given_limits=tuple(from_options),
        given_candidates="candidate" in given,
        base=config.invocation_params.dir,
        started=time.time(),
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
    for name, path in paths.items():
        for other, taken in known.items():
            if path == taken or (path.exists() and taken.exists() and path.samefile(taken)):
                raise pytest.UsageError(
                    plain(f"{name}: {other} writes its report to {path}, too; give each report a path of its own")
                )
        known[name] = path


def _check_servers(values: dict[str, Any]) -> None:
    """Reject options that contradict each other."""
    candidates, urls = values["candidate"] or (), values["candidate_url"] or ()
    if urls and len(urls) != len(candidates):
        raise pytest.UsageError(
            f"--kld-candidate-url: {len(urls)} URLs for {len(candidates)} candidates; give one for each, in their order"
        )
    if values["moe_backend"] and (urls or values["engine"] == "transformers"):
        raise pytest.UsageError("--kld-moe-backend needs SGLang servers that pytest-kld boots, one for each backend")
    if (urls or values["ref_url"]) and not values["capture_dir"]:
        raise pytest.UsageError(
            "--kld-ref-url and --kld-candidate-url need --kld-capture-dir: the directory that the server's environment "
            "variable PYTEST_KLD_CAPTURE_DIR names, as this machine sees it"
        )

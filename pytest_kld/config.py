"""Options, ini keys and the one frozen KLDConfig that is built from them. Nothing else asks pytest for options."""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from pytest_kld.corpus import CORPUS_FILES
from pytest_kld.engines.sglang.arguments import check_arguments, parse_command
from pytest_kld.errors import ServerError
from pytest_kld.gate import DEFAULT_BOUNDS, LIMITS, Limit, merge_bounds
from pytest_kld.models import ModelSpec

Store = Literal["auto", "hidden", "logits", "logprobs"]
HeadMode = Literal["exact", "native"]
Metrics = Literal["core", "all"]
Inconclusive = Literal["fail", "pass", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting: `--kld-name` on the command line and `kld_name` in an ini file.

    Attributes:
        name: with underscores, e.g. `window_size`.
        help: one sentence for `--help`; the default is appended.
        metavar: what the value is called in `--help`.
        default: its text, as a user would write it; None means unset.
        parse: turns text into the value; raises ValueError with what is valid. Takes the directory that
            relative paths start from.
        repeatable: may be given several times; in ini files one value a line.
        flag: takes no value.

    """

    name: str
    help: str
    metavar: str | None = None
    default: str | None = None
    parse: Callable[[str, Path], Any] = lambda text, _: text
    repeatable: bool = False
    flag: bool = False

    @property
    def option(self) -> str:
        """Return the spelling on the command line."""
        return f"--kld-{self.name.replace('_', '-')}"

    @property
    def ini(self) -> str:
        """Return the spelling in an ini file."""
        return f"kld_{self.name}"


def _path(text: str, base: Path) -> Path:
    return (base / Path(text).expanduser()).resolve()


def _report(text: str, base: Path) -> Path:
    """Refuse now what could not be written when everything is measured."""
    path = _path(text, base)
    above = next(parent for parent in path.parents if parent.exists())
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"expected a file that can be written, got {text!r} ({path})")
    return path


def _dataset(text: str, base: Path) -> str:
    """Keep names; give a file that an ini file names as the path from where pytest was called."""
    if Path(text).suffix not in CORPUS_FILES or Path(text).expanduser().is_absolute():
        return text
    return os.path.relpath(base / text)


def _choice(*choices: str) -> Callable[[str, Path], str]:
    def parse(text: str, _: Path) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {text!r}")
        return text

    return parse


def _whole(least: int) -> Callable[[str, Path], int]:
    def parse(text: str, _: Path) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ValueError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return parse


def _window_count(text: str, base: Path) -> int | None:
    try:
        return None if text == "max" else _whole(1)(text, base)
    except ValueError as error:
        raise ValueError(f"{error} (or `max`: all that the text gives; or `auto`)") from None


def _window_plan(text: str, base: Path) -> tuple[int | None, bool]:
    """Return the greatest number of windows, and whether fewer will do where they decide."""
    word, _, most = text.partition(":")
    if word != "auto":
        return _window_count(text, base), False
    return _window_count(most or "100", base), True


def _confidence(text: str, _: Path) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.5 <= number < 1:
        raise ValueError(f"expected a number of at least 0.5 and below 1, e.g. 0.95, got {text!r}")
    return number


def _device(text: str, _: Path) -> str:
    if text not in ("auto", "cpu", "cuda") and not (text.startswith("cuda:") and text[5:].isdecimal()):
        raise ValueError(f"expected auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def _server_flags(text: str, _: Path) -> tuple[str, ...]:
    flags = tuple(shlex.split(text))
    try:
        check_arguments(flags, text)
    except ServerError as error:
        raise ValueError(str(error)) from None
    return flags


def _variable(text: str, _: Path) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _url(text: str, _: Path) -> str:
    if not text.startswith(("http://", "https://")):
        raise ValueError(f"expected http://HOST:PORT, got {text!r}")
    return text.rstrip("/")


def _bound(limit: Limit) -> Callable[[str, Path], float]:
    return lambda text, _: limit.parse(text)


OPTIONS: tuple[Option, ...] = (
    Option(
        name="ref",
        metavar="MODEL",
        parse=ModelSpec.parse,
        help="Reference model: a local directory, a hub id with optional @REVISION, or a capture directory.",
    ),
    Option(
        name="candidate",
        metavar="MODEL",
        parse=ModelSpec.parse,
        repeatable=True,
        help="Candidate model to gate against the reference, named in the same ways; repeatable.",
    ),
    Option(
        name="tokenizer",
        metavar="MODEL",
        parse=ModelSpec.parse,
        help="Model whose tokenizer cuts the text for both sides. Default: the reference's.",
    ),
    Option(
        name="dataset",
        metavar="TEXT",
        default="wikitext-2",
        parse=_dataset,
        repeatable=True,
        help="Text: wikitext-2, python-docs (offline), a .txt, .jsonl (text or messages) or .parquet file, or "
        "hf:NAME[:CONFIG][:SPLIT]; repeatable: figures are then the average over datasets.",
    ),
    Option(
        name="each_dataset",
        flag=True,
        help="Hold each of several datasets to the limits, too, not only their average. Default: off.",
    ),
    Option(
        name="windows",
        metavar="N",
        default="100",
        parse=_window_plan,
        help="Number of windows, max for all that the text gives, or auto[:N]: rounds of windows until every limit "
        "is decided, N (100, or max) at most.",
    ),
    Option(
        name="window_size",
        metavar="TOKENS",
        default="2048",
        parse=_whole(2),  # a window needs one token to condition on and one to predict
        help="Length of a window in tokens.",
    ),
    Option(
        name="stride",
        metavar="TOKENS",
        default="512",
        parse=_whole(1),
        help="Distance between the starts of two windows in tokens.",
    ),
    Option(
        name="skip_first",
        metavar="N",
        default="0",
        parse=_whole(0),
        help="Leave the first N positions of each window, with fewer than N tokens before them, out of the figures.",
    ),
    Option(
        name="metrics",
        metavar="METRICS",
        default="core",
        parse=_choice("core", "all"),
        help="Figures to compute: core, or all (a second pass). A limit on one of the others implies all.",
    ),
    Option(
        name="engine",
        metavar="ENGINE",
        default="auto",
        parse=_choice("auto", "sglang", "transformers"),
        help="What runs the models: sglang (servers), transformers (in this process), or auto (sglang where it is).",
    ),
    Option(
        name="confidence",
        metavar="X",
        parse=_confidence,
        help="Hold confidence intervals, not figures, against the limits, e.g. 0.95. Default: off; 0.95 with "
        "--kld-windows=auto.",
    ),
    Option(
        name="inconclusive",
        metavar="OUTCOME",
        default="fail",
        parse=_choice("fail", "pass", "skip"),
        help="Outcome of a test whose intervals leave a limit undecided: fail, pass or skip.",
    ),
    Option(
        name="dtype",
        metavar="DTYPE",
        default="auto",
        parse=_choice("auto", "float32", "bfloat16", "float16"),
        help="Dtype to load models in: auto (the checkpoint's), float32, bfloat16 or float16.",
    ),
    Option(
        name="device",
        metavar="DEVICE",
        default="auto",
        parse=_device,
        help="Device to run and compare on: auto (CUDA where there is one), cpu, cuda or cuda:N.",
    ),
    Option(
        name="trust_remote_code",
        flag=True,
        help="Allow models and tokenizers to run code from their repository. Default: off.",
    ),
    Option(
        name="sglang_command",
        metavar="COMMAND",
        parse=lambda text, _: parse_command(text),
        help="What starts SGLang, ending with `-m sglang.launch_server`: another interpreter, docker run, srun. "
        "Default: this interpreter.",
    ),
    Option(
        name="ref_args",
        metavar="FLAGS",
        parse=_server_flags,
        help='Flags for the reference\'s SGLang server, e.g. "--tp 8 --kv-cache-dtype bfloat16".',
    ),
    Option(
        name="candidate_args",
        metavar="FLAGS",
        parse=_server_flags,
        help="Flags for the candidates' SGLang servers.",
    ),
    Option(
        name="ref_env",
        metavar="NAME=VALUE",
        parse=_variable,
        repeatable=True,
        help="Environment variable for the reference's SGLang server; repeatable.",
    ),
    Option(
        name="candidate_env",
        metavar="NAME=VALUE",
        parse=_variable,
        repeatable=True,
        help="Environment variable for the candidates' SGLang servers; repeatable.",
    ),
    Option(
        name="moe_backend",
        metavar="BACKEND",
        repeatable=True,
        help="MoE runner backend of SGLang to gate each candidate with, a test for each; repeatable.",
    ),
    Option(
        name="ref_url",
        metavar="URL",
        parse=_url,
        help="Running SGLang server with the capture hook to use for the reference instead of booting one.",
    ),
    Option(
        name="candidate_url",
        metavar="URL",
        parse=_url,
        repeatable=True,
        help="The same for the candidates: one for each --kld-candidate, in the same order.",
    ),
    Option(
        name="api_key_env",
        metavar="NAME",
        help="Environment variable with the API key of servers that are named by URL.",
    ),
    Option(
        name="capture_dir",
        metavar="DIR",
        parse=_path,
        help="Directory that this process and SGLang's see under the same path, for what the hook writes. "
        "Default: spool in the cache directory.",
    ),
    Option(
        name="startup_timeout",
        metavar="SECONDS",
        default="1800",
        parse=_whole(1),
        help="How long a SGLang server may take to become ready.",
    ),
    Option(
        name="store",
        metavar="STORE",
        default="auto",
        parse=_choice("auto", "hidden", "logits", "logprobs"),
        help="What a capture keeps: hidden states and head, logits in the engine's dtype, float32 logprobs, "
        "or auto (hidden where check rows prove the head, else logits).",
    ),
    Option(
        name="head",
        metavar="HEAD",
        default="exact",
        parse=_choice("exact", "native"),
        help="How logits are recomputed from hidden states: exact (float32) or native (the engine's rounding).",
    ),
    Option(
        name="cache_dir",
        metavar="DIR",
        parse=_path,
        help="Directory for captures and scores. Default: pytest-kld in the user's cache directory.",
    ),
    Option(name="refresh", flag=True, help="Capture and compare anew what the cache already holds."),
    Option(name="junit", metavar="FILE", parse=_report, help="Write a JUnit report: a suite per candidate."),
    Option(
        name="json",
        metavar="FILE",
        parse=_report,
        help="Write a JSON report: figures, protocol, versions, keys.",
    ),
    Option(name="html", metavar="FILE", parse=_report, help="Write an HTML report: one file with charts and tables."),
    *(
        Option(
            name=limit.name,
            metavar="N" if limit.integer else limit.unit.upper() or "X",
            parse=_bound(limit),
            help=f"{'Greatest' if limit.upper else 'Least'} {limit.label} that passes."
            + ("" if limit.default is None else f" Default: {limit.default:g}."),
        )
        for limit in LIMITS.values()
    ),
)
"""Every option there is. The tables in docs/reference.md are held against it by a test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KLDConfig:
    """Everything the plugin was told, checked and with defaults filled in. Fields are named as the options.

    Attributes:
        ref: the reference, or None.
        candidate: the candidates, in the order given.
        dataset: the datasets, in the order given; relative paths start from `base`.
        windows: number of windows, the greatest where `adaptive`; None means all that the text gives.
        adaptive: whether to stop at fewer windows, once every limit is decided.
        confidence: of the intervals that are held against the limits; None holds the figures themselves.
        inconclusive: outcome of a test that the intervals leave undecided.
        bounds: limits by name, command line over ini over default.
        given_limits: options of limits that stand on the command line.
        given_candidates: whether candidates stand on the command line.
        base: the directory in which pytest was called.
        started: when the session began, in seconds since the epoch; what is older gives way to --kld-refresh.

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
    cache_dir: Path
    refresh: bool
    junit: Path | None
    json: Path | None
    html: Path | None
    bounds: dict[str, float]
    given_limits: tuple[str, ...]
    given_candidates: bool
    base: Path
    started: float


_TUPLES = {option.name for option in OPTIONS if option.repeatable} | {"ref_args", "candidate_args"}
"""Settings that are empty, not None, where nobody gives them."""

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
            else:  # numbers too, so that native TOML may say kld_max_mean = 0.05
                parser.addini(option.ini, text, type=str | int | float, default=None)


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
    if values["skip_first"] > values["window_size"] - 2:
        raise pytest.UsageError(
            f"--kld-skip-first: {values['skip_first']} positions leave none that predicts a token in windows of "
            f"{values['window_size']} tokens; give at most {values['window_size'] - 2}"
        )
    by_limit: dict[str, float | None] = {name: value for name in LIMITS if (value := values.pop(name)) is not None}
    from_options = [option.option for option in OPTIONS if option.name in LIMITS and option.name in given]
    for name in _TUPLES:
        values[name] = values[name] or ()
    values["trust_remote_code"] = bool(values["trust_remote_code"])
    values["refresh"] = bool(values["refresh"])
    values["each_dataset"] = bool(values["each_dataset"])
    values["cache_dir"] = values["cache_dir"] or _default_cache_dir()
    values["windows"], values["adaptive"] = values["windows"]
    if values["adaptive"] and len(values["dataset"]) > 1:
        raise pytest.UsageError(
            "--kld-windows=auto goes on along one text; give one --kld-dataset, or a number of windows"
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
    except ValueError as error:
        raise pytest.UsageError(f"{source}: {error}") from None
    return specs


def _check_servers(values: dict[str, Any]) -> None:
    """Refuse options that contradict each other."""
    candidates, urls = values["candidate"] or (), values["candidate_url"] or ()
    if urls and len(urls) != len(candidates):
        raise pytest.UsageError(
            f"--kld-candidate-url: {len(urls)} URLs for {len(candidates)} candidates; give one for each, in their order"
        )
    if values["moe_backend"] and (urls or values["engine"] == "transformers"):
        raise pytest.UsageError("--kld-moe-backend needs SGLang servers that are booted here, one for each backend")
    if (urls or values["ref_url"]) and not values["capture_dir"]:
        raise pytest.UsageError(
            "--kld-ref-url and --kld-candidate-url need --kld-capture-dir: the directory that the server's environment "
            "variable PYTEST_KLD_CAPTURE_DIR names, as this machine sees it"
        )


def _default_cache_dir() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("pytest-kld")

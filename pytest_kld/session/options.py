"""Every option and ini key there is: its name, its help, and how its text becomes a value."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_kld.errors import ServerError
from pytest_kld.gate.limits import LIMITS, Limit
from pytest_kld.gate.number import decimal_number, shown, whole_number

if TYPE_CHECKING:  # imported by what parses: a session that gives no such option does not pay for them
    from pytest_kld.subjects.model import ModelSpec


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


_MOST_WINDOWS = 10_000_000
_LONGEST_WINDOW = 10_000_000
"""In tokens: as long as the longest contexts that models are made for."""
_LONGEST_STRIDE = 1_000_000_000
"""In tokens: with it the start of the last of the most windows still is a 64-bit number."""
_LONGEST_WAIT = 1_000_000
"""In seconds: eleven days."""
_GREATEST_CONFIDENCE = 0.999999
_GREATEST_SIZE = 1e18
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(kB|MB|GB|TB)")
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def _path(text: str, base: Path) -> Path:
    return _in_utf8((base / Path(text).expanduser()).resolve())


def _in_utf8(path: Path) -> Path:
    """Refuse a path that safetensors could not open, before anything is measured."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path} is not UTF-8, and safetensors cannot open files there; rename it") from None
    return path


def _model(text: str, base: Path) -> ModelSpec:
    from pytest_kld.subjects.model import ModelSpec

    model = ModelSpec.parse(text, base)
    if model.path is not None:
        _in_utf8(model.path)
    return model


def parse_report(text: str, base: Path) -> Path:
    """Refuse now what could not be written when everything is measured. A link to a regular file is written through."""
    from pytest_kld.files import TEMPORARY_SUFFIX_BYTES

    named = base / Path(text).expanduser()
    path = named.resolve()
    if named.exists() and not named.is_file():  # before it is resolved: /dev/stdout may lead to no path at all
        raise ValueError(f"expected a file that can be written, got {text!r} ({path}), which is no regular file")
    above = next(parent for parent in path.parents if parent.exists())
    too_long = len(os.fsencode(path.name)) > os.pathconf(above, "PC_NAME_MAX") - TEMPORARY_SUFFIX_BYTES
    if too_long or not path.name or not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"expected a file that can be written, got {text!r} ({path})")
    return path


def _dataset(text: str, base: Path) -> str:
    """Keep names; give a file that an ini file names as the path from where pytest was called."""
    if not Path(text).suffix:
        return text
    from pytest_kld.text.corpus import CORPUS_FILES

    if Path(text).suffix not in CORPUS_FILES or Path(text).expanduser().is_absolute():
        return text
    return os.path.relpath(base / text)


def _choice(*choices: str) -> Callable[[str, Path], str]:
    def parse(text: str, _: Path) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {text!r}")
        return text

    return parse


def _whole(least: int, greatest: int) -> Callable[[str, Path], int]:
    def parse(text: str, _: Path) -> int:
        number = whole_number(text)
        if number is None or number < least:
            raise ValueError(f"expected a whole number of at least {least}, got {shown(text)}")
        if number > greatest:
            raise ValueError(f"expected a whole number of at most {greatest:,}, got {shown(text)}")
        return number

    return parse


def _window_count(text: str, base: Path) -> int | None:
    try:
        return None if text == "max" else _whole(1, _MOST_WINDOWS)(text, base)
    except ValueError as error:
        raise ValueError(f"{error} (or `max`: all that the text gives; or `auto`)") from None


def _window_plan(text: str, base: Path) -> tuple[int | None, bool]:
    """Return the greatest number of windows, and whether fewer will do where they decide."""
    word, _, most = text.partition(":")
    if word != "auto":
        return _window_count(text, base), False
    return _window_count(most or "100", base), True


def _confidence(text: str, _: Path) -> float:
    number = decimal_number(text)
    if number is None or not 0.5 <= number <= _GREATEST_CONFIDENCE:
        raise ValueError(
            f"expected a number of at least 0.5 and at most {_GREATEST_CONFIDENCE}, e.g. 0.95, got {shown(text)}"
        )
    return number


def _size(text: str, _: Path) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a size such as 500GB or 1.5TB, got {shown(text)}")
    number = float(match[1]) * _UNITS[match[2]]
    if number > _GREATEST_SIZE:
        raise ValueError(f"expected a size of at most 1000000TB, got {shown(text)}")
    return round(number)


def _device(text: str, _: Path) -> str:
    if text not in ("auto", "cpu", "cuda") and not re.fullmatch("cuda:[0-9]{1,3}", text):
        raise ValueError(f"expected auto, cpu, cuda or cuda:N, got {shown(text)}")
    return text


def _command(text: str, _: Path) -> tuple[str, ...]:
    from pytest_kld.engines.sglang.arguments import parse_command

    return parse_command(text)


def _server_flags(text: str, _: Path) -> tuple[str, ...]:
    from pytest_kld.engines.sglang.arguments import check_arguments

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
        parse=_model,
        help="Reference model: a local directory, a hub id with optional @REVISION, or a capture directory.",
    ),
    Option(
        name="candidate",
        metavar="MODEL",
        parse=_model,
        repeatable=True,
        help="Candidate model to gate against the reference, named in the same ways; repeatable.",
    ),
    Option(
        name="tokenizer",
        metavar="MODEL",
        parse=_model,
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
        parse=_whole(2, _LONGEST_WINDOW),  # a window needs one token to condition on and one to predict
        help="Length of a window in tokens.",
    ),
    Option(
        name="stride",
        metavar="TOKENS",
        default="512",
        parse=_whole(1, _LONGEST_STRIDE),
        help="Distance between the starts of two windows in tokens.",
    ),
    Option(
        name="skip_first",
        metavar="N",
        default="0",
        parse=_whole(0, _LONGEST_WINDOW),
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
        parse=_command,
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
        parse=_whole(1, _LONGEST_WAIT),
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
    Option(
        name="cache_size",
        metavar="SIZE",
        parse=_size,
        help="Greatest size of the cache, e.g. 500GB: when a session ends, captures and scores that were used least "
        "recently are removed, but none of the last 24 hours. Default: no limit.",
    ),
    Option(
        name="hash",
        metavar="HASH",
        default="sample",
        parse=_choice("sample", "full"),
        help="What of a local model's files identifies it in the cache: sample (all of small files, spans of every "
        "tensor and of the whole of large ones) or full (every byte).",
    ),
    Option(name="refresh", flag=True, help="Capture and compare anew what the cache already holds."),
    Option(
        name="strict_cache",
        flag=True,
        help="Report a damaged cache entry as an error, instead of moving it to quarantine and making it anew. "
        "Default: off.",
    ),
    Option(name="junit", metavar="FILE", parse=parse_report, help="Write a JUnit report: a suite per candidate."),
    Option(
        name="json",
        metavar="FILE",
        parse=parse_report,
        help="Write a JSON report: figures, protocol, versions, keys.",
    ),
    Option(
        name="html", metavar="FILE", parse=parse_report, help="Write an HTML report: one file with charts and tables."
    ),
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

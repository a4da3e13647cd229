"""Every option and ini key: its name, its help, and how its text is parsed."""

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

if TYPE_CHECKING:  # imported when parsing: sessions without such options do not pay for them
    from pytest_kld.subjects.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting: `--kld-name` on the command line and `kld_name` in an ini file.

    Attributes:
        name: with underscores, e.g. `window_size`.
        help: one sentence for `--help`; the default is appended.
        metavar: the placeholder for the value in `--help`.
        default: its text, as a user would write it; None means unset.
        parse: converts text to the value; raises ValueError, whose message says what is valid. The second argument
            is the directory that relative paths start from.
        repeatable: may be given several times; in ini files, one value per line.
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
"""In tokens: at this stride, the start of the last of `_MOST_WINDOWS` windows still fits in 64 bits."""
_LONGEST_WAIT = 1_000_000
"""In seconds: eleven days."""
_GREATEST_CONFIDENCE = 0.999999
_GREATEST_SIZE = 1e18
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(kB|MB|GB|TB)")
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def _path(text: str, base: Path) -> Path:
    return _in_utf8((base / Path(text).expanduser()).resolve())


def _in_utf8(path: Path) -> Path:
    """Reject a path that safetensors could not open, before anything is measured."""
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
    """Reject now what could not be written after the measurement. A link to a regular file is followed."""
    from pytest_kld.files import TEMPORARY_SUFFIX_BYTES

    named = base / Path(text).expanduser()
    path = named.resolve()
    if named.exists() and not named.is_file():  # checked before resolving: /dev/stdout may lead to no path at all
        raise ValueError(f"expected a file that can be written, got {text!r} ({path}), which is not a regular file")
    above = next(parent for parent in path.parents if parent.exists())
    too_long = len(os.fsencode(path.name)) > os.pathconf(above, "PC_NAME_MAX") - TEMPORARY_SUFFIX_BYTES
    if too_long or not path.name or not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"expected a file that can be written, got {text!r} ({path})")
    return path


def _dataset(text: str, base: Path) -> str:
    """Keep names; make a file named in an ini file relative to the directory in which pytest was called."""
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
        raise ValueError(f"{error} (or `max` for as many as the text yields, or `auto`)") from None


def _window_plan(text: str, base: Path) -> tuple[int | None, bool]:
    """Return the maximum number of windows, and whether to stop earlier if fewer decide every limit."""
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
        help="Candidate model to gate against the reference. Takes the same kinds of value as --kld-ref. Repeatable.",
    ),
    Option(
        name="tokenizer",
        metavar="MODEL",
        parse=_model,
        help="Model whose tokenizer splits the text into tokens for both sides. Default: the reference's.",
    ),
    Option(
        name="dataset",
        metavar="TEXT",
        default="wikitext-2",
        parse=_dataset,
        repeatable=True,
        help="Text to measure on: wikitext-2, python-docs (offline), a .txt, .jsonl (text or messages) or .parquet "
        "file, or hf:NAME[:CONFIG][:SPLIT]. Repeatable: figures are then averaged over the datasets.",
    ),
    Option(
        name="each_dataset",
        flag=True,
        help="With several datasets, check the limits on each dataset as well as on their average. Default: off.",
    ),
    Option(
        name="windows",
        metavar="N",
        default="100",
        parse=_window_plan,
        help="Number of windows, max for as many as the text yields, or auto[:N]: measure in rounds until every limit "
        "is decided, with at most N windows (100 if omitted; max is valid too).",
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
        help="Distance in tokens between the starts of consecutive windows.",
    ),
    Option(
        name="skip_first",
        metavar="N",
        default="0",
        parse=_whole(0, _LONGEST_WINDOW),
        help="Exclude the first N positions of each window from the figures: fewer than N tokens precede them.",
    ),
    Option(
        name="metrics",
        metavar="METRICS",
        default="core",
        parse=_choice("core", "all"),
        help="Figures to compute: core, or all (needs a second pass). A limit on a figure outside core implies all.",
    ),
    Option(
        name="engine",
        metavar="ENGINE",
        default="auto",
        parse=_choice("auto", "sglang", "transformers"),
        help="Engine that runs the models: sglang (servers), transformers (in this process), or auto (sglang if it is "
        "installed or named by another option, else transformers).",
    ),
    Option(
        name="confidence",
        metavar="X",
        parse=_confidence,
        help="Check the limits against confidence intervals of this level, e.g. 0.95, instead of the figures "
        "themselves. Default: off; 0.95 with --kld-windows=auto.",
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
        help="Device to run and compare models on: auto (CUDA if available), cpu, cuda or cuda:N.",
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
        help="Command that starts SGLang, ending with `-m sglang.launch_server`: through another interpreter, "
        "docker run or srun. Default: this interpreter.",
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
        help="Environment variable for the reference's SGLang server. Repeatable.",
    ),
    Option(
        name="candidate_env",
        metavar="NAME=VALUE",
        parse=_variable,
        repeatable=True,
        help="Environment variable for the candidates' SGLang servers. Repeatable.",
    ),
    Option(
        name="moe_backend",
        metavar="BACKEND",
        repeatable=True,
        help="MoE runner backend of SGLang to gate each candidate with. Repeatable: one test for each backend.",
    ),
    Option(
        name="ref_url",
        metavar="URL",
        parse=_url,
        help="URL of a running SGLang server with the capture hook, used for the reference instead of booting one.",
    ),
    Option(
        name="candidate_url",
        metavar="URL",
        parse=_url,
        repeatable=True,
        help="The same for the candidates: one URL for each --kld-candidate, in the same order. Repeatable.",
    ),
    Option(
        name="api_key_env",
        metavar="NAME",
        help="Environment variable that holds the API key of the servers given by URL.",
    ),
    Option(
        name="capture_dir",
        metavar="DIR",
        parse=_path,
        help="Directory that the hook writes to. This process and SGLang's must see it under the same path. "
        "Default: spool in the cache directory.",
    ),
    Option(
        name="startup_timeout",
        metavar="SECONDS",
        default="1800",
        parse=_whole(1, _LONGEST_WAIT),
        help="Time in seconds that an SGLang server may take to become ready.",
    ),
    Option(
        name="store",
        metavar="STORE",
        default="auto",
        parse=_choice("auto", "hidden", "logits", "logprobs"),
        help="What a capture stores: hidden (hidden states and the head), logits (in the engine's dtype), "
        "logprobs (in float32), or auto (hidden if the check rows confirm the head, else logits).",
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
        help="Maximum size of the cache, e.g. 500GB. When a session ends, the least recently used captures and scores "
        "are removed, but none that was used in the last 24 hours. Default: no limit.",
    ),
    Option(
        name="hash",
        metavar="HASH",
        default="sample",
        parse=_choice("sample", "full"),
        help="How much of a local model's files is hashed to identify it in the cache: sample (small files in full; "
        "spans of every tensor and of the whole file for large ones) or full (every byte).",
    ),
    Option(name="refresh", flag=True, help="Repeat captures and comparisons that the cache already holds."),
    Option(
        name="strict_cache",
        flag=True,
        help="Report a damaged cache entry as an error instead of moving it to quarantine and recreating it. "
        "Default: off.",
    ),
    Option(name="junit", metavar="FILE", parse=parse_report, help="Write a JUnit report: one suite per candidate."),
    Option(
        name="json",
        metavar="FILE",
        parse=parse_report,
        help="Write a JSON report: figures, protocol, versions and keys.",
    ),
    Option(
        name="html", metavar="FILE", parse=parse_report, help="Write an HTML report: one file with charts and tables."
    ),
    *(
        Option(
            name=limit.name,
            metavar="N" if limit.integer else limit.unit.upper() or "X",
            parse=_bound(limit),
            help=f"{'Highest' if limit.upper else 'Lowest'} {limit.label} that passes."
            + ("" if limit.default is None else f" Default: {limit.default:g}."),
        )
        for limit in LIMITS.values()
    ),
)
"""All options. A test compares the tables in docs/reference.md with them."""

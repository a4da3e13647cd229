"""Every option and ini key: its name, its help, and the parser of its text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_kld.gate.limits import LIMITS, MATRIX_LIMITS, PATHS
from pytest_kld.gate.speed_limits import SPEED_LIMITS
from pytest_kld.settings import parsers


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
        in_suite: whether a suite file may set it under `[protocol]`; the others hold for the whole session, or a suite
            has its own words for them.

    """

    name: str
    help: str
    metavar: str | None = None
    default: str | None = None
    parse: Callable[[str, Path], Any] = lambda text, _: text
    repeatable: bool = False
    flag: bool = False
    in_suite: bool = False

    @property
    def option(self) -> str:
        """Return the spelling on the command line."""
        return f"--kld-{self.name.replace('_', '-')}"

    @property
    def ini(self) -> str:
        """Return the spelling in an ini file."""
        return f"kld_{self.name}"


OPTIONS: tuple[Option, ...] = (
    Option(
        name="ref",
        metavar="MODEL",
        parse=parsers.model,
        help="Reference model: a local directory, a hub id with optional @REVISION, or a capture directory.",
    ),
    Option(
        name="candidate",
        metavar="MODEL",
        parse=parsers.model,
        repeatable=True,
        help="Candidate model to gate against the reference. Takes the same kinds of value as --kld-ref. Repeatable.",
    ),
    Option(
        name="tokenizer",
        in_suite=True,
        metavar="MODEL",
        parse=parsers.model,
        help="Model whose tokenizer splits the text into tokens for both sides. Default: the reference's.",
    ),
    Option(
        name="dataset",
        in_suite=True,
        metavar="TEXT",
        default="wikitext-2",
        parse=parsers.dataset,
        repeatable=True,
        help="Text to measure on: wikitext-2, python-docs (offline), a .txt, .jsonl (text or messages) or .parquet "
        "file, or hf:NAME[:CONFIG][:SPLIT]. Repeatable: figures are then averaged over the datasets.",
    ),
    Option(
        name="each_dataset",
        in_suite=True,
        flag=True,
        help="With several datasets, check the limits on each dataset as well as on their average. Default: off.",
    ),
    Option(
        name="windows",
        in_suite=True,
        metavar="N",
        default="100",
        parse=parsers.window_plan,
        help="Number of windows, max for as many as the text yields, or auto[:N]: measure in rounds until every limit "
        "is decided, with at most N windows (100 if omitted; max is valid too).",
    ),
    Option(
        name="windows_from",
        in_suite=True,
        metavar="PART",
        default="start",
        parse=parsers.choice("start", "spread"),
        help="Where the windows are taken from: start (the beginning of the text) or spread (evenly over all of it).",
    ),
    Option(
        name="window_size",
        in_suite=True,
        metavar="TOKENS",
        default="2048",
        parse=parsers.whole(2, parsers.LONGEST_WINDOW),  # a window needs one token to condition on and one to predict
        help="Length of a window in tokens.",
    ),
    Option(
        name="stride",
        in_suite=True,
        metavar="TOKENS",
        default="512",
        parse=parsers.whole(1, parsers.LONGEST_STRIDE),
        help="Distance in tokens between the starts of consecutive windows.",
    ),
    Option(
        name="skip_first",
        in_suite=True,
        metavar="N",
        default="0",
        parse=parsers.whole(0, parsers.LONGEST_WINDOW),
        help="Exclude the first N positions of each window from the figures: fewer than N tokens precede them.",
    ),
    Option(
        name="metrics",
        in_suite=True,
        metavar="METRICS",
        default="core",
        parse=parsers.choice("core", "all"),
        help="Figures to compute: core, or all (needs a second pass). A limit on a figure outside core implies all.",
    ),
    Option(
        name="matrix",
        in_suite=True,
        metavar="WHICH",
        parse=parsers.choice("axes", "all"),
        help="Compare candidates with each other, too, in a test of its own: axes compares those that differ only in "
        "their axes, such as the MoE backend, and all compares all. Default: none.",
    ),
    Option(
        name="engine",
        in_suite=True,
        metavar="ENGINE",
        default="auto",
        parse=parsers.choice("auto", "sglang", "vllm", "transformers"),
        help="Engine that runs the models: sglang or vllm (servers), transformers (in this process), or auto (the one "
        "of sglang and vllm that is installed or whose command is given, else transformers).",
    ),
    Option(
        name="candidate_engine",
        metavar="ENGINE",
        parse=parsers.choice("sglang", "vllm", "transformers"),
        repeatable=True,
        help="Engine that runs the candidates, if it is not that of the reference. Repeatable: one test for each "
        "candidate and engine.",
    ),
    Option(
        name="path",
        in_suite=True,
        metavar="PATH",
        default="prefill",
        parse=parsers.choice(*PATHS),
        help="Path through the engine to measure: prefill (each window at once), decode (a prompt at once, then the "
        "text's own tokens one at a time), or both (one test for each).",
    ),
    Option(
        name="prompt_size",
        in_suite=True,
        metavar="TOKENS",
        parse=parsers.whole(1, parsers.LONGEST_WINDOW),
        help="With --kld-path=decode: length of the prompt that each window begins with. Its positions are not "
        "measured. Default: a quarter of the window.",
    ),
    Option(
        name="concurrency",
        in_suite=True,
        metavar="N",
        default="8",
        parse=parsers.whole(1, parsers.MOST_SEQUENCES),
        help="With --kld-path=decode: number of sequences that are decoded together.",
    ),
    Option(
        name="confidence",
        in_suite=True,
        metavar="X",
        parse=parsers.confidence,
        help="Check the limits against confidence intervals of this level, e.g. 0.95, instead of the figures "
        "themselves. Default: off; 0.95 with --kld-windows=auto.",
    ),
    Option(
        name="inconclusive",
        in_suite=True,
        metavar="OUTCOME",
        default="fail",
        parse=parsers.choice("fail", "pass", "skip"),
        help="Outcome of a test whose intervals leave a limit undecided: fail, pass or skip.",
    ),
    Option(
        name="floor",
        in_suite=True,
        flag=True,
        help="Capture each model twice, each time on a fresh server: what the two runs differ by is the floor of the "
        "figures. Figures below twice the floor are marked; a floor above a limit is an error. Default: off.",
    ),
    Option(
        name="dtype",
        in_suite=True,
        metavar="DTYPE",
        default="auto",
        parse=parsers.choice("auto", "float32", "bfloat16", "float16"),
        help="Dtype to load models in: auto (the checkpoint's), float32, bfloat16 or float16.",
    ),
    Option(
        name="device",
        in_suite=True,
        metavar="DEVICE",
        default="auto",
        parse=parsers.device,
        help="Device to run and compare models on: auto (CUDA if available), cpu, cuda or cuda:N.",
    ),
    Option(
        name="trust_remote_code",
        in_suite=True,
        flag=True,
        help="Allow models and tokenizers to run code from their repository. Default: off.",
    ),
    Option(
        name="sglang_command",
        in_suite=True,
        metavar="COMMAND",
        parse=parsers.command("sglang"),
        help="Command that starts SGLang, ending with `-m sglang.launch_server`: through another interpreter, "
        "docker run or srun. Default: this interpreter.",
    ),
    Option(
        name="vllm_command",
        in_suite=True,
        metavar="COMMAND",
        parse=parsers.command("vllm"),
        help="Command that starts vLLM, ending with `-m vllm.entrypoints.openai.api_server`: through another "
        "interpreter, docker run or srun. Default: this interpreter.",
    ),
    Option(
        name="ref_args",
        metavar="FLAGS",
        parse=parsers.server_flags,
        help='Flags of its engine for the reference\'s server, e.g. "--tp 8 --kv-cache-dtype bfloat16".',
    ),
    Option(
        name="candidate_args",
        metavar="FLAGS",
        parse=parsers.server_flags,
        help="Flags of their engine for the candidates' servers.",
    ),
    Option(
        name="ref_env",
        metavar="NAME=VALUE",
        parse=parsers.variable,
        repeatable=True,
        help="Environment variable for the reference's server. Repeatable.",
    ),
    Option(
        name="candidate_env",
        metavar="NAME=VALUE",
        parse=parsers.variable,
        repeatable=True,
        help="Environment variable for the candidates' servers. Repeatable.",
    ),
    Option(
        name="moe_backend",
        metavar="BACKEND",
        repeatable=True,
        help="MoE backend of the server to gate each candidate with. Repeatable: one test for each backend.",
    ),
    Option(
        name="ref_url",
        metavar="URL",
        parse=parsers.url,
        help="URL of a running server with the capture hook, used for the reference instead of booting one.",
    ),
    Option(
        name="candidate_url",
        metavar="URL",
        parse=parsers.url,
        repeatable=True,
        help="The same for the candidates: one URL for each --kld-candidate, in the same order. Repeatable.",
    ),
    Option(
        name="api_key_env",
        in_suite=True,
        metavar="NAME",
        help="Environment variable that holds the API key of the servers given by URL.",
    ),
    Option(
        name="capture_dir",
        in_suite=True,
        metavar="DIR",
        parse=parsers.path_of,
        help="Directory that the hook writes to. This process and the server's must see it under the same path. "
        "Default: spool in the cache directory.",
    ),
    Option(
        name="startup_timeout",
        in_suite=True,
        metavar="SECONDS",
        default="1800",
        parse=parsers.whole(1, parsers.LONGEST_WAIT),
        help="Time in seconds that a server may take to become ready.",
    ),
    Option(
        name="cpu_servers",
        metavar="N",
        default="1",
        parse=parsers.whole(1, 1000),
        help="Number of servers that a suite file may run side by side on a machine without GPUs.",
    ),
    Option(
        name="store",
        in_suite=True,
        metavar="STORE",
        default="auto",
        parse=parsers.choice("auto", "hidden", "logits", "logprobs"),
        help="What a capture stores: hidden (hidden states and the head), logits (in the engine's dtype), "
        "logprobs (in float32), or auto (hidden if the check rows confirm the head, else logits).",
    ),
    Option(
        name="head",
        in_suite=True,
        metavar="HEAD",
        default="exact",
        parse=parsers.choice("exact", "native"),
        help="How logits are recomputed from hidden states: exact (float32) or native (the engine's rounding).",
    ),
    Option(
        name="cache_dir",
        metavar="DIR",
        parse=parsers.path_of,
        help="Directory for captures and scores. Default: pytest-kld in the user's cache directory.",
    ),
    Option(
        name="cache_size",
        metavar="SIZE",
        parse=parsers.size,
        help="Maximum size of the cache, e.g. 500GB. When a session ends, the least recently used captures and scores "
        "are removed, but none that was used in the last 24 hours. Default: no limit.",
    ),
    Option(
        name="cache_url",
        metavar="URL",
        parse=parsers.cache_url,
        help="Shared cache of captures, as a URL that fsspec opens: s3://…, gs://…, hf://…, https://… or file:///…. "
        "Captures that the local cache lacks are downloaded from there.",
    ),
    Option(
        name="cache_push",
        flag=True,
        help="Upload captures to the shared cache, and let sessions on other machines wait for them. Default: off.",
    ),
    Option(
        name="hash",
        in_suite=True,
        metavar="HASH",
        default="sample",
        parse=parsers.choice("sample", "full"),
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
    Option(
        name="plan",
        flag=True,
        help="Show what would be measured, what is cached, which servers would be booted and on which GPUs, the disk "
        "space and the probable time; measure nothing.",
    ),
    Option(
        name="plan_json",
        metavar="FILE",
        parse=parsers.report_file,
        help="Write that plan as JSON; measure nothing.",
    ),
    Option(
        name="shard",
        metavar="K/N",
        parse=parsers.shard,
        help="Gate only the K-th of N shares of the Subjects, e.g. 2/5. Each machine gets the same command with its K.",
    ),
    Option(
        name="junit", metavar="FILE", parse=parsers.report_file, help="Write a JUnit report: one suite per candidate."
    ),
    Option(
        name="json",
        metavar="FILE",
        parse=parsers.report_file,
        help="Write a JSON report: figures, protocol, versions and keys.",
    ),
    Option(
        name="html",
        metavar="FILE",
        parse=parsers.report_file,
        help="Write an HTML report: one file with charts and tables.",
    ),
    Option(
        name="markdown",
        metavar="FILE",
        parse=parsers.report_file,
        help="Write a Markdown summary for a pull request or a model card. In GitHub Actions it is also appended to "
        "the job's summary.",
    ),
    Option(
        name="baseline",
        metavar="DIR",
        parse=parsers.baselines,
        help="Directory of baselines, as `pytest-kld baseline promote` makes them. Results are shown beside them.",
    ),
    Option(
        name="max_regression",
        metavar="FIGURE:AMOUNT",
        parse=parsers.allowance,
        repeatable=True,
        help="How far a figure may fall behind its baseline: an amount (p99:0.01), or a share of the baseline with a "
        "percent sign. Figures are named like limits without max or min. Repeatable.",
    ),
    Option(
        name="throughput",
        metavar="CONCURRENCIES",
        parse=parsers.concurrencies,
        help="Measure the speed of every served model at these numbers of concurrent requests, e.g. 1,4,16,64, with "
        "the engine's own load generator. Default: off.",
        in_suite=True,
    ),
    Option(
        name="throughput_input",
        metavar="TOKENS",
        default="256",
        parse=parsers.whole(1, parsers.LONGEST_WINDOW),
        help="Length of each prompt under load in tokens.",
        in_suite=True,
    ),
    Option(
        name="throughput_output",
        metavar="TOKENS",
        default="128",
        parse=parsers.whole(2, parsers.LONGEST_WINDOW),  # the time per output token needs two
        help="Length of each answer under load in tokens.",
        in_suite=True,
    ),
    Option(
        name="throughput_rounds",
        metavar="N",
        default="3",
        parse=parsers.whole(1, 1000),
        help="How often each concurrency is measured. With --kld-confidence=0.95 a limit needs 6 rounds, a speedup 7.",
        in_suite=True,
    ),
    Option(
        name="throughput_failures",
        metavar="N",
        default="0",
        parse=parsers.whole(0, parsers.MOST_WINDOWS),
        help="Number of requests of a run under load that may fail.",
        in_suite=True,
    ),
    Option(
        name="throughput_args",
        metavar="FLAGS",
        parse=parsers.words,
        help="Further flags of the servers that are put under load, e.g. speculation or CUDA graphs. Such a server is "
        "booted beside the one that captures. Default: the server that captures is put under load.",
        in_suite=True,
    ),
    Option(
        name="speedup_over",
        metavar="NAME",
        help="Candidate whose speed --kld-min-speedup is a ratio to. Default: the reference.",
        in_suite=True,
    ),
    *(
        Option(
            name=limit.name,
            metavar="[CONCURRENCY:]" + (limit.unit.upper() or "X"),
            parse=parsers.speed_bounds(limit),
            help=f"{'Highest' if limit.upper else 'Lowest'} {limit.label} that passes, at every concurrency of "
            "--kld-throughput or as CONCURRENCY:BOUND,…",
            in_suite=True,
        )
        for limit in SPEED_LIMITS.values()
    ),
    *(
        Option(
            name=limit.name,
            metavar="N" if limit.integer else limit.unit.upper() or "X",
            parse=parsers.bound(limit),
            help=f"{'Highest' if limit.upper else 'Lowest'} {limit.label} that passes."
            + ("" if limit.default is None else f" Default: {limit.default:g}."),
        )
        for limit in (*LIMITS.values(), *MATRIX_LIMITS.values())
    ),
)
"""All options. A test compares the tables in docs/reference.md with them."""

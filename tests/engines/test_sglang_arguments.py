"""SGLang's flags: what is refused, what leases are needed, what is part of the cache key."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_kld.engines.served.engine import ServedEngine
from pytest_kld.engines.served.flags import parse_command
from pytest_kld.engines.served.kind import Settings
from pytest_kld.engines.served.pool import ServerPool
from pytest_kld.engines.sglang.arguments import LAUNCH, RULES
from pytest_kld.engines.sglang.hints import hint
from pytest_kld.engines.sglang.kind import KIND
from pytest_kld.errors import ServerError
from pytest_kld.hook.options import read_options
from pytest_kld.hook.sglang import SOURCES
from pytest_kld.progress import Silent
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import Subject

DECLARED = (
    (
        "calls",
        {
            "srt/server_args.py": """
def add_cli_args(parser):
    parser.add_argument("--model-path", "--model", type=str)
    parser.add_argument("--tp-size", "--tensor-parallel-size", dest="tp_size", type=int)
    parser.add_argument("--wide-attention", dest="attn_dp_size", type=int)
    parser.add_argument("--quantization", type=str)
    parser.add_argument("--dtype", type=str)
"""
        },
    ),
    (
        "fields",
        {
            "srt/server_args.py": "def add_cli_args(parser): parser.add_argument('--config', type=str)",
            "srt/arg_groups/fields/model.py": """
class Model:
    model_path: A[str, Arg(help="weights", aliases=["--model"])]
    quantization: A[Optional[str], "the method"] = None
    dtype: A[str, Arg(help="dtype", choices=CHOICES)] = "auto"
    disable_cuda_graph: A[bool, Arg(help="x", no_cli=True)] = False
""",
            "srt/arg_groups/fields/parallel.py": """
class Parallel:
    tp_size: A[int, Arg(help="tp", aliases=["--tensor-parallel-size"])] = 1
    attn_dp_size: A[int, Arg(help="dp", aliases=["--wide-attention"])] = 1
""",
        },
    ),
)
"""How releases declare flags: the older ones by calls, newer ones by annotated fields."""


def test_flags_are_split_in_all_their_spellings() -> None:
    given = shlex.split("--tp 8 --kv-cache-dtype=bfloat16 --disable-cuda-graph --cuda-graph-bs 1 2 4")
    assert list(RULES.split(given)) == [
        ("--tp", ("8",)),
        ("--kv-cache-dtype", ("bfloat16",)),
        ("--disable-cuda-graph", ()),
        ("--cuda-graph-bs", ("1", "2", "4")),
    ]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("--port 30000", "free port"),
        ("--model-path X", "--kld-ref"),
        ("--enable-dp-attention", "other ranks"),
        ("--pp-size 2", "pipeline's stages"),
        ("--pipeline-parallel-size=2", "pipeline's stages"),
        ("--load-format dummy", "random"),
        ("--load-format=dummy", "random"),
        ("--speculative-algorithm UNO", "refuses requests for log-probs"),
        ("--speculative-alg uno", "refuses requests for log-probs"),
        ("--nnodes 2", "--kld-ref-url"),
        ("--lora-paths a=b", "merge the adapter"),
        ("--enable-mixed-chunk", "decoding"),
    ],
)
def test_flags_that_would_spoil_a_measurement_are_refused_with_the_reason(given: str, reason: str) -> None:
    with pytest.raises(ServerError, match=reason) as caught:
        RULES.check(["--tp", "2", *shlex.split(given)], "--kld-ref-args")
    assert "--kld-ref-args" in str(caught.value)


@pytest.mark.parametrize(
    "given", ["--speculative-algorithm NEXTN", "--speculative-alg=EAGLE", "--speculative-dflash-x"]
)
def test_speculation_is_refused_with_the_reason_if_decoding_is_measured(given: str, tmp_path: Path) -> None:
    """When the model's facts are read, before anything boots; a prefill may have a draft model beside it."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    pool = ServerPool(
        kind=KIND,
        command=("no-such-command",),
        capture_dir=tmp_path,
        log_dir=tmp_path,
        startup_timeout=1,
        settings=Settings(),
        progress=Silent(),
    )
    model = ModelSpec.parse(str(tmp_path), Path())
    subject = Subject(name="it", model=model, engine="sglang", arguments={"args": shlex.split(given)})
    engine = ServedEngine(servers=pool, capture_dir=tmp_path, api_key=None)
    assert engine.facts(subject).experts is None
    with pytest.raises(ServerError, match=r"SGLang's arguments: --speculative-.* decoding is measured: .*forced"):
        engine.facts(replace(subject, path="decode"))


def test_other_flags_pass() -> None:
    RULES.check(shlex.split("--tp 8 --load-format safetensors --nnodes 1 --speculative-algorithm NEXTN"), "x")


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ("", 1),
        ("--tp 8", 8),
        ("--tensor-parallel-size 2 --dp-size 3", 6),
        ("--tp-size=4 --pp-size 2", 8),
        ("--tp 2 --device cpu", 0),
    ],
)
def test_gpus_are_counted(given: str, needed: int) -> None:
    assert KIND.gpus_needed(shlex.split(given)) == needed


def test_a_size_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ServerError, match="--tp-size wants a whole number, got 'two'"):
        KIND.gpus_needed(["--tp", "two"])


def test_the_key_holds_all_flags_but_those_that_are_known_to_move_no_logit() -> None:
    one = RULES.numeric(shlex.split("--attention-backend triton --watchdog-timeout 9 --tp 2"))
    other = RULES.numeric(shlex.split("--tensor-parallel-size=2 --attention-backend=triton --log-level debug"))
    assert one == other == [["--attention-backend", "triton"], ["--tp-size", "2"]]
    assert RULES.numeric(["--some-flag-of-tomorrow"]) == [["--some-flag-of-tomorrow"]]


@pytest.mark.parametrize(
    "given",
    [
        "--disable-cuda-graph",
        "--cuda-graph-max-bs 8",
        "--disable-piecewise-cuda-graph",
        "--cuda-graph-backend-prefill disabled",
        "--trust-remote-code",
        "--mem-fraction-static 0.7",
        "--max-total-tokens 4096",
        "--context-length 2048",
        "--disable-radix-cache",
        "--json-model-override-args=",
    ],
)
def test_flags_that_may_choose_other_kernels_are_in_the_key(given: str) -> None:
    assert RULES.numeric(["--tp", "2", *shlex.split(given)]) != RULES.numeric(["--tp", "2"])


def test_of_a_flag_that_is_given_twice_the_last_counts_so_the_order_is_in_the_key() -> None:
    triton, fa3 = ["--attention-backend", "triton"], ["--attention-backend", "fa3"]
    assert RULES.numeric([*triton, *fa3]) != RULES.numeric([*fa3, *triton])


def test_a_file_that_a_flag_names_is_in_the_key_by_its_contents(tmp_path: Path) -> None:
    config = tmp_path / "experts.json"
    config.write_text("[1]")
    before = RULES.numeric(["--init-expert-location", str(config)])
    config.write_text("[2]")
    assert RULES.numeric(["--init-expert-location", str(config)]) != before


@pytest.mark.parametrize(
    "given",
    ["--enable-dp-a", "--attn-dp 2", "--attention-data-parallel-size 2", "--lora-p a=b", "--load-f dummy", "--por 1"],
)
def test_sglang_takes_abbreviations_so_that_those_of_refused_flags_are_refused(given: str) -> None:
    with pytest.raises(ServerError, match="cannot be given"):
        RULES.check(shlex.split(given), "--kld-ref-args")


def test_attention_in_one_group_is_not_refused() -> None:
    RULES.check(shlex.split("--attn-dp-size 1 --nnodes 1 --pp-size 1"), "--kld-ref-args")


def test_flags_in_a_file_are_refused() -> None:
    with pytest.raises(ServerError, match="neither checked nor in the cache key"):
        RULES.check(["--config", "server.yaml"], "--kld-ref-args")


@pytest.mark.parametrize("release", [release for release, *_ in DECLARED])
def test_the_flags_of_a_release_are_read_from_its_source(release: str, tmp_path: Path) -> None:
    """Both ways in which releases declare them, cut down; see the slow test for the real sources."""
    files = next(files for name, files in DECLARED if name == release)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    options = read_options(tmp_path, SOURCES, "--model-path")
    assert options is not None
    assert options["--tensor-parallel-size"][1] == "tp_size"
    assert options["--wide-attention"][1] == "attn_dp_size"
    assert RULES.numeric(["--quantiz", "fp8"], options) == [["--quantization", "fp8"]]
    assert KIND.gpus_needed(shlex.split("--tensor-par 4"), options) == 4
    assert RULES.has(["--dty", "float32"], "--dtype", options)
    for spelling in ("--wide-attention", "--wide-att", "--model-p"):
        with pytest.raises(ServerError, match="cannot be given"):
            RULES.check([spelling, "2"], "--kld-ref-args", options)


def test_a_source_that_declares_nothing_known_gives_no_flags(tmp_path: Path) -> None:
    (tmp_path / "srt").mkdir()
    (tmp_path / "srt" / "server_args.py").write_text("def nothing(): pass")
    assert read_options(tmp_path, SOURCES, "--model-path") is None
    assert read_options(tmp_path / "nowhere", SOURCES, "--model-path") is None


def test_a_command_must_end_with_the_launcher() -> None:
    assert parse_command("/opt/py -m sglang.launch_server", LAUNCH, "sglang") == (
        "/opt/py",
        "-m",
        "sglang.launch_server",
    )
    with pytest.raises(ValueError, match="ends with"):
        parse_command("sglang serve", LAUNCH, "sglang")


@pytest.mark.parametrize(
    ("log", "advice"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory", "mem-fraction-static"),
        ("layers/logprob_processor.py\nCUDA out of memory. Tried to allocate 1.16 GiB", "SGLANG_LOGPROB_CHUNK_SIZE"),
        ("layers/logits_processor.py\ntorch.OutOfMemoryError", "SGLANG_LOGITS_PROCESSER_CHUNK_SIZE"),
        ("launch_server.py: error: unrecognized arguments: --foo", "--kld-ref-args"),
        ("KeyError: 'model.layers.0.mlp.experts.w13_weight'", "20439"),
        ("OSError: [Errno 98] Address already in use", "port"),
        ("layers/attention/hybrid_linear_attn_backend.py\nAssertionError: sm120", "--attention-backend triton"),
        ("everything is fine", None),
    ],
)
def test_known_deaths_come_with_advice(log: str, advice: str | None) -> None:
    given = hint(log)
    assert given is None if advice is None else given is not None and advice in given

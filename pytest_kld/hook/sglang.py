"""SGLang's seams: where it is hooked, and how its objects are read. Nothing else in this package knows SGLang.

SGLang's files stay unchanged if it has plugins (0.5.11 and newer: the entry point `sglang.srt.plugins`); in older
releases `pytest-kld patch` adds one line. Both ways call `install`.

These methods exist in every supported release, on the single-pass and the chunked path. `ModelRunner.forward` brackets
a forward pass and has the request ids and `is_draft_worker`, the one signal that tells a draft model's passes (MTP,
NextN, EAGLE, standalone) from the main model's: their requests carry the same ids. `LogitsProcessor.forward` receives
the head. `LogitsProcessor._get_logits` is called once per block of rows: it takes hidden states and returns logits.
`ModelRunner.sample` gets the logits of each request's last token, and returns the tokens that the scheduler goes on
with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from pytest_kld.errors import PatchError
from pytest_kld.hook import put_in
from pytest_kld.hook.options import read_options
from pytest_kld.hook.patching import Installation, State
from pytest_kld.hook.wrapping import MARK, wrap

if TYPE_CHECKING:
    from pytest_kld.hook.decoder import Step
    from pytest_kld.hook.experts import ExpertWatch, RoutingDescription
    from pytest_kld.hook.handshake import ServerDescription
    from pytest_kld.hook.recorder import PassDescription, Recorder, Segment

PACKAGES = ("sglang", "torch", "transformers", "sgl-kernel", "flashinfer-python")
"""The packages whose versions determine a capture's bits."""
SOURCES = ("srt/server_args.py", "srt/arg_groups/fields/*.py")
"""The files that declare flags, in the directory of the package `sglang`."""
_ARGUMENTS = (
    "revision",
    "attention_backend",
    "moe_runner_backend",
    "kv_cache_dtype",
    "quantization",
    "chunked_prefill_size",
    "speculative_algorithm",
    "tp_size",
    "pp_size",
    "dp_size",
    "enable_dp_attention",
    "attn_dp_size",
    "device",
)
"""The server's arguments that the handshake reports."""
_DP_ATTENTION = (
    "it runs data-parallel attention, so the head's input holds rows of other ranks' requests. Start it with --tp "
    "alone, or with --dp-size without it"
)

_PIPELINE = "it is a pipeline, and no test has shown that captures of its stages are right. Start it with --tp alone"


def install() -> None:
    """Install the hook. SGLang calls this in each of its processes.

    It never raises, and a second call changes nothing.
    """
    put_in(_hook)


def why_not_hooked() -> str | None:
    """Return why the installed SGLang would not call `install`, and what to do; None if it would."""
    try:
        found = Installation.find()
    except PatchError as error:
        return str(error)
    what, state = f"SGLang {found.release} in {found.root}", found.state()
    if state is State.NOTHING_TO_PATCH:
        if any(point.name == "pytest_kld" for point in entry_points(group="sglang.srt.plugins")):
            return None
        return "pytest-kld is importable where SGLang runs, but it is not installed: `pip install pytest-kld` there"
    if state is State.NOT_PATCHED:
        return f"{what} has no plugins and is not patched: run `pytest-kld patch --apply` there."
    if state is State.MODIFIED:
        return f"{what} has no plugins and cannot be patched: {found.target} {state.value}."
    return None


def options() -> dict[str, tuple[str, str]] | None:
    """Return the flags of the installed release; None if they cannot be read. See `hook.options`."""
    try:
        return read_options(Installation.find().root, SOURCES, "--model-path")
    except PatchError:
        return None


def _hook(recorder: Recorder) -> None:
    """Wrap the methods.

    Raises:
        AttributeError: this release of SGLang lacks one of them.

    """
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    runners: list[Any] = []
    wrap(ModelRunner, "forward", _model_forward(recorder, runners))
    wrap(LogitsProcessor, "forward", _logits_forward(recorder, runners))
    wrap(LogitsProcessor, "_get_logits", _get_logits(recorder))
    wrap(ModelRunner, "sample", _sample(recorder))
    if "rids" not in ForwardBatch.__dataclass_fields__:  # before 0.5.10
        _attach_request_ids(ForwardBatch)


def _attach_request_ids(forward_batch: type) -> None:
    original = forward_batch.init_new.__func__  # type: ignore[attr-defined]
    if hasattr(original, MARK):
        return

    @functools.wraps(original)
    def init_new(cls: type, batch: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(cls, batch, *args, **kwargs)
        made.rids = [request.rid for request in batch.reqs] if getattr(batch, "reqs", None) else None
        return made

    setattr(init_new, MARK, True)
    forward_batch.init_new = classmethod(init_new)  # type: ignore[attr-defined]


def _model_forward(recorder: Recorder, runners: list[Any]) -> Callable[..., Any]:
    """Keep the runner of the current pass as the last of `runners`."""
    watches: dict[int, ExpertWatch | None] = {}

    def watch(runner: Any) -> ExpertWatch | None:
        if id(runner) not in watches:  # a process has one runner for the model, and perhaps one for a draft model
            watches[id(runner)] = _watch(runner)
        return watches[id(runner)]

    def around(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        decodes = not runner.is_draft_worker and forward_batch.forward_mode.is_decode()
        if not runner.is_draft_worker:
            recorder.decoder.begin(_rids(forward_batch) if decodes else ())
        ids = _request_ids(runner, forward_batch)
        with recorder.forward_pass(ids, lambda: _describe_pass(runner, forward_batch)):
            runners.append(runner)
            try:
                with (
                    recorder.watching_experts(lambda: watch(runner)),
                    recorder.decoder.watching_experts(lambda: watch(runner)) if decodes else nullcontext(),
                ):
                    return original(runner, forward_batch, *args, **kwargs)
            finally:
                runners.pop()

    return around


def _logits_forward(recorder: Recorder, runners: list[Any]) -> Callable[..., Any]:
    def around(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.current is None:  # the usual case, which must cost nothing more
            return original(processor, *args, **kwargs)
        head = _argument("lm_head", 2, args, kwargs)
        recorder.begin_logits(lambda: _describe_server(runners[-1], processor, head))
        output = original(processor, *args, **kwargs)
        recorder.end_logits()
        return output

    return around


def _get_logits(recorder: Recorder) -> Callable[..., Any]:
    def around(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
        logits = original(processor, *args, **kwargs)
        if recorder.current is None:
            recorder.decoder.see_hidden(_argument("hidden_states", 0, args, kwargs))
        else:
            recorder.take_block(_argument("hidden_states", 0, args, kwargs), lambda rows: logits[rows])
        return logits

    return around


def _sample(recorder: Recorder) -> Callable[..., Any]:
    """Keep the logits before they are changed for sampling, and replace the sampled tokens of our requests.

    `sample` runs outside of the graphs, on every rank, and the scheduler goes on with what it returns.
    """

    def around(
        original: Callable[..., Any], runner: Any, output: Any, forward_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        logits = output.next_token_logits
        forced = recorder.decoder.take(_rids(forward_batch), lambda: _describe_step(runner, forward_batch, logits))
        tokens = original(runner, output, forward_batch, *args, **kwargs)
        for request, token in forced:
            tokens[request] = token
        return tokens

    return around


def _describe_step(runner: Any, batch: Any, logits: Any) -> Step:
    from pytest_kld.hook.decoder import Step

    lengths = batch.seq_lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu
    decoding = batch.forward_mode.is_decode()
    return Step(
        rank=_rank(runner),
        positions=[length - 1 for length in lengths.tolist()],
        decoding=[decoding] * len(batch.rids),
        token_ids=batch.input_ids,  # in a prefill, which is not recorded, not those of the requests
        logits=logits,
    )


def _rids(batch: Any) -> Sequence[object]:
    return getattr(batch, "rids", None) or ()


def _argument(name: str, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a method's argument, whether it was passed by name or by position."""
    return kwargs[name] if name in kwargs else args[position]


def _request_ids(runner: Any, batch: Any) -> Sequence[object]:
    """Return the request ids of a prefill of the main model; an empty sequence for other passes."""
    if runner.is_draft_worker or not batch.forward_mode.is_extend():
        return ()
    return _rids(batch)


def _describe_pass(runner: Any, batch: Any) -> PassDescription:
    from pytest_kld.hook.recorder import PassDescription

    if not batch.return_logprob:
        raise RuntimeError("the request does not ask for log-probs (return_logprob), so most rows are not computed")
    return PassDescription(rank=_rank(runner), segments=list(_segments(batch)), tokens=len(batch.input_ids))


def _segments(batch: Any) -> Iterator[Segment]:
    """Yield the rows of each request.

    Over the blocks of one pass, request i of the batch owns max(ext[i] - lps[i], 1) consecutive rows, with
    ext = extend_seq_lens_cpu, lps = extend_logprob_start_lens_cpu and pre = extend_prefix_lens_cpu. If
    ext > lps, they are rows of the text and start at position pre[i] + lps[i] of the request; otherwise there is one
    row, computed only to sample a token.
    """
    from pytest_kld.hook.recorder import Segment

    first_row = first_token = 0
    lengths = zip(
        batch.extend_seq_lens_cpu, batch.extend_logprob_start_lens_cpu, batch.extend_prefix_lens_cpu, strict=True
    )
    for rid, (extend, start, prefix) in zip(batch.rids, lengths, strict=True):
        extend, start, prefix = int(extend), int(start), int(prefix)
        rows = max(extend - start, 1)
        yield Segment(
            request_id=rid,
            first_row=first_row,
            rows=rows,
            position=prefix + start,
            token_ids=batch.input_ids[first_token + start : first_token + extend] if extend > start else None,
            first_token=first_token + start,
        )
        first_row += rows
        first_token += extend


def _rank(runner: Any) -> int:
    """Return the tensor-parallel rank of a model runner's process."""
    if hasattr(runner, "tp_rank"):
        return int(runner.tp_rank)
    from sglang.srt.runtime_context import get_parallel  # newer releases moved it there

    return int(get_parallel().tp_rank)


def _describe_server(runner: Any, processor: Any, head: Any) -> ServerDescription:
    import torch
    from sglang.version import __version__ as version

    from pytest_kld.hook.handshake import ServerDescription
    from pytest_kld.hook.head import describe_head, head_part

    config, arguments = runner.model_config, runner.server_args
    names = {str(name) for name in (arguments.model_path, arguments.served_model_name) if name is not None}
    quantization = getattr(config, "quantization", None)
    return ServerDescription(
        engine="sglang",
        version=version,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else str(runner.device),
        model_names=tuple(sorted(names)),
        model_class=type(runner.model).__name__,
        vocab_size=int(processor.config.vocab_size),
        hidden_size=int(config.hidden_size),
        dtype=str(config.dtype).removeprefix("torch."),
        quantization=None if quantization is None else str(quantization),
        head=describe_head(
            head,
            scale=getattr(processor, "logit_scale", None),
            softcap=getattr(processor, "final_logit_softcapping", None),
        ),
        head_ranks=int(arguments.tp_size or 1),
        head_part=lambda: head_part(head, _rank(runner)),
        arguments={name: _plain(getattr(arguments, name, None)) for name in _ARGUMENTS},
        refusal=_refusal(arguments, processor),
        routing=_routing(runner),
    )


def _routers(runner: Any) -> dict[str, Any]:
    """Return the modules that choose experts, by name."""
    return {name: module for name, module in runner.model.named_modules() if type(module).__name__ == "TopK"}


def _watch(runner: Any) -> ExpertWatch | None:
    from pytest_kld.hook.experts import ExpertWatch, on_outputs

    routing = _routing(runner)
    if routing is None or routing.unobserved is not None:
        return None
    return ExpertWatch(list(_routers(runner).values()), on_outputs(routed_ids))


def routed_ids(router: Any, output: Any) -> Any:
    """Return the ids [tokens, K] in the output of a `TopK`, without experts that every token uses; None if it has none.

    Shared experts that are fused with the routed ones have the last columns.
    """
    ids = getattr(output, "topk_ids", None)
    if ids is None:
        return None
    config = router.topk_config
    shared = getattr(config, "num_shared_topk_slots", None)
    shared = getattr(config, "num_fused_shared_experts", 0) if shared is None else shared
    return ids[:, : ids.shape[1] - int(shared or 0)]


def _routing(runner: Any) -> RoutingDescription | None:
    from pytest_kld.hook.experts import RoutingDescription, experts_of, experts_per_token_of, layers_of

    config = getattr(runner.model_config, "hf_text_config", None) or getattr(runner.model_config, "hf_config", None)
    experts, per_token = experts_of(config), experts_per_token_of(config)
    if experts is None:
        return None
    routers, arguments = _routers(runner), runner.server_args
    why = None
    if not routers:
        why = f"no layer of {type(runner.model).__name__} has SGLang's TopK"
    elif any(getattr(arguments, name, None) for name in ("enable_eplb", "ep_num_redundant_experts")):
        why = "experts are moved or copied between ranks (expert-parallel load balancing), so ids are those of places"
    elif getattr(arguments, "init_expert_location", None) not in (None, "trivial"):
        why = "experts are placed by --init-expert-location, so ids are those of places"
    return RoutingDescription(layers=layers_of(routers), experts=experts, per_token=per_token, unobserved=why)


def _refusal(arguments: Any, processor: Any) -> str | None:
    """Return why captures of this server are refused, or None."""
    if (getattr(arguments, "pp_size", None) or 1) > 1:
        return _PIPELINE
    return _DP_ATTENTION if runs_dp_attention(arguments, processor) else None


def runs_dp_attention(arguments: Any, processor: Any) -> bool:
    """Tell whether the running processor's rows belong to several attention groups, each with its own requests.

    It gathers the rows of all groups before the head (`do_tensor_parallel_all_gather_dp_attn`), or each group has its
    own head (`use_attn_tp_group`). The server's arguments may say so too.
    """
    names = ("do_tensor_parallel_all_gather_dp_attn", "use_attn_tp_group")
    asked = getattr(arguments, "enable_dp_attention", False) or (getattr(arguments, "attn_dp_size", None) or 1) > 1
    return bool(asked) or any(getattr(processor, name, None) for name in names)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)

"""Where SGLang is hooked. These methods exist in every supported release, on the single-pass and the chunked path.

`ModelRunner.forward` brackets a forward pass and has the request ids and `is_draft_worker`, the one signal that
tells a draft model's passes (MTP, NextN, EAGLE, standalone) from the main model's: their requests carry the same ids.
`LogitsProcessor.forward` has the head. `LogitsProcessor._get_logits` is called once per block of rows: what goes in
are hidden states, what comes out are logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_kld.hook.recorder import Recorder

_MARK = "_pytest_kld_hooked"


def install(recorder: Recorder) -> None:
    """Wrap the methods. Calling it again changes nothing.

    Raises:
        AttributeError: this release of SGLang lacks one of them.

    """
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    _wrap(ModelRunner, "forward", _model_forward(recorder))
    _wrap(LogitsProcessor, "forward", _logits_forward(recorder))
    _wrap(LogitsProcessor, "_get_logits", _get_logits(recorder))
    if "rids" not in ForwardBatch.__dataclass_fields__:  # before 0.5.10
        _attach_request_ids(ForwardBatch)


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapper, _MARK, True)
    setattr(owner, name, wrapper)


def _attach_request_ids(forward_batch: type) -> None:
    original = forward_batch.init_new.__func__  # type: ignore[attr-defined]
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def init_new(cls: type, batch: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(cls, batch, *args, **kwargs)
        made.rids = [request.rid for request in batch.reqs] if getattr(batch, "reqs", None) else None
        return made

    setattr(init_new, _MARK, True)
    forward_batch.init_new = classmethod(init_new)  # type: ignore[attr-defined]


def _model_forward(recorder: Recorder) -> Callable[..., Any]:
    def around(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        with recorder.forward_pass(runner, forward_batch):
            return original(runner, forward_batch, *args, **kwargs)

    return around


def _logits_forward(recorder: Recorder) -> Callable[..., Any]:
    def around(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.current is None:  # the usual case, and nothing more is done in it
            return original(processor, *args, **kwargs)
        recorder.begin_logits(processor, _argument("lm_head", 2, args, kwargs))
        output = original(processor, *args, **kwargs)
        recorder.end_logits()
        return output

    return around


def _get_logits(recorder: Recorder) -> Callable[..., Any]:
    def around(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
        logits = original(processor, *args, **kwargs)
        if recorder.current is not None:
            recorder.take_block(_argument("hidden_states", 0, args, kwargs), logits)
        return logits

    return around


def _argument(name: str, position: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an argument of a method, whichever way its caller passed it."""
    return kwargs[name] if name in kwargs else args[position]

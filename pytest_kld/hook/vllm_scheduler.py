"""vLLM's seams in its scheduler, so that the sequences of a group are decoded together.

vLLM's scheduler gets the prompts of a request one by one, prefills as many tokens a step as fit, and decodes the first
sequences meanwhile. So the hook hands our sequences on when their group has arrived, all at once, and those that are
through their prompts wait until the last one is: `Request.next_decode_eligible_step` is the scheduler's own field for
that. Other requests are not touched. A group that cannot be prefilled as a whole, for lack of room, stops waiting; each
step tells how many sequences it decoded, so that this comes out.
"""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_kld.hook.protocol import parse_request_id, report_error
from pytest_kld.hook.vllm_requests import TOGETHER, external_id, split_name
from pytest_kld.hook.wrapping import require_parameters, wrap

_ARRIVING_GROUPS = 64
"""Groups that may be incomplete at a time; beyond that the oldest is dropped: its client is gone."""


class Groups:
    """Our groups of sequences in one scheduler that do not decode yet."""

    def __init__(self, directory: Path) -> None:
        """Take the directory of runs, for reports of errors."""
        self._directory = directory
        self._arriving: OrderedDict[str, dict[int, Any]] = OrderedDict()
        self._prefilling: list[list[Any]] = []

    def arrive(self, request: Any) -> list[Any]:
        """Take a request, and return those that the scheduler may have now, in the order of their windows."""
        size, parts = _size_of_group(request), split_name(request.request_id)
        if size is None or parts is None:
            return [request]
        request.skip_reading_prefix_cache = True  # each prompt is prefilled as if it were the first
        name, number = parts
        group = self._arriving.setdefault(name, {})
        group[number] = request
        if len(group) < size:
            while len(self._arriving) > _ARRIVING_GROUPS:
                self._arriving.popitem(last=False)
            return []
        del self._arriving[name]
        complete = [group[number] for number in sorted(group)]
        self._prefilling.append(complete)
        return complete

    def hold(self, step: int) -> bool:
        """Keep sequences that are through their prompts from decoding in the next step, if some of their group are not.

        Args:
            step: the number of the scheduler's last step.

        Returns:
            Whether there are such groups.

        """
        self._prefilling = [group for group in self._prefilling if any(map(_is_in_prompt, group))]
        for group in self._prefilling:
            for request in group:
                if not _is_in_prompt(request):
                    request.next_decode_eligible_step = step + 2
        return bool(self._prefilling)

    def let_go(self) -> None:
        """Let all groups decode."""
        self._prefilling.clear()

    def report(self, request: Any) -> None:
        """Report an exception to the run of a request, if it is ours."""
        known = parse_request_id(external_id(request.request_id))
        if known is not None:
            report_error(self._directory / known[0], 0, traceback.format_exc())


def _size_of_group(request: Any) -> int | None:
    """Return how many sequences are decoded together with this one; None if it is not ours or does not decode."""
    if parse_request_id(external_id(request.request_id)) is None:
        return None
    return (getattr(request.sampling_params, "extra_args", None) or {}).get(TOGETHER)


def _is_in_prompt(request: Any) -> bool:
    return not request.is_finished() and request.num_computed_tokens < request.num_prompt_tokens


def hook_scheduler(directory: Path) -> None:
    """Wrap the methods of vLLM's scheduler.

    Raises:
        RuntimeError: the release changed them.

    """
    from vllm.v1.core.sched.scheduler import Scheduler

    require_parameters(Scheduler.add_request, ("self", "request"), "vLLM")
    groups = Groups(directory)

    def add_request(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
        try:
            now = groups.arrive(request)
        except Exception:  # the server must keep running
            groups.report(request)
            now = [request]
        for one in now:
            original(scheduler, one)

    def schedule(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            waiting = groups.hold(scheduler.current_step)
        except Exception:  # the server must keep running; the number of sequences in each step shows it
            groups.let_go()
            waiting = False
        output = original(scheduler, *args, **kwargs)
        if waiting and not output.total_num_scheduled_tokens:  # room for the other prompts would never come
            groups.let_go()
        return output

    wrap(Scheduler, "add_request", add_request)
    wrap(Scheduler, "schedule", schedule)

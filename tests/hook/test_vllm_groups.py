"""How vLLM's scheduler is given the sequences of a group."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_kld.hook.protocol import new_run, request_id
from pytest_kld.hook.vllm_requests import TOGETHER, external_id
from pytest_kld.hook.vllm_scheduler import Groups

RUN = new_run()


@dataclass
class Request:
    """What the hook reads and sets of vLLM's requests."""

    request_id: str
    extra: dict[str, Any] | None = None
    num_computed_tokens: int = 0
    num_prompt_tokens: int = 10
    next_decode_eligible_step: int = 0
    skip_reading_prefix_cache: bool = False
    finished: bool = False
    sampling_params: Any = field(init=False)

    def __post_init__(self) -> None:
        self.sampling_params = SimpleNamespace(extra_args=self.extra)

    def is_finished(self) -> bool:
        return self.finished


def group(size: int, first: int = 0) -> list[Request]:
    """Return the requests of the prompts of one request to decode."""
    ours = request_id(RUN, first)
    return [Request(f"cmpl-{ours}-{number}-0123abcd", {TOGETHER: size}) for number in range(size)]


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def test_each_prompt_has_the_id_of_its_window() -> None:
    assert [external_id(one.request_id) for one in group(3, first=5)] == [request_id(RUN, one) for one in (5, 6, 7)]


def test_a_group_is_handed_on_when_all_of_it_is_there_in_the_order_of_its_windows(groups: Groups) -> None:
    one, other = group(3), group(2, first=3)
    assert groups.arrive(one[2]) == []
    assert groups.arrive(other[0]) == []
    assert groups.arrive(one[0]) == []
    assert groups.arrive(one[1]) == one
    assert groups.arrive(other[1]) == other
    assert all(request.skip_reading_prefix_cache for request in (*one, *other))


@pytest.mark.parametrize(
    "request_",
    [
        Request("cmpl-somebody-0-0123abcd", {TOGETHER: 2}),
        Request(f"cmpl-{request_id(RUN, 0)}-0-0123abcd"),
        Request("chatcmpl-x", {}),
    ],
)
def test_other_requests_go_on_untouched(groups: Groups, request_: Request) -> None:
    assert groups.arrive(request_) == [request_]
    assert not request_.skip_reading_prefix_cache
    assert not groups.hold(3)


def test_those_that_are_through_their_prompts_wait_one_step_at_a_time_for_the_last(groups: Groups) -> None:
    first, second = group(2)
    for request in (first, second):
        groups.arrive(request)
    first.num_computed_tokens = 10
    second.num_computed_tokens = 9
    assert groups.hold(7)
    assert (first.next_decode_eligible_step, second.next_decode_eligible_step) == (9, 0)  # not in step 8
    second.num_computed_tokens = 10
    assert not groups.hold(8)
    assert first.next_decode_eligible_step == 9


@pytest.mark.parametrize("end", ["gives up", "is aborted"])
def test_a_group_that_cannot_be_prefilled_as_a_whole_stops_waiting(groups: Groups, end: str) -> None:
    first, second = group(2)
    for request in (first, second):
        groups.arrive(request)
    first.num_computed_tokens = 10
    assert groups.hold(1)
    if end == "gives up":
        groups.let_go()
    else:
        second.finished = True
    assert not groups.hold(2)


def test_clients_that_are_gone_take_no_memory(groups: Groups) -> None:
    for first in range(200):
        groups.arrive(group(2, first=2 * first)[0])
    assert len(groups._arriving) <= 64

"""How vLLM's own schedulers schedule a group of sequences that must be decoded together."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import TINY, MakeModel
from transformers import LlamaConfig
from vllm_cpu.environment import HERE, VLLMEnvironment

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

PROMPT, STEPS, CHUNK = 100, 5, 128
ALL, OTHER = {"0", "1", "2", "3"}, "-1"


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> Path:
    return make_model("scheduled-llama", LlamaConfig(**{**TINY, "head_dim": 32}))


def steps(environment: VLLMEnvironment, model: Path, blocks: int, scheduler: str) -> list[dict[str, int]]:
    """Return how many tokens of each window ran in each step that ran some."""
    run = subprocess.run(
        [environment.python, HERE / "scheduled_groups.py", model, str(blocks), scheduler],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment.variables},
    )
    return [step for step in json.loads(run.stdout.splitlines()[-1]) if step]


@pytest.mark.parametrize("scheduler", ["sync", "async"])
def test_no_sequence_decodes_before_all_prompts_are_through(
    vllm_cpu: VLLMEnvironment, model: Path, scheduler: str
) -> None:
    """The prompts are alike, yet none is read from the prefix cache; the other user's request is not held."""
    found = steps(vllm_cpu, model, 64, scheduler)
    prompts, decoded = found[: -(STEPS - 1)], found[-(STEPS - 1) :]
    assert decoded == [dict.fromkeys(sorted(ALL), 1)] * (STEPS - 1)
    assert prompts[0][OTHER] == 20
    assert all(sum(step.values()) <= CHUNK for step in prompts)
    assert {window: sum(step.get(window, 0) for step in prompts) for window in ALL} == dict.fromkeys(ALL, PROMPT)
    first = [next(number for number, step in enumerate(prompts) if window in step) for window in sorted(ALL)]
    assert first == sorted(first)


@pytest.mark.parametrize("scheduler", ["sync", "async"])
def test_a_group_that_the_cache_does_not_hold_goes_on_without_the_others(
    vllm_cpu: VLLMEnvironment, model: Path, scheduler: str
) -> None:
    found = steps(vllm_cpu, model, 20, scheduler)
    assert dict.fromkeys(sorted(ALL), 1) not in found
    assert {window: sum(step.get(window, 0) for step in found) for window in ALL} == dict.fromkeys(
        ALL, PROMPT + STEPS - 1
    )

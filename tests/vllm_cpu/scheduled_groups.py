"""Let vLLM's own schedulers schedule a group, without a model: python scheduled_groups.py MODEL BLOCKS SCHEDULER.

This runs where vLLM runs. Four prompts of 100 tokens are decoded for five tokens each, in steps of at most 128 tokens;
a cache of BLOCKS blocks of 16 tokens holds them, or does not. SCHEDULER is `sync`, or `async`, which schedules a step
before it knows the tokens of the step before. The group arrives in another order than that of its windows, while a
request of somebody else runs, which generates one token. All prompts are alike, as the prefix cache sees. It prints, as
JSON, for each step how many tokens of each window ran.
"""

import json
import sys
from collections import deque
from pathlib import Path

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from pytest_kld.hook.vllm_requests import TOGETHER, split_name
from pytest_kld.hook.vllm_scheduler import hook_scheduler

MODEL, BLOCKS, SCHEDULER = sys.argv[1:]
SIZE, PROMPT, STEPS, CHUNK, BLOCK = 4, 100, 5, 128, 16
OURS = f"cmpl-pytest-kld:{'0' * 32}:0"


def request(name, prompt, steps, extra=None):
    sampling = SamplingParams(max_tokens=steps, ignore_eos=True, temperature=0, extra_args=extra)
    return Request(
        request_id=name,
        prompt_token_ids=[7] * prompt,
        sampling_params=sampling,
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def main():
    args = EngineArgs(model=MODEL, max_num_seqs=SIZE, max_num_batched_tokens=CHUNK, max_model_len=256)
    config = args.create_engine_config()
    config.cache_config.block_size, config.cache_config.num_gpu_blocks = BLOCK, int(BLOCKS)
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    group = [KVCacheGroupSpec(["layer"], spec)]
    init_none_hash(sha256)
    hook_scheduler(Path("nowhere"))
    made = (AsyncScheduler if SCHEDULER == "async" else Scheduler)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks=int(BLOCKS), kv_cache_tensors=[], kv_cache_groups=group),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
    )
    made.add_request(request("cmpl-other-0-0123abcd", 20, 1))
    for number in (2, 0, 3, 1):
        made.add_request(request(f"{OURS}-{number}-12345678", PROMPT, STEPS, {TOGETHER: SIZE}))
    steps, running = [], deque()
    while made.has_requests() and len(steps) < 200:
        ran = made.schedule()
        steps.append(
            {split_name(name)[1] if name.startswith(OURS) else -1: n for name, n in ran.num_scheduled_tokens.items()}
        )
        running.append((ran, {name: made.requests[name].is_prefill_chunk for name in ran.num_scheduled_tokens}))
        if len(running) > (SCHEDULER == "async"):
            finish(made, *running.popleft())
    while running:
        finish(made, *running.popleft())
    print(json.dumps(steps))


def finish(scheduler, ran, in_prompt):
    """Tell the scheduler a token of each request that is through its prompt."""
    names = list(ran.num_scheduled_tokens)
    places = {name: place for place, name in enumerate(names)}
    tokens = [[] if in_prompt[name] else [9] for name in names]
    scheduler.update_from_output(ran, ModelRunnerOutput(names, places, sampled_token_ids=tokens))


main()

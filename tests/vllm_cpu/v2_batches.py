"""Give the second model runner's seam two batches made by hand: python v2_batches.py MODEL CAPTURES RUN OUT.

This runs where vLLM runs. Every class is vLLM's own, except for a model that is only a head; hidden states are random.
Three requests share the batches: one of ours is prefilled in two chunks, another begins and ends in the second batch,
and one that is not ours generates meanwhile. OUT gets what the captures must agree with.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

from pytest_kld.hook.recorder import Recorder
from pytest_kld.hook.vllm import hook_runner

MODEL, CAPTURES, RUN, OUT = sys.argv[1:]
LONG, SHORT = (f"cmpl-pytest-kld:{RUN}:{window}-0-0123abcd" for window in (0, 1))
OTHER = "cmpl-other-0-89abcdef"
PROMPTS = {LONG: 11, OTHER: 4, SHORT: 5}
STATES = {LONG: 2, OTHER: 0, SHORT: 3}
"""Where the runner keeps each request: not in the order of a batch."""
BATCHES = (
    [(OTHER, 4, 1), (LONG, 0, 6)],
    [(LONG, 6, 5), (OTHER, 5, 1), (SHORT, 0, 5)],
)
"""For each request of a batch its name, its first position, and how many tokens run."""
FILES = ("0.0.safetensors", "0.6.safetensors", "1.0.safetensors", "handshake.json")


class Head(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.lm_head = ParallelLMHead(config.get_vocab_size(), config.get_hidden_size(), params_dtype=torch.float32)
        torch.nn.init.normal_(self.lm_head.weight)
        self.lm_head.quant_method.process_weights_after_loading(self.lm_head)
        self.logits_processor = LogitsProcessor(config.get_vocab_size())

    def compute_logits(self, hidden):
        return self.logits_processor(self.lm_head, hidden)


def make_batch(requests, buffers, ids):
    rows = sum(count for _, _, count in requests)
    batch = InputBatch.make_dummy(len(requests), rows, buffers, is_padding=False)
    batch.req_ids = [name for name, _, _ in requests]
    batch.idx_mapping_np = np.array([STATES[name] for name in batch.req_ids])
    batch.idx_mapping = torch.from_numpy(batch.idx_mapping_np)
    batch.num_scheduled_tokens = np.array([count for _, _, count in requests], dtype=np.int32)
    batch.query_start_loc_np = np.concatenate([[0], np.cumsum(batch.num_scheduled_tokens)]).astype(np.int32)
    batch.query_start_loc = torch.from_numpy(batch.query_start_loc_np)
    computed = [min(first, PROMPTS[name]) for name, first, _ in requests]
    batch.num_computed_prefill_tokens_np = np.array(computed, dtype=np.int32)
    batch.prefill_len_np = np.array([PROMPTS[name] for name in batch.req_ids], dtype=np.int32)
    batch.input_ids[:] = torch.cat([ids[STATES[name], first : first + count] for name, first, count in requests])
    return batch


def main():
    config = EngineArgs(model=MODEL, dtype="float32", enforce_eager=True).create_engine_config()
    width, vocab_size = config.model_config.get_hidden_size(), config.model_config.get_vocab_size()
    torch.manual_seed(0)
    ids, lengths = torch.randint(1000, (4, 32), dtype=torch.int32), np.zeros(4, dtype=np.int32)
    hidden_of, told = {LONG: [], OTHER: [], SHORT: []}, {}
    with set_current_vllm_config(config), torch.inference_mode():
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        runner = object.__new__(GPUModelRunner)
        runner.vllm_config, runner.device, runner.model = config, torch.device("cpu"), Head(config.model_config)
        hook_runner(Recorder(CAPTURES), runner)
        worker = PromptLogprobsWorker(max_num_reqs=4, device=runner.device)
        for name, state in STATES.items():
            worker.add_request(name, state, SamplingParams(prompt_logprobs=0))
            lengths[state] = PROMPTS[name]
        buffers = InputBuffers(max_num_reqs=4, max_num_tokens=32, device=runner.device)
        for requests in BATCHES:
            batch = make_batch(requests, buffers, ids)
            hidden = torch.randn(batch.num_tokens + 3, width)  # padded, as a graph's output is
            computed = torch.zeros(4, dtype=torch.int32)
            for row, (name, first, count) in zip(batch.query_start_loc_np, requests, strict=False):
                computed[STATES[name]] = first
                hidden_of[name].append(hidden[row : row + count].clone())
            compute = runner.model.compute_logits
            told |= worker.compute_prompt_logprobs(compute, hidden, batch, ids, computed, lengths)
        expected = {"head": runner.model.lm_head.weight[:vocab_size].clone()}
        for window, name in enumerate((LONG, SHORT)):
            expected[f"hidden.{window}"] = torch.cat(hidden_of[name])
            expected[f"token_ids.{window}"] = ids[STATES[name], : PROMPTS[name]].clone()
            expected[f"log_probs.{window}"] = told[name].logprobs[:, 0].clone()
        save_file(expected, OUT)
    deadline = time.monotonic() + 30  # a thread writes them
    while not all(Path(CAPTURES, RUN, name).is_file() for name in FILES) and time.monotonic() < deadline:
        time.sleep(0.1)


main()

"""Decoding with transformers: its own generation loop, with each token given by the text."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from pytest_kld.errors import CaptureError, ModelError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from transformers import PreTrainedModel

    from pytest_kld.engines.routes import RouteWatch

_KEPT_SETTINGS = ("cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size")
"""Fields of a model's `generation_config` that say how its cache works. The others say which token is chosen."""


@dataclass(slots=True)
class ForcedSteps(LogitsProcessor):
    """Keeps what each decode step computed, and makes the text's next token the only possible one.

    Attributes:
        token_ids: [B, N], the windows of the batch.
        prompt_size: tokens that are prefilled.
        positions: positions whose logits are kept.
        label: the model's name in messages.
        routes: watches the experts of a model that has some.

    """

    token_ids: Tensor
    prompt_size: int
    positions: Collection[int]
    label: str
    routes: RouteWatch | None = None
    hidden: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    _inputs: list[Tensor] = field(default_factory=list)
    _tokens: int = 0
    _output: Tensor | None = None
    _steps: int = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take one step; transformers calls this once for each token, after the forward pass."""
        position = input_ids.shape[1] - 1
        if position >= self.prompt_size:
            self._take(position)
        size = self.token_ids.shape[1]
        token = self.token_ids[:, min(position + 1, size - 1)].to(scores.device)  # what follows the window is not run
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)

    def _take(self, position: int) -> None:
        if self._tokens != 1:
            raise ModelError(
                f"{self.label} cannot decode: at position {position:,} it ran {self._tokens:,} tokens instead of one, "
                "so it has no cache. Measure it with --kld-path=prefill."
            )
        assert self._output is not None
        self._steps += 1
        if len(self._inputs) == 1:  # else the head's input is unknown, or which of several it is
            self.hidden.append(self._inputs[0][:, -1].cpu())
        if self.routes is not None and (experts := self.routes.take(len(self.token_ids))) is not None:
            self.experts.append(experts)
        if position in self.positions:
            self.logits.append(self._output[:, -1].cpu())

    def run(self, network: PreTrainedModel) -> None:
        """Prefill the prompts and decode the rest of the windows.

        Raises:
            CaptureError: other tokens were run, or steps are missing.

        """
        prompts, steps = self.token_ids[:, : self.prompt_size], self.token_ids.shape[1] - self.prompt_size
        with self._watching(network), _only_cache_settings(network):
            made: Tensor = network.generate(  # type: ignore[operator]
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=steps + 1,  # the last token is chosen after the last step, and not run
                do_sample=False,
                use_cache=True,
                logits_processor=LogitsProcessorList([self]),
            )
        run = made[:, : self.token_ids.shape[1]]
        if self._steps != steps or not torch.equal(run.to(self.token_ids.device), self.token_ids):
            raise CaptureError(
                f"{self.label}: {self._steps:,} of {steps:,} steps were decoded with the tokens of the text"
            )

    @contextmanager
    def _watching(self, network: PreTrainedModel) -> Iterator[None]:
        """Observe the input of the head, and the logits."""

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            self._tokens = next(one.shape[1] for one in given if isinstance(one, Tensor))
            self._inputs.clear()
            if self.routes is not None:
                self.routes.clear()

        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._inputs.append(args[0])

        def end(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._output = output.logits

        head: Any = network.get_output_embeddings()  # type: ignore[no-untyped-call]
        hooks = [
            network.register_forward_pre_hook(begin, with_kwargs=True),
            network.register_forward_hook(end),
            *([head.register_forward_pre_hook(see)] if isinstance(head, nn.Module) else []),
            *([] if self.routes is None else self.routes.attach()),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._inputs.clear()
            self._output = None


@contextmanager
def _only_cache_settings(network: PreTrainedModel) -> Iterator[None]:
    """Leave out of a model's generation settings what ends a text early or changes which token is chosen."""
    given = network.generation_config
    kept = {name: value for name in _KEPT_SETTINGS if (value := getattr(given, name, None)) is not None}
    network.generation_config = GenerationConfig(**kept, disable_compile=True)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        network.generation_config = given

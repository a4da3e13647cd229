"""The original method inside SGLang, as a plugin: float32 log-probabilities of every position, a file per window.

This follows the procedure that this project started from. On rank 0, in the scheduler's own thread, it takes the
log_softmax of a prefill's logits in float32 on the CPU and writes it to a safetensors file. `SGLANG_KLD_SAVE_DIR` names
the directory.
"""

import itertools
import os
from pathlib import Path
from typing import Any

from original import save_window

_numbers = itertools.count()


def install() -> None:
    """Register the hook. SGLang calls this in each of its processes."""
    directory = os.environ.get("SGLANG_KLD_SAVE_DIR")
    if not directory:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def save(original: Any, processor: Any, hidden: Any, head: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
        logits = original(processor, hidden, head, metadata, *args, **kwargs)
        if metadata.extend_return_logprob:
            save_window(logits, Path(directory) / f"{next(_numbers)}.safetensors")
        return logits

    target = "sglang.srt.layers.logits_processor.LogitsProcessor._get_logits"
    HookRegistry.register(target, save, HookType.AROUND)

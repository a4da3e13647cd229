"""Take the pictures in docs/images: gate quantizations of tiny models and open the reports in Chromium.

Run it in the test environment: `.venv/bin/python docs/screenshots.py`. The pictures of speed, decoding and experts are
of a gate on the SGLang of the tests, which takes some minutes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3MoeConfig

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "conftest_examples/quickstart")]

from browser import Browser  # noqa: E402 (it is in tests/)
from make_models import round_weights  # noqa: E402
from sglang_cpu.environment import sglang_environment  # noqa: E402

from pytest_kld.text.corpus import load_corpus  # noqa: E402

FORMATS = ("int8", "fp8", "nvfp4")
LIMITS = ("--kld-max-mean=0.05", "--kld-max-p99=0.2", "--kld-min-top1=0.85")
PROTOCOL = ("--kld-dataset=python-docs", "--kld-windows=40", "--kld-window-size=128", "--kld-stride=64")
SERVED = (
    *("--kld-max-mean=0.05", "--kld-max-decode-gap=1e-6", "--kld-min-experts-seen=0.9", "--kld-path=both"),
    *("--kld-dataset=python-docs", "--kld-windows=8", "--kld-window-size=128", "--kld-stride=128"),
    *("--kld-throughput=1,4", "--kld-throughput-rounds=2", "--kld-throughput-input=64", "--kld-throughput-output=16"),
)
SIZES = {
    **{"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False},
}
DENSE = Qwen3Config(**SIZES)
SPARSE = Qwen3MoeConfig(**SIZES, num_experts=32, num_experts_per_tok=2, moe_intermediate_size=64)
DESKTOP, PHONE = 1100, 390
"""Widths in CSS pixels."""


def main() -> None:
    """Make the models, gate them, and take pictures in light mode, in dark mode and of a phone."""
    images = ROOT / "docs/images"
    images.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, Browser() as browser:
        for name, config in (("dense", DENSE), ("sparse", SPARSE)):
            make_models(Path(directory, name), config)
        report = gate(Path(directory, "dense"), FORMATS, *LIMITS, *PROTOCOL, "--kld-engine=transformers")
        browser.open(report, width=DESKTOP)
        browser.screenshot(images / "report-light.png", top=0, height=1060)
        browser.open(report, width=DESKTOP, dark=True)
        browser.screenshot(images / "report-dark.png", top=browser.top_of("#distribution"), height=1250)
        browser.open(report, width=PHONE)
        browser.screenshot(images / "report-phone.png", top=0, height=1150)
        hook = Path(directory, "hook")
        hook.mkdir()
        sglang = sglang_environment(hook).with_dtype("float32")
        report = gate(Path(directory, "sparse"), ("int8", "nvfp4"), *SERVED, *sglang.options())
        browser.open(report, width=DESKTOP)
        for name, selector, height in (
            ("speed", "#speed", 832),
            ("decoding", "figure:has(#gap-caption)", 410),
            ("experts", "#saw", 885),
        ):
            browser.screenshot(images / f"report-{name}.png", top=browser.top_of(selector), height=height)


@torch.no_grad()
def make_models(root: Path, config: PretrainedConfig) -> None:
    """Save a random model and its quantizations, with a tokenizer trained on the text that they run on."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, show_progress=False)
    bpe.train_from_iterator([load_corpus("python-docs", Path()).text[:50_000]], trainer)
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config)
    reference.get_output_embeddings().weight.mul_(12)  # random heads are nearly flat
    reference.save_pretrained(root / "reference")
    for name in FORMATS:
        candidate = AutoModelForCausalLM.from_pretrained(root / "reference")
        round_weights(candidate, name)
        candidate.save_pretrained(root / name)
    for name in ("reference", *FORMATS):
        PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(root / name)


def gate(root: Path, candidates: Sequence[str], *arguments: str) -> Path:
    """Run the gate and return the path of its HTML report. At least one candidate fails, as it should."""
    (root / "pytest.ini").write_text("[pytest]\n")
    command = [
        *(sys.executable, "-m", "pytest", "--kld-ref=reference", *(f"--kld-candidate={name}" for name in candidates)),
        *(*arguments, f"--kld-cache-dir={root / 'cache'}", "--kld-html=report.html"),
    ]
    subprocess.run(command, cwd=root, check=False)
    return root / "report.html"


if __name__ == "__main__":
    main()

"""Captures of the original layout, from their import to the tables of the original scripts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from pairs import log_probs_of, save_capture
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pytest_kld.captures.capture import Capture
from pytest_kld.command import main

if TYPE_CHECKING:
    from conftest import MakeModel

    from pytest_kld.text.windows import Windows

# Of the original README; the numbers belong to other models.
HEADING = "Model                                      Mean KLD   Median KLD    P95 KLD    P99 KLD    Max KLD"
RULE = "-" * 96
MOE = """\
flashinfer_cutlass (fp4 + moe)             0.035637     0.006939   0.147900   0.534100     4.4300
cutedsl + cudnn (moe cutedsl, fp4 cudnn)   0.036000     0.006900   0.148700   0.538100     4.4300
cutlass MoE                                0.036000     0.006900   0.148800   0.538100     4.4300
"""
RESULTS = """\
QuantTrio/Qwen3.5-397B-A17B-AWQ (INT4)    0.024057     0.004778   0.097600   0.349900     4.3300
nvidia/Qwen3.5-397B-A17B-NVFP4            0.035313     0.006843   0.146500   0.531800     5.1100
lukealonso/Qwen3.5-397B-A17B-NVFP4        0.035637     0.006939   0.147900   0.534100     4.4300
"""
REFERENCE = "Qwen3.5-397B-A17B-FP8"


@dataclass(frozen=True)
class Originals:
    """Directories of the original layout, and the log-probabilities in them."""

    root: Path
    windows: Windows
    tokenizer: Path
    log_probs: dict[str, torch.Tensor]

    def imported(self, name: str, directory: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
        """Import a directory, and return the capture's path."""
        capsys.readouterr()
        protocol = ["--dataset=python-docs", "--windows=3", "--window-size=64", "--stride=32"]
        place = [f"--tokenizer={self.tokenizer}", f"--cache-dir={self.root / 'cache'}"]
        code = main(["import-logprobs", str(self.root / directory), f"--name={name}", *protocol, *place, *more])
        assert code == 0, capsys.readouterr().err
        return capsys.readouterr().out.strip()


@pytest.fixture
def originals(make_model: MakeModel, reference_dir: Path, windows: Windows, tmp_path: Path) -> Originals:
    noises = {"reference": 0.0, "awq": 0.0004, "nvfp4": 0.0008, "other": 0.0009}
    log_probs = {}
    for name, noise in noises.items():
        path = reference_dir if name == "reference" else make_model(f"original-{name}", noise=noise)
        log_probs[name] = log_probs_of(AutoModelForCausalLM.from_pretrained(path), windows)
        save_capture(tmp_path / name, log_probs[name], windows)
    return Originals(tmp_path, windows, reference_dir, log_probs)


def figures(reference: torch.Tensor, candidate: torch.Tensor) -> str:
    """The figures of a row, as the original scripts computed them, in float64."""
    p, q = (side.double().numpy().reshape(-1, side.shape[-1]) for side in (reference, candidate))
    p, q = (side - np.log(np.exp(side).sum(-1, keepdims=True)) for side in (p, q))
    kl = (np.exp(p) * (p - q)).sum(-1)
    mean, median, p95, p99 = kl.mean(), *np.quantile(kl, [0.5, 0.95, 0.99])
    return f"{mean:.6f} {median:.6f} {p95:.6f} {p99:.6f} {kl.max():.4f}"


def compared(originals: Originals, names: dict[str, str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Import and compare, and return the scores' files."""
    reference = originals.imported(REFERENCE, "reference", capsys)
    files = []
    for index, (name, directory) in enumerate(names.items()):
        files.append(str(originals.root / f"{index}.safetensors"))
        candidate = originals.imported(name, directory, capsys)
        assert main(["compare", reference, candidate, "--scores", files[-1]]) == 0
    capsys.readouterr()
    return files


def test_the_results_table_of_the_original_scripts(originals: Originals, capsys: pytest.CaptureFixture[str]) -> None:
    """Heading and rules are the same to the character. In the original README, its rows alone are a column off."""
    names = dict(zip((line[:42].strip() for line in RESULTS.splitlines()), ("awq", "nvfp4", "other"), strict=True))
    files = compared(originals, names, capsys)
    assert main(["report", "--original", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"KLD Evaluation Results (ref: {REFERENCE}, dataset: python-docs, 192 positions)"
    assert lines[1:5] == ["=" * 92, "", HEADING, RULE]
    for line, (name, directory), seed in zip(lines[5:8], names.items(), RESULTS.splitlines(), strict=True):
        expected = figures(originals.log_probs["reference"], originals.log_probs[directory])
        assert line.split() == [*name.split(), *expected.split()]
        assert [len(number) for number in line.split()[-5:]] == [len(number) for number in seed.split()[-5:]]


def test_the_moe_table_of_the_original_scripts(originals: Originals, capsys: pytest.CaptureFixture[str]) -> None:
    """Every character is the same, but for the digits."""
    names = dict(zip((line[:41].strip() for line in MOE.splitlines()), ("nvfp4", "other", "awq"), strict=True))
    files = compared(originals, names, capsys)
    assert main(["report", "--original", "--title=", *files]) == 0
    out = capsys.readouterr().out.rstrip() + "\n"

    def without_digits(table: str) -> str:
        return re.sub(r"\d\.\d+", lambda number: re.sub(r"\d", "0", number[0]), table)

    assert without_digits(out) == without_digits(f"{HEADING}\n{RULE}\n{MOE}")
    for line, directory in zip(out.splitlines()[2:], names.values(), strict=True):
        expected = figures(originals.log_probs["reference"], originals.log_probs[directory])
        assert line[41:].split() == expected.split()


def test_positions_with_nan_are_counted_below_the_table(
    originals: Originals, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = load_file(originals.root / "awq" / "1.safetensors")
    damaged["log_probs"][7:10] = torch.nan
    save_file(damaged, originals.root / "awq" / "1.safetensors")
    files = compared_with_nan(originals, capsys)
    assert main(["report", "--original", *files]) == 1
    assert "NaN excluded: 3 of 192 positions of a (candidate)" in capsys.readouterr().out


def compared_with_nan(originals: Originals, capsys: pytest.CaptureFixture[str]) -> list[str]:
    pair = [originals.imported(REFERENCE, "reference", capsys), originals.imported("a", "awq", capsys)]
    assert main(["compare", *pair, "--scores", str(originals.root / "a.safetensors")]) == 1
    capsys.readouterr()
    return [str(originals.root / "a.safetensors")]


def test_an_imported_capture_has_the_same_numbers_and_the_token_ids(
    originals: Originals, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(originals.imported("a", "awq", capsys))
    capture = Capture.open(path, originals.windows)
    capture.verify()
    assert capture.name == "a"
    assert capture.manifest["key"]["model"].keys() == {"local", "hash", "elsewhere"}
    for window in range(3):
        ids = capture.token_ids(window)
        assert ids is not None
        assert ids.tolist() == originals.windows.token_ids[window].tolist()
        assert torch.equal(capture.rows(window, 0, 64), originals.log_probs["awq"][window])
    assert main(["cache", "verify", "--cache-dir", str(originals.root / "cache")]) == 0
    assert originals.imported("a", "awq", capsys) == str(path)


def test_an_import_tells_the_perplexity_of_its_windows(
    originals: Originals, capsys: pytest.CaptureFixture[str]
) -> None:
    place = [f"--tokenizer={originals.tokenizer}", f"--cache-dir={originals.root / 'cache'}"]
    protocol = ["--dataset=python-docs", "--windows=3", "--window-size=64", "--stride=32"]
    assert main(["import-logprobs", str(originals.root / "awq"), "--name=a", *protocol, *place]) == 0
    labels = torch.from_numpy(originals.windows.token_ids).long()[:, 1:, None]
    nll = -float(originals.log_probs["awq"][:, :-1].double().gather(2, labels).mean())
    assert f"a: perplexity {math.exp(nll):,.2f} on these windows" in capsys.readouterr().err


def test_captures_of_equal_bits_keep_their_names(originals: Originals, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [originals.imported(name, "awq", capsys) for name in ("cutlass", "triton")]
    assert [Capture.open(Path(path)).name for path in paths] == ["cutlass", "triton"]


def test_speculative_heads_are_left_out_of_an_import(originals: Originals, capsys: pytest.CaptureFixture[str]) -> None:
    doubled = originals.root / "doubled"
    doubled.mkdir()
    for window in range(3):
        for odd, side in enumerate(("awq", "other")):
            part = originals.log_probs[side][window].contiguous()
            save_file({"log_probs": part}, doubled / f"{2 * window + odd}.safetensors")
    capture = Capture.open(Path(originals.imported("a", "doubled", capsys)))
    assert torch.equal(capture.rows(2, 0, 64), originals.log_probs["awq"][2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows + 1, "row 0 sums to exp(1)"),
        (lambda rows: rows.half(), "dtype torch.float16"),
        (lambda rows: rows[:32].contiguous(), "has shape [32, 1024]"),
        (lambda rows: rows[:, :300].log_softmax(-1).contiguous(), "has 300 columns"),
    ],
)
def test_what_are_not_log_probabilities_is_refused(
    originals: Originals, change: object, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(change)
    for window in range(3):
        file = originals.root / "awq" / f"{window}.safetensors"
        save_file({"log_probs": change(originals.log_probs["awq"][window])}, file)
    options = ["--dataset=python-docs", "--windows=3", "--window-size=64", "--stride=32"]
    place = [f"--tokenizer={originals.tokenizer}", f"--cache-dir={originals.root / 'cache'}"]
    assert main(["import-logprobs", str(originals.root / "awq"), *options, *place]) == 2
    assert said in capsys.readouterr().err
    assert not list((originals.root / "cache").glob("captures/*/capture.json"))


def test_two_captures_without_token_ids_cannot_be_compared(
    originals: Originals, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(originals.root / side) for side in ("reference", "awq")]
    assert main(["compare", *pair]) == 2
    assert "pytest-kld import-logprobs" in capsys.readouterr().err
    imported = originals.imported("a", "awq", capsys)
    assert main(["compare", pair[0], imported]) == 0
    assert figures(originals.log_probs["reference"], originals.log_probs["awq"]).split()[0] in capsys.readouterr().out

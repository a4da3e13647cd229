"""Vocabularies that differ: the probability outside the common one is measured, bounded and noted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import TINY
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Gate

MORE = 16


@pytest.fixture(scope="session")
def widened(
    reference_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The reference with 16 more tokens, to which the head gives `nothing`, `much` or `nan`."""
    root = tmp_path_factory.mktemp("wide")

    def make(what: str) -> Path:
        path = root / what
        if path.exists():
            return path
        network = AutoModelForCausalLM.from_pretrained(reference_dir)
        network.resize_token_embeddings(TINY["vocab_size"] + MORE, mean_resizing=False)
        head: Any = network.get_output_embeddings()
        with torch.no_grad():
            rows = head.weight[:MORE]
            head.weight[-MORE:] = {"nothing": 0 * rows, "much": 3 * rows, "nan": torch.nan * rows}[what]
        network.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


def test_more_tokens_that_hold_the_probability_fail(gate: Gate, widened: Callable[[str], Path]) -> None:
    wide = widened("much")
    result = gate("--kld-max-mean=0.1", "--kld-json=report.json", "--kld-junit=gate.xml", candidates=(wide,))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*FAIL  probability outside the common vocabulary * > max_cut_mass 0.01 *",
            f"note: the vocabularies differ: * has 1,024 tokens and {wide} 1,040. The figures cover the first 1,024*",
        ]
    )
    (gated,) = gate.results()
    # The other tokens match the reference to the bit, or up to rounding if sums are taken in another order.
    assert gated["figures"]["mean"] < 1e-9
    assert gated["figures"]["cut_mass"] > 0.5
    (note,) = gated["notes"]
    assert note.startswith("the vocabularies differ")
    assert gated["about"]["candidate"]["vocab_size"] == gated["about"]["reference"]["vocab_size"] + MORE
    assert 'name="max_cut_mass"' in (gate.path / "gate.xml").read_text()


def test_the_references_own_further_tokens_count_as_well(gate: Gate, widened: Callable[[str], Path]) -> None:
    wide = widened("much")
    result = gate(f"--kld-ref={wide}", "--kld-max-mean=0.1", candidates=(gate.reference,))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*FAIL  probability outside the common vocabulary * > max_cut_mass 0.01 *"])


def test_more_tokens_that_are_nan_fail(gate: Gate, widened: Callable[[str], Path]) -> None:
    result = gate("--kld-max-mean=0.1", candidates=(widened("nan"),))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*the reference is NaN or infinite in 0 and the candidate in 192*"])


def test_the_limit_decides_how_much_further_tokens_may_hold(gate: Gate, widened: Callable[[str], Path]) -> None:
    """Rows of zeros: each further token has a logit of 0, so its probability is small but not zero."""
    result = gate("--kld-max-mean=0.1", "--kld-max-cut-mass=1", "--kld-metrics=all", candidates=(widened("nothing"),))
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["note: the vocabularies differ: *"])
    bounded = gate("--kld-max-mean=0.1", "--kld-max-cut-mass=0", candidates=(widened("nothing"),))
    bounded.assert_outcomes(failed=1)

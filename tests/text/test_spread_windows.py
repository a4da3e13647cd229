"""Windows that are spread over a text: where they begin, and that the first of them are spread too."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from pytest_kld.errors import CorpusError
from pytest_kld.figures.schedule import rounds_of, schedule
from pytest_kld.text.corpus import Corpus
from pytest_kld.text.windows import Windows, cut_windows, join_windows

TOKENS = 5_000
TEXT = Corpus(name="letters", text="ab" * TOKENS)
"""The tokenizer below has one token for each pair of letters."""


@pytest.fixture(scope="module")
def letters() -> PreTrainedTokenizerFast:
    """A tokenizer that has `ab` as its only longer token, so that a text's length in tokens is known."""
    from tokenizers import Tokenizer, models

    bpe = models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe))


def spread(tokenizer: PreTrainedTokenizerFast, count: int | None, size: int = 20, stride: int = 5) -> Windows:
    return cut_windows(TEXT, tokenizer, count=count, size=size, stride=stride, label="", taken_from="spread")


@pytest.mark.parametrize("count", [1, 2, 7, 100, 101, 997])
def test_each_window_is_in_the_middle_of_its_share_of_the_text(count: int, letters: PreTrainedTokenizerFast) -> None:
    windows = spread(letters, count)
    places = (TOKENS - 20) // 5 + 1  # 997
    ordered = np.sort(windows.starts)
    assert (ordered % 5 == 0).all()
    for k, start in enumerate(ordered):
        assert abs(start / 5 + 0.5 - (k + 0.5) * places / count) <= 0.5
    protocol = windows.protocol()
    assert (protocol["windows_from"], protocol["datasets"][0]["text_tokens"]) == ("spread", TOKENS)


@pytest.mark.parametrize("most", [1, 6, 16, 100, 333])
def test_each_round_fills_the_gaps_of_the_one_before(most: int, letters: PreTrainedTokenizerFast) -> None:
    windows = spread(letters, most)
    before: set[int] = set()
    for look, taken in zip(schedule(most), rounds_of(windows), strict=True):
        starts = np.sort(taken.starts)
        assert len(starts) == look.windows
        assert before < set(starts.tolist())
        assert taken.taken_from == "spread"
        gaps = np.diff(starts)
        assert gaps.size == 0 or gaps.max() <= gaps.min() + 5  # even, up to the stride
        for left, right in zip(sorted(before), sorted(before)[1:], strict=False):
            assert sum(left < start < right for start in starts) == 1
        before = set(starts.tolist())


def test_all_windows_of_a_text_are_those_of_its_start_in_another_order(letters: PreTrainedTokenizerFast) -> None:
    windows = spread(letters, None)
    assert np.sort(windows.starts).tolist() == list(range(0, TOKENS - 19, 5))
    with pytest.raises(CorpusError, match="998 are requested"):
        spread(letters, 998)


def test_each_of_several_texts_has_its_own_spread_windows(letters: PreTrainedTokenizerFast) -> None:
    both = join_windows([spread(letters, 3), spread(letters, 4)])
    assert [sorted(part.starts.tolist()) for part in both.parts] == [
        [830, 2490, 4150],
        [620, 1865, 3115, 4360],
    ]
    assert both.starts.tolist() == [*both.parts[0].starts, *both.parts[1].starts]
    assert both.protocol()["windows_from"] == "spread"
    assert [one["text_tokens"] for one in both.protocol()["datasets"]] == [TOKENS, TOKENS]

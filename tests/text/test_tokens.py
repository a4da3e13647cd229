from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pytest_kld.text.tokens import CLASSES, Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

WORDS = ["<s>", "▁the", "ing", "42", "▁", "():", "▁x1", "don", "’t", "▁ein", "\n"]


@pytest.fixture
def metaspace() -> Tokens:
    """A tokenizer that marks the starts of words, as sentencepiece does, with one special token."""
    model = models.WordLevel({word: token_id for token_id, word in enumerate(WORDS)}, unk_token="ing")
    wrapped = Tokenizer(model)
    wrapped.pre_tokenizer = pre_tokenizers.Metaspace()
    wrapped.decoder = decoders.Metaspace()
    return Tokens.of(PreTrainedTokenizerFast(tokenizer_object=wrapped, bos_token="<s>"))


def test_text_of_a_token_keeps_the_space_before_a_word(metaspace: Tokens, tokenizer: PreTrainedTokenizerFast) -> None:
    assert metaspace.text(1) == " the"
    assert metaspace.text(2) == "ing"
    tokens = Tokens.of(tokenizer)
    ids: Sequence[int] = tokenizer("now the end")["input_ids"]
    assert "".join(map(tokens.text, ids)) == "now the end"


def test_ids_beyond_the_tokenizer_have_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = Tokens.of(tokenizer)
    assert tokens.text(1023) == ""
    assert tokens.class_of(1023) == "other"


@pytest.mark.parametrize(
    ("token_id", "name"),
    [
        (0, "special"),
        (1, "word start"),
        (2, "other"),
        (3, "digit"),
        (4, "whitespace"),
        (5, "code-like"),
        (6, "word start"),
        (10, "whitespace"),
    ],
)
def test_class_of_a_token(metaspace: Tokens, token_id: int, name: str) -> None:
    assert metaspace.class_of(token_id) == name
    assert name in CLASSES

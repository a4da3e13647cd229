"""The text of token ids, and the classes of tokens that a diagnosis distinguishes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

CLASSES = ("special", "digit", "whitespace", "code-like", "word start", "other")
"""Classes of tokens. A token belongs to the first class that fits."""
_CODE_SYMBOLS = frozenset("[]{}()<>=+*/\\|&^%$#@~`_;")


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a tokenizer says about ids.

    Attributes:
        decode: turns ids into text, special tokens included.
        special_ids: ids of tokens that are not text: begin, end, padding, turns of a conversation.

    """

    decode: Callable[[Sequence[int]], str]
    special_ids: frozenset[int]
    _texts: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Tokens:
        """Use a transformers tokenizer. Ids that it does not know, as in a padded vocabulary, decode to no text."""
        known = len(tokenizer)
        added = {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if getattr(token, "special", False)
        }

        def decode(ids: Sequence[int]) -> str:
            return str(
                tokenizer.decode(
                    [token_id for token_id in ids if 0 <= token_id < known],
                    skip_special_tokens=False,
                    clean_up_tokenization_spaces=False,
                )
            )

        return cls(decode, frozenset(added | set(tokenizer.all_special_ids)))

    def text(self, token_id: int) -> str:
        """Return the text of one token as it appears among others.

        A tokenizer that marks word starts drops the space before the first word. So the token is decoded twice in a row
        and the first copy is removed: the second keeps its space.
        """
        if token_id not in self._texts:
            once = self.decode([token_id])
            self._texts[token_id] = self.decode([token_id, token_id])[len(once) :]
        return self._texts[token_id]

    def class_of(self, token_id: int) -> str:
        """Return the class of a token, one of `CLASSES`."""
        text = self.text(token_id)
        if token_id in self.special_ids:
            return "special"
        if any(map(str.isdigit, text)) and not any(map(str.isalpha, text)):
            return "digit"
        if text.isspace():
            return "whitespace"
        if not _CODE_SYMBOLS.isdisjoint(text):
            return "code-like"
        return "word start" if text[:1].isspace() and text[1:2].isalpha() else "other"

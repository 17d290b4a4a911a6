"""Texts to classify -> token ids, in training and when a tuned model is asked. No template: the text is all there is.

BOS stands in front where the tokenizer puts it. With add_eos_token EOS stands at the end, and its hidden state is
classified; else that of the text's last token. A text above cutoff_len keeps its beginning, and EOS: here it is not
something to be learned, but the place where the answer is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from alpaca_lora.data.cleaning import Cleaner
from alpaca_lora.data.encode import (
    OVER_LENGTH,
    EncodedRow,
    EncodePolicy,
    RowTokenizer,
    SpecialWords,
    over_length_error,
    refuse_surrogates,
    tokenizer_parts,
)
from alpaca_lora.errors import UserError
from alpaca_lora.text.messages import Conversation, labelled
from alpaca_lora.text.rendered import Rendered, Span

NO_TOKEN = "no_token"


class LabelledEncoder:
    """Encodes labelled rows under one tokenizer; of the policy, what it says of turns and prompts does not matter."""

    def __init__(self, tokenizer: RowTokenizer, policy: EncodePolicy) -> None:
        self.tokenizer, self.policy = tokenizer, policy
        self._spells_special = SpecialWords(tokenizer.special_tokens)

    def key_parts(self) -> dict[str, Any]:
        """What of this decides ids, as JSON, for the cache's key."""
        policy = [self.policy.cutoff_len, self.policy.add_eos_token, self.policy.over_length]
        return {**tokenizer_parts(self.tokenizer), "task": "classification", "policy": policy}

    def encode_many(self, conversations: Sequence[Conversation]) -> list[EncodedRow]:
        """One `EncodedRow` per row of kind ``labelled``; its mask marks the token that is classified. Raises DataError
        for an over-long row when the policy is ``error``.
        """
        try:
            encoded = self.tokenizer.encode_many([_plain(row.messages[0].content) for row in conversations])
        except (UnicodeEncodeError, TypeError):
            refuse_surrogates(conversations)
            raise
        return [self._encode(row, one.ids) for row, one in zip(conversations, encoded, strict=True)]

    def _encode(self, row: Conversation, text_ids: list[int]) -> EncodedRow:
        ids, num_whole = framed(text_ids, self.tokenizer, self.policy)
        if not ids:
            return EncodedRow("dropped", reason=NO_TOKEN)
        if num_whole > len(ids):
            if self.policy.over_length == "drop":
                return EncodedRow("dropped", reason=OVER_LENGTH)
            if self.policy.over_length == "error":
                raise over_length_error(row, num_whole, self.policy.cutoff_len)
        classified_T = np.zeros(len(ids), dtype=bool)
        classified_T[-1] = True
        return EncodedRow(
            "whole" if num_whole == len(ids) else "truncated",
            ((np.array(ids, dtype=np.int32), classified_T),),
            spells_special=self._spells_special((row.messages[0].content,)),
        )


def question_ids(text: str, tokenizer: RowTokenizer, policy: EncodePolicy) -> tuple[list[int], bool]:
    """(ids of a text that a tuned model is to classify, whether it was cut at cutoff_len): cleaned and framed as the
    rows it learned from.

    Raises UserError for a text of which nothing is left.
    """
    cleaned = Cleaner().clean(labelled(text, "?")).conversation
    text_ids = [] if cleaned is None else tokenizer.encode_many([_plain(cleaned.messages[0].content)])[0].ids
    if not text_ids:
        raise UserError("the text to classify is empty")
    ids, num_whole = framed(text_ids, tokenizer, policy)
    return ids, num_whole > len(ids)


def framed(text_ids: list[int], tokenizer: RowTokenizer, policy: EncodePolicy) -> tuple[list[int], int]:
    """(BOS, as much of the text as fits, EOS; how many they would be uncut)."""
    front = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    back = [tokenizer.eos_id] if policy.add_eos_token and tokenizer.eos_id is not None else []
    room = max(0, policy.cutoff_len - len(front) - len(back))
    return [*front, *text_ids[:room], *back], len(front) + len(text_ids) + len(back)


def _plain(text: str) -> Rendered:
    return Rendered(text, (Span(0, len(text)),), (), special=False, needs_eos=False)

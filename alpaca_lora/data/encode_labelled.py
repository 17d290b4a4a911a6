"""Texts to classify -> token ids, in training and when a tuned model is asked: `text_template` with the text in it.

BOS stands in front where the tokenizer puts it. The hidden state of the text's last token is classified, as PEFT and
transformers do with the ids that their tokenizers give; with add_eos_token that of an EOS behind it. A text above
cutoff_len keeps its beginning, and what the template or EOS puts behind it: that is where the answer is read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from alpaca_lora.data.cleaning import Cleaner
from alpaca_lora.data.encode import (
    OVER_LENGTH,
    EncodedRow,
    EncodedText,
    EncodePolicy,
    RowTokenizer,
    SpecialWords,
    over_length_error,
    refuse_surrogates,
    tokenizer_parts,
)
from alpaca_lora.errors import ConfigError, UserError
from alpaca_lora.text.messages import Conversation, labelled
from alpaca_lora.text.rendered import Rendered, Span

NO_TOKEN = "no_token"


class LabelledEncoder:
    """Encodes labelled rows under one tokenizer; of the policy, what it says of turns and prompts does not matter."""

    def __init__(self, tokenizer: RowTokenizer, policy: EncodePolicy) -> None:
        """ConfigError for a cutoff_len that leaves no room for a text."""
        text_room(tokenizer, policy)
        self.tokenizer, self.policy = tokenizer, policy
        self._spells_special = SpecialWords(tokenizer.special_tokens)

    def key_parts(self) -> dict[str, Any]:
        """What of this decides ids, as JSON, for the cache's key."""
        policy = [self.policy.cutoff_len, self.policy.add_eos_token, self.policy.over_length, self.policy.text_template]
        return {**tokenizer_parts(self.tokenizer), "task": "classification", "policy": policy}

    def encode_many(self, conversations: Sequence[Conversation]) -> list[EncodedRow]:
        """One `EncodedRow` per row of kind ``labelled``; its mask marks the token that is classified. Raises DataError
        for an over-long row when the policy is ``error``.
        """
        try:
            texts = [_inside(row.messages[0].content, self.policy) for row in conversations]
            encoded = self.tokenizer.encode_many(texts)
        except (UnicodeEncodeError, TypeError):
            refuse_surrogates(conversations)
            raise
        return [self._encode(row, one) for row, one in zip(conversations, encoded, strict=True)]

    def _encode(self, row: Conversation, encoded: EncodedText) -> EncodedRow:
        if not encoded.ids:
            return EncodedRow("dropped", reason=NO_TOKEN)
        ids, num_whole = framed(encoded, row.messages[0].content, self.tokenizer, self.policy)
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


def question_ids(
    texts: Sequence[str], tokenizer: RowTokenizer, policy: EncodePolicy, skip_cleaning: Collection[str] = ()
) -> list[tuple[list[int], bool] | None]:
    """(ids of a text that a tuned model is to classify, whether it was cut at cutoff_len) of each: cleaned and framed
    as the rows it learned from. None for a text of which nothing is left.

    Raises UserError for a text that is no Unicode, where the rule that mends it was skipped.
    """
    text_room(tokenizer, policy)
    cleaner = Cleaner(skip_cleaning)
    cleaned = [cleaner.clean(labelled(text, "?")).conversation if text.strip() else None for text in texts]
    left = ["" if one is None else one.messages[0].content for one in cleaned]
    try:
        encoded = tokenizer.encode_many([_inside(text, policy) for text in left])
    except (UnicodeEncodeError, TypeError) as error:
        raise UserError("half of a surrogate pair is no text", expected="Unicode") from error
    framed_ids = [
        framed(one, text, tokenizer, policy) if text and one.ids else None
        for text, one in zip(left, encoded, strict=True)
    ]
    return [None if one is None else (one[0], one[1] > len(one[0])) for one in framed_ids]


def framed(encoded: EncodedText, text: str, tokenizer: RowTokenizer, policy: EncodePolicy) -> tuple[list[int], int]:
    """(BOS, as much of the text as fits, what the template has behind it, EOS; how many they would be uncut).

    ``encoded``: the template with the text in it, encoded as one.
    """
    front, back = _frame(tokenizer, policy)
    before, _, behind = policy.text_template.partition("{text}")
    ids, tail = encoded.ids, []
    room = policy.cutoff_len - len(front) - len(back)
    if behind and len(ids) > room:  # the tail is where the answer is read: it stays
        at, reaches_over = encoded.token_at(len(before) + len(text))
        at -= int(reaches_over)
        ids, tail = ids[:at], ids[at:]
    num_whole = len(front) + len(ids) + len(tail) + len(back)
    return [*front, *ids[: max(0, room - len(tail))], *tail, *back], num_whole


def text_room(tokenizer: RowTokenizer, policy: EncodePolicy) -> int:
    """How many tokens of a text fit. ConfigError where that is none."""
    front, back = _frame(tokenizer, policy)
    around = policy.text_template.replace("{text}", "")
    template = tokenizer.encode_many([_plain(around)])[0].ids if around else []
    room = policy.cutoff_len - len(front) - len(back) - len(template)
    if room < 1:
        parts = (("BOS", front), ("text_template", template), ("EOS", back))
        raise ConfigError(
            f"{policy.cutoff_len} leaves no room for a text beside {' and '.join(name for name, ids in parts if ids)}",
            field="cutoff_len",
            expected=f"at least {policy.cutoff_len + 1 - room}",
        )
    return room


def _frame(tokenizer: RowTokenizer, policy: EncodePolicy) -> tuple[list[int], list[int]]:
    """(BOS or nothing, EOS or nothing)."""
    front = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    back = [tokenizer.eos_id] if policy.add_eos_token and tokenizer.eos_id is not None else []
    return front, back


def _inside(text: str, policy: EncodePolicy) -> Rendered:
    return _plain(policy.text_template.replace("{text}", text))


def _plain(text: str) -> Rendered:
    return Rendered(text, (Span(0, len(text)),), (), special=False, needs_eos=False)

"""Conversations -> token ids and which of them are learned. Knows the over-length policy; knows no files and no model.

A text is tokenized once, whole. A response's tokens are those that lie wholly inside its characters: a token that
reaches over the border is not learned, and counted. BOS and EOS are added here and nowhere else, and never a second
time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np

from alpaca_lora.errors import DataError
from alpaca_lora.text.messages import Conversation
from alpaca_lora.text.rendered import Rendered, Template

NO_SUPERVISED = "no_supervised_token"
OVER_LENGTH = "over_length"


class EncodedText(Protocol):
    """What is needed of `text.encoded.Encoded`."""

    ids: list[int]

    def token_at(self, char: int) -> tuple[int, bool]: ...


class RowTokenizer(Protocol):
    """What is needed of `text.tokenizer.Tokenizer`."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def pad_id(self) -> int | None: ...

    @property
    def add_bos(self) -> bool: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def special_tokens(self) -> dict[str, int]: ...

    @property
    def fingerprint(self) -> str: ...

    def encode_many(self, rendered: Sequence[Rendered]) -> Sequence[Any]: ...


@dataclass(frozen=True)
class EncodePolicy:
    """The options that decide ids and masks; all of them are part of the cache's key."""

    cutoff_len: int
    train_on_inputs: bool = True
    train_on_turns: Literal["all", "last"] = "all"
    add_eos_token: bool = True
    over_length: Literal["truncate", "drop", "error"] = "truncate"
    text_template: str = "{text}"  # of texts to classify


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """What a row became.

    pieces: (ids_T int32, supervised_T bool) of each example: one, or several of a long text, or none when it was
    dropped. num_straddling: tokens over a response's border. ends: whether its last learned token is EOS or an
    end-of-turn token; None for texts and dropped rows. spells_special: its own text holds a special token's name.
    error: outcome ``bad`` only.
    """

    outcome: Literal["whole", "truncated", "split", "dropped", "bad"]
    pieces: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    reason: str = ""
    num_straddling: int = 0
    ends: bool | None = None
    spells_special: bool = False
    error: DataError | None = None


class Encoder:
    """Encodes rows under one tokenizer, template and policy."""

    def __init__(
        self, tokenizer: RowTokenizer, template: Template, policy: EncodePolicy, *, system_prompt: str | None = None
    ) -> None:
        self.tokenizer, self.template, self.policy = tokenizer, template, policy
        self.system_prompt = system_prompt
        named = (tokenizer.special_tokens.get(token) for token in template.stop_tokens)
        self.end_ids = {i for i in (tokenizer.eos_id, *tokenizer.stop_ids, *named) if i is not None}
        self._spells_special = SpecialWords(tokenizer.special_tokens)

    def key_parts(self) -> dict[str, Any]:
        """What of this decides ids and masks, as JSON, for the cache's key."""
        return {
            **tokenizer_parts(self.tokenizer),
            "end_ids": sorted(self.end_ids),
            "template": self.template.digest,
            "system_prompt": self.system_prompt,
            "policy": asdict(self.policy),
        }

    def encode_many(self, conversations: Sequence[Conversation]) -> list[EncodedRow]:
        """One `EncodedRow` per conversation. Raises DataError for an over-long row when the policy is ``error``."""
        rendered = [self._render(conversation) for conversation in conversations]
        good = [one for one in rendered if isinstance(one, Rendered)]
        try:
            encoded = iter(self.tokenizer.encode_many(good))
        except (UnicodeEncodeError, TypeError):
            refuse_surrogates(conversations)
            raise
        return [
            self._encode(conversation, one, next(encoded))
            if isinstance(one, Rendered)
            else EncodedRow("bad", error=one)
            for conversation, one in zip(conversations, rendered, strict=True)
        ]

    def _render(self, conversation: Conversation) -> Rendered | DataError:
        try:
            return self.template.render(conversation, system_prompt=self.system_prompt)
        except DataError as error:
            return error

    def _encode(self, conversation: Conversation, rendered: Rendered, encoded: EncodedText) -> EncodedRow:
        front, back = self._added(rendered, encoded.ids)
        num_front, num_back = len(front), len(back)
        ids_T = np.array([*front, *encoded.ids, *back], dtype=np.int32)
        spells_special = self._spells_special(
            text for message in conversation.messages for text in (message.content, message.context)
        )
        if conversation.kind == "text":
            return self._encode_text(ids_T, num_front, spells_special)
        supervised_T, num_straddling = self._mask(rendered, encoded, num_front, num_back)
        if num_back and len(rendered.responses) > 1:
            ids_T, supervised_T = self._end_each_turn(ids_T, supervised_T, rendered, encoded, num_front)
        ends = num_back > 0 or self._ends(rendered, encoded)
        outcome = "whole"
        cutoff = self.policy.cutoff_len
        if len(ids_T) > cutoff:
            if self.policy.over_length == "drop":
                return EncodedRow("dropped", reason=OVER_LENGTH)
            if self.policy.over_length == "error":
                raise over_length_error(conversation, len(ids_T), cutoff)
            outcome, ends = "truncated", False
            ids_T, supervised_T = ids_T[:cutoff], supervised_T[:cutoff]
        if not supervised_T.any():
            return EncodedRow("dropped", reason=NO_SUPERVISED)
        return EncodedRow(
            outcome, ((ids_T, supervised_T),), num_straddling=num_straddling, ends=ends, spells_special=spells_special
        )

    def _added(self, rendered: Rendered, ids: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(BOS or nothing, EOS or nothing) to put around the ids: not where the template wrote them itself."""
        bos_id, eos_id = self.tokenizer.bos_id, self.tokenizer.eos_id
        has_bos = rendered.special and ids[:1] == [bos_id]
        has_eos = rendered.special and ids[-1:] == [eos_id]
        front = (bos_id,) if self.tokenizer.add_bos and bos_id is not None and not has_bos else ()
        wants_eos = self.policy.add_eos_token and rendered.needs_eos and not has_eos
        return front, (eos_id,) if wants_eos and eos_id is not None else ()

    def _mask(self, rendered: Rendered, encoded: EncodedText, num_front: int, num_back: int) -> tuple[np.ndarray, int]:
        """(supervised_T of the whole row, tokens that straddle a border). The first token has nothing that predicts
        it.
        """
        num_tokens = num_front + len(encoded.ids) + num_back
        num_straddling = 0
        if self.policy.train_on_inputs:
            supervised_T = np.ones(num_tokens, dtype=bool)
        else:
            supervised_T = np.zeros(num_tokens, dtype=bool)
            spans = rendered.responses if self.policy.train_on_turns == "all" else rendered.responses[-1:]
            for span in spans:
                first, reaches_in = encoded.token_at(span.start)
                last, reaches_out = encoded.token_at(span.end)
                end = last - 1 if reaches_out else last
                num_straddling += 1 if end < first else int(reaches_in) + int(reaches_out)
                supervised_T[num_front + first : num_front + max(first, end)] = True
            if num_back:
                supervised_T[-1] = True
        supervised_T[:1] = False
        return supervised_T, num_straddling

    def _end_each_turn(
        self, ids_T: np.ndarray, supervised_T: np.ndarray, rendered: Rendered, encoded: EncodedText, num_front: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """EOS behind each response but the last, which has it already: else a chat in an instruction template would
        teach that a question follows the answer. Not where a token reaches over the response's end. Learned as its
        response is.
        """
        ends = [encoded.token_at(span.end) for span in rendered.responses[:-1]]
        at_N = np.array([num_front + token for token, reaches_out in ends if not reaches_out], dtype=np.int64)
        learned = self.policy.train_on_inputs or self.policy.train_on_turns == "all"
        return np.insert(ids_T, at_N, ids_T[-1]), np.insert(supervised_T, at_N, learned)

    def _ends(self, rendered: Rendered, encoded: EncodedText) -> bool:
        if not rendered.responses:
            return False
        end = rendered.responses[-1].end
        last = len(encoded.ids) if end >= len(rendered.text) else encoded.token_at(end)[0]
        return last > 0 and encoded.ids[last - 1] in self.end_ids

    def _encode_text(self, ids_T: np.ndarray, num_front: int, spells_special: bool) -> EncodedRow:
        """A text longer than cutoff_len is not cut off but cut in pieces, each of which is an example; EOS ends the
        last.

        With BOS, each piece begins with it; without, each begins with the last token of the one before. So every
        token of the text but the first is learned once.
        """
        cutoff = self.policy.cutoff_len
        if len(ids_T) < 2:
            return EncodedRow("dropped", reason=NO_SUPERVISED)
        if len(ids_T) <= cutoff:
            return EncodedRow("whole", (_all_learned(ids_T),), spells_special=spells_special)
        pieces: list[tuple[np.ndarray, np.ndarray]] = []
        if num_front:
            for start in range(1, len(ids_T), cutoff - 1):
                pieces.append(_all_learned(np.concatenate((ids_T[:1], ids_T[start : start + cutoff - 1]))))
        else:
            for start in range(0, len(ids_T) - 1, cutoff - 1):
                pieces.append(_all_learned(ids_T[start : start + cutoff]))
        return EncodedRow("split", tuple(pieces), spells_special=spells_special)


def _all_learned(ids_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    supervised_T = np.ones(len(ids_T), dtype=bool)
    supervised_T[0] = False
    return ids_T, supervised_T


def over_length_error(conversation: Conversation, num_tokens: int, cutoff_len: int) -> DataError:
    """What is said of a row above cutoff_len where over_length is ``error``."""
    return DataError(
        f"the row has {num_tokens:,} tokens",
        file=conversation.file,
        line=conversation.line,
        expected=f"at most cutoff_len = {cutoff_len:,}",
        fix="raise cutoff_len, or set over_length to truncate or drop",
    )


class SpecialWords:
    """Whether a text spells a special token: it stays text, and is counted."""

    def __init__(self, special_tokens: Collection[str]) -> None:
        self._words = tuple(special_tokens)
        openings = {token[:1] for token in self._words}
        self._opening = openings.pop() if len(openings) == 1 else ""

    def __call__(self, texts: Iterable[str]) -> bool:
        return any(self._opening in text and any(word in text for word in self._words) for text in texts)


def tokenizer_parts(tokenizer: RowTokenizer) -> dict[str, Any]:
    """What of a tokenizer decides ids, as JSON, for the cache's key."""
    return {"tokenizer": [tokenizer.fingerprint, tokenizer.add_bos, tokenizer.bos_id, tokenizer.eos_id]}


def refuse_surrogates(conversations: Sequence[Conversation]) -> None:
    """DataError naming file and line of the first text that is no Unicode."""
    for conversation in conversations:
        for turn, message in enumerate(conversation.messages):
            for text in (message.content, message.context):
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise DataError(
                        f"character {error.start} of turn {turn} is half of a surrogate pair, not text",
                        file=conversation.file,
                        line=conversation.line,
                        fix="do not skip the cleaning rule broken_unicode",
                    ) from error

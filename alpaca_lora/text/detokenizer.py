"""Ids to text while they come, without broken characters. Knows nothing of stop strings: `inference` cuts the text."""

from __future__ import annotations

import codecs

from alpaca_lora.text.tokenizer import Tokenizer


class Detokenizer:
    """Each `push` gives the characters that are complete; bytes that can never be one become U+FFFD.

    skip_special: special tokens give no text. at_text_start: the ids begin a text, so the space that SentencePiece puts
    in front of a text is taken off (an answer goes on from its prompt: its leading space is real).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, at_text_start: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset(tokenizer.special_tokens.values()) if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_space = at_text_start and tokenizer.has_prefix_space

    def push(self, index: int) -> str:
        """The text that token ``index`` completes; often one word, sometimes nothing."""
        if index in self._hidden:
            return ""
        data = self._tokenizer.token_bytes(index)
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    @property
    def is_inside(self) -> bool:
        """Whether the last token ends in the middle of a character."""
        return bool(self._decoder.getstate()[0])

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)

"""Answers that must be JSON, fit a JSON schema or match a regular expression. Knows tokens as bytes, and no model.

llguidance does the work: an Earley parser over lexemes says for each state which tokens of a vocabulary may come next.
It is an optional package (extra `serve`), imported when the first grammar is compiled. Grammars come from outside, so
sizes are checked before compiling (`json_schema`) and the library's own limits bound the work of compiling and of each
step; a request whose grammar goes over them ends with an error of its own.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from alpaca_lora.errors import MachineError, UserError
from alpaca_lora.inference.json_schema import MAX_PATTERN, read_schema
from alpaca_lora.text.tokenizer import Tokenizer

# white space between the parts of a JSON text: room for a pretty print, and an end to a model that goes on with spaces
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,24}"
# no \uXXXX: each character has one spelling, so a name that is taken cannot come again in another
ESCAPES = 'nrbtf\\"'
# of the library; units as in its documentation. A lexer state is one to two kB.
LIMITS = (
    ("max_items_in_row", 10_000),
    ("initial_lexer_fuel", 1_000_000),
    ("step_lexer_fuel", 200_000),
    ("step_max_items", 50_000),
    ("max_lexer_states", 50_000),
    ("max_grammar_size", 100_000),
)
NO_TOKEN = "no token can come next, look for parts that contradict each other"


class GrammarState(Protocol):
    """How far one answer has come in its grammar."""

    @property
    def is_done(self) -> bool:
        """The answer is complete and nothing can follow."""
        ...

    def mask_(self, logits_V: torch.Tensor) -> None:
        """Minus infinity for every token that cannot come next; stop ids can where the answer is complete.

        UserError when no token can, or when the state became too complex.
        """
        ...

    def accept(self, token_id: int) -> None:
        """The answer goes on with `token_id`. UserError for a token that cannot come next."""
        ...


class Grammar(Protocol):
    """What answers must look like. One may serve many requests."""

    def start(self, stop_ids: Sequence[int]) -> GrammarState:
        """The state before the first token of an answer that the tokens `stop_ids` may end."""
        ...


class GrammarCompiler:
    """Compiles grammars for one tokenizer, whose vocabulary is prepared once, with the first grammar.

    Every method raises UserError for a grammar that is wrong, not supported or too large, and MachineError where
    llguidance is not installed. Not cheap (milliseconds, for the largest schemas a second): not for an event loop.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def prepare(self) -> None:
        """Get the vocabulary ready now: it holds up all other threads for a tenth of a second."""
        if importlib.util.find_spec("llguidance") is not None:
            self._vocabulary  # noqa: B018 - made when it is asked for

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: object) -> Grammar:
        """JSON texts that `schema` allows, properties in its order (keywords: see `json_schema`).

        As JSON Schema has it, other properties may come unless additionalProperties says no.
        """
        options = {"whitespace_pattern": WHITESPACE, "json_allowed_escapes": ESCAPES}
        text = json.dumps({**read_schema(schema), "x-guidance": options})
        return self._compile(f"start: %json {text}", "schema")

    def regex(self, pattern: str) -> Grammar:
        """Texts that match the regular expression as a whole (Rust's syntax: no look-around, no back references)."""
        if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_PATTERN:
            raise UserError("is not usable", field="regex", expected=f"a text of 1 to {MAX_PATTERN} characters")
        return self._compile(f"start: /{self._library.regex_to_lark(pattern)}/", "regex")

    def _compile(self, rules: str, field: str) -> Grammar:
        # no_forcing: the model chooses among all tokenizations; the library has no need of the tokenizer, only of bytes
        text = f'%llguidance {{"no_forcing": true}}\n{rules}\n'
        limits = self._library.LLParserLimits(**dict(LIMITS), verbose_errors=False)
        matcher = self._library.LLMatcher(self._vocabulary, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise UserError(_told(matcher.get_error()), field=field)
        grammar = CompiledGrammar(matcher, self._tokenizer.vocab_size)
        grammar.check()
        return grammar

    @cached_property
    def _library(self) -> Any:
        try:
            import llguidance
        except ImportError as error:
            raise MachineError(
                "structured answers need the package llguidance", fix="pip install 'alpaca-lora[serve]'"
            ) from error
        return llguidance

    @cached_property
    def _vocabulary(self) -> Any:
        return self._library.LLTokenizer(self._library.TokenizerWrapper(TokenBytes(self._tokenizer)))


class TokenBytes:
    """A vocabulary as llguidance wants it: each token's bytes, and which tokens are no text.

    The end of an answer is a token of its own behind the vocabulary: which tokens end an answer is known only when a
    request starts.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)] + [b"<end of answer>"]
        self.eos_token_id = tokenizer.vocab_size
        self.bos_token_id = None
        self.special_token_ids = [*tokenizer.special_tokens.values(), self.eos_token_id]

    def __call__(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._tokenizer.encode_text(text)


class CompiledGrammar:
    """A grammar compiled for a vocabulary of `vocab_size` tokens."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def start(self, stop_ids: Sequence[int]) -> GrammarState:
        """See `Grammar`."""
        return MatcherState(self._matcher.deep_copy(), self._vocab_size, stop_ids)

    def check(self) -> None:
        """UserError when no answer can even begin."""
        state = MatcherState(self._matcher.deep_copy(), self._vocab_size, ())
        if not state.is_done and not state.allowed().any():
            raise UserError(NO_TOKEN, field="grammar")


class MatcherState:
    """See `GrammarState`."""

    def __init__(self, matcher: Any, vocab_size: int, stop_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._stop_ids = [token_id for token_id in stop_ids if token_id < vocab_size]
        self._stopped = False

    @property
    def is_done(self) -> bool:
        """See `GrammarState`."""
        return self._stopped or bool(self._matcher.is_stopped())

    def allowed(self) -> np.ndarray:
        """(vocab_size,) of 0 and 1: the tokens that can come next as text."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise UserError(_told(self._matcher.get_error()), field="grammar")
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little")

    def mask_(self, logits_V: torch.Tensor) -> None:
        """See `GrammarState`."""
        allowed_N = torch.from_numpy(self.allowed())[: len(logits_V)].bool()
        if self._matcher.is_accepting() and self._stop_ids:
            allowed_N[self._stop_ids] = True
        if not allowed_N.any():
            raise UserError(NO_TOKEN, field="grammar")
        # a model has often a few more rows than its tokenizer has tokens
        logits_V[len(allowed_N) :] = -torch.inf
        logits_V[: len(allowed_N)].masked_fill_(~allowed_N.to(logits_V.device), -torch.inf)

    def accept(self, token_id: int) -> None:
        """See `GrammarState`."""
        if token_id in self._stop_ids:
            self._stopped = True
        elif not self._matcher.consume_token(token_id):
            raise UserError(_told(self._matcher.get_error()), field="grammar")


def _told(message: str) -> str:
    """The library's message as ours: one line, without the text of ours that it quotes."""
    if "oneOf constraints" in message:
        return "oneOf: branches that may hold at once are not supported, use anyOf or a const that tells them apart"
    if "NoExtension" in message:
        return NO_TOKEN
    said = message.partition("\n   1 | %llguidance")[0].removesuffix("<non-verbose/>")
    said = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", " ".join(said.split()))
    return f"cannot be used: {said[:300]}"

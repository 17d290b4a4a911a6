"""Log probabilities behind a rail: they tell the tokens of a text, so each waits until its text was let pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from alpaca_lora.inference.request import TokenLogprob
from alpaca_lora.text.detokenizer import Detokenizer
from alpaca_lora.text.tokenizer import Tokenizer


class HeldLogprobs:
    """Of one answer. Places in what the model says and in what the rail shows are the same until the rail changes
    something; from there on none are told.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._waiting: deque[tuple[TokenLogprob, int]] = deque()  # with the place where its text ends
        self._num_said = self._num_shown = 0  # characters
        self._is_over = False

    def advance(
        self, tokens: Sequence[TokenLogprob], shown: str, *, is_changed: bool, is_last: bool
    ) -> tuple[TokenLogprob, ...]:
        """Those whose text is shown now, after ``tokens`` were made and the rail let ``shown`` pass.

        is_changed: ``shown`` is not what was said; is_last: all that was said is shown.
        """
        self._is_over = self._is_over or is_changed
        if self._is_over:
            self._waiting.clear()
            return ()
        for one in tokens:
            self._num_said += len(self._detokenizer.push(one.token_id))
            # the bytes of a character that is not complete are the next character's
            self._waiting.append((one, self._num_said + self._detokenizer.is_inside))
        self._num_shown += len(shown)
        told: list[TokenLogprob] = []
        while self._waiting and (is_last or self._waiting[0][1] <= self._num_shown):
            told.append(self._waiting.popleft()[0])
        return tuple(told)

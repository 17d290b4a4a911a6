"""The answers of one request: submitted together, told piece by piece, each through its output rail.

The same pieces make a stream and a whole answer, so both say the same. Knows no shape of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

from alpaca_lora.errors import AdapterError, AlpacaLoraError, UserError
from alpaca_lora.inference.request import Event, Request, SamplingParams, TokenLogprob
from alpaca_lora.server.bridge import Bridge
from alpaca_lora.server.errors import ApiError, of_error, unavailable, unknown_model
from alpaca_lora.server.held_logprobs import HeldLogprobs
from alpaca_lora.server.metrics import Metrics
from alpaca_lora.server.question import Question
from alpaca_lora.server.rails import Note, OutputRail, Rails, Ruling
from alpaca_lora.server.served_models import ServedModel
from alpaca_lora.server.ticket import Ticket
from alpaca_lora.server.workers import Workers

Hold = Callable[[ServedModel], AbstractAsyncContextManager[None]]  # see `adapter_hold.held`


class Delta(NamedTuple):
    """A piece of the answer number ``choice``. finish_reason: with its last piece; refusal: why it was filtered."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be answered: ``n`` answers to each question, with the parameters of each question."""

    model: ServedModel
    questions: tuple[Question, ...]
    params: tuple[SamplingParams, ...]
    n: int
    rails: Rails
    salt: str


@dataclass
class Usage:
    """Tokens of each prompt once, however many answers it gets, and of all answers."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class _Choice:
    """One answer on its way."""

    number: int
    question: int
    params: SamplingParams
    rail: OutputRail | None
    held: HeldLogprobs
    num_tokens: int = 0
    is_done: bool = False
    last_at: float = 0.0


class Generation:
    """`start` it, then read `deltas` to their end; `close` it in any case."""

    def __init__(
        self, job: Job, bridge: Bridge, workers: Workers, metrics: Metrics, hold: Hold,
        audit: Callable[[Iterable[Note]], None],
    ) -> None:  # fmt: skip
        """``workers``: where output rails run; ``hold`` keeps the model's adapter in memory; ``audit`` is told what
        rails found.
        """
        self.job, self._bridge, self._workers, self._metrics = job, bridge, workers, metrics
        self._hold, self._audit = hold, audit
        self.usage = Usage()
        self._choices = [self._choice(place) for place in range(len(job.questions) * job.n)]
        self._asked = [choice for choice in self._choices if job.questions[choice.question].refusal is None]
        self._ticket: Ticket | None = None
        self._start = time.perf_counter()

    def _choice(self, place: int) -> _Choice:
        job = self.job
        question, params = place // job.n, _of_choice(job.params[place // job.n], place % job.n)
        held = HeldLogprobs(job.model.writes.tokenizer)
        return _Choice(place, question, params, job.rails.open_output(), held)

    async def start(self) -> None:
        """Give the requests to the engine, with their adapter in memory. ApiError when it refuses one."""
        job = self.job
        for question in job.questions:
            self._audit(question.notes)
        self.usage.prompt_tokens = sum(len(question.ids) for question in job.questions)
        if not self._asked:
            return
        requests = [
            Request(job.questions[choice.question].ids, choice.params, job.model.adapter, job.salt)
            for choice in self._asked
        ]
        try:
            async with self._hold(job.model):
                self._ticket = await self._bridge.submit(requests)
        except AdapterError as error:
            if error.field == "name":  # unloaded since its name was looked up
                raise unknown_model(job.model.name) from error
            raise of_error(error, param="model") from error
        except AlpacaLoraError as error:
            raise of_error(error) from error

    async def deltas(self) -> AsyncIterator[Delta]:
        """All pieces of all answers as they come. ApiError when the engine or the reader fails."""
        for choice in self._choices:
            refusal = self.job.questions[choice.question].refusal
            if refusal is not None:
                choice.is_done = True
                self._metrics.finished(self.job.model.name, "content_filter", time.perf_counter() - self._start)
                yield Delta(choice.number, refusal, (), "content_filter", refusal)
        if self._ticket is None:
            return
        async for place, event in self._ticket:
            choice = self._asked[place]
            if choice.is_done:
                continue  # what was on its way when the rail closed
            delta = await self._advance(choice, place, event)
            if delta.text or delta.logprobs or delta.finish_reason:
                yield delta

    def close(self) -> None:
        """Cancel what still runs, and count what was made."""
        self._metrics.tokens(self.job.model.name, self.usage)
        if self._ticket is not None:
            self._ticket.close()

    async def _advance(self, choice: _Choice, place: int, event: Event) -> Delta:
        reason = self._finish_reason(event)
        self._count(choice, event)
        ruling = Ruling(event.text)
        if choice.rail is not None and (event.text or reason is not None):
            ruling = await self._workers.run(choice.rail.advance, event.text, is_last=reason is not None)
            self._audit(ruling.notes)
        told = self._told(choice, event, reason)
        if choice.rail is not None:
            told = choice.held.advance(told, ruling.text, is_changed=ruling.changed, is_last=reason is not None)
        if ruling.refusal is not None:
            reason = "content_filter"
            if self._ticket is not None:
                self._ticket.cancel((place,))
        if reason is not None:
            choice.is_done = True
            self._metrics.finished(self.job.model.name, reason, time.perf_counter() - self._start)
            if event.completion is not None:
                self._metrics.computed(self.job.model.name, event.completion)
        return Delta(choice.number, ruling.text, told, reason, ruling.refusal)

    def _finish_reason(self, event: Event) -> str | None:
        done = event.completion
        if done is None:
            return None
        if done.finish_reason == "error":
            self._metrics.finished(self.job.model.name, "error", time.perf_counter() - self._start)
            if isinstance(done.error, UserError):  # the grammar that was asked for cannot go on
                raise of_error(done.error, param="response_format")
            raise ApiError(500, str(done.error), kind="server_error", code="generation_failed")
        if done.finish_reason == "cancelled":
            raise unavailable("The answer was cancelled by the server", "cancelled")
        return done.finish_reason

    def _count(self, choice: _Choice, event: Event) -> None:
        """Tokens and their times; the last event has the engine's own counts."""
        now = time.perf_counter()
        new = len(event.token_ids)
        if event.completion is not None:
            new = event.completion.completion_tokens - choice.num_tokens
            if choice.number % self.job.n == 0:
                self.usage.cached_tokens += event.completion.cached_tokens
        if new and not choice.num_tokens:
            self._metrics.first_token(self.job.model.name, now - self._start)
        elif new:
            self._metrics.between_tokens(self.job.model.name, (now - choice.last_at) / new, new)
        if new:
            choice.last_at = now
        choice.num_tokens += new
        self.usage.completion_tokens += new

    @staticmethod
    def _told(choice: _Choice, event: Event, reason: str | None) -> tuple[TokenLogprob, ...]:
        """The event's log probabilities without that of a stop token, which is no part of the text."""
        told = event.logprobs
        if reason == "stop" and told and told[-1].token_id in choice.params.stop_ids:
            return told[:-1]
        return told


def _of_choice(params: SamplingParams, number: int) -> SamplingParams:
    """Answers to one question differ where they are drawn, and are the same again with the same seed."""
    return params if params.seed is None else replace(params, seed=(params.seed + number) % 2**63)

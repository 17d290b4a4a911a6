"""POST /v1/completions: a text or token ids in, what follows them out. No template."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from alpaca_lora.inference.request import SamplingParams
from alpaca_lora.server.answering import answer
from alpaca_lora.server.generation import Job
from alpaca_lora.server.protocol import CompletionRequest
from alpaca_lora.server.question import Question, check_token_ids, fitted, text_question
from alpaca_lora.server.rails import Rails
from alpaca_lora.server.replies import Reply, TextReply
from alpaca_lora.server.served_models import ServedModel
from alpaca_lora.server.service import Service, Turn
from alpaca_lora.server.unsupported import COMPLETIONS


class CompletionsApi:
    """The route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """Completions of one or more prompts, streamed or whole."""
        return await answer(
            self._service, request, lambda: self._service.read(request, CompletionRequest, COMPLETIONS), self._prepare
        )

    async def _prepare(self, asked: CompletionRequest, turn: Turn) -> tuple[Job, Reply]:
        service = self._service
        model = await service.find_model(asked.model)
        rails = service.rails_of(model)
        pairs = [
            await service.rail_workers.run(self._question, prompt, asked, model, rails) for prompt in asked.prompts
        ]
        questions = tuple(question for question, _ in pairs)
        job = Job(model, questions, tuple(params for _, params in pairs), asked.n, rails, turn.caller.tenant)
        reply = TextReply(
            asked.model, model.digest, model.writes.tokenizer, with_logprobs=asked.logprobs is not None,
            include_usage=asked.include_usage,
        )  # fmt: skip
        return job, reply

    def _question(
        self, prompt: str | list[int], asked: CompletionRequest, model: ServedModel, rails: Rails
    ) -> tuple[Question, SamplingParams]:
        service = self._service
        params = asked.params(max_new_tokens=asked.max_tokens, logprobs=asked.logprobs)
        question = text_question(prompt, model, rails, service.room)
        if question.refusal is not None:
            return question, params
        check_token_ids(params, model)
        params = fitted(
            params, question, model, service.bridge.context_length, asked=asked.max_tokens,
            cap=service.options.max_answer_tokens, param="prompt",
        )  # fmt: skip
        return question, params

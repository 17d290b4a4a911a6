"""POST /v1/chat/completions: turns in, the assistant's next turn out."""

from __future__ import annotations

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from alpaca_lora.errors import AlpacaLoraError
from alpaca_lora.inference.request import SamplingParams
from alpaca_lora.server.answering import answer
from alpaca_lora.server.errors import of_error
from alpaca_lora.server.generation import Job
from alpaca_lora.server.protocol import ChatRequest
from alpaca_lora.server.question import Question, chat_question, check_token_ids, fitted
from alpaca_lora.server.rails import Rails
from alpaca_lora.server.replies import ChatReply, Reply
from alpaca_lora.server.served_models import ServedModel
from alpaca_lora.server.service import Service, Turn
from alpaca_lora.server.unsupported import CHAT


class ChatApi:
    """The route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """A chat completion, streamed or whole; the model is the base or an adapter, with its own template."""
        return await answer(
            self._service, request, lambda: self._service.read(request, ChatRequest, CHAT), self._prepare
        )

    async def _prepare(self, asked: ChatRequest, turn: Turn) -> tuple[Job, Reply]:
        service = self._service
        model = await service.find_model(asked.model)
        rails = service.rails_of(model)
        question, params = await service.rail_workers.run(self._question, asked, model, rails)
        job = Job(model, (question,), (params,), asked.n, rails, turn.caller.tenant)
        reply = ChatReply(
            asked.model, model.digest, model.writes.tokenizer, with_logprobs=asked.logprobs,
            include_usage=asked.include_usage,
        )  # fmt: skip
        return job, reply

    def _question(self, asked: ChatRequest, model: ServedModel, rails: Rails) -> tuple[Question, SamplingParams]:
        service = self._service
        context = service.bridge.context_length
        params = asked.params(max_new_tokens=1, logprobs=asked.num_logprobs)
        question = chat_question(asked.messages, model, rails, service.room)
        if question.refusal is not None:
            return question, params
        check_token_ids(params, model)
        params = fitted(
            params, question, model, context, asked=asked.limit, cap=service.options.max_answer_tokens, param="messages"
        )
        return question, self._shaped(params, asked)

    def _shaped(self, params: SamplingParams, asked: ChatRequest) -> SamplingParams:
        """With the grammar that ``response_format`` asks for."""
        shape = asked.response_format
        if shape is None or shape.type == "text":
            return params
        grammars = self._service.grammars
        try:
            schema = shape.json_schema
            grammar = grammars.json_object() if schema is None else grammars.json_schema(schema.schema_)
        except AlpacaLoraError as error:
            raise of_error(error, param="response_format") from error
        return replace(params, grammar=grammar)

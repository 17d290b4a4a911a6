"""POST /v1/classify: texts in, the labels of a classifying adapter out. One pass through the model for each text."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from alpaca_lora.adapters.record import RECORD_NAME, AdapterRecord
from alpaca_lora.data.cleaning import RULE_NAMES
from alpaca_lora.data.encode import EncodePolicy
from alpaca_lora.data.encode_labelled import question_ids
from alpaca_lora.errors import AlpacaLoraError, ModelFileError
from alpaca_lora.inference.request import Completion, SamplingParams
from alpaca_lora.inference.request import Request as EngineRequest
from alpaca_lora.server.connection import while_connected
from alpaca_lora.server.errors import ApiError, invalid, of_error
from alpaca_lora.server.protocol import ClassifyRequest
from alpaca_lora.server.served_models import ServedModel
from alpaca_lora.server.service import Service, Turn


@dataclass(frozen=True, slots=True)
class Label:
    """label: the likeliest; probabilities: of every label, likeliest first; truncated: the text was cut to fit."""

    label: str
    probabilities: dict[str, float]
    prompt_tokens: int
    truncated: bool


class Classifier:
    """Asks classifying adapters through the engine, beside everything else that it computes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def classify(self, model: ServedModel, texts: Sequence[str], salt: str) -> list[Label]:
        """A label for each text. ApiError 400 for a text of which cleaning leaves nothing."""
        rows = await self._service.workers.run(self._ids, model, texts)
        params = SamplingParams(max_new_tokens=1)
        requests = [EngineRequest(tuple(ids), params, model.adapter, salt, kind="classify") for ids, _ in rows]
        try:
            async with self._service.holding(model):
                ticket = await self._service.bridge.submit(requests)
        except AlpacaLoraError as error:
            raise of_error(error, param="input") from error
        done: dict[int, Completion] = {}
        try:
            async for place, event in ticket:
                if event.completion is not None:
                    done[place] = event.completion
        finally:
            ticket.close()
        return [_label(done[place], model, truncated) for place, (_, truncated) in enumerate(rows)]

    def _ids(self, model: ServedModel, texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        service = self._service
        record = service.models.bank.get(model.adapter or "").record
        try:
            policy, skip_cleaning = _policy(record, service.bridge.context_length - model.num_virtual)
            rows = question_ids(texts, service.models.tokenizer, policy, skip_cleaning)
        except AlpacaLoraError as error:
            raise of_error(error, param="input") from error
        found: list[tuple[list[int], bool]] = []
        for number, row in enumerate(rows):
            if row is None:
                raise invalid("There is no text to classify", f"input[{number}]")
            found.append(row)
        return found


class ClassifyApi:
    """The route."""

    def __init__(self, service: Service, classifier: Classifier) -> None:
        self._service, self._classifier = service, classifier

    async def create(self, request: Request) -> Response:
        """The label of each text, with the probabilities of all labels."""
        service = self._service
        turn = service.enter(request)
        try:
            asked = await service.read(request, ClassifyRequest)
            work = self._answer(asked, turn)
            async with asyncio.timeout(turn.seconds_left):
                return JSONResponse(await while_connected(request.receive, work))
        except TimeoutError as error:
            raise service.late() from error
        finally:
            turn.close()

    async def _answer(self, asked: ClassifyRequest, turn: Turn) -> dict[str, Any]:
        model = await self._service.find_model(asked.model)
        turn.facts["model"] = model.name
        if model.prompts is not None:
            raise invalid(f"The model {model.name!r} does not classify; its answers are texts", "model")
        self._service.admit(len(asked.texts))
        found = await self._classifier.classify(model, asked.texts, turn.caller.tenant)
        num_tokens = sum(one.prompt_tokens for one in found)
        data = [
            {
                "index": number, "label": one.label, "probabilities": one.probabilities,
                "num_classes": len(one.probabilities), "truncated": one.truncated,
            }
            for number, one in enumerate(found)
        ]  # fmt: skip
        usage = {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens}
        return {"object": "list", "model": model.name, "data": data, "usage": usage}


def _policy(record: AdapterRecord | None, context_length: int) -> tuple[EncodePolicy, list[str]]:
    """How rows were cut, ended and cleaned in training; without a record the text as it is.

    ModelFileError for a record that cannot be.
    """
    if record is None:
        return EncodePolicy(context_length, add_eos_token=False), []
    cutoff_len, skipped = record.config.get("cutoff_len", context_length), record.config.get("skip_cleaning", [])
    template = record.config.get("text_template", "{text}")
    if type(cutoff_len) is not int or cutoff_len < 1 or not isinstance(template, str):
        raise ModelFileError("holds no usable cutoff_len or text_template", file=RECORD_NAME, field="config")
    if not isinstance(skipped, list) or not set(map(str, skipped)) <= {*RULE_NAMES, "all"}:
        raise ModelFileError("holds no usable skip_cleaning", file=RECORD_NAME, field="config")
    policy = EncodePolicy(min(cutoff_len, context_length), add_eos_token=record.add_eos, text_template=template)
    return policy, list(map(str, skipped))


def _label(done: Completion, model: ServedModel, truncated: bool) -> Label:
    if done.class_logits is None:
        why = "The text was not classified" if done.error is None else str(done.error)
        raise ApiError(500, why, kind="server_error", code="classify_failed")
    top = max(done.class_logits)
    weights = [math.exp(value - top) for value in done.class_logits]
    shares = {name: weight / sum(weights) for name, weight in zip(model.labels, weights, strict=True)}
    ranked = dict(sorted(shares.items(), key=lambda pair: -pair[1]))
    return Label(next(iter(ranked)), ranked, done.prompt_tokens, truncated)

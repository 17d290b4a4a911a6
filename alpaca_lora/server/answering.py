"""The road of an answer, the same for chats and texts: read, prepare, submit, then stream it or send it whole."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from alpaca_lora.server.connection import while_connected
from alpaca_lora.server.generation import Generation, Job
from alpaca_lora.server.protocol import SamplingFields
from alpaca_lora.server.replies import Reply, Whole
from alpaca_lora.server.service import Service, Turn
from alpaca_lora.server.streaming import EventStream

F = TypeVar("F", bound=SamplingFields)


async def answer(
    service: Service,
    request: Request,
    read: Callable[[], Awaitable[F]],
    prepare: Callable[[F, Turn], Awaitable[tuple[Job, Reply]]],
) -> Response:
    """One request from its first byte to its last. ApiErrors come before the first byte of a stream, or as its last
    event; whatever happens, what the request held is given back.
    """
    turn = service.enter(request)
    try:
        fields = await read()
        turn.facts["model"] = fields.model if fields.model in service.models.names() else None
        if fields.user is not None:
            turn.facts["user"] = hashlib.sha256(fields.user.encode()).hexdigest()[:12]
        work = _begin(service, turn, fields, prepare)
        generation, reply = await while_connected(request.receive, _in_time(service, turn, work))
        if fields.stream:
            events = _events(service, turn, generation, reply, include_usage=fields.include_usage)
            return EventStream(
                events, seconds=turn.seconds_left, on_close=turn.close,
                on_defect=lambda error: service.log.defect(error, request_id=request.state.request_id),
            )  # fmt: skip
        whole = _in_time(service, turn, _whole(service, turn, generation, reply))
        response = JSONResponse(await while_connected(request.receive, whole))
    except BaseException:
        turn.close()
        raise
    turn.close()
    return response


async def _in_time(service: Service, turn: Turn, work: Awaitable[Any]) -> Any:
    try:
        async with asyncio.timeout(turn.seconds_left):
            return await work
    except TimeoutError as error:
        raise service.late() from error


async def _begin(
    service: Service, turn: Turn, fields: F, prepare: Callable[[F, Turn], Awaitable[tuple[Job, Reply]]]
) -> tuple[Generation, Reply]:
    job, reply = await prepare(fields, turn)
    generation = Generation(
        job, service.bridge, service.rail_workers, service.metrics, service.holding,
        lambda notes: service.audit(turn, notes),
    )  # fmt: skip
    service.admit(len(job.questions) * job.n)
    turn.on_close.append(generation.close)
    await generation.start()
    return generation, reply


async def _whole(service: Service, turn: Turn, generation: Generation, reply: Reply) -> dict[str, Any]:
    job = generation.job
    choices = [Whole() for _ in range(len(job.questions) * job.n)]
    async for delta in generation.deltas():
        choices[delta.choice].add(delta)
    _tell(service, turn, generation)
    return reply.whole(choices, generation.usage)


async def _events(
    service: Service, turn: Turn, generation: Generation, reply: Reply, *, include_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    job = generation.job
    for chunk in reply.opening(len(job.questions) * job.n):
        yield chunk
    async for delta in generation.deltas():
        yield reply.chunk(delta)
    _tell(service, turn, generation)
    if include_usage:
        yield reply.usage_chunk(generation.usage)


def _tell(service: Service, turn: Turn, generation: Generation) -> None:
    usage = generation.usage
    turn.facts["prompt_tokens"], turn.facts["completion_tokens"] = usage.prompt_tokens, usage.completion_tokens

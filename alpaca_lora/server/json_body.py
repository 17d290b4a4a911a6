"""The body of a request: bounded in bytes, time and depth, read strictly, never twice the same key. Knows no fields."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from alpaca_lora.server.errors import ApiError, invalid

MAX_DEPTH = 64
MAX_VALUES = 200_000  # a prompt of token ids has one for each
MAX_KEYS = 4096  # of one object


class ClientGone(Exception):
    """Nobody is left to answer."""


async def read_body(request: Request, *, max_bytes: int, seconds: float) -> bytes:
    """The bytes of a JSON body. ApiError: 400, 408 (slower than ``seconds``), 413 (over ``max_bytes``) or 415."""
    _check_headers(request, max_bytes)
    try:
        async with asyncio.timeout(seconds):
            return await _read(request, max_bytes)
    except TimeoutError as error:
        raise ApiError(408, f"The body did not come within {seconds:g} seconds", code="body_timeout") from error
    except ClientDisconnect as error:
        raise ClientGone from error


def _check_headers(request: Request, max_bytes: int) -> None:
    headers = request.headers
    kind, _, parameters = headers.get("content-type", "").partition(";")
    charset = parameters.lower().replace(" ", "").replace('"', "")
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8", "charset=utf8"):
        raise ApiError(415, "The body must be JSON in UTF-8: content-type application/json", code="content_type")
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(415, "Compressed bodies are not read", code="content_encoding")
    length = headers.get("content-length")
    if length is not None and "transfer-encoding" in headers:
        raise ApiError(400, "The body has a content-length and a transfer-encoding", code="framing")
    if length is not None and length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)


async def _read(request: Request, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    return b"".join(parts)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The body is larger than {max_bytes:,} bytes", code="request_too_large")


def parse(body: bytes) -> dict[str, Any]:
    """ApiError 400 for what is no JSON object: bad UTF-8, NaN, a key twice, too deep, lone surrogates."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise _malformed(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise _malformed(f"it is nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:
        # json's own message says where and never what; the others are ours, or of a number of thousands of digits
        raise _malformed(str(error)) from error
    if not isinstance(value, dict):
        raise _malformed("it is not an object")
    _check_tree(value)
    return value


def _malformed(why: str) -> ApiError:
    return invalid(f"We could not parse the JSON body of your request: {why}", None, "invalid_json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_tree(root: dict[str, Any]) -> None:
    """Depth and number of values, and what JSON can spell but nothing can use: half a surrogate pair, numbers beyond
    float.
    """
    waiting: list[tuple[dict[str, Any] | list[Any], int]] = [(root, 1)]
    num_values = 0
    while waiting:
        container, depth = waiting.pop()
        num_values += len(container)
        if num_values > MAX_VALUES:
            raise _malformed(f"it holds more than {MAX_VALUES:,} values")
        if isinstance(container, dict):
            if len(container) > MAX_KEYS:
                raise _malformed(f"an object has more than {MAX_KEYS:,} keys")
            for key in container:
                _check_text(key)
        for value in container.values() if isinstance(container, dict) else container:
            if isinstance(value, str):
                _check_text(value)
            elif isinstance(value, float):
                if not math.isfinite(value):
                    raise _malformed("a number is out of range")
            elif isinstance(value, dict | list):
                if depth == MAX_DEPTH:
                    raise _malformed(f"it is nested more than {MAX_DEPTH} deep")
                waiting.append((value, depth + 1))


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _malformed("a string holds half a surrogate pair") from error

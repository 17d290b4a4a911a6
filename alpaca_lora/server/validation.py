"""A body against its model: the first thing that is wrong, as OpenAI's error, naming the field by its path."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from alpaca_lora.errors import nearest
from alpaca_lora.server.errors import ApiError, invalid
from alpaca_lora.server.protocol import Body

B = TypeVar("B", bound=Body)

# pydantic puts the member of a union that it tried into the path
_BRANCH = re.compile(r"(str|int|float|bool|none|TextPart|constrained-\w+|nullable|.*\[.*)$")


def validate(model: type[B], body: Mapping[str, Any]) -> B:
    """ApiError 400: unknown_parameter, missing_required_parameter, invalid_type or invalid_value."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _api_error(error.errors(include_url=False, include_input=False), model) from error


def _api_error(problems: Sequence[Any], model: type[Body]) -> ApiError:
    problem = problems[0]
    param = _path(problem["loc"])
    kind = problem["type"]
    if kind == "extra_forbidden":
        hint = nearest(str(problem["loc"][-1]), model.model_fields)
        fix = f"; did you mean {hint[0]!r}?" if hint else ""
        return invalid(f"Unrecognized request argument supplied: {param}{fix}", param, "unknown_parameter")
    if kind == "missing":
        return invalid(f"Missing required parameter: {param!r}", param, "missing_required_parameter")
    if kind == "value_error":
        name, _, why = str(problem["ctx"]["error"]).partition(": ")
        param = f"{param}.{name}" if param else name
        return invalid(f"Invalid value for {param!r}: {why}", param)
    code = "invalid_type" if kind.endswith(("_type", "_parsing")) or kind == "none_required" else "invalid_value"
    # a union fails once for each of its members
    wrong = dict.fromkeys(str(other["msg"]) for other in problems if _path(other["loc"]) == param)
    return invalid(f"Invalid value for {param!r}: {' / '.join(wrong)}", param, code)


def _path(location: Sequence[str | int]) -> str:
    """``messages[0].content`` of ("messages", 0, "content", "str")."""
    text = ""
    for number, part in enumerate(location):
        if isinstance(part, int):
            text += f"[{part}]"
        elif number == 0 or not _BRANCH.match(part):
            # a key of the client's own (logit_bias) may be long and may hold anything
            text += f".{part[:64]}" if text else part[:64]
    return text

"""What the clients of OpenAI can send and this service does not do: refused by name, with the reason.

A value that asks for nothing (null, or what happens anyway) is let through.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from alpaca_lora.server.errors import invalid

_TOOLS = "tools are not supported"
_STORE = "nothing is stored here"
CHAT: Mapping[str, str] = {
    "audio": "only text is made",
    "function_call": _TOOLS,
    "functions": _TOOLS,
    "metadata": _STORE,
    "modalities": "only text is made",
    "moderation": "the server's policy is not the client's to choose",
    "parallel_tool_calls": _TOOLS,
    "prediction": "predicted outputs are not supported",
    "prompt_cache_key": "prefixes are found by their content",
    "prompt_cache_options": "prefixes are found by their content",
    "prompt_cache_retention": "prefixes are kept as long as there is room",
    "reasoning_effort": "these models have no hidden reasoning",
    "safety_identifier": "send user instead",
    "service_tier": "there is one tier",
    "store": _STORE,
    "tool_choice": _TOOLS,
    "tools": _TOOLS,
    "verbosity": "say it in the prompt",
    "web_search_options": "there is no search",
}
COMPLETIONS: Mapping[str, str] = {
    "echo": "the prompt is not repeated",
    "suffix": "text is not inserted before a suffix",
}
# what happens anyway
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "function_call": ("none",),
}


def without_unsupported(body: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    """The body without what asks for nothing. ApiError 400 names the first field that asks for something."""
    kept: dict[str, Any] = {}
    for name, value in body.items():
        if name not in table:
            kept[name] = value
        elif value is not None and json.dumps(value) not in map(json.dumps, _HARMLESS.get(name, ())):
            raise invalid(f"{name} is not supported: {table[name]}", name, "unsupported_parameter")
    return kept

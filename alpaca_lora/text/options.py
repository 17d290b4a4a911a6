"""The options of the text room: which template, which system prompt. No torch, so that ``--help`` is quick."""

from __future__ import annotations

from pydantic import Field

from alpaca_lora.config import Options


class TextOptions(Options):
    prompt_template_name: str | None = Field(
        default=None,
        description="alpaca, alpaca_short, alpaca_legacy, vigogne, alpaca_zh, chat, or the path of a template file; "
        "by default chat where the model brings a chat template, else alpaca",
    )
    system_prompt: str | None = Field(
        default=None, description="system message for rows that bring none; stands in front of the prompt"
    )

"""Many questions to one model at once, as the demo's table and the training report ask them. One function."""

from __future__ import annotations

from collections.abc import Sequence

from alpaca_lora.inference.engine import Engine
from alpaca_lora.inference.prompts import PromptFormat
from alpaca_lora.inference.request import Completion, SamplingParams
from alpaca_lora.models.load import Base
from alpaca_lora.text.messages import Conversation
from alpaca_lora.text.rendered import Template


def answer_many(
    base: Base,
    template: Template,
    conversations: Sequence[Conversation],
    params: SamplingParams,
    *,
    system_prompt: str | None = None,
    max_running: int = 32,
) -> list[Completion]:
    """The answers in the order of the conversations, decoded together. An adapter on the model takes part.

    What ends an answer (EOS, the template's stop tokens) is added to `params`.
    """  # fmt: skip
    prompts = PromptFormat.of(template, base.tokenizer, system_prompt=system_prompt)
    engine = Engine(base.model, base.tokenizer, max_running=max_running)
    return engine.generate([prompts.request(conversation, params) for conversation in conversations])

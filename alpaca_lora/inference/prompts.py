"""How a conversation becomes a request: the template, BOS, and what ends an answer; as in training, from its record.

Knows templates and tokenizers; knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike

from alpaca_lora.adapters.record import AdapterRecord
from alpaca_lora.errors import ModelFileError
from alpaca_lora.inference.request import Request, SamplingParams
from alpaca_lora.text.messages import Conversation
from alpaca_lora.text.rendered import Template
from alpaca_lora.text.templates import template_from_record
from alpaca_lora.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """Template, system prompt and BOS policy of the questions; stop ids and stop texts of the answers."""

    template: Template
    tokenizer: Tokenizer
    system_prompt: str | None
    add_bos: bool
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, template: Template, tokenizer: Tokenizer, *, system_prompt: str | None = None) -> PromptFormat:
        """What a model without an adapter gets: BOS as its tokenizer has it, its own and the template's stop tokens."""
        known = tokenizer.special_tokens
        template_ids = [known[token] for token in template.stop_tokens if token in known]
        texts = tuple(token for token in template.stop_tokens if token not in known)
        own = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
        stop_ids = tuple(dict.fromkeys([*own, *tokenizer.stop_ids, *template_ids]))
        return cls(template, tokenizer, system_prompt, tokenizer.add_bos, stop_ids, texts)

    @classmethod
    def from_record(
        cls, record: AdapterRecord, tokenizer: Tokenizer, *, file: PathLike[str] | None = None
    ) -> PromptFormat:
        """What the adapter was trained with. ModelFileError when its record (``file``) holds no template."""
        if not record.template:
            raise ModelFileError("the adapter's record holds no template", file=file, field="template", fix="name one")
        template = template_from_record(record.template, tokenizer, file=file)
        usual = cls.of(template, tokenizer, system_prompt=record.system_prompt)
        stop_ids = tuple(dict.fromkeys([*record.stop_ids, *usual.stop_ids]))
        stop = tuple(dict.fromkeys([*record.stop_strings, *usual.stop]))
        return replace(usual, add_bos=record.add_bos, stop_ids=stop_ids, stop=stop)

    def prompt_ids(self, conversation: Conversation) -> tuple[int, ...]:
        """The conversation up to where the answer begins; exactly one BOS where the model wants one."""
        ids = self.tokenizer.encode(self.template.render_prompt(conversation, system_prompt=self.system_prompt)).ids
        bos_id = self.tokenizer.bos_id
        # some chat templates write the BOS themselves
        if self.add_bos and bos_id is not None and ids[:1] != [bos_id]:
            ids = [bos_id, *ids]
        return tuple(ids)

    def request(self, conversation: Conversation, params: SamplingParams) -> Request:
        """The conversation's request; what ends an answer here is added to what `params` names."""
        stop_ids = tuple(dict.fromkeys([*params.stop_ids, *self.stop_ids]))
        stop = tuple(dict.fromkeys([*params.stop, *self.stop]))
        return Request(self.prompt_ids(conversation), replace(params, stop_ids=stop_ids, stop=stop))

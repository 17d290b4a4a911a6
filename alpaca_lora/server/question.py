"""From a request's prompt to token ids: the input rail, the template, the tokenizer, the room that is left.

Everything here may take long and runs in a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from alpaca_lora.errors import AlpacaLoraError
from alpaca_lora.inference.request import SamplingParams
from alpaca_lora.server.errors import ApiError, invalid, of_error
from alpaca_lora.server.protocol import ChatMessage
from alpaca_lora.server.rails import Note, Rails, Ruling
from alpaca_lora.server.served_models import ServedModel
from alpaca_lora.text.messages import Conversation, Message
from alpaca_lora.text.tokenizer import Tokenizer

_TOO_LONG = "context_length_exceeded"


class Room(NamedTuple):
    """What a prompt has to fit into: tokens, and the bytes that so many of the longest tokens have."""

    context_length: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt. ids: empty where the input rail refused it. notes: what the rail found in its texts."""

    ids: tuple[int, ...]
    refusal: str | None = None
    notes: tuple[Note, ...] = ()


def chat_question(messages: Sequence[ChatMessage], model: ServedModel, rails: Rails, room: Room) -> Question:
    """The conversation in the model's own template. ApiError 400 for turns that it cannot render."""
    prompts = model.writes
    rulings = [rails.check_input(message.text) for message in messages]
    notes = tuple(note for ruling in rulings for note in ruling.notes)
    refusal = next((ruling.refusal for ruling in rulings if ruling.refusal is not None), None)
    if refusal is not None:
        return Question((), refusal, notes)
    _check_size([ruling.text for ruling in rulings], room, prompts.tokenizer, "messages")
    turns = tuple(Message(message.role, ruling.text) for message, ruling in zip(messages, rulings, strict=True))
    kind = "instruction" if len(turns) == 1 else "chat"
    try:
        ids = prompts.prompt_ids(Conversation(turns, kind, "", 0))
    except AlpacaLoraError as error:
        raise of_error(error, param="messages") from error
    return Question(ids, None, notes)


def text_question(prompt: str | list[int], model: ServedModel, rails: Rails, room: Room) -> Question:
    """A text as it is, with the BOS that the model wants; or ids as they are. ApiError 400 for impossible ids."""
    prompts = model.writes
    tokenizer = prompts.tokenizer
    if isinstance(prompt, list):
        if max(prompt) >= tokenizer.vocab_size:
            raise invalid(f"Token ids go up to {tokenizer.vocab_size - 1}", "prompt")
        # ids are read as the text they stand for, or they would be a way around the rail
        ruling = rails.check_input(tokenizer.decode(prompt, skip_special=False)) if rails.are_there else Ruling("")
        if ruling.refusal is not None or not ruling.changed:
            return Question(() if ruling.refusal is not None else tuple(prompt), ruling.refusal, ruling.notes)
    else:
        ruling = rails.check_input(prompt)
        if ruling.refusal is not None:
            return Question((), ruling.refusal, ruling.notes)
    _check_size([ruling.text], room, tokenizer, "prompt")
    ids = tokenizer.encode_text(ruling.text)
    bos = [tokenizer.bos_id] if prompts.add_bos and tokenizer.bos_id is not None else []
    return Question((*bos, *ids), None, ruling.notes)


def fitted(
    params: SamplingParams, question: Question, model: ServedModel, context_length: int, *, asked: int | None,
    cap: int | None, param: str,
) -> SamplingParams:  # fmt: skip
    """The parameters with the model's own stops and with the most tokens that there is room for.

    asked: what the client wants at most (None: what fits); cap: the server's own limit. ApiError 400 when prompt and
    answer do not fit into the context, or the prompt is empty.
    """
    room = context_length - model.num_virtual - len(question.ids)
    if not question.ids:
        raise invalid("The prompt has no tokens", param)
    if room < 1 or (asked is not None and asked > room):
        wanted = f" and {asked} of the answer" if asked is not None else ""
        raise _too_long(f"{len(question.ids)} tokens of the prompt{wanted}", context_length - model.num_virtual, param)
    if asked is not None and cap is not None and asked > cap:
        raise invalid(f"This server answers with at most {cap} tokens", "max_tokens")
    limit = asked if asked is not None else min(room, cap or room)
    prompts = model.writes
    stop_ids = tuple(dict.fromkeys([*params.stop_ids, *prompts.stop_ids]))
    stop = tuple(dict.fromkeys([*params.stop, *prompts.stop]))
    return replace(params, max_new_tokens=limit, stop_ids=stop_ids, stop=stop)


def check_token_ids(params: SamplingParams, model: ServedModel) -> None:
    """ApiError 400 for a bias or a stop of a token that does not exist."""
    size = model.writes.tokenizer.vocab_size
    for name, ids in (("logit_bias", [token for token, _ in params.logit_bias]), ("stop_token_ids", params.stop_ids)):
        if ids and max(ids) >= size:
            raise invalid(f"Token ids go up to {size - 1}, {max(ids)} is none", name)


def _check_size(texts: Sequence[str], room: Room, tokenizer: Tokenizer, param: str) -> None:
    """A text that cannot fit is not tokenized as a whole: it would if each of its tokens were the longest one, and if
    its beginning alone had not twice the tokens that there is room for.
    """
    num_bytes = sum(len(text.encode()) for text in texts)
    if num_bytes > room.max_bytes:
        raise invalid(f"{num_bytes:,} bytes of text do not fit into the model's context", param, _TOO_LONG)
    num_chars = 8 * room.context_length
    for text in texts:
        if len(text) > num_chars and len(tokenizer.encode_text(text[:num_chars])) > 2 * room.context_length:
            raise invalid(f"{len(text):,} characters do not fit into the model's context", param, _TOO_LONG)


def _too_long(what: str, context_length: int, param: str) -> ApiError:
    return invalid(f"This model's context is {context_length} tokens; {what} do not fit", param, _TOO_LONG)

"""Reads a tokenizer from a Hugging Face folder and writes one that transformers loads with the same ids.

Knows tokenizer.json, tokenizer.model, tokenizer_config.json, special_tokens_map.json, added_tokens.json,
chat_template.jinja and the end ids of generation_config.json. Runs no code out of the folder.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from alpaca_lora.errors import ModelFileError
from alpaca_lora.text.sentencepiece_tokenizer import definition_from_model
from alpaca_lora.text.tokenizer_definition import TokenizerDefinition

_ROLES = ("bos", "eos", "pad", "unk")
_OURS = {"chat_template", "add_bos_token", "added_tokens_decoder", "auto_map", *(f"{role}_token" for role in _ROLES)}


def definition_from_folder(folder: Path) -> TokenizerDefinition:
    """Raises ModelFileError when there is no tokenizer that we can read."""
    config = _object(folder / "tokenizer_config.json")
    special_map = _object(folder / "special_tokens_map.json")
    json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    names = {role: _token(config, special_map, role, folder) for role in _ROLES}
    listed = _listed_special(config, special_map)
    add_bos: bool | None = None
    if json_file.is_file():
        backend = _read_backend(json_file)
    elif model_file.is_file():
        pieces = definition_from_model(model_file)
        backend, add_bos = pieces.backend, pieces.add_bos
        names = {role: names[role] or getattr(pieces, role) for role in _ROLES}
        _add_older(backend, folder / "added_tokens.json", listed)
    else:
        raise ModelFileError(
            "has no tokenizer",
            file=folder,
            expected="tokenizer.json or tokenizer.model",
            fix="put the tokenizer of the model into the folder",
        )
    _add_declared(backend, config, folder, listed)
    if isinstance(config.get("add_bos_token"), bool):
        add_bos = config["add_bos_token"]
    elif add_bos is None:
        add_bos = _adds_bos(backend, names["bos"])
    return TokenizerDefinition(
        backend,
        str(folder),
        bos=names["bos"],
        eos=names["eos"],
        pad=names["pad"],
        unk=names["unk"],
        add_bos=bool(add_bos) and names["bos"] is not None,
        chat_template=_chat_template(folder, config),
        stop_ids=_end_ids(folder),
        extra={key: value for key, value in config.items() if key not in _OURS},
    )


def write_folder(folder: Path, definition: TokenizerDefinition, tokenizer_json: str) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    config: dict[str, Any] = dict(definition.extra)
    # the class that takes tokenizer.json as it is: others rebuild it from parts and may split otherwise
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": definition.add_bos}
    config |= {"clean_up_tokenization_spaces": False}
    for role in _ROLES:
        if getattr(definition, role) is not None:
            config[f"{role}_token"] = getattr(definition, role)
    if definition.chat_template is not None:
        config["chat_template"] = definition.chat_template
        (folder / "chat_template.jinja").write_text(definition.chat_template, encoding="utf-8", newline="")
    text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty when the file is not there."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelFileError(
            error.msg, file=path, line=error.lineno, expected="JSON", fix="fetch the file again"
        ) from error
    except UnicodeDecodeError as error:
        raise ModelFileError(f"byte {error.start} is not UTF-8", file=path, fix="fetch the file again") from error
    except (ValueError, RecursionError) as error:  # an endless number, or nested too deeply
        raise ModelFileError(f"is not JSON: {error}", file=path, fix="fetch the file again") from error
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror}", file=path) from error
    if not isinstance(content, dict):
        raise ModelFileError("is not a JSON object", file=path, fix="fetch the file again")
    return content


def _read_backend(path: Path) -> Tokenizer:
    content = _object(path)
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    if len(set(ids)) != len(ids):
        raise ModelFileError("two tokens have the same id", file=path, field="model.vocab", expected="unique ids")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises plain Exception
        raise ModelFileError(f"is not a tokenizer: {error}", file=path, fix="fetch the file again") from error


def _token(config: dict[str, Any], special_map: dict[str, Any], role: str, folder: Path) -> str | None:
    """A token is a string or an object with ``content``."""
    value = config.get(f"{role}_token", special_map.get(f"{role}_token"))
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ModelFileError(
            f"{value!r} is not a token",
            file=folder / "tokenizer_config.json",
            field=f"{role}_token",
            expected="a string",
        )
    return value


def _listed_special(config: dict[str, Any], special_map: dict[str, Any]) -> set[str]:
    """Tokens that the files name as special: those with a role, and the additional ones."""
    values: list[Any] = [*special_map.values(), *(config.get(f"{role}_token") for role in _ROLES)]
    values.append(config.get("additional_special_tokens"))
    entries = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
    tokens = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    return {token for token in tokens if isinstance(token, str)}


def _add_declared(backend: Tokenizer, config: dict[str, Any], folder: Path, listed: set[str]) -> None:
    """Tokens that only tokenizer_config.json declares, with their flags."""
    declared = config.get("added_tokens_decoder")
    if not isinstance(declared, dict):
        return
    for index, entry in sorted(((int(i), e) for i, e in declared.items() if i.isdecimal()), key=lambda pair: pair[0]):
        flags = entry if isinstance(entry, dict) else {"content": entry, "special": True}
        content = flags.get("content")
        if not isinstance(content, str):
            continue
        special = flags.get("special") is True or content in listed
        token = AddedToken(
            content, special=special, normalized=flags.get("normalized", not special) is True,
            lstrip=flags.get("lstrip") is True, rstrip=flags.get("rstrip") is True,
            single_word=flags.get("single_word") is True,
        )  # fmt: skip
        _add(backend, token, index, folder / "tokenizer_config.json", "added_tokens_decoder")


def _add_older(backend: Tokenizer, path: Path, listed: set[str]) -> None:
    """Tokens of added_tokens.json (token -> id), which older folders have beside tokenizer.model."""
    declared = _object(path)
    for content, index in declared.items():
        if not content or not isinstance(index, int) or isinstance(index, bool):
            raise ModelFileError(f"{index!r} is not an id", file=path, field=content, expected="token: id")
    for content, index in sorted(declared.items(), key=lambda pair: pair[1]):
        special = content in listed or re.fullmatch(r"<\|.+\|>", content) is not None
        _add(backend, AddedToken(content, special=special, normalized=False), index, path, content)


def _add(backend: Tokenizer, token: AddedToken, index: int, file: Path, field: str) -> None:
    """Add a token that is not there yet; its id must come out as declared."""
    content = token.content
    if backend.token_to_id(content) is None:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    if backend.token_to_id(content) != index:
        raise ModelFileError(
            f"{content!r} is token {backend.token_to_id(content)} in the tokenizer",
            file=file,
            field=field,
            expected=f"id {index}",
            fix="take both files of the same model",
        )


def _adds_bos(backend: Tokenizer, bos: str | None) -> bool:
    if bos is None:
        return False
    ids = backend.encode("", add_special_tokens=True).ids
    return bool(ids) and ids[0] == backend.token_to_id(bos)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    jinja_file = folder / "chat_template.jinja"
    if jinja_file.is_file():
        try:
            return jinja_file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFileError(f"byte {error.start} is not UTF-8", file=jinja_file, fix="fetch it again") from error
    template = _object(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _end_ids(folder: Path) -> tuple[int, ...]:
    ends = _object(folder / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return tuple(end for end in ends if isinstance(end, int) and not isinstance(end, bool))

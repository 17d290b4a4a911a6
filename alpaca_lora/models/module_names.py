"""What a user's word for modules means: ends of names, whole names, regular expressions, ``all-linear``."""

from __future__ import annotations

import re
from collections.abc import Callable

from alpaca_lora.errors import ConfigError

ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "score", "classifier")  # what `all-linear` leaves out, as PEFT does
METACHARACTERS = frozenset("*+?[](){}|^$\\")


def name_matcher(entry: str, field: str) -> Callable[[str], bool]:
    """Whether ``entry`` means the module of a name. It is the end of a name (``q_proj``, ``self_attn.q_proj``), a whole
    name, a regular expression that matches the whole name (whatever holds one of ``* + ? [ ] ( ) { } | ^ $ \\``), or
    ``all-linear``, which is everything but heads. ConfigError of ``field`` for what is no regular expression.
    """
    if entry == ALL_LINEAR:
        return lambda name: name.rpartition(".")[2] not in HEADS
    if METACHARACTERS.isdisjoint(entry):
        return lambda name: name == entry or name.endswith("." + entry)
    try:
        expression = re.compile(entry)
    except re.error as error:
        raise ConfigError(
            f"{entry!r} is not a regular expression: {error}", field=field,
            expected="a name or a regular expression of whole names", fix=r"for example '.*\.(q|v)_proj'",
        ) from error  # fmt: skip
    return lambda name: expression.fullmatch(name) is not None

"""What a user's word for modules means: ends of names, whole names, regular expressions, ``all-linear``."""

from __future__ import annotations

from collections.abc import Callable

from alpaca_lora.models.name_pattern import Effort, NamePattern

ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "score", "classifier")  # what `all-linear` leaves out, as PEFT does
METACHARACTERS = frozenset("*+?[](){}|^$\\")


def name_matcher(entry: str, field: str, effort: Effort | None = None) -> Callable[[str], bool]:
    """Whether ``entry`` means the module of a name. It is the end of a name (``q_proj``, ``self_attn.q_proj``), a whole
    name, a regular expression that matches the whole name (whatever holds one of ``* + ? [ ] ( ) { } | ^ $ \\``), or
    ``all-linear``, which is everything but heads. ConfigError of ``field`` for what is no regular expression;
    AdapterError where the ``effort`` is that of a file.
    """
    if entry == ALL_LINEAR:
        return lambda name: name.rpartition(".")[2] not in HEADS
    if METACHARACTERS.isdisjoint(entry):
        return lambda name: name == entry or name.endswith("." + entry)
    return NamePattern(entry, effort or Effort(), field=field).matches

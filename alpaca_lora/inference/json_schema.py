"""What a JSON schema from outside may ask for: known keywords, bounded sizes. Compiles nothing (see `grammar`).

The dialect is draft 2020-12 without what cannot be held while tokens are drawn. A keyword that would not be held is an
error that names it and its place; annotations (titles, defaults, examples ...) constrain nothing and are left out.
The limits keep the time and memory of a hostile schema small; schemas of real programs stay far below them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sized
from decimal import Decimal
from types import MappingProxyType
from typing import Any, NoReturn
from urllib.parse import unquote

from alpaca_lora.errors import UserError, nearest

MAX_DEPTH = 32  # schemas inside of schemas, values inside of values
MAX_SCHEMAS = 2000  # schemas in one, the outer one included
MAX_PROPERTIES = 500  # of one object
MAX_OPTIONS = 1000  # values of an enum, branches of anyOf, oneOf, allOf
MAX_CHARS = 100_000  # of the schema as JSON, annotations left out
MAX_PATTERN = 500  # characters of a regular expression
MAX_COUNT = 10_000  # of minLength, maxLength, minItems, maxItems
# different patterns and formats of a schema that joins schemas: whether fifteen texts can hold at once may take hours
MAX_JOINED = 4
MAX_STEPS = 20_000  # sum of all multipleOf, decimal point left out: each is a machine of so many states
MAX_NUMBER = 2**53  # larger integers are not exact where numbers are 64-bit floats

TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
# keywords that speak of texts and numbers, here or further inside
SPEAKING = ("pattern", "format", "multipleOf", "properties", "items", "prefixItems", "additionalProperties")
# `discriminator` is OpenAPI's hint beside a oneOf: the oneOf says all that it says
ANNOTATIONS = frozenset(
    "$comment $schema title description default examples example deprecated readOnly writeOnly contentMediaType"
    " contentEncoding discriminator".split()
)

# of JSON Schema and OpenAPI, and not held here: no misspellings of anything
NOT_HELD = frozenset(
    "$anchor $dynamicAnchor $dynamicRef $id $vocabulary additionalItems contains dependencies dependentRequired"
    " dependentSchemas else if maxContains maxProperties minContains minProperties not nullable patternProperties"
    " propertyNames then unevaluatedItems unevaluatedProperties uniqueItems".split()
)
# control characters that JSON writes as \uXXXX, which no answer may hold (see `grammar`)
UNSPEAKABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")

Place = tuple[str, ...]  # keys from the root of the schema


def read_schema(schema: object) -> dict[str, Any]:
    """`schema` without its annotations. UserError for an unknown keyword, a wrong value or too much of anything."""
    if not isinstance(schema, Mapping):
        refuse((), f"is {_kind(schema)}", expected="an object")
    reader = _Reader()
    # an id only names the whole: references are within the document
    root = {key: value for key, value in schema.items() if key not in ("$id", "id")}
    cleaned = reader.read(root, ())
    reader.check_references()
    reader.check_costs()
    size = len(json.dumps(cleaned))
    if size > MAX_CHARS:
        refuse((), f"has {size} characters", expected=f"at most {MAX_CHARS}")
    return cleaned


def refuse(place: Place, what: str, *, expected: str | None = None, fix: str | None = None) -> NoReturn:
    """UserError for the part of a schema that stands at `place`."""
    path = "/".join(("#", *place))
    raise UserError(
        what, field=f"schema {path if len(path) <= 200 else path[:200] + '...'}", expected=expected, fix=fix
    )


class _Reader:
    """Walks a schema once; remembers where schemas stand, so that no reference leads into anything else."""

    def __init__(self) -> None:
        self._places: set[Place] = set()
        self._references: list[tuple[str, Place]] = []
        self._patterns: set[str] = set()
        self._divisors: list[Decimal] = []
        self._joint: Place | None = None  # where schemas hold at once

    def read(self, schema: object, place: Place, depth: int = 0) -> Any:
        """The schema at `place` without its annotations."""
        if depth > MAX_DEPTH:
            refuse(
                place[:8], f"is nested more than {MAX_DEPTH} deep", fix="name inner schemas in $defs and refer to them"
            )
        self._places.add(place)
        if len(self._places) > MAX_SCHEMAS:
            refuse(place, f"is schema number {len(self._places)}", expected=f"at most {MAX_SCHEMAS}")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            refuse(place, f"is {_kind(schema)}", expected="a schema: an object, true or false")
        if _joins(schema):
            self._joint = place
        return {
            keyword: self._keyword(keyword, value, (*place, str(keyword)), depth)
            for keyword, value in schema.items()
            if keyword not in ANNOTATIONS
        }

    def _keyword(self, keyword: object, value: Any, place: Place, depth: int) -> Any:
        if keyword in ("properties", "$defs", "definitions"):
            _check(place, isinstance(value, Mapping), value, "an object of schemas")
            _check_size(place, value, MAX_PROPERTIES)
            return {str(name): self.read(inner, (*place, str(name)), depth + 1) for name, inner in value.items()}
        if keyword in ("items", "additionalProperties"):
            _check(place, isinstance(value, Mapping | bool), value, "a schema (for one per place: prefixItems)")
            return self.read(value, place, depth + 1)
        if keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
            _check(place, isinstance(value, list) and len(value) > 0, value, "a list of at least one schema")
            _check_size(place, value)
            return [self.read(inner, (*place, str(number)), depth + 1) for number, inner in enumerate(value)]
        if keyword == "$ref":
            _check(place, isinstance(value, str), value, "a text")
            self._references.append((value, place))
            return value
        check = CHECKS.get(str(keyword))
        if check is None:
            names = (*CHECKS, "properties", "items", "anyOf", "additionalProperties")
            close = [] if keyword in NOT_HELD else nearest(str(keyword), names)
            fix = f"did you mean {close[0]!r}?" if close else "leave it out"
            refuse(place, f"keyword {str(keyword)[:100]!r} is not supported", fix=fix)
        check(place, value)
        if keyword in ("pattern", "format"):
            self._patterns.add(value)
        elif keyword == "multipleOf":
            self._divisors.append(Decimal(str(value)).normalize())
        return value

    def check_costs(self) -> None:
        """UserError for what takes too long to compile, as measured."""
        steps = [_digits(divisor, _decimals(divisor)) for divisor in self._divisors]
        if sum(steps) > MAX_STEPS:
            refuse((), f"its multipleOf have {sum(steps)} steps", expected=f"at most {MAX_STEPS} together")
        if self._joint is None:
            return
        if len(self._patterns) > MAX_JOINED:
            refuse(
                self._joint,
                f"joins schemas, and there are {len(self._patterns)} patterns and formats",
                expected=f"at most {MAX_JOINED} then",
            )
        decimals = max(map(_decimals, self._divisors), default=0)
        common = math.lcm(*(_digits(divisor, decimals) for divisor in self._divisors))
        if common > MAX_STEPS:
            refuse(
                self._joint, f"joins schemas, and their multipleOf meet at {common}", expected=f"at most {MAX_STEPS}"
            )

    def check_references(self) -> None:
        """UserError for a reference to another document, or to what is no schema in this one."""
        for reference, place in self._references:
            start, *keys = reference.split("/")
            target = tuple(unquote(key).replace("~1", "/").replace("~0", "~") for key in keys)
            if start != "#" or target not in self._places:
                refuse(
                    place,
                    f"refers to {reference[:100]!r}",
                    expected="a schema in this document, such as '#/$defs/name'",
                )


def _joins(schema: Mapping[Any, Any]) -> bool:
    """Two parts of `schema` may both say something of one and the same text or number."""
    combining = [key for key in ("allOf", "anyOf", "oneOf", "$ref") if key in schema]
    speaking = [key for key in SPEAKING if key in schema]
    branches = schema.get("allOf")
    several = isinstance(branches, list) and len(branches) > 1
    return several or (bool(combining) and len(combining) + len(speaking) > 1)


def _decimals(number: Decimal) -> int:
    exponent = number.as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _digits(number: Decimal, decimals: int) -> int:
    """`number` in units of its last decimal."""
    return int(number.scaleb(decimals))


def _check(place: Place, holds: bool, value: object, expected: str) -> None:
    if not holds:
        refuse(place, f"is {_kind(value)}", expected=expected)


def _check_size(place: Place, values: Sized, most: int = MAX_OPTIONS) -> None:
    if len(values) > most:
        refuse(place, f"has {len(values)} entries", expected=f"at most {most}")


def _kind(value: object) -> str:
    """A value as a message may show it."""
    if isinstance(value, Mapping | list):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    shown = json.dumps(value) if isinstance(value, str | bool | None) else repr(value)
    return shown if len(shown) <= 60 else shown[:60] + "..."


# --- keywords whose value is no schema ---------------------------------------------------------------------------


def _type(place: Place, value: Any) -> None:
    names = value if isinstance(value, list) and value else [value]
    _check(place, all(isinstance(name, str) and name in TYPES for name in names), value, f"of {', '.join(TYPES)}")


def _constant(place: Place, value: Any, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        refuse(place[:8], f"is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping | list):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in pairs:
            _constant((*place, str(key)), inner, depth + 1)
    elif isinstance(value, str):
        _check(place, not UNSPEAKABLE.search(value), value, "a text without control characters")
    elif value is not None and not isinstance(value, bool):
        _number(place, value)


def _enum(place: Place, value: Any) -> None:
    _check(place, isinstance(value, list) and len(value) > 0, value, "a list of at least one value")
    _check_size(place, value)
    _constant(place, value)


def _required(place: Place, value: Any) -> None:
    _check(place, isinstance(value, list) and all(isinstance(name, str) for name in value), value, "a list of names")
    _check_size(place, value)


def _count(place: Place, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    _check(place, whole and 0 <= value <= MAX_COUNT, value, f"a whole number from 0 to {MAX_COUNT}")


def _number(place: Place, value: Any) -> None:
    holds = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER
    _check(place, holds, value, "a number from -2^53 to 2^53")


def _divisor(place: Place, value: Any) -> None:
    _number(place, value)
    _check(place, value > 0 and math.isfinite(value), value, "a number above 0")


def _pattern(place: Place, value: Any) -> None:
    holds = isinstance(value, str) and len(value) <= MAX_PATTERN
    _check(place, holds, value, f"a regular expression of at most {MAX_PATTERN} characters")


def _format(place: Place, value: Any) -> None:
    _check(place, isinstance(value, str) and value in FORMATS, value, f"one of {', '.join(FORMATS)}")


CHECKS: Mapping[str, Callable[[Place, Any], None]] = MappingProxyType(
    {
        "type": _type,
        "const": _constant,
        "enum": _enum,
        "required": _required,
        "pattern": _pattern,
        "format": _format,
        "multipleOf": _divisor,
        **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _count),
        **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _number),
    }
)

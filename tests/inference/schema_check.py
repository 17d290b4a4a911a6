"""Does a value fit a JSON schema? The plain reading of the keywords that the grammars know; a test's oracle."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

KINDS: dict[str, tuple[type, ...]] = {
    "array": (list,),
    "boolean": (bool,),
    "integer": (int,),
    "null": (type(None),),
    "number": (int, float),
    "object": (dict,),
    "string": (str,),
}


def violations(value: Any, schema: Any, root: Any = None) -> list[str]:
    """The keywords of `schema` that `value` does not keep, empty when it fits."""
    if isinstance(schema, bool):
        return [] if schema else ["false"]
    root = schema if root is None else root
    return [key for key, wanted in schema.items() if not holds(key, wanted, value, schema, root)]


def is_kind(value: Any, name: str) -> bool:
    return isinstance(value, KINDS[name]) and (name == "boolean" or not isinstance(value, bool))


def same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def holds(key: str, wanted: Any, value: Any, schema: Any, root: Any) -> bool:
    def fits(inner: Any, part: Any) -> bool:
        return violations(part, inner, root) == []

    match key:
        case "type":
            return any(is_kind(value, name) for name in ([wanted] if isinstance(wanted, str) else wanted))
        case "const":
            return same(value, wanted)
        case "enum":
            return any(same(value, option) for option in wanted)
        case "anyOf":
            return any(fits(inner, value) for inner in wanted)
        case "oneOf":
            return sum(fits(inner, value) for inner in wanted) == 1
        case "allOf":
            return all(fits(inner, value) for inner in wanted)
        case "$ref":
            target = root
            for part in wanted.split("/")[1:]:
                target = target[part]
            return fits(target, value)
        case "$defs":
            return True
    if isinstance(value, dict):
        return of_object(key, wanted, value, schema, fits)
    if isinstance(value, list):
        return of_array(key, wanted, value, schema, fits)
    if isinstance(value, str):
        return of_string(key, wanted, value)
    if is_kind(value, "number"):
        return of_number(key, wanted, value)
    return True


def of_object(key: str, wanted: Any, value: dict[str, Any], schema: Any, fits: Any) -> bool:
    match key:
        case "properties":
            return all(fits(inner, value[name]) for name, inner in wanted.items() if name in value)
        case "required":
            return all(name in value for name in wanted)
        case "additionalProperties":
            return all(fits(wanted, part) for name, part in value.items() if name not in schema.get("properties", {}))
    return True


def of_array(key: str, wanted: Any, value: list[Any], schema: Any, fits: Any) -> bool:
    match key:
        case "prefixItems":
            return all(fits(inner, part) for inner, part in zip(wanted, value, strict=False))
        case "items":
            return all(fits(wanted, part) for part in value[len(schema.get("prefixItems", ())) :])
        case "minItems":
            return len(value) >= wanted
        case "maxItems":
            return len(value) <= wanted
    return True


def of_string(key: str, wanted: Any, value: str) -> bool:
    match key:
        case "minLength":
            return len(value) >= wanted
        case "maxLength":
            return len(value) <= wanted
        case "pattern":
            return re.search(wanted, value) is not None
    return True


def of_number(key: str, wanted: Any, value: float) -> bool:
    match key:
        case "minimum":
            return value >= wanted
        case "maximum":
            return value <= wanted
        case "exclusiveMinimum":
            return value > wanted
        case "exclusiveMaximum":
            return value < wanted
        case "multipleOf":
            return Fraction(str(value)) % Fraction(str(wanted)) == 0
    return True

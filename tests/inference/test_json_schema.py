"""Schemas from outside: what is understood passes unchanged, everything else is named with its place."""

from __future__ import annotations

from typing import Any

import pytest

from alpaca_lora.errors import UserError
from alpaca_lora.inference.json_schema import (
    ANNOTATIONS,
    FORMATS,
    MAX_CHARS,
    MAX_DEPTH,
    MAX_JOINED,
    MAX_OPTIONS,
    MAX_PATTERN,
    MAX_PROPERTIES,
    MAX_SCHEMAS,
    read_schema,
)

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20, "pattern": "^[A-Z]"},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150.0, "multipleOf": 1},
        "tags": {"type": "array", "items": {"enum": ["a", 1, None, [1, {"b": True}]]}, "minItems": 1, "maxItems": 3},
        "born": {"type": ["string", "null"], "format": "date"},
        "place": {"anyOf": [{"$ref": "#/$defs/place"}, {"const": "nowhere"}, True]},
        "pair": {"type": "array", "prefixItems": [{"type": "number"}, {"type": "boolean"}], "items": False},
        "title": {"allOf": [{"type": "string"}], "oneOf": [{"const": "Dr"}, {"const": "Ms"}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"place": {"properties": {"~/odd name": {"$ref": "#/$defs/place/properties/~0~1odd%20name"}}}},
}  # fmt: skip


def test_what_is_understood_passes_unchanged() -> None:
    assert read_schema(PERSON) == PERSON


def test_annotations_are_left_out_and_names_that_look_like_them_are_not() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.com/x",
        "title": "X",
        "description": "an x",
        "properties": {"description": {"type": "string", "title": "Description", "default": "none"}, "default": {}},
        "examples": [{"if": 1}],
    }
    assert read_schema(schema) == {"properties": {"description": {"type": "string"}, "default": {}}}
    assert read_schema(dict.fromkeys(ANNOTATIONS, 1)) == {}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def joined_by_reference(number: int) -> dict[str, Any]:
    parts = {str(i): {"pattern": str(i), "$ref": f"#/$defs/{i + 1}"} for i in range(number - 1)}
    return {"$ref": "#/$defs/0", "$defs": {**parts, str(number - 1): {"format": "date"}}}


def nested_value(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"if": {}}, "schema #/if: keyword 'if' is not supported"),
        ({"properties": {"a": {"propertyNames": {}}}}, "#/properties/a/propertyNames: keyword 'propertyNames' is not"),
        ({"uniqueItems": True}, "#/uniqueItems: keyword 'uniqueItems' is not supported"),
        ({"dependentRequired": {}}, "keyword 'dependentRequired' is not supported"),
        ({"items": {"$id": "x"}}, "#/items/$id: keyword '$id' is not supported"),
        ({"x-guidance": {"lenient": True}}, "#/x-guidance: keyword 'x-guidance' is not supported"),
        ({"requird": ["a"]}, "#/requird: keyword 'requird' is not supported, did you mean 'required'?"),
        ({"anyOf": [{"not": {}}]}, "#/anyOf/0/not: keyword 'not' is not supported"),
        ({"nullable": True}, "keyword 'nullable' is not supported, leave it out"),
        ({"patternProperties": {}}, "keyword 'patternProperties' is not supported, leave it out"),
        ([], "schema #: is a list of 0, expected an object"),
        ("x" * 100, "expected an object"),
        (None, "is null, expected an object"),
        ({"properties": []}, "#/properties: is a list of 0, expected an object of schemas"),
        ({"properties": {"a": 3}}, "#/properties/a: is 3, expected a schema"),
        ({"items": [{}, {}]}, "#/items: is a list of 2, expected a schema (for one per place: prefixItems)"),
        ({"anyOf": []}, "#/anyOf: is a list of 0"),
        ({"anyOf": {}}, "#/anyOf: is an object of 0"),
        ({"type": "text"}, '#/type: is "text", expected of array, boolean'),
        ({"type": []}, "#/type: is a list of 0"),
        ({"type": [["string"]]}, "#/type: is a list of 1"),
        ({"enum": []}, "#/enum: is a list of 0"),
        ({"enum": "a"}, '#/enum: is "a"'),
        ({"const": 2**60}, f"#/const: is {2**60}, expected a number from -2^53 to 2^53"),
        ({"enum": [1, {"a": [2, float("nan")]}]}, "#/enum/1/a/1: is nan"),
        ({"minimum": float("inf")}, "#/minimum: is inf"),
        ({"minimum": True}, "#/minimum: is true"),
        ({"multipleOf": 0}, "#/multipleOf: is 0, expected a number above 0"),
        ({"minLength": -1}, "#/minLength: is -1, expected a whole number from 0"),
        ({"maxItems": 10**9}, "#/maxItems: is 1000000000, expected a whole number from 0"),
        ({"maxItems": 1.5}, "#/maxItems: is 1.5"),
        ({"minLength": True}, "#/minLength: is true"),
        ({"required": "a"}, '#/required: is "a", expected a list of names'),
        ({"required": [1]}, "#/required: is a list of 1"),
        ({"pattern": 1}, "#/pattern: is 1"),
        ({"pattern": "a" * (MAX_PATTERN + 1)}, f"expected a regular expression of at most {MAX_PATTERN} characters"),
        ({"format": "regex"}, '#/format: is "regex", expected one of date, date-time'),
        ({"$ref": 1}, "#/$ref: is 1"),
        ({"$ref": "https://example.com/schema"}, "#/$ref: refers to 'https://example.com/schema', expected a"),
        ({"$ref": "file:///etc/passwd"}, "#/$ref: refers to 'file:///etc/passwd'"),
        ({"$ref": "#/$defs/missing"}, "#/$ref: refers to '#/$defs/missing'"),
        ({"$ref": "#/enum/0", "enum": [{"if": {}}]}, "#/$ref: refers to '#/enum/0'"),
        ({"properties": {"a": {"$ref": "#anchor"}}}, "#/properties/a/$ref: refers to '#anchor'"),
        (nested(MAX_DEPTH + 1), f"is nested more than {MAX_DEPTH} deep, name inner schemas in $defs and refer to them"),
        (nested(900), "is nested more than"),
        ({"const": nested_value(900)}, "is nested more than"),
        ({"enum": list(range(10_000))}, f"#/enum: has 10000 entries, expected at most {MAX_OPTIONS}"),
        ({"oneOf": [{}] * 10_000}, "#/oneOf: has 10000 entries"),
        ({"properties": {str(i): {} for i in range(MAX_PROPERTIES + 1)}}, "#/properties: has 501 entries"),
        ({"anyOf": [{"properties": {str(i): {} for i in range(400)}}] * 6}, f"expected at most {MAX_SCHEMAS}"),
        ({"multipleOf": 86_401}, "#: its multipleOf have 86401 steps, expected at most 20000 together"),
        ({"multipleOf": 1.23456}, "#: its multipleOf have 123456 steps"),
        ({"properties": {str(i): {"multipleOf": 997} for i in range(30)}}, "#: its multipleOf have 29910 steps"),
        ({"allOf": [{"multipleOf": 997}, {"multipleOf": 99.1}]}, "joins schemas, and their multipleOf meet at 9880270"),
        ({"allOf": [{"pattern": str(i)} for i in range(MAX_JOINED + 1)]}, "#: joins schemas, and there are 5 patterns"),
        (joined_by_reference(MAX_JOINED + 1), "#/$defs/3: joins schemas, and there are 5 patterns and"),
        ({"const": "a" * MAX_CHARS}, f"characters, expected at most {MAX_CHARS}"),
    ],
)  # fmt: skip
def test_everything_else_is_named_with_its_place(schema: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_schema(schema)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_known(name: str) -> None:
    assert read_schema({"format": name}) == {"format": name}


def test_many_patterns_side_by_side_are_no_trouble() -> None:
    apart = {"properties": {str(i): {"anyOf": [{"pattern": str(i)}, {"multipleOf": 100}]} for i in range(50)}}
    assert read_schema(apart) == apart
    one = {"properties": {str(i): {"allOf": [{"pattern": str(i)}], "title": "x", "type": "string"} for i in range(50)}}
    assert len(read_schema(one)["properties"]) == 50


def test_the_limits_leave_room() -> None:
    assert read_schema(nested(MAX_DEPTH)) == nested(MAX_DEPTH)
    many = {"enum": [str(i) for i in range(MAX_OPTIONS)]}
    assert read_schema(many) == many

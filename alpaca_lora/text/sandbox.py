"""Runs a Jinja template that somebody else wrote: no loader, no writing, and a budget of steps, time and size.

Jinja's immutable sandbox keeps a template away from Python's insides but not from loops without end or texts without
bounds. Here every loop body and macro counts a step, every operation that makes a text longer is asked for its size
first, and filters and methods that are not known to be harmless do not exist. Rendering is a pure function of its
arguments.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 200_000
MAX_SECONDS = 5.0
MAX_CHARS = 16_000_000  # of any one text or list that a template makes
MAX_TOTAL_CHARS = 256_000_000  # of all of them in one rendering
MAX_SOURCE_CHARS = 1_000_000
_MAX_BITS = 4_096
_STEPS_PER_CLOCK = 256
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int",
    "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
    "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper",
    "wordcount",
)  # fmt: skip
_STRING_METHODS = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace "
    "istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit "
    "rstrip split splitlines startswith strip swapcase title upper".split()
)
# the date that Llama 3.2's own template falls back to: a rendering may not depend on the day
_DATE = time.struct_time((2024, 7, 26, 0, 0, 0, 4, 208, 0))


class BudgetError(TemplateError):
    """The template asked for more steps, time or size than a template may."""


class _Budget:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.steps = 0
        self.total = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise BudgetError(f"more than {MAX_STEPS} steps of loops and macros")
        if self.steps % _STEPS_PER_CLOCK == 0 and time.monotonic() > self.deadline:
            raise BudgetError(f"more than {MAX_SECONDS:g} seconds")

    def grow(self, size: int) -> None:
        """Asked before (or right after) a text or list of that size is made."""
        self.total += size
        if size > MAX_CHARS or self.total > MAX_TOTAL_CHARS:
            raise BudgetError(f"a text of {size} characters, {self.total} in all")
        if time.monotonic() > self.deadline:
            raise BudgetError(f"more than {MAX_SECONDS:g} seconds")


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text in some templates; we find it ourselves and pass over the tag."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _CountSteps(NodeTransformer):
    """Puts a step into each loop and macro body and makes ``~`` ask for its size."""

    def _counted(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("step", [], node.lineno)).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_FilterBlock = _counted

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("bounded_concat", node.nodes, node.lineno)


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Expr:
    function = nodes.EnvironmentAttribute(name).set_lineno(line)  # cannot be shadowed by a template's variable
    call = nodes.Call(function, arguments, [], None, None)
    call.set_lineno(line)
    return call


class Sandbox(ImmutableSandboxedEnvironment):
    """One environment per template. Not for use by several threads at once."""

    intercepted_binops = frozenset({"*", "+", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[LoopControlExtension, _Generation]
        )
        self._budget = _Budget()
        self.concat = self._bounded_join  # type: ignore[assignment]
        known = self.filters | {"tojson": _to_json, "indent": _indent}
        self.filters = {name: self._bounded(name, known[name]) for name in (*_FILTERS, "tojson", "indent")}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime}

    def render(self, template: Any, **variables: Any) -> str:
        """The text. Raises TemplateError (also for what the template itself raises, and for the budget)."""
        self._budget = _Budget()
        try:
            return self._bounded_join(template.root_render_func(template.new_context(variables)))
        except TemplateError:
            raise
        except RecursionError as error:
            raise BudgetError("nested too deeply") from error
        except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
            raise TemplateError(f"{type(error).__name__}: {error}") from error

    def compile_source(self, source: str) -> Any:
        """The compiled template. Raises TemplateError."""
        if len(source) > MAX_SOURCE_CHARS:
            raise BudgetError(f"the template is longer than {MAX_SOURCE_CHARS} characters")
        try:
            return self.from_string(source)
        except TemplateError:
            raise
        except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
            raise TemplateError(f"cannot be compiled: {error or type(error).__name__}") from error

    # --- called out of the compiled template ---

    def step(self) -> str:
        self._budget.step()
        return ""

    def bounded_concat(self, *parts: Any) -> str:
        return self._bounded_join(str(part) for part in parts)

    def _bounded_join(self, parts: Iterable[str]) -> str:
        kept: list[str] = []
        size = 0
        for part in parts:
            size += len(part)
            if size > MAX_CHARS:
                break
            kept.append(part)
        self._budget.grow(size)
        return "".join(kept)

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that asks before it makes a text much longer, and counts what it made."""
        leading = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)  # keeps Jinja's mark of which argument it passes first
        def guarded(*arguments: Any, **named: Any) -> Any:
            if name == "replace":
                self._guard_replace(*arguments[leading:])
            result = function(*arguments, **named)
            return self._counted(result)

        return guarded

    def _counted(self, result: Any) -> Any:
        if isinstance(result, (str, list, tuple)):
            self._budget.grow(len(result))
        return result

    def _guard_replace(self, text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
        if isinstance(text, str) and isinstance(old, str) and isinstance(new, str) and len(new) > len(old):
            self._budget.grow(len(text) + (text.count(old) if old else len(text) + 1) * (len(new) - len(old)))

    def _guard_join(self, separator: str, parts: Any) -> list[Any]:
        """``parts`` as a list whose join is not too long."""
        kept = list(parts)
        self._budget.grow(sum(len(part) for part in kept if isinstance(part, str)) + len(separator) * len(kept))
        return kept

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _CountSteps().visit(tree)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for repeated, times in ((left, right), (right, left)):
                if isinstance(repeated, (str, list, tuple)) and isinstance(times, int):
                    self._budget.grow(len(repeated) * max(times, 0))
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self._budget.grow(len(left) + len(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("% on text is not available to templates")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _STRING_METHODS:
            return False
        return not isinstance(obj, (bytes, int, float)) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No ``str.format``: a width in it can be any number. Jinja would wrap it before it asks whether it is safe."""
        return None

    def call(self, context: Context, obj: Any, *arguments: Any, **named: Any) -> Any:  # type: ignore[override]
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            if obj.__name__ == "replace":
                self._guard_replace(owner, *arguments)
            elif obj.__name__ == "join" and arguments:
                arguments = (self._guard_join(owner, arguments[0]), *arguments[1:])
            return self._counted(super().call(context, obj, *arguments, **named))
        return super().call(context, obj, *arguments, **named)


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise BudgetError(f"a number of {bits} bits")


def _raise(message: str) -> None:
    raise TemplateError(str(message))


def _strftime(form: str) -> str:
    if len(form) > 100:
        raise BudgetError("a date format of more than 100 characters")
    return time.strftime(form, _DATE)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as transformers' templates expect it: not escaped for HTML."""
    if isinstance(indent, int) and indent > 16:
        raise BudgetError(f"an indent of {indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if len(width) > 64 if isinstance(width, str) else width > 64:
        raise BudgetError(f"an indent of {width}")
    return do_indent(str(text), width, first, blank)

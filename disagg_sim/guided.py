"""Grammars: texts that structured outputs, response formats and tool choices force, their values thrown from a seed.

Tool calls take the forms that vLLM decodes: bare arguments for a named tool, a JSON list for "required", Hermes tags
for "auto" (``openai/engine/serving.py`` ``_parse_tool_calls_from_content``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_sim.text import Dice, Guide
from disagg_sim.vocabulary import WORDS

_DEEPEST = 6


def json_guide(schema: Mapping[str, Any] | None) -> Guide:
    """JSON that fits ``schema``; any object for None."""
    return lambda dice: json.dumps(_value(schema or {"type": "object"}, schema or {}, dice, 0), ensure_ascii=False)


def choice_guide(choices: Sequence[str]) -> Guide:
    """One of ``choices``."""
    return lambda dice: choices[dice.throw(len(choices))]


def named_tool_guide(tool: Mapping[str, Any]) -> Guide:
    """The arguments of a tool that the request names."""
    return json_guide(tool["function"].get("parameters"))


def required_tool_guide(tools: Sequence[Mapping[str, Any]]) -> Guide:
    """A JSON list with one call."""

    def guide(dice: Dice) -> str:
        tool = tools[dice.throw(len(tools))]
        name = json.dumps(tool["function"]["name"], ensure_ascii=False)
        return f'[{{"name": {name}, "parameters": {named_tool_guide(tool)(dice)}}}]'

    return guide


def auto_tool_guide(tools: Sequence[Mapping[str, Any]]) -> Guide:
    """One call in Hermes tags."""

    def guide(dice: Dice) -> str:
        tool = tools[dice.throw(len(tools))]
        name = json.dumps(tool["function"]["name"], ensure_ascii=False)
        return f'<tool_call>\n{{"name": {name}, "arguments": {named_tool_guide(tool)(dice)}}}\n</tool_call>'

    return guide


TOOL_FORMS: dict[str, tuple[re.Pattern[str], str]] = {
    "required": (re.compile(r'^\[\{"name": ("(?:[^"\\]|\\.)*"), "parameters": '), "}]"),
    "auto": (re.compile(r'^<tool_call>\n\{"name": ("(?:[^"\\]|\\.)*"), "arguments": '), "}\n</tool_call>"),
}
"""How a call begins (group 1 is the name, as JSON) and ends, by tool choice."""


def parse_tool_call(mode: str, text: str) -> tuple[str, str] | None:
    """(name, arguments) of a complete call in ``text``, None when there is none."""
    head, tail = TOOL_FORMS[mode]
    match = head.match(text)
    if match is None or not text.endswith(tail):
        return None
    return json.loads(match.group(1)), text[match.end() : -len(tail)]


def _value(schema: Mapping[str, Any], root: Mapping[str, Any], dice: Dice, depth: int) -> Any:
    if "$ref" in schema:
        target: Any = root
        for part in str(schema["$ref"]).removeprefix("#/").split("/"):
            target = target.get(part, {}) if isinstance(target, Mapping) else {}
        schema = target if depth < _DEEPEST else {}
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][dice.throw(len(schema["enum"]))]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return _value(schema[key][0], root, dice, depth + 1)
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "object" or "properties" in schema:
        properties = schema.get("properties") or {"answer": {"type": "string"}}
        if depth >= _DEEPEST:
            properties = {}
        return {name: _value(inner, root, dice, depth + 1) for name, inner in properties.items()}
    if kind == "array":
        count = max(1, int(schema.get("minItems", 1))) if depth < _DEEPEST else 0
        return [_value(schema.get("items") or {"type": "string"}, root, dice, depth + 1) for _ in range(count)]
    if kind in ("integer", "number"):
        least = schema.get("minimum", 0)
        most = schema.get("maximum", least + 100)
        return int(least) + dice.throw(max(1, int(most) - int(least) + 1))
    if kind == "boolean":
        return bool(dice.throw(2))
    if kind == "null":
        return None
    return " ".join(WORDS[dice.throw(len(WORDS))].strip() for _ in range(3))

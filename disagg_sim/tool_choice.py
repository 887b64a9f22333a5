"""Tools on the chat route: what the request may ask for, and how generated text becomes tool calls."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from disagg_sim.api_error import InvalidBody
from disagg_sim.guided import (
    TOOL_FORMS,
    auto_tool_guide,
    named_tool_guide,
    parse_tool_call,
    required_tool_guide,
)
from disagg_sim.text import Guide

Mode = Literal["auto", "required", "named"]


@dataclass(frozen=True)
class ToolChoice:
    """The mode in force (None without tools), the grammar it puts on the answer, the tool that is named."""

    mode: Mode | None = None
    guide: Guide | None = None
    name: str | None = None

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> ToolChoice:
        """Read ``tools`` and ``tool_choice`` (vLLM's check_tool_usage).

        Raises:
            InvalidBody: for a choice that does not fit the tools.
        """
        tools = body.get("tools")
        if tools == []:
            raise InvalidBody("`tools` must not be an empty array.", param="tools")
        for tool in tools or ():
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise InvalidBody("[{'loc': ('body', 'tools'), 'msg': 'Field required'}]", param="tools")
        choice = body.get("tool_choice", "auto" if tools else None)
        if choice in (None, "none"):
            return cls()
        if not tools:
            raise InvalidBody("When using `tool_choice`, `tools` must be set.", param="tool_choice")
        if isinstance(choice, dict):
            function = choice.get("function")
            name = function.get("name") if isinstance(function, dict) else None
            for tool in tools:
                if tool["function"]["name"] == name:
                    return cls("named", named_tool_guide(tool), name)
            raise InvalidBody(
                "The tool specified in `tool_choice` does not match any of the specified `tools`", param="tool_choice"
            )
        if choice == "required":
            return cls("required", required_tool_guide(tools))
        if choice != "auto":
            raise InvalidBody(
                f"Invalid value for `tool_choice`: {choice}! "
                'Only named tools, "none", "auto" or "required" are supported.',
                param="tool_choice",
            )
        # A model that has just been given a tool's result answers in words.
        answered = bool(body["messages"]) and body["messages"][-1].get("role") == "tool"
        return cls("auto", None if answered else auto_tool_guide(tools))


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"chatcmpl-tool-{uuid.uuid4().hex[:16]}", "type": "function", "function": function}


def message_of(tools: ToolChoice, text: str) -> tuple[dict[str, Any], bool]:
    """The assistant's message for a complete text, and whether it calls a tool."""
    content: str | None = text
    calls: list[dict[str, Any]] = []
    if tools.mode == "named" and tools.name is not None:
        # Bare arguments, complete or not: a text that was cut off becomes arguments that are no JSON.
        calls, content = [_call(tools.name, text)], ""
    elif tools.mode is not None:
        found = parse_tool_call(tools.mode, text)
        if found is not None:
            calls, content = [_call(*found)], None if tools.mode == "auto" else ""
        elif tools.mode == "required":
            content = ""
    message = {
        "role": "assistant",
        "content": content,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": calls,
        "reasoning": None,
    }
    return message, bool(calls)


class ToolStream:
    """Turns one choice's text deltas into message deltas."""

    def __init__(self, tools: ToolChoice) -> None:
        self._tools = tools
        self._text = ""
        self._sent = 0
        self._start: int | None = None
        self.called = False

    def feed(self, text: str, *, final: bool) -> dict[str, Any] | None:
        """The delta to send now, None when the parser wants more text first."""
        mode = self._tools.mode
        if mode is None or (mode == "auto" and self._tools.guide is None):
            return {"content": text}
        self._text += text
        if mode == "named" and self._tools.name is not None:
            return self._arguments(self._tools.name, len(self._text), 0)
        head, tail = TOOL_FORMS[mode]
        match = head.match(self._text)
        if match is None:
            opening = "<tool_call>"
            undecided = not final and self._text[: len(opening)] == opening[: len(self._text)]
            return None if mode == "required" or undecided else self._plain()
        complete = final and self._text.endswith(tail)
        end = len(self._text) - len(tail)
        if not complete and end <= match.end() and self.called:
            return None
        return self._arguments(json.loads(match.group(1)), max(end, match.end()), match.end())

    def _plain(self) -> dict[str, Any]:
        text, self._text = self._text, ""
        return {"content": text}

    def _arguments(self, name: str, end: int, start: int) -> dict[str, Any] | None:
        if self._start is None:
            self._start = self._sent = start
        piece, self._sent = self._text[self._sent : end], max(self._sent, end)
        if self.called:
            return {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} if piece else None
        self.called = True
        call = _call(name, piece)
        return {"tool_calls": [{"index": 0, **call}]}

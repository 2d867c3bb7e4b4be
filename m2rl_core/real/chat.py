"""Qwen3's chat form for rows of real data, with the tokens that carry loss: what the assistant says, and its end marker.

The text is what Qwen3's own template gives, tools, tool calls and tool answers included. `thinking="every"` keeps the
reasoning of every assistant turn and is the released code's way (it renders each message alone); "last" keeps what the
template keeps in a finished conversation, the reasoning after the last question. An empty think block carries no loss.
Departures: tool answers in a row share one turn, as in the template; the line break after an end marker carries no loss.
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from m2rl_core.errors import StudyError

START, END = "<|im_start|>", "<|im_end|>"
THINK, THOUGHT = "<think>", "</think>"
EMPTY = f"{THINK}\n\n{THOUGHT}"
TOOLS_BEFORE = ("# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
                "You are provided with function signatures within <tools></tools> XML tags:\n<tools>")
TOOLS_AFTER = ("\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
               "<tool_call></tool_call> XML tags:\n<tool_call>\n"
               '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')
Span = tuple[str, bool]  # a text, and whether its tokens carry loss


def spans(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: Literal["every", "last"] = "every") -> list[Span]:
    """The conversation as texts that are tokenised one by one: joined, they are the template's own text.

    `messages` as `schema.messages` gives them. StudyError for no messages or another `thinking`.
    """
    if not messages or thinking not in ("every", "last"):
        raise StudyError("no messages to render" if not messages else f"thinking {thinking!r}: one of every, last")
    query = _last_query(messages)
    parts: list[Span] = _opening(messages[0], tools)
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "assistant":
            parts += _assistant(message, thinking == "every" or i > query, i == len(messages) - 1 or thinking == "every")
        elif role == "tool":
            follows = i > 0 and messages[i - 1]["role"] == "tool"
            more = i + 1 < len(messages) and messages[i + 1]["role"] == "tool"
            parts.append(("" if follows else f"{START}user", False))
            parts.append((f"\n<tool_response>\n{content}\n</tool_response>" + ("" if more else f"{END}\n"), False))
        elif role == "user" or i > 0:
            parts.append((f"{START}{role}\n{content}{END}\n", False))
    return _joined(parts)


def encode(tokenizer, messages: Sequence[dict], tools: Sequence[dict] = (),
           thinking: Literal["every", "last"] = "every") -> tuple[list[int], list[bool]]:
    """Token ids and which of them carry loss. StudyError for a tokenizer that has no tokens for Qwen3's marks."""
    check_tokenizer(tokenizer)
    ids: list[int] = []
    learn: list[bool] = []
    for text, flag in spans(messages, tools, thinking):
        told = tokenizer.encode(text, add_special_tokens=False)
        ids += told
        learn += [flag] * len(told)
    return ids, learn


def check_tokenizer(tokenizer) -> None:
    """StudyError, naming it, for a mark that is not one token: a text would then be cut where the model never cuts."""
    for mark in (START, END, THINK, THOUGHT):
        if len(tokenizer.encode(mark, add_special_tokens=False)) != 1:
            raise StudyError(f"tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}: {mark} is not "
                             f"one of its tokens, and Qwen3's chat form needs it: take the tokenizer of Qwen3-4B")


def _opening(first: dict, tools: Sequence[dict]) -> list[Span]:
    said = first["content"] if first["role"] == "system" else None
    if not tools:
        return [] if said is None else [(f"{START}system\n{said}{END}\n", False)]
    listed = "".join("\n" + _json(tool) for tool in tools)
    return [(f"{START}system\n{'' if said is None else said + chr(10) * 2}{TOOLS_BEFORE}{listed}{TOOLS_AFTER}{END}\n", False)]


def _assistant(message: dict, think: bool, even_empty: bool) -> list[Span]:
    """One assistant turn. `think`: with its reasoning; `even_empty`: with a think block also where there is none."""
    reasoning, content = message.get("reasoning_content"), message["content"]
    if reasoning is None:
        reasoning = ""
        if THOUGHT in content:
            reasoning = content.split(THOUGHT)[0].rstrip("\n").split(THINK)[-1].lstrip("\n")
            content = content.split(THOUGHT)[-1].lstrip("\n")
    parts: list[Span] = [(f"{START}assistant\n", False)]
    if think and (reasoning or even_empty):
        inside = reasoning.strip("\n")
        parts.append((f"{THINK}\n{inside}\n{THOUGHT}", True) if inside else (EMPTY, False))
        parts.append(("\n\n" + content.lstrip("\n"), True))
    else:
        parts.append((content, True))
    for i, call in enumerate(message.get("tool_calls", ())):
        arguments = call["arguments"] if isinstance(call["arguments"], str) else _json(call["arguments"])
        parts.append((("\n" if content or i else "")
                      + f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>', True))
    return [*parts, (END, True), ("\n", False)]


def _last_query(messages: Sequence[dict]) -> int:
    """Index of the last user message that is no tool's answer; the last message where there is none."""
    for i in range(len(messages) - 1, -1, -1):
        content = messages[i]["content"]
        if messages[i]["role"] == "user" and not (
                content.startswith("<tool_response>") and content.endswith("</tool_response>")):
            return i
    return len(messages) - 1


def _joined(parts: list[Span]) -> list[Span]:
    """Neighbours of the same kind as one text, so that a tokenizer may join across them as it would in the whole."""
    joined: list[Span] = []
    for text, flag in parts:
        if joined and joined[-1][1] == flag:
            joined[-1] = (joined[-1][0] + text, flag)
        elif text:
            joined.append((text, flag))
    return joined


def _json(value) -> str:
    """As the template's tojson writes it."""
    return json.dumps(value, ensure_ascii=False)

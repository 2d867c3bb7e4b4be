"""Qwen3's chat form and loss mask for real rows, by hand on a toy tokenizer and against a template of the same meaning."""
from __future__ import annotations

import pytest

from m2rl_core.real import chat, sft_blend
from m2rl_core.real.questions import Statements

# Qwen3's rules as a template: reasoning after the last question only, a think block on the last turn in any case, tool
# answers in one user turn, arguments as they are given.
QWEN3 = """\
{%- macro call_text(call, lead) %}{{ '\\n' if lead }}{{ '<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}\
{{- call.arguments if call.arguments is string else call.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endmacro %}
{%- set query = namespace(at=messages | length - 1, open=true) %}
{%- for m in messages[::-1] %}
{%- if query.open and m.role == 'user' and not (m.content.startswith('<tool_response>')
       and m.content.endswith('</tool_response>')) %}
{%- set query.at = messages | length - 1 - loop.index0 %}{% set query.open = false %}
{%- endif %}
{%- endfor %}
{%- if tools %}
{{- '<|im_start|>system\\n' ~ (messages[0].content ~ '\\n\\n' if messages[0].role == 'system' else '') }}
{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with function '
    ~ 'signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within '
    ~ '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n'
    ~ '</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' ~ messages[0].content ~ '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set thought = m.reasoning_content or '' %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > query.at and (loop.last or thought) %}
{{- '<think>\\n' ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' ~ m.content.lstrip('\\n') }}
{%- else %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}{{ call_text(call, m.content or not loop.first) }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' }}
{{- '\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response>' }}
{{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}
{%- endif %}
{%- endfor %}"""


def user(text):
    return {"role": "user", "content": text}


def says(text, thought="", *calls):
    return {"role": "assistant", "content": text} | ({"reasoning_content": thought} if thought else {}) | (
        {"tool_calls": list(calls)} if calls else {})


def tool(text):
    return {"role": "tool", "content": text}


TOOL = {"type": "function", "function": {"name": "find", "description": "Finds é.", "parameters": {
    "type": "object", "properties": {"who": {"type": "string"}}}}}
FIND = {"name": "find", "arguments": {"who": "Zoë", "n": 1}}
AS_TEXT = {"name": "find", "arguments": '{"who":"Bo"}'}
SYSTEM = {"role": "system", "content": "Be brief."}
TALKS = {
    "one answer": [user("2+2?"), says("4", "2+2=4")],
    "no reasoning": [user("2+2?"), says("4")],
    "two questions": [SYSTEM, user("2+2?"), says("4", "2+2=4"), user("3+3?"), says("6", "\n3+3=6\n")],
    "an early answer without reasoning": [user("2+2?"), says("4"), user("3+3?"), says("6", "3+3=6")],
    "tools": [user("who?"), says("Let me see.", "look", FIND, AS_TEXT), tool("{}"), tool("[1]"), says("", "again", FIND),
              tool("Zoë"), says("It is Zoë.", "found")],
    "a call without reasoning": [SYSTEM, user("who?"), says("", "", FIND), tool("Zoë"), says("Zoë")],
    "a late system turn": [user("a"), SYSTEM, says("b", "c")],
}


def learnt(words, messages, tools=(), thinking="every"):
    """The texts of the runs of tokens that carry loss."""
    ids, flags = chat.encode(words, messages, tools, thinking)
    runs, run = [], []
    for token, flag in [*zip(ids, flags, strict=True), (0, False)]:
        if flag:
            run.append(token)
        elif run:
            runs.append(words.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("tools", [(), (TOOL, TOOL)], ids=["without tools", "with tools"])
@pytest.mark.parametrize("name", TALKS)
def test_the_text_is_the_templates(words, name, tools):
    """Faults: a space, line break, quote or letter that differs from what the model is later asked with."""
    text = words.apply_chat_template(TALKS[name], tools=list(tools) or None, tokenize=False, chat_template=QWEN3)
    assert "".join(part for part, _ in chat.spans(TALKS[name], tools, "last")) == text


def test_with_every_thinking_each_turn_is_rendered_as_if_it_were_the_last(words):
    """Fault: the reasoning of earlier turns lost, which the released code trains on."""
    for name in ("two questions", "tools"):
        text = "".join(part for part, _ in chat.spans(TALKS[name], (), "every"))
        for message in TALKS[name]:
            if message["role"] == "assistant":
                alone = words.apply_chat_template([user("q"), message], tokenize=False, chat_template=QWEN3)
                assert alone.removeprefix("<|im_start|>user\nq<|im_end|>\n") in text
    assert "2+2=4" not in "".join(part for part, _ in chat.spans(TALKS["two questions"], (), "last"))


def test_only_the_assistants_words_and_their_end_carry_loss(words):
    """Faults: loss on a question, a tool's answer or a tool's description; none on reasoning, calls or the end marker."""
    assert learnt(words, TALKS["one answer"]) == ["<think>\n2+2=4\n</think>\n\n4<|im_end|>"]
    assert learnt(words, TALKS["tools"], (TOOL,)) == [
        '<think>\nlook\n</think>\n\nLet me see.\n<tool_call>\n{"name": "find", "arguments": {"who": "Zoë", "n": 1}}\n'
        '</tool_call>\n<tool_call>\n{"name": "find", "arguments": {"who":"Bo"}}\n</tool_call><|im_end|>',
        '<think>\nagain\n</think>\n\n<tool_call>\n{"name": "find", "arguments": {"who": "Zoë", "n": 1}}\n</tool_call>'
        '<|im_end|>',
        "<think>\nfound\n</think>\n\nIt is Zoë.<|im_end|>"]


def test_an_empty_think_block_carries_no_loss(words):
    """Fault: a model that is taught not to think by rows without reasoning."""
    assert learnt(words, TALKS["no reasoning"]) == ["\n\n4<|im_end|>"]
    assert learnt(words, TALKS["an early answer without reasoning"]) == [
        "\n\n4<|im_end|>", "<think>\n3+3=6\n</think>\n\n6<|im_end|>"]
    assert learnt(words, TALKS["an early answer without reasoning"], thinking="last") == [
        "4<|im_end|>", "<think>\n3+3=6\n</think>\n\n6<|im_end|>"]


def test_reasoning_inside_of_the_content_is_the_same_as_beside_it():
    """Fault: rows that have <think> in their content end with two think blocks."""
    inside = [user("2+2?"), says("<think>\n2+2=4\n</think>\n\n4")]
    assert chat.spans(inside) == chat.spans(TALKS["one answer"])


@pytest.mark.parametrize("name", TALKS)
def test_tokens_are_cut_as_in_the_whole_text(words, name):
    """Fault: a border inside of a word, so that training sees tokens that sampling never gives."""
    ids, flags = chat.encode(words, TALKS[name], (TOOL,))
    whole = "".join(part for part, _ in chat.spans(TALKS[name], (TOOL,)))
    assert ids == words.encode(whole, add_special_tokens=False) and len(flags) == len(ids) and any(flags)


def test_a_row_of_the_blend_can_be_encoded(words):
    """Fault: a stored row whose calls the chat form cannot read."""
    call = {"type": "function", "function": {"name": "find", "arguments": {"who": "Zoë"}}}
    row = {"messages": [user("who?"), {"role": "assistant", "content": None, "tool_calls": [call]},
                        {"role": "tool", "content": [1]}, says("Zoë")], "tools": '[{"type": "function", "name": "find"}]'}
    made = sft_blend.clean(row, "here", Statements(lambda repo: pytest.fail(repo)))
    assert learnt(words, made["messages"], made["tools"])[0] == (
        '\n\n<tool_call>\n{"name": "find", "arguments": {"who": "Zoë"}}\n</tool_call><|im_end|>')


def test_what_is_encoded_can_be_trained_on(words, policy):
    """Fault: ids and flags of another form than `sft.masked_loss` takes."""
    import math

    import toy_policy
    from m2rl_core.training.sft import masked_loss
    student = toy_policy.clone(policy)
    student.requires_grad()
    row = chat.encode(words, TALKS["tools"], (TOOL,))
    loss, tokens = masked_loss(student, [row])
    assert math.isfinite(loss) and tokens == sum(row[1]) > 20
    assert all(weight.grad is not None for weight in student.weights.values())


def test_a_tokenizer_without_the_marks_is_named(words):
    """Fault: <think> cut into letters, which the model would learn to spell."""
    class Letters:
        name_or_path = "letters"

        def encode(self, text, add_special_tokens):
            return list(map(ord, text))

    with pytest.raises(ValueError) as caught:
        chat.encode(Letters(), TALKS["one answer"])
    assert str(caught.value) == ("tokenizer letters: <|im_start|> is not one of its tokens, and Qwen3's chat form needs it: "
                                 "take the tokenizer of Qwen3-4B")
    with pytest.raises(ValueError, match="no messages to render"):
        chat.spans([])
    with pytest.raises(ValueError, match="thinking 'some': one of every, last"):
        chat.spans(TALKS["one answer"], (), "some")

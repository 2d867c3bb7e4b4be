"""Our reward in TRL: `GRPOTrainer(reward_funcs=m2rl_core.adapters.trl.reward)`, or `trl grpo --reward_funcs` with its path.

TRL 1.16 calls `f(prompts=, completions=, completion_ids=, **columns, trainer_state=, log_extra=, log_metric=)` and takes a
number for each completion (huggingface/trl: trl/trainer/grpo_trainer.py, `_calculate_rewards`; the dotted path:
trl/scripts/grpo.py). A completion is a text, or the messages that followed a prompt of messages. A message that TRL has
parsed, as it does where it is given tools, is put together again; thoughts that it dropped because they were empty stay
lost there, and such an answer fails the format gate.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from m2rl_core.adapters import scoring
from m2rl_core.domains import THINK_END


def reward(prompts: Sequence, completions: Sequence, **columns) -> list[float]:
    """The score of each completion, in [0, 1], in order; StudyError for a data set of another make.

    Where TRL can log, the mean reward of each domain, and how many answers broke a verifier, become metrics.
    """
    texts = columns.get(scoring.KEY) or [None] * len(completions)
    rows = [scoring.row_of({scoring.KEY: text}, "TRL's data set (column)") for text in texts]
    found = scoring.verdicts(rows, [_turns(row, said) for row, said in zip(rows, completions, strict=True)])
    if log_metric := columns.get("log_metric"):
        for domain in sorted({row.domain for row in rows}):
            scores = [verdict.score for row, verdict in zip(rows, found, strict=True) if row.domain == domain]
            log_metric(f"reward/{domain}", sum(scores) / len(scores))
        log_metric("verifier_failed", float(sum(verdict.failed for verdict in found)))
    return [verdict.score for verdict in found]


def _turns(row, said: str | Sequence[Mapping]) -> list[str]:
    if isinstance(said, str):
        return scoring.turns_of(row, said)
    return [turn for message in said if message.get("role") == "assistant" for turn in scoring.turns_of(row, _text(message))]


def _text(message: Mapping) -> str:
    """What the policy said, from a message with or without thoughts and tool calls of their own."""
    content = message.get("content") or ""
    if not isinstance(content, str):  # parts, as multimodal models have them
        content = "".join(part.get("text", "") for part in content)
    thought = message.get("reasoning_content") or message.get("thinking")
    parts = [f"<think>\n{thought}\n{THINK_END}\n\n{content}" if thought else content]
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        parts.append(f"<tool_call>\n{json.dumps({key: function[key] for key in ('name', 'arguments')})}\n</tool_call>")
    return "\n".join(parts)

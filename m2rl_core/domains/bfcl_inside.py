"""The program that runs inside the sandbox: one question as JSON on standard input, its answer as the last line printed.

`bfcl_wheel.py` hands this file's text over; the modules named here are those of the wheel `bfcl-eval`, imported already.
A program gets one question: the wheel keeps the state of an episode in its module's globals, and they go with the fork.
"""
from __future__ import annotations

import json
import sys

MODEL = "model"  # the wheel keeps an episode's state under this name and the item's


def ast(asked: dict) -> dict:
    """The wheel's verdict on the calls of one turn."""
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
    return said(ast_checker(asked["functions"], asked["calls"], asked["ground_truth"], asked["language"],
                            asked["category"], MODEL))


def multi_turn(asked: dict) -> dict:
    """The wheel's verdict on an episode: turns of steps of calls."""
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker
    return said(multi_turn_checker(asked["turns"], asked["ground_truth"], asked["item"], asked["category"], MODEL))


def execute(asked: dict) -> dict:
    """What the last step's calls give, after those of all steps before it."""
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import execute_multi_turn_func_call
    item, results = asked["item"], []
    for calls in asked["steps"]:
        results, _ = execute_multi_turn_func_call(
            calls, item["initial_config"], item["involved_classes"], MODEL, item["id"],
            long_context="long_context" in asked["category"])
    return {"results": results}


def said(found: dict) -> dict:
    """A verdict without the states that it was taken from."""
    errors = found.get("error_message") or found.get("error") or ""
    first = errors[0] if isinstance(errors, list) and errors else errors
    return {"valid": bool(found["valid"]), "error_type": str(found.get("error_type", "")), "error": str(first)[:400]}


def main() -> None:
    asked = json.load(sys.stdin)
    answer = {"ast": ast, "multi_turn": multi_turn, "execute": execute}[asked["kind"]](asked)
    print("\n" + json.dumps(answer))  # whatever a tool has printed stands on lines of its own


if __name__ == "__main__":
    main()

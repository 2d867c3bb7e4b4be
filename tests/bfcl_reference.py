"""Run as a file: the wheel's own runners and its handler for Qwen3 on the answers in standard input; prints their verdicts.

Only what they import of other packages is stubbed. Input: {"verdicts": [{category, entry, ground_truth, answers}, ...],
"tools": [[function, category], ...], "scores": {category: [accuracy, items]}}; output: the same keys: bools, tools, and the
overall score in percent. In a process of its own, since it evaluates calls as code.
"""
import atexit
import csv
import json
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path


def stub(name: str, **attributes) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes)


class Models(dict):
    def __missing__(self, name):
        return types.SimpleNamespace(underscore_to_dot=False, display_name=name, url="", org="", license="", input_price=None,
                                     output_price=None)


os.environ["BFCL_PROJECT_ROOT"] = folder = tempfile.mkdtemp()
atexit.register(shutil.rmtree, folder)
stub("bfcl_eval.constants.model_config", MODEL_CONFIG_MAPPING=Models())
stub("bfcl_eval.model_handler.local_inference.base_oss_handler", OSSHandler=object)
stub("bfcl_eval.model_handler.parser.java_parser", parse_java_function_call=None)
stub("bfcl_eval.model_handler.parser.js_parser", parse_javascript_function_call=None)
stub("overrides", override=lambda function: function, final=lambda function: function)
stub("dotenv", load_dotenv=None)
stub("tenacity", **dict.fromkeys(("retry", "retry_if_exception_message", "retry_if_exception_type",
                                  "wait_random_exponential", "stop_after_attempt")))

from bfcl_eval.eval_checker import eval_runner as official  # noqa: E402
from bfcl_eval.model_handler import utils  # noqa: E402
from bfcl_eval.model_handler.local_inference.qwen_fc import QwenFCHandler  # noqa: E402
from bfcl_eval.model_handler.model_style import ModelStyle  # noqa: E402

LANGUAGES = {"java": "Java", "javascript": "JavaScript"}


def verdict(number: int, case: dict) -> bool:
    handler, category, name = QwenFCHandler.__new__(QwenFCHandler), case["category"], f"model{number}"
    result, prompt = [{"id": case["entry"]["id"], "result": case["answers"]}], [case["entry"]]
    truth, score = [{"ground_truth": case["ground_truth"]}], Path(folder)
    if category.startswith("multi_turn"):
        return official.multi_turn_runner(handler, result, prompt, truth, name, category, score)[0] == 1
    if category.endswith("relevance"):
        return official.relevance_file_runner(handler, result, prompt, name, category, score)[0] == 1
    return official.ast_file_runner(handler, result, prompt, truth, LANGUAGES.get(category, "Python"), category, name,
                                    score)[0] == 1


def tool(function: dict, category: str) -> dict:
    shown = utils.func_doc_language_specific_pre_processing([function], category)
    return utils.convert_to_tool(shown, utils.GORILLA_TO_OPENAPI, ModelStyle.OpenAI_Completions)[0]


def overall(scores: dict) -> float:
    table = {"model": {name: {"accuracy": score, "total_count": n} for name, (score, n) in scores.items()}}
    official.generate_leaderboard_csv(table, Path(folder))
    with (Path(folder) / "data_overall.csv").open() as file:
        return float(next(csv.DictReader(file))["Overall Acc"].rstrip("%"))


asked = json.load(sys.stdin)
said = {"verdicts": [verdict(i, case) for i, case in enumerate(asked["verdicts"])],
        "tools": [tool(*pair) for pair in asked["tools"]],
        "scores": overall(asked["scores"])}
print("\n" + json.dumps(said))

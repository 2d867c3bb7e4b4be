"""The official checkers of BFCL v3, from the wheel `bfcl-eval`, inside the sandbox: one question a fresh process.

The wheel asks for 27 packages at one numpy; its checkers and tools need mpmath alone, once the table of models, which
imports a client of every provider, is replaced by one that says of each model that it keeps the dots in names. What is
needed is copied into a folder of its own: neither the answers nor anything else of this environment is to be seen inside.
"""
from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from m2rl_core import sandbox
from m2rl_core.errors import StudyError

NAME, VERSION = "bfcl-eval", "2025.8.6.2"  # the last with v3's data and averaging
MEND = "pip install --no-deps -r requirements-nodeps.txt"
PARTS = ("constants/type_mappings.py", "eval_checker/ast_eval", "eval_checker/multi_turn_eval")
BACKENDS = ("gorilla_file_system", "math_api", "message_api", "posting_api", "ticket_api", "trading_bot", "travel_booking",
            "vehicle_control")
CHECKERS = "bfcl_eval.eval_checker"
MODULES = ("json", "mpmath", f"{CHECKERS}.ast_eval.ast_checker", f"{CHECKERS}.multi_turn_eval.multi_turn_checker",
           *(f"{CHECKERS}.multi_turn_eval.func_source_code.{name}" for name in BACKENDS))
MODELS = '''"""Stands for the wheel's table of models: names of functions keep their dots, as Qwen3's prompt shows them."""
from types import SimpleNamespace


class Models(dict):
    def __missing__(self, name):
        return SimpleNamespace(underscore_to_dot=False)


MODEL_CONFIG_MAPPING = Models()
'''
PROGRAM = Path(__file__).with_name("bfcl_inside.py")
SECONDS, OUTPUT = 5, 8 * 2**20  # of CPU for one question; bytes of an answer


def root() -> Path:
    """The installed wheel's folder; StudyError where it is missing or of another version."""
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None:
        raise StudyError(f"BFCL v3 needs {NAME}=={VERSION}, which is not installed: {MEND}")
    found = metadata.version("bfcl_eval")
    if found != VERSION:
        raise StudyError(f"BFCL v3 needs {NAME}=={VERSION}, but {found} is installed, whose data and rules are others: {MEND}")
    return Path(spec.submodule_search_locations[0])


def copy_to(folder: Path) -> None:
    """What the checkers need, as an importable tree in `folder`, for anybody on this machine to read."""
    wheel, package = root(), folder / "bfcl_eval"
    for part in PARTS:
        if (wheel / part).is_dir():
            shutil.copytree(wheel / part, package / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (package / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(wheel / part, package / part)
    (package / "constants" / "model_config.py").write_text(MODELS)
    for inner in ("", "constants", "eval_checker"):
        (package / inner / "__init__.py").touch()
    mpmath = importlib.util.find_spec("mpmath").submodule_search_locations[0]
    shutil.copytree(mpmath, folder / "mpmath", ignore=shutil.ignore_patterns("__pycache__", "tests"))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


@functools.cache
def _limits(pid: int) -> sandbox.Limits:
    """The sandbox's limits with a folder that lasts as long as this process."""
    folder = tempfile.mkdtemp(prefix="m2rl-bfcl-")
    atexit.register(_remove, pid, folder)
    copy_to(Path(folder))
    return sandbox.Limits(output_bytes=OUTPUT, folder=folder, modules=MODULES)


def _remove(pid: int, folder: str) -> None:
    if pid == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)


def ask(questions: Sequence[dict]) -> list[dict | str]:
    """The answer to each question (see `bfcl_inside`), in order; a text says why there is none.

    Each is answered by a process of its own: what one leaves behind in the wheel's globals never meets the next.
    StudyError where the wheel is missing, or bubblewrap: a model's arguments reach the wheel's `eval`.
    """
    box = sandbox.shared(_limits(os.getpid()))
    if box.kind != "bubblewrap":
        raise StudyError(f"BFCL v3 runs its checkers and tools inside bubblewrap, for which the {box.about} cannot stand: "
                         "apt-get install bubblewrap, and unset M2RL_SANDBOX")
    code = PROGRAM.read_text()
    programs = [sandbox.Program(code, (json.dumps(question),), SECONDS) for question in questions]
    return [_answer(outcome) for outcome in box.run(programs)]


def _answer(outcome: sandbox.Outcome) -> dict | str:
    said = outcome.outputs[0]
    return outcome.error.removeprefix("input 1: ") if said is None else json.loads(said.splitlines()[-1])

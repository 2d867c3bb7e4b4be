"""Notebooks executed in one process: what a kernel would run, without the seconds that a kernel of its own takes."""
from __future__ import annotations

import json
import os
import sys
import traceback

from m2rl_core.profile import repo_root
from m2rl_core.publishing.report import parameter_names


def execute(name: str, **parameters) -> list[tuple[str, str]]:
    """(source, what was shown or the error) of each code cell; ends at the first that fails, as "error: ..."."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    shell.showtraceback = lambda *args, **kwargs: None
    source = repo_root() / "notebooks" / f"{name}.ipynb"
    assert set(parameters) <= set(parameter_names(source))
    told = []
    for cell in json.loads(source.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        code = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", []):
            code += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
        with capture_output() as shown:
            result = shell.run_cell("from IPython.display import display\n" + code if not told else code)
        error = result.error_in_exec or result.error_before_exec
        if error:
            where = "".join(traceback.format_exception(error)[-3:])
            told.append((code, f"error: {type(error).__name__}: {error}\n{where}"))
            break
        parts = [str(out.data.get("text/markdown") or out.data.get("text/plain", "")) for out in shown.outputs]
        told.append((code, "\n".join([*parts, shown.stdout, str(result.result or "")])))
    return told


if __name__ == "__main__":
    os.environ["M2RL_ARTIFACTS"], profile, *names = sys.argv[1:]
    for name in names:
        told = execute(name, profile=profile)
        lines = [line for _, out in told for line in out.splitlines() if "Not run" in line or line.startswith("error")]
        print(f"== {name}: {len(told)} cells", *lines, told[-1][1] if told[-1][1].startswith("error") else "", sep="\n")

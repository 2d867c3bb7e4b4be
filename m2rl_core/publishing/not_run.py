"""In a notebook of a study with parts left out: a cell that needs such a part says "not run", and the next one goes on.

Each cell's code is put into a `try`; what it asks for in vain (`NotInStudy`, `NotMeasured`, `Missing`), and names that a
cell which was not run would have set, end it with one line in place of its output. Every other error stays one. Whole
studies of miniatures never have this installed; of the real benchmarks one may be out of reach.
"""
from __future__ import annotations

import ast

from IPython.display import Markdown, display

from m2rl_core.claims.evidence import Missing
from m2rl_core.metrics.measured import NotMeasured
from m2rl_core.study import NotInStudy

CALLED = "_m2rl_not_run"


def install(shell) -> None:
    """Let an IPython shell do so, once."""
    if CALLED not in shell.user_ns:
        shell.user_ns[CALLED] = Cells(shell.user_ns)
        shell.ast_transformers.append(Wrapped())


class Wrapped(ast.NodeTransformer):
    """A cell as `try: ...; except Exception as e: if not told(e, names): raise`, its last value shown as before."""

    def visit_Module(self, node: ast.Module) -> ast.Module:
        if not node.body:
            return node
        names = sorted({part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)})
        last = node.body[-1]
        if isinstance(last, ast.Expr):
            node.body[-1] = ast.copy_location(_parsed(f"{CALLED}.show(None)").body[0], last)
            node.body[-1].value.args = [last.value]
        guard = _parsed(f"try:\n pass\nexcept Exception as _error:\n if not {CALLED}.told(_error, {names!r}):\n"
                        "  raise").body[0]
        for part in (guard, *ast.walk(guard)):
            ast.copy_location(part, node.body[0])
        guard.body, node.body = node.body, [guard]
        return ast.fix_missing_locations(node)


class Cells:
    """What cells that were not run would have set, and why they were not."""

    def __init__(self, known: dict):
        self.known = known  # the notebook's variables
        self.unset: dict[str, str] = {}

    @staticmethod
    def show(value) -> None:
        if value is not None:
            display(value)

    def told(self, error: Exception, names: list[str]) -> bool:
        """Say why a cell is not run, where that is the reason for the error; its names count as unset from now on."""
        if isinstance(error, NotInStudy | NotMeasured | Missing):
            why = " ".join(str(error).split())
        elif isinstance(error, NameError) and error.name in self.unset:
            why = self.unset[error.name]
        else:
            return False
        self.unset |= dict.fromkeys(names, why)
        for name in names:  # what an earlier cell called so must not be taken for it
            self.known.pop(name, None)
        display(Markdown(f"*Not run: {why}.*"))
        return True


def _parsed(code: str) -> ast.Module:
    return ast.parse(code)

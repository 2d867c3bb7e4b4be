"""The table of known mistakes in notebook 2: each names a test that exists."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

from m2rl_core.views import mistakes


@pytest.mark.parametrize("test", sorted({test for _, _, test in mistakes.MISTAKES}))
def test_the_test_is_there(test):
    """Catches a test that was renamed or removed while the table goes on to promise it."""
    file, name = test.split("::")
    tree = ast.parse((Path(__file__).parent / f"{file}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_no_mistake_stands_twice():
    assert len({what for what, _, _ in mistakes.MISTAKES}) == len(mistakes.table())

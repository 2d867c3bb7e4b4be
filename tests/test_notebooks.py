"""The house rules of notebooks, read from the source files: nothing is executed here (test_reproduce.py does that)."""
import ast
import copy
import re

import nbformat
import pytest
from papermill.inspection import inspect_notebook

from m2rl_core.profile import load_profile, profile_names, repo_root
from m2rl_core.publishing.report import NOTEBOOKS, TRAIN, parameter_names
from m2rl_core.study import TRAINED

FOLDER = repo_root() / "notebooks"
PARAMETERS = {"profile": str, "model": str, "engine": str}
IMPORTS = {"m2rl_core", "numpy", "pandas", "torch", "IPython", "math"}
CELL, SETUP = 10, 16  # lines of code at most
VERDICT = "nbval-check-output"  # nbval compares the output of cells with this tag
# What may hold a digit in prose that reads a result: a formula, code, a name, the level of an interval, a reference.
ALLOWED = re.compile(r"""
    \$\$.*?\$\$ | \$[^$]*\$ | `[^`]*` | Qwen3-\d+B | \d-billion-parameter | BFCL\ v3
    | 95\ %(?=\ (?:interval|over|confid))
    | (?: Tables? | Figs?\. | Figures? | Eq\. | Sections? | Appendix | §§? ) \s* \d(?:\.\d)?
      (?: (?:,|\ to|\ and) \s* \d(?:\.\d)? )*
      (?! [\d%] | \.\d | \s*(?:%|points|nats|items) )
    | \bin\ 3\.[1-6]\b (?! \s*(?:%|points|nats) )""", re.X | re.S)


def notebook(name: str):
    """The source notebook of that name."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(name: str) -> list:
    """Its code cells."""
    return [cell for cell in notebook(name).cells if cell.cell_type == "code"]


def tagged(name: str, tag: str) -> list:
    """Its cells with this tag."""
    return [cell for cell in notebook(name).cells if tag in cell.metadata.get("tags", [])]


def typed_numbers(prose: str) -> list[str]:
    """Words with a digit that is no formula, no name, no reference and no level of an interval."""
    return re.findall(r"\S*\d\S*", ALLOWED.sub(" ", prose))


every = pytest.mark.parametrize("name", NOTEBOOKS)


def test_the_folder_holds_the_study_and_nothing_else():
    """Catches a notebook that no run executes, or that the runner expects in vain."""
    assert sorted(path.name for path in FOLDER.iterdir() if path.name[0] != ".") == sorted(
        f"{name}.ipynb" for name in NOTEBOOKS)


@every
def test_valid_and_stripped(name):
    """Catches outputs, counts and papermill's marks in the sources: results belong to reports/."""
    found = notebook(name)
    nbformat.validate(found)
    assert (found.nbformat, found.nbformat_minor) == (4, 5) and found.metadata.kernelspec.name == "python3"
    assert not set(found.metadata) - {"kernelspec", "language_info"}
    for cell in found.cells:
        assert not set(cell.metadata) - {"tags"}, f"{cell.id}: {dict(cell.metadata)}"
        assert cell.source.strip(), f"{cell.id} is empty"
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, f"{cell.id} is not stripped"


@every
def test_parameters_are_typed_literals_that_papermill_can_read(name):
    """Catches a value derived in the parameters cell (stale once papermill overrides its source), and a second '='
    on a line, even in the comment: papermill then no longer sees the parameter."""
    cells = tagged(name, "parameters")
    assert len(cells) == 1
    for node in ast.parse(cells[0].source).body:
        assert isinstance(node, ast.AnnAssign), f"untyped: {ast.unparse(node)}"
        assert isinstance(ast.literal_eval(node.value), PARAMETERS[node.target.id])
        assert node.annotation.id == PARAMETERS[node.target.id].__name__
    wanted = ["profile", "model", "engine"] if name == TRAIN else ["profile"]
    assert parameter_names(FOLDER / f"{name}.ipynb") == wanted
    seen = inspect_notebook(str(FOLDER / f"{name}.ipynb"))
    assert list(seen) == wanted
    assert all(value["help"] and value["inferred_type_name"] != "None" for value in seen.values())
    assert ast.literal_eval(seen["profile"]["default"]) == "smoke"  # nbval cannot choose another
    if name == TRAIN:
        assert ast.literal_eval(seen["model"]["default"]) in TRAINED and ast.literal_eval(seen["engine"]["default"]) == "local"


@pytest.mark.parametrize("profile", profile_names())
def test_every_profile_that_can_be_named_loads(profile):
    assert load_profile(profile).name == profile


@every
def test_code_only_calls_the_package(name):
    """Catches logic that drifts into notebooks, where no test reaches it: functions, long cells, magics, filters."""
    for cell in code_cells(name):
        tree = ast.parse(cell.source)  # a magic or a `!pip` is no Python
        setup = "start(profile" in cell.source
        assert len(cell.source.splitlines()) <= (SETUP if setup else CELL), f"{cell.id} is too long"
        for node in ast.walk(tree):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda | ast.Try
                                  | ast.While), f"{cell.id}: line {node.lineno} belongs into the package"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {part.split(".")[0] for part in names} <= IMPORTS, f"{cell.id}: imports {names}"
                assert setup, f"{cell.id}: imports stand in the set-up cell"
        for word in ("warnings", "filterwarnings", "get_ipython", "exec(", "eval(", "sys.path", "os.environ"):
            assert word not in cell.source, f"{cell.id}: {word}"


@every
def test_no_paths_of_one_machine(name):
    for cell in notebook(name).cells:
        assert not re.search(r"(?<![\w./)])(?:/|~/)(?:home|root|tmp|work|usr|mnt|var|data|opt)\b", cell.source), cell.id


@every
def test_the_set_up_names_the_section(name):
    """Catches a copied set-up cell that shows another section's card."""
    cells = [cell for cell in code_cells(name) if "start(profile" in cell.source]
    assert len(cells) == 1 and f'start(profile, "{name.split("_")[0]}")' in cells[0].source
    order = [cell.id for cell in code_cells(name)]
    assert order[:2] == [tagged(name, "parameters")[0].id, cells[0].id]


@every
def test_prose_begins_with_a_title_and_ends_with_limits(name):
    cells = notebook(name).cells
    assert re.match(rf"# {re.escape(name.split('_')[0])} \w.*\n\n\S.*\?", cells[0].source, re.S), "no question"
    assert "What the paper says" in cells[1].source
    assert cells[-1].cell_type == "markdown"
    assert re.match(r"## (What this does not show|Limits)\n\n\S", cells[-1].source)
    assert "TODO" not in "".join(cell.source for cell in cells)


@every
def test_prose_holds_no_result(name):
    """Catches a number that was typed while looking at one run: what is said of results must come from the results."""
    for cell in notebook(name).cells:
        if re.match(r"\*\*How to read|## (What this does not show|Limits)", cell.source):
            assert not typed_numbers(cell.source), f"{cell.id}: {typed_numbers(cell.source)}"


def test_typed_numbers_by_hand():
    bad = {"The merge reaches 61.2 %, the mix 58.": ["61.2", "58."], "12 of 30 items": ["12", "30"],
           "a gain of +3.4 points (Table 3)": ["+3.4"], "fell in 3.3 points": ["3.3"], "solves 95 % of them": ["95"],
           "Table 3 points up by 4": ["3", "4"], "KL is 0.02 nats in Fig. 4": ["0.02"], "r=-0.53": ["r=-0.53"]}
    for prose, found in bad.items():
        assert typed_numbers(prose) == found, prose
    for good in ("Decided in 3.3 (Tables 3 and 4, Figs. 6 to 8, Eq. 1, §3.6, Section 3.2).", "Where $J = 0.2$ and $r$",
                 "the 95 % interval", "notebook `3.2_train`", "Qwen3-4B is a 4-billion-parameter model"):
        assert typed_numbers(good) == [], good


@every
def test_nothing_but_house_tags(name):
    for cell in notebook(name).cells:
        assert set(cell.metadata.get("tags", [])) <= {"parameters", VERDICT}, cell.id


@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name[0] in "34"])
def test_verdicts_are_compared_when_a_report_is_checked(name):
    """Catches a verdict that a re-execution of the report could change unseen."""
    source = "\n".join(cell.source for cell in code_cells(name))
    judged = [cell for cell in code_cells(name)
              if re.search(r"verdicts\.(summary|table|counts|agreement)\(", cell.source)]
    assert ("publish_claims" in source) == bool(judged)
    assert [cell.id for cell in tagged(name, VERDICT)] == [cell.id for cell in judged]


def test_no_two_notebooks_publish_one_name():
    """Catches a picture or a table that overwrites another notebook's in the report."""
    found = [(what, *re.findall(r'"([^"]+)"', given)[:1]) for name in NOTEBOOKS for cell in code_cells(name)
             for what, given in re.findall(r"publish_(figure|table)\((f?\"[^\"]+\")", cell.source)]
    assert len(found) > 30 and len(set(found)) == len(found), sorted(each for each in found if found.count(each) > 1)


def test_a_copy_with_a_fault_is_found(tmp_path, monkeypatch):
    """Catches rules that cannot fail: each fault planted into a good notebook breaks the rule meant for it."""
    faults = {
        test_valid_and_stripped: lambda cells: cells[3].update(execution_count=1),
        test_parameters_are_typed_literals_that_papermill_can_read:
            lambda cells: cells[2].update(source='profile: str = "smoke"  # one of params, n=3'),
        test_code_only_calls_the_package: lambda cells: cells[3].update(source=cells[3].source + "\n!pip list"),
        test_no_paths_of_one_machine: lambda cells: cells[0].update(source="# See /home/me/study"),
        test_the_set_up_names_the_section: lambda cells: cells[3].update(source='run = start(profile, "9")'),
        test_prose_begins_with_a_title_and_ends_with_limits: lambda cells: cells.pop(),
        test_prose_holds_no_result: lambda cells: cells[-1].update(source="## Limits\n\nOnly 61.2 % are solved."),
        test_nothing_but_house_tags: lambda cells: cells[3].metadata.update(tags=["nbval-skip"]),
    }
    good = notebook("3.3_weight_shift")
    monkeypatch.setattr("test_notebooks.FOLDER", tmp_path)
    for rule, fault in faults.items():
        bad = copy.deepcopy(good)
        fault(bad.cells)
        nbformat.write(bad, tmp_path / "3.3_weight_shift.ipynb")
        with pytest.raises((AssertionError, SyntaxError)):
            rule("3.3_weight_shift")

"""One's own experts and one's own domain: the worked example of the README, from files to every section's notebook."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import toy_foreign
import toy_notebooks
import yaml

from m2rl_core import domains
from m2rl_core.claims.evidence import Missing
from m2rl_core.domains import own_file, rewards
from m2rl_core.domains.own_file import DomainError
from m2rl_core.profile import ProfileError, load_profile, repo_root
from m2rl_core.publishing.report import plan
from m2rl_core.run import open_run
from m2rl_core.study import MERGES, Members, NotInStudy, find, study
from m2rl_core.views import judging, preliminary, scores, skills, verdicts

UNITS = repo_root() / "params" / "domains" / "units.py"
ANALYSIS = ("0_plan", "3.1_preliminary", "3.2_experiments", "3.3_weight_shift", "3.4_policy_neighborhoods", "3.5_same_skills",
            "3.6_self_verification", "4_conclusion", "A_training_details")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A profile of two foreign experts on math and units, and its run with every stage made."""
    home = tmp_path_factory.mktemp("byo")
    path = toy_foreign.profile(home, toy_foreign.models(home / "models"))
    run = open_run(str(path), home / "art")
    for name in run.stages:
        run.need(name)
    return path, run


# ---- the graph

def test_what_is_not_brought_is_left_out_with_all_that_needs_it(made):
    """Faults: a stage that waits for a model that nobody makes; one that is left out although all it needs is there."""
    _, run = made
    assert run.members.models == ("sft", "rl-math", "rl-units", *MERGES) and run.members.trained == ()
    assert {"weights", "neighborhoods", "sweep", "judge-merge-ties", "pair-math-units"} <= run.stages.keys()
    assert not {"base", "rl-multi", "mt-opd", "subsets", "eval-base", "rl-coding"} & run.stages.keys()
    with pytest.raises(NotInStudy, match="rl-multi: this profile neither brings nor trains what it needs"):
        find(run.stages, "rl-multi")
    assert run.stages["merge-ties"].needs == ("sft", "rl-math", "rl-units")


def test_a_published_set_without_distillation_is_the_paper_less_that():
    profile = load_profile("released")
    here = Members.of(profile)
    assert len(here.models) == 14 and here.trained == () and "mt-opd" not in here.models and len(here.experts) == 5
    kinds = {stage.kind for stage in study(profile).values()}
    assert kinds == {"import", "merge", "eval", "weights", "sweep", "kl", "judge"}


def test_experts_that_are_trained_here_beside_one_that_is_brought(tmp_path):
    """Fault: `train` that is read as all or nothing."""
    found = {"sft": "/nowhere/sft", "rl-math": "/nowhere/math"}
    profile = load_profile(str(toy_foreign.profile(tmp_path, found, train=["rl-units", "rl-multi"])))
    stages = study(profile)
    assert stages["rl-math"].kind == "import" and stages["rl-units"].kind == stages["rl-multi"].kind == "rl"
    assert set(stages["rl-multi"].settings["rows"]) == {"math", "units"} and "mt-opd" not in stages
    assert stages["rl-units"].settings["files"].keys() == {"units"} and "files" not in stages["merge-ties"].settings


def test_a_changed_domain_file_makes_its_results_again_and_no_others(tmp_path):
    """Fault: scores of an old verifier shown as the new one's."""
    own = tmp_path / "units.py"
    own.write_text(UNITS.read_text())
    path = toy_foreign.profile(tmp_path, {"sft": "/nowhere/sft"}, train=["rl-math", "rl-units"], domains=["math", str(own)])
    before = study(load_profile(str(path)))
    own.write_text(UNITS.read_text() + "\n")
    after = study(load_profile(str(path)))
    changed = {name for name in before if before[name].key != after[name].key}
    assert {"rl-units", "eval-sft", "eval-rl-math", "merge-ties"} <= changed and not {"sft", "rl-math"} & changed


# ---- rows and verdicts

def test_the_example_gives_rows_and_right_verdicts(made):
    """Faults: a right answer that scores nothing; a test row that is trained on; a split that is ignored."""
    test = domains.benchmark_rows("units", 40, 1)
    assert [row.domain for row in test] == ["units"] * 40 and test == domains.benchmark_rows("units", 40, 1)
    right = [[f"<think>\n</think>\nIt is {row.truth['row']['value']}"] for row in test]
    assert [v.score for v in rewards(test, right)] == [1.0] * 40
    wrong = rewards(test[:2], [["</think> 7 m"], ["no tag 8"]])
    assert [v.score for v in wrong] == [0.0, 0.0] and wrong[1].reason == "no </think>"
    assert own_file.leaks("units", str(UNITS), 400, 100, 1) == 0
    sft = domains.training_rows("units", "sft", 3, 1)
    assert [v.score for v in rewards(sft, [[row.turns[0]["content"]] for row in sft])] == [1.0] * 3
    assert "value" not in sft[0].messages[0]["content"]


def written(folder: Path, rows: str = "[{'prompt': f'{split} {i}'} for i in range(n)]",
            verify: str = "[0.5] * len(rows)") -> str:
    """A domain's file `mine.py` of these two expressions, made known to this process."""
    path = folder / "mine.py"
    path.write_text(f"import time\ndef rows(split, n, seed):\n    return {rows}\n"
                    f"def verify(rows, answers):\n    return {verify}\n")
    domains.own({"mine": str(path)})
    return str(path)


def test_scores_may_be_numbers_bools_or_pairs_and_failures_cost_one_answer(tmp_path, monkeypatch):
    """Faults: a verifier that hangs or raises and takes the batch with it; a score above one."""
    monkeypatch.setattr("m2rl_core.domains.worker.LIMIT", 2.0)
    kinds = ("[{'1': 0.5, '2': True, '3': (0.25, 'so so'), '4': 7, '5': None}.get(a) if a != 'hang' else time.sleep(99) or 0"
             " for a in answers]")
    written(tmp_path, verify=kinds)
    rows = domains.training_rows("mine", "rl", 6, 1)
    found = rewards(rows, [[f"</think>{a}"] for a in ("1", "2", "3", "4", "hang", "5")])
    assert [v.score for v in found] == [0.5, 1.0, 0.25, 0.0, 0.0, 0.0]
    assert [v.failed for v in found] == [False, False, False, True, True, True] and found[2].reason == "so so"
    assert "killed" in found[4].reason


@pytest.mark.parametrize(("rows", "expected"), [
    ("[{'prompt': 'x'}]", "rows('rl', 3, 1) gave 1 rows; the profile asks for 3"),
    ("[3] * n", "rows('rl', ...)[0]: expected a dict with `prompt`, found 3"),
    ("[{'question': 'x'}] * n", "[0].prompt: expected a text or a list of messages"),
    ("[{'prompt': 'x', 'truth': {1}}] * n", "[0]: Object of type set is not JSON serializable"),
    ("[1 / 0]", "line 3: rows('rl', 3, 1): ZeroDivisionError: division by zero"),
])
def test_rows_that_are_none(tmp_path, rows, expected):
    written(tmp_path, rows=rows)
    with pytest.raises(DomainError) as caught:
        domains.training_rows("mine", "rl", 3, 1)
    assert expected in str(caught.value) and "mine.py" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_serve(tmp_path):
    written(tmp_path, rows="[{'prompt': 'x'}] * n")
    with pytest.raises(DomainError, match="a row stands there twice"):
        domains.benchmark_rows("mine", 3, 1)
    with pytest.raises(DomainError, match="answer: a row to learn from needs the text of its answer"):
        domains.training_rows("mine", "sft", 1, 1)
    for text, expected in (("def rows(split, n, seed):\n  return []\n", "it has no function `verify`"),
                           ("def rows(:\n", "line 1: SyntaxError"), ("import nothing_such\n", "line 1: ModuleNotFoundError")):
        path = tmp_path / f"bad{len(text)}.py"
        path.write_text(text)
        with pytest.raises(DomainError, match=expected):
            own_file.load(str(path))


# ---- what a profile may say of them

@pytest.mark.parametrize(("changes", "expected"), [
    ({"domains": ["maths"]}, "domains[0]: 'maths' is none of the five and no Python file; did you mean 'math'?"),
    ({"domains": ["math", "math"]}, "domains[0]: 'math' stands there twice"),
    ({"domains": ["math", "gone.py"]}, "domains[1]: no file"),
    ({"domains": []}, "domains: at least one is needed"),
    ({"import": {"sft": "/x", "rl-coding": "/y"}}, "import.rl-coding: its domain is not in `domains`, which has math, units"),
    ({"import": {"sft": "/x", "rl-unit": "/y"}}, "import.rl-unit: unknown model; did you mean 'rl-units'?"),
    ({"import": {"sft": "/x", "base": "/y"}}, "import.base: give it as `model: "),
    ({"import": {"sft": "not an id"}}, "import.sft: 'not an id' is neither a folder that is there nor a hub id"),
    ({"import": {"rl-math": "/x"}}, "model: missing; give a shape, or `source:"),
    ({"train": ["rl-unitz"]}, "train: unknown policy 'rl-unitz'; did you mean 'rl-units'?"),
    ({"train": ["rl-math"]}, "train: 'rl-math' is imported; it cannot be trained, too"),
    ({"seeds": 2}, "is brought once: use seeds: 1"),
    ({"rl": {}}, "rl.rows: 'units' is missing"),
    ({"model": {"source": "a/b"}}, "model.context: missing; this key is needed"),
    ({"model": {"source": "a b", "context": 400}}, "model.source: 'a b' is neither a folder"),
    ({"rows": "true"}, "rows: unknown value 'true'"),
    ({"data": {"share": 0.0}}, "data.share: 0.0 is not in (0, 1]"),
    ({"data": {"rules": {"math": "lastbox"}}}, "data.rules.math: unknown rule 'lastbox'; did you mean 'last_box'?"),
])
def test_mistakes_name_the_place_and_the_mend(tmp_path, changes, expected):
    with pytest.raises(ProfileError) as caught:
        load_profile(str(toy_foreign.profile(tmp_path, {"sft": "/x", "rl-math": "/m", "rl-units": "/u"}, **changes)))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


# ---- the whole analysis

def test_every_notebook_of_the_analysis_says_what_it_has_and_what_is_not_run(made, monkeypatch):
    """Faults: a notebook that dies of a model that a study need not have; one that hides what it leaves out."""
    path, run = made
    monkeypatch.setenv("M2RL_ARTIFACTS", str(run.root))
    monkeypatch.delenv("M2RL_REPORT", raising=False)
    shown = {}
    for name in ANALYSIS:
        told = toy_notebooks.execute(name, profile=str(path))
        assert not told[-1][1].startswith("error"), (name, told[-1])
        shown[name] = "\n".join(out for _, out in told)
        assert "not run" in shown[name].lower() and "rl-multi" in shown[name], name
    assert "rl-units" in shown["3.2_experiments"] and "units" in shown["3.3_weight_shift"]
    assert "Not run: no costs" in shown["4_conclusion"] and os.environ["M2RL_ARTIFACTS"] == str(run.root)
    # what a reader would take for the paper's: verdicts on other experts, groups and settings that are not there
    assert "of 9 claims, this run finds: **9 not run**" in shown["3.3_weight_shift"].lower()
    assert "of 82 claims, this run finds: **82 not run**" in shown["4_conclusion"].lower()
    assert "with units" in shown["3.3_weight_shift"] and "reasoning with IF" not in shown["3.3_weight_shift"]
    assert "units 0 of" in shown["3.6_self_verification"] and "not trained here" in shown["A_training_details"]


def test_tables_hold_the_study_s_own_models_and_no_others(made, monkeypatch):
    """Faults: an expert of one's own that stands in no table; the paper's models as rows of "undefined"; the paper's mean of
    four beside a mean of two; a domain of one's own of which no item is shown."""
    _, run = made
    found = verdicts.evidence(run, "scores", "judged")
    table3 = scores.table(found, scores.TABLE3)
    assert list(table3["model"]) == ["sft", "rl-math", "rl-units", "merge-ties"]
    judges = judging.scores(found)
    assert list(dict.fromkeys(judges["model"])) == ["sft", "rl-math", "rl-units", "merge-ties"]
    assert list(dict.fromkeys(judges["benchmark"])) == ["aime24", "units", "avg"] and judges["value"].notna().all()
    shown = judging.table7_shown(judges).set_index("model")
    assert "paper" in shown.loc["sft", "aime24 (miniature)"] and "paper" not in shown.loc["sft", "mean of 2"]
    assert "units 0 of 4" in judging.modality_sentence(judges).data
    items = preliminary.benchmark_items(run.profile).set_index("benchmark")
    assert "End with the number" in items.loc["units", "prompt"] and " are " in items.loc["units", "a right answer"]
    with pytest.raises(Missing, match="no scores of rl-multi"):
        skills.transcripts(skills.apart(found), found.scores, "rl-multi", "model only")


def test_the_notebooks_run_by_papermill(made, tmp_path):
    """Fault: what only a kernel of its own shows: a profile by its path, cells that are not run, pages that are not written.

    The other notebooks are executed likewise, in process, above.
    """
    path, run = made
    done = subprocess.run(
        [sys.executable, "-m", "m2rl_core", "reproduce", "--profile", str(path), "--nb", "3.6,4"], capture_output=True,
        text=True, env={**os.environ, "M2RL_ARTIFACTS": str(run.root), "M2RL_REPORTS": str(tmp_path)}, cwd=repo_root())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 notebooks completed" in done.stdout and "made in" not in done.stdout  # every stage was there
    report = tmp_path / "mine"
    for name in ("3.6_self_verification", "4_conclusion"):
        cells = json.loads((report / f"{name}.ipynb").read_text())["cells"]
        outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
        assert not [output for output in outputs if output["output_type"] == "error"], name
        page = (report / f"{name}.html").read_text()
        assert "not run" in page and "Traceback (most" not in page and f"{name}.html" in (report / "index.html").read_text()
    verdicts_of = {line["run_verdict"] for line in json.loads((report / "claims.json").read_text())}
    assert verdicts_of == {"not run"}


def test_a_real_mistake_in_a_cell_is_still_an_error(made, monkeypatch):
    """Fault: "not run" that swallows every error."""
    from m2rl_core.claims.evidence import Missing
    from m2rl_core.publishing.not_run import Cells
    known = {"table": "an earlier cell's"}
    cells = Cells(known)
    assert not cells.told(KeyError("x"), ["a"]) and not cells.told(NameError("y", name="y"), [])
    assert cells.told(Missing("no costs"), ["table"]) and cells.told(NameError("table", name="table"), ["next"])
    assert cells.told(NameError("next", name="next"), []) and not known


def test_only_what_is_trained_gets_a_training_notebook(made):
    """Fault: a run of 3.2_train for a model that was brought, or none for an expert of one's own domain."""
    path, run = made
    jobs = [job.name for job in plan(repo_root() / "notebooks", str(path))]
    assert not [name for name in jobs if name.startswith("3.2_train")] and "4_conclusion" in jobs
    content = yaml.safe_load(path.read_text()) | {"train": ["rl-units"]}
    content["import"].pop("rl-units")
    other = path.with_name("other.yaml")
    other.write_text(yaml.safe_dump(content))
    assert "3.2_train.rl-units" in [job.name for job in plan(repo_root() / "notebooks", str(other))]
    assert replace(load_profile(str(other)), name="x").domain_names == ("math", "units")

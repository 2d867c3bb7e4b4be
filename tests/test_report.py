"""The runner on throwaway notebooks in real kernels: what fails, what still runs, what a reader gets."""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from m2rl_core.progress import line
from m2rl_core.publishing import publish, report, site
from m2rl_core.publishing.publish import CLAIM_KEYS
from m2rl_core.publishing.report import Job, ReportError, Result, plan, reproduce, tidy, unfinished
from m2rl_core.study import TRAINED

PARAMETERS = 'profile: str = "smoke"  # which params file\n'
ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def suite(folder: Path, **special: str) -> Path:
    """All notebooks of the study, each with one cell that prints its parameters; `special` replaces that cell."""
    for name in report.NOTEBOOKS:
        model = 'model: str = "rl-math"\n' if name == report.TRAIN else ""
        write(folder, name, special.get(name, "print(profile)"), parameters=PARAMETERS + model)
    return folder


def claim(number: int) -> str:
    values = dict.fromkeys(CLAIM_KEYS, None) | {"id": f"c{number}", "section": "1", "text": "<b>merge wins</b>",
                                                "run_verdict": "supported", "estimate": 0.25, "low": 0.1, "high": 0.4}
    return repr(values)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """One run of seven notebooks: two fail, each in its own way, one needs a failed one, four complete."""
    folder = tmp_path_factory.mktemp("suite")
    notebooks = folder / "notebooks"
    good = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from m2rl_core import progress\nfrom m2rl_core.publishing import publish\n"
            "from pathlib import Path\n"
            "import pandas as pd, altair as alt\n"
            "shown = progress.Progress('rl-toy')\n"
            "for step in (1, 2):\n"
            "    shown.step(step, 2, reward=0.5)\n"
            f"publish.claims(Path({str(folder / 'store')!r}), '1', [{claim(1)}])\n"
            "publish.table('table1', pd.DataFrame({'model': ['sft'], 'aime24': [0.5]}))\n"
            "chart = alt.Chart(pd.DataFrame({'x': [1, 2]})).mark_point().encode(x='x:Q')\n"
            "publish.figure('figure9', chart)\n"
            "print('done')")
    sources = [
        write(notebooks, "1_introduction", good),
        write(notebooks, "2_related_work", "import sys\nsys.exit(0)", "print('never seen')"),
        write(notebooks, "3.3_weight_shift", "raise ValueError('no weights\\nat all')", "print('never seen')"),
        write(notebooks, "0_plan", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"),
        write(notebooks, "3.5_same_skills", "print(profile)"),
        write(notebooks, "4_conclusion", "print('needs 3.3')"),
        write(notebooks, "A_training_details", "print('last')"),
    ]
    jobs = [Job(source.stem, source, {"profile": "tiny"}) for source in sources]
    said: list[str] = []
    ok = reproduce(jobs, folder / "report", folder / "artifacts", "tiny", said.append)
    facts = json.loads((folder / "report" / "run.json").read_text())
    return folder / "report", ok, {entry["name"]: entry for entry in facts["notebooks"]}, said


def test_a_failed_cell_fails_the_run_and_is_named(outcome):
    _, ok, entries, _ = outcome
    assert not ok
    assert entries["3.3_weight_shift"]["status"] == "failed"
    assert entries["3.3_weight_shift"]["reason"] == "cell In [3]: ValueError: no weights"


def test_system_exit_zero_fails_the_notebook(outcome):
    """Catches papermill's silent success: the cells after sys.exit(0) never ran."""
    entry = outcome[2]["2_related_work"]
    assert entry["status"] == "failed" and entry["reason"].startswith("ended early: cell")


def test_a_killed_kernel_is_a_failure_and_says_how_to_go_on(outcome):
    entry = outcome[2]["0_plan"]
    assert entry["status"] == "failed" and "the kernel died" in entry["reason"]


@pytest.mark.parametrize(("silent", "status"), [(2, "completed"), (9, "failed")])
def test_a_kernel_that_does_not_start_is_started_again(tmp_path, monkeypatch, silent, status):
    """Fault: two kernels that chose one port at the same moment end a night's study with a traceback."""
    import papermill
    source = tmp_path / "1.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1)")]), source)
    real, left = papermill.execute_notebook, [silent]

    def execute(source, new, **settings):
        left[0] -= 1
        if left[0] >= 0:
            nbformat.write(nbformat.read(source, 4), new)  # as papermill does before it starts a kernel
            raise RuntimeError("Kernel died before replying to kernel_info")
        return real(source, new, **settings)
    monkeypatch.setattr(papermill, "execute_notebook", execute)
    found = report.execute(Job("1", source, {}), tmp_path, tmp_path / "log")
    assert found.status == status and left == [-1 if silent == 2 else silent - 3]
    assert silent == 2 or found.reason == "its kernel did not start (Kernel died before replying to kernel_info); run again"


def test_dependants_are_marked_and_independents_run(outcome):
    folder, _, entries, _ = outcome
    assert entries["4_conclusion"]["status"] == "not run"
    assert entries["4_conclusion"]["reason"] == "needs 3.3_weight_shift"
    assert not (folder / "4_conclusion.ipynb").exists()
    for name in ("1_introduction", "3.5_same_skills", "A_training_details"):
        assert entries[name]["status"] == "completed", entries[name]


def test_a_notebook_starts_when_what_it_needs_is_over_and_not_before(tmp_path):
    """Two lanes: the plan looks at the store alone, the experts wait for SFT, the conclusion for all sections."""
    note = "from pathlib import Path; import time\nPath({!r}, '{}').write_text(str(time.time()))"
    marks = tmp_path / "marks"
    marks.mkdir()
    names = ("0_plan", "3.1_preliminary", "3.3_weight_shift", "4_conclusion")
    cells = {name: [note.format(str(marks), f"{name} begins"), "time.sleep(0.5)", note.format(str(marks), f"{name} ends")]
             for name in names}
    jobs = [Job(name, write(tmp_path / "notebooks", name, *cells[name]), {"profile": "tiny"}) for name in reversed(names)]
    said: list[str] = []
    assert reproduce(jobs, tmp_path / "report", tmp_path / "artifacts", "tiny", said.append), said
    at = {path.name: float(path.read_text()) for path in marks.iterdir()}
    assert at["0_plan ends"] < at["3.1_preliminary begins"]
    assert at["3.3_weight_shift ends"] < at["4_conclusion begins"]
    begins, ends = ([at[f"{name} {what}"] for name in names[:3]] for what in ("begins", "ends"))
    assert sorted(begins)[1] < min(ends)  # two of them at a time


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_a_killed_runner_leaves_no_kernel_behind(tmp_path):
    """Catches a kernel that goes on training after `kill -9` of make, and keeps the store locked."""
    source = write(tmp_path / "notebooks", "0_plan", "import time\nopen('started', 'w').close()\ntime.sleep(120)")
    code = ("from pathlib import Path; from m2rl_core.publishing.report import Job, reproduce\n"
            f"if __name__ == '__main__':\n    folder = Path({str(tmp_path)!r})\n"
            f"    reproduce([Job('0_plan', Path({str(source)!r}), {{}})], folder / 'report', folder / 'artifacts', 'tiny')")
    (tmp_path / "runner.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "M2RL_MARK": str(tmp_path)}
    runner = subprocess.Popen([sys.executable, str(tmp_path / "runner.py")], env=environment, stdout=subprocess.DEVNULL)
    waited(lambda: (tmp_path / "notebooks" / "started").exists(), 60)
    assert len(marked(tmp_path)) >= 3  # the runner, a lane, its kernel
    runner.kill()
    runner.wait()
    waited(lambda: not marked(tmp_path), 30)


def test_a_killed_lane_fails_its_notebook_and_later_ones_run(tmp_path):
    """Catches a broken pool that ends the whole run, or one that takes the rest of the notebooks with it."""
    folder = tmp_path / "notebooks"
    jobs = [Job("0_plan", write(folder, "0_plan", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)"), {}),
            Job("3.1_preliminary", write(folder, "3.1_preliminary", "print('after it')"), {})]
    said: list[str] = []
    assert not reproduce(jobs, tmp_path / "report", tmp_path / "artifacts", "tiny", said.append)
    status = {entry["name"]: entry for entry in json.loads((tmp_path / "report" / "run.json").read_text())["notebooks"]}
    assert status["0_plan"]["status"] == "failed" and "killed" in status["0_plan"]["reason"]
    assert status["3.1_preliminary"]["status"] == "completed", said


def marked(folder: Path) -> list[int]:
    """Processes that run with this mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"M2RL_MARK={folder}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass  # it ended meanwhile
    return found


def waited(condition, seconds: float) -> None:
    """Returns when the condition holds; fails where it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, condition
        time.sleep(0.2)


def test_parameters_reach_the_notebook_and_progress_does_not(outcome):
    folder, _, _, said = outcome
    text = (folder / "3.5_same_skills.ipynb").read_text()
    assert '"tiny\\n"' in text
    assert any(part.startswith("    rl-toy · step 1/2 · reward 0.5") for part in said)
    assert "rl-toy" not in "".join(output.text for cell in nbformat.read(folder / "1_introduction.ipynb", 4).cells
                                   for output in cell.get("outputs", []) if output.output_type == "stream")


def test_executed_copies_hold_no_times_and_no_paths(outcome):
    """Catches a report that differs from itself after every run."""
    folder = outcome[0]
    text = (folder / "3.5_same_skills.ipynb").read_text()
    for word in ("start_time", "duration", "iopub", "output_path", str(folder.parent)):
        assert word not in text
    for cell in nbformat.read(folder / "3.5_same_skills.ipynb", 4).cells:
        assert cell.metadata.papermill.status == "completed"


def test_the_site_is_whole_and_offline(outcome):
    folder = outcome[0]
    index = (folder / "index.html").read_text()
    assert "&lt;b&gt;merge wins&lt;/b&gt;" in index and "[0.1, 0.4]" in index
    assert "figures/figure9.png" in index and (folder / "figures" / "figure9.vl.json").is_file()
    assert "not run: needs 3.3_weight_shift" in index and "failed: cell In [3]" in index
    assert 'href="1_introduction.html"' in index and 'href="4_conclusion.html"' not in index
    page = (folder / "1_introduction.html").read_text()
    assert "done" in page and len(page) < 200_000
    assert re.findall(r'(?:src|href)="(https?://[^"]+)"', index) == []
    assert json.loads((folder / "claims.json").read_text())[0].keys() == set(CLAIM_KEYS)
    assert (folder / "tables" / "table1.csv").read_text() == "model,aime24\nsft,0.5\n"
    assert "papermill==" in (folder / "environment.txt").read_text()


def test_plan_covers_every_policy_in_order(tmp_path):
    jobs = plan(suite(tmp_path / "notebooks"), "smoke")
    assert [job.name for job in jobs[4:11]] == [f"3.2_train.{model}" for model in TRAINED]
    assert len(jobs) == 20 and jobs[4].parameters == {"profile": "smoke", "model": "rl-math"}


def test_a_part_of_the_plan(tmp_path):
    folder = suite(tmp_path / "notebooks")
    two = plan(folder, "smoke", models="rl-math,mt-opd")
    assert [job.name for job in two] == ["3.2_train.rl-math", "3.2_train.mt-opd"]
    assert [job.name for job in plan(folder, "smoke", notebooks="3.3, 4")] == ["3.3_weight_shift", "4_conclusion"]
    with pytest.raises(ReportError, match="unknown model 'rl-mat'; did you mean 'rl-math'"):
        plan(folder, "smoke", models="rl-mat")
    with pytest.raises(ReportError, match="unknown notebook '3.3_weigth'; did you mean '3.3_weight_shift'"):
        plan(folder, "smoke", notebooks="3.3_weigth")


def test_an_unknown_parameter_is_an_error(tmp_path):
    """Catches the typo that papermill only warns of, so that the default is used in silence."""
    folder = suite(tmp_path / "notebooks")
    with pytest.raises(ReportError, match="unknown parameter 'modle'; did you mean 'model'"):
        plan(folder, "smoke", extra={"modle": "rl-if"})
    write(folder, "0_plan", "print(1)", parameters='profil = "smoke"')
    with pytest.raises(ReportError, match="0_plan.ipynb: unknown parameter 'profile'; did you mean 'profil'"):
        plan(folder, "smoke", notebooks="0_plan")


def test_every_dependency_is_a_job(tmp_path):
    """Catches a misspelt name in NEEDS, which would never block anything."""
    names = [job.name for job in plan(suite(tmp_path / "notebooks"), "smoke")]
    for name, needs in report.NEEDS.items():
        assert name in names and set(needs) <= set(names[:names.index(name)]), name


def test_unfinished_by_hand():
    cells = [nbformat.v4.new_code_cell("a = 1", metadata={"papermill": {"status": "completed"}}),
             nbformat.v4.new_code_cell("b = 2", metadata={"papermill": {"status": "pending"}})]
    notebook = nbformat.v4.new_notebook(cells=cells)
    assert unfinished(notebook) == "ended early: cell 2 (`b = 2`) is pending"
    assert unfinished(nbformat.v4.new_notebook(cells=cells[:1])) == ""
    assert "end_time" not in json.dumps(tidy(notebook))


def test_later_parts_keep_earlier_results(tmp_path):
    """Catches `NB=3.3` that empties the index of everything else."""
    for name in ("0_plan", "3.3_weight_shift"):
        report._record(tmp_path, "smoke", {name: Result(name, "completed")})
    assert [entry["name"] for entry in json.loads((tmp_path / "run.json").read_text())["notebooks"]] == [
        "0_plan", "3.3_weight_shift"]


def test_nothing_is_published_outside_of_the_runner(tmp_path, monkeypatch):
    """Catches an open notebook that overwrites the committed report."""
    import pandas as pd
    monkeypatch.delenv("M2RL_REPORT", raising=False)
    monkeypatch.chdir(tmp_path)
    frame = pd.DataFrame({"a": [1]})
    assert publish.table("table1", frame) is frame
    publish.claims(tmp_path / "claims", "3.3", [eval(claim(1))])
    assert sorted(os.listdir(tmp_path)) == ["claims"]
    assert publish.read_claims(tmp_path / "claims")[0]["id"] == "c1"
    with pytest.raises(ValueError, match="claim c2: without text"):
        publish.claims(tmp_path / "claims", "3.3", [{"id": "c2"} | dict.fromkeys(set(CLAIM_KEYS) - {"id", "text"})])
    with pytest.raises(ValueError, match="cannot be a file's name"):
        publish.claims(tmp_path / "claims", "../3.3", [])


def test_nan_in_a_claim_is_null(tmp_path):
    publish.claims(tmp_path, "1", [dict.fromkeys(CLAIM_KEYS) | {"id": "c", "estimate": float("nan")}])
    assert json.loads((tmp_path / "1.json").read_text())[0]["estimate"] is None


def test_progress_line_by_hand():
    assert line("rl-math", 12, 40, {"reward": 0.61}, 80) == "rl-math · step 12/40 · reward 0.61 · 1:20 left"
    assert site.duration(7500) == "2:05:00"


def test_formulas_become_mathml_and_prices_do_not():
    """Catches a page whose formulas need a network, and text between two dollar signs taken for one."""
    from m2rl_core.publishing.site import with_mathml
    page = with_mathml(r"costs $5 and $6; $\frac{1}{PG}\sum_i r_i$ here, $$\tau = 1$$")
    assert page.count("<math") == 2 and "costs $5 and $6; <math" in page and "<mfrac>" in page
    assert 'display="block"' in page and "\\frac" not in page

"""The whole study at profile smoke, as a user runs it: one report, made once and looked at from all sides.

The first test to ask for `study` waits for it: some two minutes on two calm cores.
"""
import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
import yaml
from whole_study import Study, run

from m2rl_core.domains import BENCHMARKS
from m2rl_core.pictures import picture
from m2rl_core.profile import repo_root
from m2rl_core.publishing.publish import CLAIM_KEYS
from m2rl_core.publishing.report import NOTEBOOKS, POLICIES, TRAIN
from m2rl_core.study import MERGES, MODELS

ROOT = repo_root()
NAMES = [name for stem in NOTEBOOKS for name in (POLICIES if stem == TRAIN else (stem,))]
VERDICT = "nbval-check-output"
VERDICTS = ("supported", "contradicted", "undecided", "not run")
SCORES = {"table3": 9, "table4": 9, "table8": 9, "table6": 1}  # score tables and the benchmarks that they have at least
SHOWN = {"text/plain", "text/html", "text/markdown", "text/latex", "image/png", picture.MIME}


def nbval(folder: Path, environment: dict) -> subprocess.CompletedProcess:
    """Execute the notebooks of a folder; cells with the tag must print again what they printed."""
    return run(["-m", "pytest", "--nbval-lax", "--nbval-current-env", "--color=no", "-p", "no:cacheprovider",
                str(folder)], environment)


def executed(study: Study, name: str):
    """An executed notebook of the report."""
    return nbformat.read(study.report / f"{name}.ipynb", as_version=4)


def outputs(cells) -> list:
    """All outputs of these cells."""
    return [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]


def table(study: Study, name: str) -> list[dict]:
    """The rows of tables/<name>.csv, values as text."""
    return list(csv.DictReader((study.report / "tables" / f"{name}.csv").read_text(encoding="utf-8").splitlines()))


def manifests(study: Study) -> dict[str, int]:
    """When each stage was sealed, in nanoseconds."""
    return {path.parent.name: path.stat().st_mtime_ns for path in sorted(study.store.glob("*/*/manifest.json"))}


def without_commit(cell) -> str:
    """The cell as text; somebody may commit while the tests run."""
    return re.sub(r"commit [0-9a-f]{12}(\+changes)?", "commit", json.dumps(cell, sort_keys=True))


def test_it_fits_into_its_time(study):
    """Two minutes on two calm cores; twice that here, so that a busy machine does not fail the test."""
    assert study.seconds < 240


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_ran_to_its_end(study, name):
    cells = executed(study, name).cells
    for cell in cells:
        if cell.cell_type == "code":
            assert cell.metadata.papermill.status == "completed" and cell.execution_count, cell.source
    assert not [output for output in outputs(cells) if output.output_type == "error"]
    injected = next(cell for cell in cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert 'profile = "smoke"' in injected.source
    if name in POLICIES:
        assert f'model = "{name.removeprefix(f"{TRAIN}.")}"' in injected.source


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_is_readable_where_code_is_hosted(study, name):
    """Catches pictures that need a network or trust, warnings on the page, files too large for a preview, paths."""
    text = (study.report / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text.encode()) < 1e6
    found = outputs(executed(study, name).cells)
    for output in found:
        assert output.get("name") != "stderr", output.text
        shown = output.get("data", {})
        assert set(shown) <= SHOWN, set(shown)
        assert not re.search(r"<script|<iframe|vega|https?://", shown.get("text/html", "")), shown["text/html"][:200]
        assert ("image/png" in shown) == (picture.MIME in shown) and "http" not in json.dumps(shown.get(picture.MIME, ""))
    assert any("image/png" in output.get("data", {}) for output in found)
    assert str(study.report.parent.parent) not in text and str(ROOT) not in text


def test_the_report_is_whole(study):
    assert sorted(path.name for path in study.report.glob("*.ipynb")) == sorted(f"{name}.ipynb" for name in NAMES)
    assert sorted(path.name for path in study.report.glob("*.html")) == sorted(
        ["index.html", *(f"{name}.html" for name in NAMES)])
    for page in study.report.glob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#:]+)"', page.read_text(encoding="utf-8")):
            assert (study.report / target).is_file(), f"{page.name} links to {target}"
    facts = json.loads((study.report / "run.json").read_text())
    assert [entry["name"] for entry in facts["notebooks"]] == NAMES and facts["profile"] == "smoke"
    assert {entry["status"] for entry in facts["notebooks"]} == {"completed"}
    assert "20 of 20 notebooks completed" in study.said


def test_all_tables_of_the_paper(study):
    for number in range(1, 9):
        assert table(study, f"table{number}"), f"table{number}.csv is empty"
    models = {"table3": {"base", "sft", "rl-math", "rl-agent", "merge-ties", "rl-multi"},
              "table4": {*MERGES, "mt-opd"}, "table7": {"sft", "rl-multi", "mt-opd"}}
    for name, wanted in models.items():
        assert wanted <= {row["model"] for row in table(study, name)} <= {*MODELS}, name


@pytest.mark.parametrize("name", SCORES)
def test_score_tables_have_a_column_a_benchmark_and_its_interval(study, name):
    rows = table(study, name)
    columns = list(rows[0])
    found = [column for column in columns if column in BENCHMARKS]
    assert columns[0] == "model" and len(found) >= SCORES[name], columns
    for row in rows:
        for benchmark in found:
            low, value, high = (row[f"{benchmark}{end}"] for end in ("_low", "", "_high"))
            if low and value and high:
                assert 0 <= float(low) <= float(value) + 1e-4 <= float(high) + 2e-4 <= 100.1, (name, row["model"])
    assert any(row[benchmark] for row in rows for benchmark in found)


def test_all_figures_of_the_paper(study):
    figures = study.report / "figures"
    for number in range(1, 10):
        assert (figures / f"figure{number}.png").is_file(), number
    for policy in POLICIES:
        assert (figures / f"figure9-{policy.removeprefix(f'{TRAIN}.')}.png").is_file(), policy
    kinds = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<svg xmlns=", ".csv": b"", ".json": b"{"}
    for path in figures.iterdir():
        assert path.read_bytes().startswith(kinds[path.suffix]), path.name
    for path in figures.glob("*.vl.json"):
        text = path.read_text(encoding="utf-8")
        assert "vega-lite" in json.loads(text)["$schema"]
        data = re.findall(r'"url": "([^"]+)"', text)
        beside = {path.name.replace(".vl.json", end) for end in (".png", ".svg", ".csv")}
        assert {*data, *beside} <= {each.name for each in figures.iterdir()}, path.name
        given = json.loads(text)["title"]
        title = given if isinstance(given, str) else f"{given['text']}; {given.get('subtitle', '')}"
        assert re.search(r"\b(better|closer|good|beats|same way|starts from sft|undefined)\b", title), title


def test_every_claim_is_judged_once(study):
    """Catches a claim that no section publishes, or two do."""
    claims = json.loads((study.report / "claims.json").read_text())
    written = yaml.safe_load((ROOT / "m2rl_core" / "paper" / "claims.yaml").read_text(encoding="utf-8"))
    written = written["claims"] if isinstance(written, dict) else written
    assert sorted(claim["id"] for claim in claims) == sorted(claim["id"] for claim in written)
    for claim in claims:
        assert list(claim) == list(CLAIM_KEYS) and claim["run_verdict"] in VERDICTS, claim["id"]
        assert claim["text"] and claim["rule"] and claim["paper_verdict"], claim["id"]
        if claim["low"] is not None and claim["estimate"] is not None:
            assert claim["low"] <= claim["high"], claim["id"]


def test_a_second_run_makes_nothing_again(study):
    """Catches a key that depends on time, on the order of sets, or on the first run itself; and a page that differs
    from itself. The notebooks run again are those that read all stages; what was not asked for stays in the report."""
    before, claims = manifests(study), (study.report / "claims.json").read_text()
    pages = {name: executed(study, name) for name in NAMES if name not in ("0_plan", "A_training_details")}
    assert len(before) == len(re.findall(r" · made in ", study.said)) > 40
    done = run(["-m", "m2rl_core", "reproduce", "--profile", "smoke", "--nb", "3,4", "--models", "mt-opd"],
               study.environment)
    assert done.returncode == 0 and "8 of 8 notebooks completed" in done.stdout, done.stdout[-4000:]
    assert " made in " not in done.stdout and manifests(study) == before
    assert (study.report / "claims.json").read_text() == claims
    test_the_report_is_whole(study)
    for name, page in pages.items():
        for old, new in zip(page.cells, executed(study, name).cells, strict=True):
            assert without_commit(new) == without_commit(old), f"{name}: the same results gave another page"


def test_nbval_runs_every_source_notebook(study):
    """The sources stand on their own: default parameters, no runner around them."""
    before = manifests(study)
    done = nbval(ROOT / "notebooks", study.environment)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]
    assert manifests(study) == before


def test_a_report_executed_again_gives_the_same_verdicts(study, tmp_path):
    for name in ("3.3_weight_shift", "4_conclusion"):
        shutil.copy(study.report / f"{name}.ipynb", tmp_path)
    checked = [cell for path in tmp_path.iterdir() for cell in nbformat.read(path, as_version=4).cells
               if VERDICT in cell.metadata.get("tags", [])]
    shown = json.dumps([output.data for output in outputs(checked)])
    assert len(checked) >= 3 and any(verdict in shown for verdict in VERDICTS)
    done = nbval(tmp_path, study.environment)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]


def test_a_forged_verdict_is_found(study, tmp_path):
    """Catches a check that compares nothing: one word of one verdict is changed in a copy of the report."""
    page = executed(study, "3.3_weight_shift")
    cell = next(cell for cell in page.cells if VERDICT in cell.metadata.get("tags", []))
    output = next(output for output in cell.outputs if "text/html" in output.data)
    word = next(verdict for verdict in VERDICTS if verdict in output.data["text/html"])
    forged = next(verdict for verdict in VERDICTS if verdict != word)
    output.data["text/html"] = output.data["text/html"].replace(word, forged, 1)
    nbformat.write(page, tmp_path / "forged.ipynb")
    done = nbval(tmp_path, study.environment)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-4000:]
    assert "Cell outputs differ" in done.stdout and forged in done.stdout

"""The README's verdict table is that of the committed report, and refreshing it changes nothing else."""
import json
import re
from pathlib import Path

import pytest
import yaml

from m2rl_core.domains import BENCHMARKS
from m2rl_core.merging import cli
from m2rl_core.publishing import readme
from m2rl_core.real import decontamination, hub

ROOT = Path(__file__).parent.parent


def test_table_is_that_of_the_committed_report():
    """Catches a report that was committed without its README."""
    claims = json.loads((ROOT / "reports/tiny/claims.json").read_text())
    assert readme.table(claims) in (ROOT / "README.md").read_text()
    assert set(readme.HEADLINES) <= {claim["id"] for claim in claims}


def test_refresh_touches_only_what_is_between_the_markers(tmp_path):
    page, claims = tmp_path / "README.md", tmp_path / "claims.json"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    claim = {"id": "few-interferences", "text": "few", "paper_verdict": "undecided", "run_verdict": "contradicted"}
    claims.write_text(json.dumps([claim, {**claim, "id": "other", "run_verdict": "supported"}]))
    readme.refresh(page, claims)
    assert page.read_text().startswith(f"before\n{readme.BEGIN}\n| claim")
    assert page.read_text().endswith(f"{readme.END}\nafter\n")
    assert "| few | undecided | **contradicted** |" in page.read_text() and "old" not in page.read_text()
    assert "All 2 claims in the small study: 1 contradicted, 1 supported." in page.read_text()


def test_missing_marker_is_named(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(readme.BEGIN)
    with pytest.raises(ValueError, match="end of verdicts"):
        readme.refresh(page, tmp_path / "claims.json")


def test_the_readmes_recipe_is_one():
    """Catches an example that the merge command would refuse, or that means another preset than mergekit's."""
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    base, experts, plan = cli.parse(yaml.safe_load(block))
    assert str(base) == "models/sft" and list(experts) == ["models/rl-math", "models/rl-coding"]
    assert (plan.method, plan.preset, plan.out_dtype) == ("ties", "mergekit", "bfloat16")
    assert plan.each("density", 2) == [0.2, 0.2]


def test_the_tables_of_data_are_those_of_the_package():
    """Catches a commit, a licence, a count or a K that was changed without the README."""
    assert readme.data_table() in (ROOT / "README.md").read_text()


def test_every_benchmark_and_data_set_says_what_it_is():
    """Catches a data set that is left out, or a line without its licence, its rows or what must be accepted first."""
    nine, others = readme.data_table().split("\n\n")
    lines = {line.split(" | ")[0].strip("| "): line.strip("|").split(" | ") for line in nine.splitlines()[2:]}
    assert list(lines) == list(BENCHMARKS) and all(len(cells) == 8 and all(cells) for cells in lines.values())
    assert lines["hle"][4:6] == ["2,158", "1"] and "hf auth login" in lines["hle"][7] and "`5a81a4c7271a`" in lines["hle"]
    tested = {home for home, _, _ in decontamination.FROM.values()}
    assert all(f"| {repo}, `" in others for repo in set(hub.sources()) - tested)
    assert "| 87,699 |" in others and "ODC-BY" in others
    for line in others.splitlines()[2:]:  # source, what for, commit, licence, rows, K, verifier, needs
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        assert len(cells) == 8 and all(cells), line
        learns = "RL: all five" in cells[1]
        assert (cells[5], "math-verify" in cells[6], "nemo-gym 0.2.0" in cells[7]) == ("16" if learns else "–", learns, learns)
    assert "the wheel bfcl-eval" in lines["bfcl_v3"][1] and lines["bfcl_v3"][2] == "2025.8.6.2"  # not a commit of the hub

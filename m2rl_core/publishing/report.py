"""The strict papermill runner: every notebook in a fresh kernel as soon as what it needs is done, then the site.

One more than stages are made at once: it starts its kernel, draws, or waits for the store. Stricter than papermill in
three points: an unknown parameter is an error, not a warning; a notebook that ends early by SystemExit(0) has failed;
a failure stops only the notebooks that need the failed one.
"""
from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m2rl_core.errors import one_line
from m2rl_core.jobs.schedule import Executor, Lanes, Result, Task, scheduled
from m2rl_core.jobs.tasks import TRAIN, stage_tasks, with_stages
from m2rl_core.profile import load_profile
from m2rl_core.progress import duration
from m2rl_core.provenance import commit, freeze, machine
from m2rl_core.store import hold, write_atomic
from m2rl_core.study import EXPERTS, TRAINED, Members

if TYPE_CHECKING:
    from m2rl_core.jobs.cluster import Nodes

NOTEBOOKS = ("0_plan", "1_introduction", "2_related_work", "3.1_preliminary", TRAIN, "3.2_experiments",
             "3.3_weight_shift", "3.4_policy_neighborhoods", "3.5_same_skills", "3.6_self_verification",
             "4_conclusion", "A_training_details", "B_benchmarks", "C_scaling")
POLICIES = tuple(f"{TRAIN}.{model}" for model in TRAINED)
EXPERT_RUNS = tuple(f"{TRAIN}.{model}" for model in EXPERTS)
NEEDS = {  # what must not have failed in this run for a notebook to be worth its time
    **dict.fromkeys(POLICIES, ("3.1_preliminary",)),
    f"{TRAIN}.mt-opd": ("3.1_preliminary", *EXPERT_RUNS),
    "3.2_experiments": POLICIES,
    "3.3_weight_shift": EXPERT_RUNS,
    "3.4_policy_neighborhoods": POLICIES,
    "3.5_same_skills": POLICIES,
    "3.6_self_verification": POLICIES,
    "4_conclusion": ("1_introduction", "3.2_experiments", "3.3_weight_shift", "3.4_policy_neighborhoods",
                     "3.5_same_skills", "3.6_self_verification"),
    "A_training_details": POLICIES,
}

# What only has to be over: the plan shows the store before this run, the benchmarks and the scaling after it.
BEFORE = {"3.1_preliminary": ("0_plan",),
          **dict.fromkeys(("B_benchmarks", "C_scaling"), ("4_conclusion", "A_training_details"))}
FIRST = (f"{TRAIN}.rl-agent", f"{TRAIN}.rl-multi")  # the longest are begun first of those that may run
SILENT = ("Kernel died before replying", "Kernel didn't respond in")  # jupyter_client's words for one that did not start
QUIET = ["--IPKernelApp.log_level=CRITICAL"]  # a kernel that ends well is interrupted first, and would call it an error


class ReportError(ValueError):
    """A request that cannot be met as it stands; the message is one line."""


class NotStarted(RuntimeError):
    """A kernel that ended, or said nothing, before it was asked anything."""


@dataclass(frozen=True)
class Job:
    """One execution of one notebook; `name` is that of the executed copy."""

    name: str
    source: Path
    parameters: dict


def plan(folder: Path, profile: str, models: str = "", notebooks: str = "", extra: dict | None = None) -> list[Job]:
    """The jobs to run, in order. `models` and `notebooks` are comma-separated; models alone mean 3.2_train alone.

    A notebook is chosen by any beginning of its name ("3.3", "3.2_train"). `extra` parameters go to every
    chosen notebook that has them. Raises ReportError for a name or a parameter that nothing has.
    """
    chosen = _choose(notebooks or (TRAIN if models else ""), NOTEBOOKS, "notebook", prefix=True)
    trained = Members.of(load_profile(profile)).trained
    policies = [name for name in _choose(models, TRAINED, "model") if models or name in trained]
    own = [name for name in trained if name not in TRAINED] if not models else []
    extra, used, jobs = extra or {}, set(), []
    for stem in chosen:
        source = folder / f"{stem}.ipynb"
        if not source.is_file():
            raise ReportError(f"{source} is missing")
        known = parameter_names(source)
        mine = {key: value for key, value in extra.items() if key in known}
        used.update(mine)
        for model in (*policies, *own) if stem == TRAIN else (None,):
            parameters = {"profile": profile, **({"model": model} if model else {}), **mine}
            check_parameters(source, parameters, known)
            jobs.append(Job(f"{stem}.{model}" if model else stem, source, parameters))
    for key in extra.keys() - used:
        every = sorted({name for job in jobs for name in parameter_names(job.source)})
        raise ReportError(f"unknown parameter {key!r}{_nearest(key, every)}")
    return jobs


def parameter_names(source: Path) -> list[str]:
    """Names assigned in the notebook's `parameters` cell; raises ReportError if it has none."""
    for cell in json.loads(source.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            text = "".join(cell["source"])
            body = ast.parse(text).body
            return [target.id for node in body if isinstance(node, ast.Assign | ast.AnnAssign)
                    for target in (node.targets if isinstance(node, ast.Assign) else [node.target])]
    raise ReportError(f"{source.name} has no cell with the tag 'parameters'")


def check_parameters(source: Path, given: dict, known: list[str]) -> None:
    """Raise ReportError for a given parameter that the notebook does not have (papermill would only warn)."""
    for name in given:
        if name not in known:
            raise ReportError(f"{source.name}: unknown parameter {name!r}{_nearest(name, known)}")


def reproduce(jobs: list[Job], report: Path, artifacts: Path, profile: str, say: Callable[[str], None] = print,
              lanes: int = 2, nodes: Nodes | None = None) -> bool:
    """Run the jobs, `lanes` at a time, write the site; True where every one of them completed.

    Executed copies go to `report`/<name>.ipynb; lines of progress from the kernels to `artifacts`/reproduce.log
    and to `say`. A second call on the same store waits for the first. The notebooks make what they read; with `nodes`
    (a cluster) every stage is a task of its own there, and a notebook is executed here when what it reads is made.
    """
    from m2rl_core.publishing import site
    report.mkdir(parents=True, exist_ok=True)
    log = artifacts / "reproduce.log"
    with hold(artifacts / ".report.lock", "the report", say), tail(log, say):
        results: dict[str, Result] = {}
        for job in jobs:
            (report / "claims" / f"{job.name}.json").unlink(missing_ok=True)
        executors: dict[str, Executor] = {"lanes": Lanes(lanes, functools.partial(execute, report=report, log=log), say)}
        tasks = notebook_tasks(jobs)
        if nodes is not None:
            executors["nodes"] = nodes
            tasks = with_stages(tasks, nodes.run)
        names = {job.name for job in jobs}
        for result in scheduled(tasks, executors):
            took = f" in {duration(result.seconds)}" if result.seconds else ""
            ended = f"{result.name}: {result.status}{took}" + (f": {result.reason}" if result.reason else "")
            if result.name not in names:
                say(ended)
                continue
            results[result.name] = result
            say(f"[{len(results)}/{len(jobs)}] {ended}")
            _record(report, profile, results)
        site.write(report)
    bad = [result.name for result in results.values() if result.status != "completed"]
    say(f"{len(jobs) - len(bad)} of {len(jobs)} notebooks completed; report: {report / 'index.html'}"
        + (f"; not completed: {', '.join(bad)}" if bad else ""))
    return not bad


def make_stages(nodes: Nodes, names: Iterable[str], say: Callable[[str], None] = print) -> bool:
    """Make these stages and what they lack on a cluster; True where all are made."""
    good = True
    with tail(nodes.run.store.root / "reproduce.log", say):
        for result in scheduled(stage_tasks(nodes.run, names), {"nodes": nodes}):
            good = good and result.status == "completed"
            say(f"{result.name}: {result.status}" + (f": {result.reason}" if result.reason else ""))
    return good


def notebook_tasks(jobs: Iterable[Job]) -> list[Task]:
    """The notebooks as tasks for the lanes, the longest first of those that may run."""
    return [Task(job.name, "lanes", job, NEEDS.get(job.name, ()), BEFORE.get(job.name, ()))
            for job in sorted(jobs, key=lambda job: job.name not in FIRST)]


def execute(job: Job, report: Path, log: Path) -> Result:
    """Execute one notebook in a fresh kernel; its copy appears in `report` by rename, failed or not."""
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    new, target = report / f".{job.name}.new.ipynb", report / f"{job.name}.ipynb"
    environment = {"M2RL_LOG": str(log), "M2RL_REPORT": str(report), "M2RL_NOTEBOOK": job.name,
                   "M2RL_ARTIFACTS": str(log.parent.parent)}
    start, reason = time.monotonic(), ""
    with _environment(environment):
        try:
            _started(lambda: papermill.execute_notebook(
                str(job.source), str(new), parameters=job.parameters, kernel_name="python3", progress_bar=False,
                cwd=str(job.source.parent), extra_arguments=QUIET))
        except papermill.PapermillExecutionError as error:
            message = str(error.evalue).strip().splitlines() or [""]
            reason = f"cell In [{error.exec_count}]: {error.ename}: {message[0]}"
        except DeadKernelError:
            reason = "the kernel died (killed, or out of memory); run again to go on from the last checkpoint"
        except NotStarted as error:
            reason = f"its kernel did not start ({error}); run again"
    notebook = nbformat.read(new, as_version=4)
    if not reason:
        reason = unfinished(notebook)
    nbformat.write(tidy(notebook), new)
    os.replace(new, target)
    seconds = round(time.monotonic() - start, 1)
    return Result(job.name, "failed" if reason else "completed", seconds, reason, job.parameters)


def _started(work: Callable) -> None:
    """`work()`, tried again where its kernel ended before it answered: ports are chosen some time before they are taken."""
    for last in (False, False, True):
        try:
            work()
            return
        except RuntimeError as error:
            if not str(error).startswith(SILENT):
                raise
            if last:
                raise NotStarted(one_line(error)) from error


def unfinished(notebook) -> str:
    """The first code cell that papermill did not complete, in words; "" if all are (SystemExit(0) leaves some)."""
    for i, cell in enumerate(notebook.cells, 1):
        status = cell.metadata.get("papermill", {}).get("status")
        if cell.cell_type == "code" and cell.source.strip() and status != "completed":
            first = cell.source.strip().splitlines()[0]
            return f"ended early: cell {i} (`{first[:60]}`) is {status or 'not executed'}"
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return f"ended early: cell {i} raised {output.ename}: {str(output.evalue).splitlines()[:1]}"
    return ""


def tidy(notebook):
    """Drop times, paths and random ids, so that the same results give the same file."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "papermill" in cell.metadata:
            cell.metadata["papermill"] = {"status": cell.metadata["papermill"].get("status")}
        for tag in ("injected-parameters", "papermill-error-cell-tag"):
            if tag in cell.metadata.get("tags", []):
                cell["id"] = f"{tag}-{notebook.cells.index(cell)}"
    kept = notebook.metadata.get("papermill", {})
    notebook.metadata["papermill"] = {key: kept[key] for key in ("parameters", "version") if key in kept}
    return notebook


def _record(report: Path, profile: str, results: dict[str, Result]) -> None:
    """run.json, claims.json and environment.txt: this run's results laid over those of earlier ones."""
    path = report / "run.json"
    old = json.loads(path.read_text(encoding="utf-8"))["notebooks"] if path.is_file() else []
    merged = {entry["name"]: entry for entry in old} | {name: asdict(result) for name, result in results.items()}
    order = [name for stem in NOTEBOOKS for name in (POLICIES if stem == TRAIN else (stem,))]
    names = sorted(merged, key=lambda name: order.index(name) if name in order else len(order))
    facts = {"profile": profile, "commit": commit(), "machine": machine(),
             "notebooks": [merged[name] for name in names]}
    write_atomic(path, json.dumps(facts, indent=1) + "\n")
    files = [report / "claims" / f"{name}.json" for name in names]
    claims = [entry for file in files if file.is_file() for entry in json.loads(file.read_text(encoding="utf-8"))]
    write_atomic(report / "claims.json", json.dumps(claims, indent=1) + "\n")
    write_atomic(report / "environment.txt", "\n".join(freeze()) + "\n")


def _choose(text: str, known: tuple[str, ...], what: str, prefix: bool = False) -> list[str]:
    wanted = [part.strip().removesuffix(".ipynb") for part in text.split(",") if part.strip()]
    if not wanted:
        return list(known)
    for part in wanted:
        if not any(name == part or prefix and name.startswith(part) for name in known):
            raise ReportError(f"unknown {what} {part!r}{_nearest(part, known)}")
    return [name for name in known if any(name == part or prefix and name.startswith(part) for part in wanted)]


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.4)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the kernel that is started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def tail(log: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Pass on every line that kernels add to the log, and the nodes of a cluster to theirs, reproduce-<node>.log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    stop, rest = threading.Event(), {}
    read = {path: path.stat().st_size for path in _logs(log)}  # what stands there is of earlier runs

    def follow():
        while True:
            last = stop.is_set()
            for path in _logs(log):
                with open(path, encoding="utf-8") as file:
                    file.seek(read.get(path, 0))
                    *lines, rest[path] = (rest.get(path, "") + file.read()).split("\n")
                    read[path] = file.tell()
                for text in lines:
                    say(f"    {text}")
            if last:
                return
            stop.wait(0.3)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _logs(log: Path) -> list[Path]:
    return [log, *log.parent.glob(f"{log.stem}-*{log.suffix}")]

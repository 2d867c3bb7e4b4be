"""A dry run: everything that a profile needs, looked for without a GPU and without making anything, each on one line.

What is missing says how to mend it. A model or data set that the hub offers counts as there, to be downloaded; where the
hub cannot be reached, the line names the files and the folder for them. Nothing here raises for what is missing.
"""
from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from m2rl_core import imports, layers
from m2rl_core.errors import StudyError, one_line
from m2rl_core.notebook import left_out
from m2rl_core.study import left_out_for

SECONDS = 8  # for one answer of the hub or of a server
HERE, FETCH, MISSING, NOTE = "here", "download", "MISSING", "note"
LEAVES = ("base", "sft", "rl", "opd", "merge")  # kinds of stages that leave a model's weights
REQUIRED = {"math": "math-verify", "if": "evalscope"}
BFCL, BFCL_VERSION = "bfcl-eval", "2025.8.6.2"


@dataclass(frozen=True)
class Line:
    """One thing that is needed: what, whether it is here, and where, or how to mend it."""

    what: str
    state: str
    told: str


def check(run) -> list[Line]:
    """All lines of a profile's run."""
    parts: list[Callable] = [hub_, models, disk, copies, stages, notebooks, parts_left_out]
    if not {stage.kind for stage in run.stages.values()} <= {"import", "weights"}:  # something is sampled
        parts[2:2] = [data, benchmarks, domains_, machine]
    with ThreadPoolExecutor(len(parts)) as pool:
        return [line for part in pool.map(lambda part: _guarded(part, run), parts) for line in part]


def _guarded(part: Callable, run) -> list[Line]:
    """The lines of one part; what goes wrong while one is looked for is a line, too."""
    try:
        return list(part(run))
    except (StudyError, OSError, ValueError) as error:
        return [Line(part.__name__.rstrip("_"), MISSING, one_line(error, 600))]


def table(lines: list[Line], name: str) -> str:
    """The lines, those that are missing last, and how many there are."""
    order = sorted(lines, key=lambda line: line.state == MISSING)
    width = max(len(line.what) for line in lines)
    missing = sum(line.state == MISSING for line in lines)
    legend = (f"what {name} needs: {HERE}: it is ready; {FETCH}: it will be fetched by itself; {NOTE}: to be known; "
              f"{MISSING}: do what its line says")
    return "\n".join([legend, *(f"{line.state:8} {line.what:{width}}  {line.told}" for line in order),
                      f"{name}: {missing} missing of {sum(line.state != NOTE for line in lines)}"
                      + ("" if missing else "; `make reproduce` can begin")])


# The hub -----------------------------------------------------------------------------------------------

def hub_(run) -> Iterator[Line]:
    """Whether the hub answers at all, where something would come from it."""
    profile = run.profile
    brought = [imports.source_of(profile, name) for name, stage in run.stages.items() if stage.kind == "import"]
    from_it = [source for source in brought if not source.startswith("/") and not imports.find(source)]
    if not from_it and "real" not in (profile.rows, profile.eval.rows):
        return
    from datasets import config
    told = "what would come from it is named below, each with the folder where it may be put by hand"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        yield Line("hub", NOTE, f"HF_HUB_OFFLINE is set, so {config.HF_ENDPOINT} is not asked: unset it to download; {told}")
        return
    found = _reach("hub", config.HF_ENDPOINT, f"{told}; or type this on a machine that reaches it")
    yield found if found.state == HERE else Line("hub", NOTE, found.told)


def _why(error: Exception) -> str:
    """Why the hub did not give something, in words; that it cannot be reached is explained in its own line."""
    if isinstance(error, urllib.error.HTTPError):
        return {401: "the hub has none, or not for everybody (`hf auth login` or set HF_TOKEN)",
                403: "the hub wants its terms accepted first", 404: "the hub has none by that name and commit",
                }.get(error.code, f"the hub answered {error.code} {error.reason}")
    away = isinstance(error, urllib.error.URLError | TimeoutError)
    return "the hub cannot be reached" if away else f"the hub: {one_line(error)}"


def _got(source) -> str:
    """How to get a data set, with the address of the page whose terms are to be accepted."""
    from m2rl_core.real import hub
    return hub.mend(source).replace("its page, then", f"https://huggingface.co/datasets/{source.repo}, then")


# Models ------------------------------------------------------------------------------------------------

def models(run) -> Iterator[Line]:
    """Every model that is brought: found, of the right kind and shape, or how to get it."""
    profile = run.profile
    sources = {name: imports.source_of(profile, name) for name, stage in run.stages.items() if stage.kind == "import"}
    parts = {name: sources.pop(name) for name in list(sources) if "layers" in run.stages[name].settings}
    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(lambda name: Line(f"model {name}", *_asked_part(name, parts[name], profile.parts)), parts)
        asked = dict(zip(sources, pool.map(_asked, sources.values()), strict=True))
    with tempfile.TemporaryDirectory(prefix="m2rl-anchors-") as room:
        for name, source in sources.items():
            if imports.find(source) is None:
                state, told = asked[name]
                if source.startswith("/") and name in profile.imports:
                    told += f", or name another folder, or owner/name@revision, as `{name}` under `import` of the profile"
                yield Line(f"model {name}", state, told)
                continue
            try:
                checked, what = imports.anchored(profile, name, Path(room))
                _suits(profile, json.loads((checked.folder / "config.json").read_text()) | dict(checked.config), what)
            except StudyError as error:
                yield Line(f"model {name}", MISSING, one_line(error, 600))
                continue
            size = sum(path.stat().st_size for path in imports.files(checked.folder))
            yield Line(f"model {name}", HERE, "; ".join([
                f"{checked.folder}, {size / 2**30:.2f} GB, content {run.stages[name].key[:8]}", *checked.remarks]))
    for name, source in profile.imports.items():
        if not source:
            yield Line(f"model {name}", MISSING, f"import.{name} names nothing yet: a folder, or owner/name@revision; "
                                                 "or remove the key, and it is not run")


def _suits(profile, config: dict, what: str) -> None:
    """StudyError where the profile asks a model for answers or for a layer that it cannot have."""
    context, layers = config.get("max_position_embeddings", 0), config.get("num_hidden_layers", 0)
    longest = max(profile.eval.max_new_tokens, *(one.max_new_tokens for one in profile.eval.sampling.values()), 0)
    if context <= longest:
        raise StudyError(f"{what} has a context of {context:,} tokens, which holds no prompt beside an answer of {longest:,}: "
                         "set a smaller `max_new_tokens` under `eval` and `rl` of the profile")
    if profile.analysis.layer >= layers:
        raise StudyError(f"{what} has {layers} layers, and `analysis.layer` asks for number {profile.analysis.layer}, counted "
                         f"from 0: set one below {layers} in the profile")


def _asked(source: str) -> tuple[str, str]:
    """What the hub says of a model that is not here."""
    name, revision = imports.split(source)
    if imports.find(source):
        return HERE, ""
    if source.startswith("/"):
        return MISSING, f"{source} holds no model: {imports.mend(source)}"
    try:
        told = _hub(f"/api/models/{name}/revision/{revision or 'main'}?blobs=true")
        size = sum(entry.get("size") or 0 for entry in told["siblings"]) / 2**30
        pin = "" if revision else f"; pin it: {name}@{told['sha']}"
        return FETCH, f"{name} at {told['sha'][:12]}, {size:.1f} GB{pin}"
    except (OSError, ValueError, KeyError) as error:
        return MISSING, f"{source} is not here, and {_why(error)}: {imports.mend(source)}"


def _asked_part(name: str, source: str, wanted) -> tuple[str, str]:
    """Some layers of a model: the bytes that will be read, by the headers of its files."""
    place, repo = layers.find(source), imports.split(source)
    try:
        if place is None and source.startswith("/"):
            return MISSING, f"{source} holds no model: {imports.mend(source)}"
        if place is None:
            place = layers.Place(repo[0], _hub(f"/api/models/{repo[0]}/revision/{repo[1] or 'main'}")["sha"])
        found, headers = layers.slices(place, wanted, f"{name} ({source})")
    except StudyError as error:
        return MISSING, one_line(error, 600)
    except (OSError, ValueError, KeyError) as error:
        return MISSING, f"{source} is not here, and {_why(error)}: {imports.mend(source)}"
    size = sum(one.end - one.begin for one in found)
    told = f"layers {', '.join(map(str, wanted))}: {size + headers:,} bytes will be read ({headers:,} of headers)"
    pin = "" if repo[1] or place.folder else f"; pin it: {place.name}@{place.commit}"
    return (HERE, f"{place.folder}, {told}") if place.folder else (FETCH, f"{place.name} at {place.commit[:12]}, {told}{pin}")


def _hub(path: str) -> dict:
    from m2rl_core.real import hub
    return hub.ask(path, SECONDS)


# Data --------------------------------------------------------------------------------------------------

def data(run) -> Iterator[Line]:
    """Every data set that training reads."""
    profile = run.profile
    if profile.rows == "miniature":
        yield Line("training rows", HERE, "made on the spot (miniature)")
        return
    from m2rl_core.real import hub
    kinds = {stage.kind for stage in run.stages.values()}
    types = {line.type for line in profile.sft.blend}
    five = any(domain not in profile.files for domain in profile.domain_names)
    wanted = []
    for source in hub.sources().values():
        kind, _, what = source.use.partition(": ")
        of_code = what == "questions of Code" and "Code" in types
        if kind == "SFT" and "sft" in kinds and (what in types or of_code):
            wanted.append(source)
        if kind == "RL" and five and kinds & {"rl", "opd", "kl"}:
            wanted.append(source)
    yield from _sources(wanted)


def benchmarks(run) -> Iterator[Line]:
    """Every benchmark: its data set, and what its verifier needs."""
    profile = run.profile
    if profile.eval.rows == "miniature":
        yield Line("benchmarks", HERE, f"{', '.join(profile.benchmarks)} (the nine's are miniatures)")
        return
    from m2rl_core.real import benchmarks as nine
    from m2rl_core.real import hub
    from m2rl_core.real.decontamination import FROM
    names = [name for name in profile.benchmarks if name in nine.NINE]
    by_wheel = [name for name in names if nine.NINE[name].make is None]
    wanted = {FROM[name][0]: None for name in names if name not in by_wheel}
    yield from _sources([hub.sources()[repo] for repo in wanted])
    for name in by_wheel:
        yield _package(f"benchmark {name}", BFCL,
                       f"pip install --no-deps {BFCL}=={BFCL_VERSION}; it needs {nine.NINE[name].needs}")
    for domain, package in REQUIRED.items():
        if domain in profile.domains:
            yield _package(f"verifier {domain}", package, "`make setup` installs it")


def _package(what: str, package: str, mend: str) -> Line:
    try:
        return Line(what, HERE, f"{package} {importlib.metadata.version(package)}")
    except importlib.metadata.PackageNotFoundError:
        return Line(what, MISSING, f"the package {package} is not installed: {mend}")


def _sources(sources) -> Iterator[Line]:
    from huggingface_hub import get_token

    from m2rl_core.real import hub

    def look(source) -> Line:
        what = f"data {source.repo}"
        try:
            if hub.folder_of(source) is None:
                _hub(f"/api/datasets/{source.repo}/revision/{source.revision or 'main'}")  # a short wait, not `hub`'s
            found = hub.files(source)
        except hub.HubError as error:
            return Line(what, MISSING, one_line(error, 600))
        except (OSError, ValueError) as error:
            return Line(what, MISSING, f"{source.use}: not here, and {_why(error)}: {_got(source)}")
        by_hand = hub.folder_of(source)
        pin = found[0].source.revision[:12]
        if not by_hand and source.login and get_token() is None:
            return Line(what, MISSING, f"{source.use}: {_got(source).partition('; or ')[0]}, or set HF_TOKEN")
        return Line(what, HERE if by_hand else FETCH,
                    f"{source.use}: {len(found)} files {f'in {by_hand}' if by_hand else f'at {pin}'} "
                    f"(licence: {source.licence})")

    with ThreadPoolExecutor(12) as pool:
        yield from pool.map(look, sources)


def domains_(run) -> Iterator[Line]:
    """Domains of one's own: the file loads, gives rows, verifies one, and trains on no test row."""
    from m2rl_core.domains import own_file, rewards
    profile = run.profile
    for name, file in profile.files.items():
        try:
            home, wanted = own_file.Domain(name, file), profile.rl.rows[name]
            rows = home.rows("test", profile.eval.items[name], profile.seed)
            home.rows("rl", wanted, profile.seed)
            if "sft" in run.stages and any(line.domain == name for line in profile.sft.blend):
                home.rows("sft", 1, profile.seed)
            (verdict,) = rewards(rows[:1], [["</think>\nIt is so."]])
            shared = own_file.leaks(name, file, wanted, len(rows), profile.seed)
        except StudyError as error:
            yield Line(f"domain {name}", MISSING, one_line(error, 600))
            continue
        if verdict.failed:
            yield Line(f"domain {name}", MISSING,
                       f"{file}: verify cannot judge 'It is so.' on the first test row: {verdict.reason}")
        elif shared:
            yield Line(f"domain {name}", MISSING,
                       f"{file}: {shared} test rows are training rows, too: give rows of 'test' that 'rl' never gives")
        else:
            yield Line(f"domain {name}", HERE, f"{file}: {len(rows)} test rows, {wanted} to train on; verify answers")


# Machine -----------------------------------------------------------------------------------------------

def machine(run) -> Iterator[Line]:
    """Engine, GPUs, sandbox, judge, Python packages."""
    profile = run.profile
    gpus = _gpus()
    if profile.engine == "vllm":
        yield from _vllm(profile)
    real = profile.rows == "real" or profile.eval.rows == "real"
    if gpus or not real:
        yield Line("GPUs", HERE, "; ".join(gpus) or "none, and none needed at this size")
    else:
        yield Line("GPUs", MISSING, "nvidia-smi shows none; the weight analysis and merging need none, all else at this size "
                                    "does: run on a machine with a CUDA GPU")
    if "coding" in profile.domains or "agent" in profile.domains:
        yield _sandbox(real)
    if "hle" in profile.benchmarks and profile.eval.rows == "real":
        yield _judge()
    if "agent" in profile.domains and profile.rows == "real":
        yield _workplace()
    if os.environ.get("M2RL_ENVIRONMENTS"):
        yield from _environments()


def _vllm(profile) -> Iterator[Line]:
    """This machine's vLLM, or each of the servers that a profile names."""
    from m2rl_core.engines import vllm_engine, vllm_link
    servers = vllm_engine.servers_of(profile)
    for address in servers:
        try:
            yield Line(f"vllm {address}", HERE, vllm_engine.version([address]))
        except StudyError as error:
            yield Line(f"vllm {address}", MISSING, one_line(error, 600))
    if not servers:
        told = vllm_engine.version()
        there = told != "not installed"
        yield Line("engine vllm", HERE if there else MISSING, told if there else vllm_link.MEND)


def _gpus() -> list[str]:
    try:
        told = subprocess.run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return told.stdout.strip().splitlines() if told.returncode == 0 else []


def _sandbox(real: bool) -> Line:
    address = os.environ.get("M2RL_SANDBOX", "")
    if address.startswith("http"):
        told = [_reach("sandbox", one.strip(), "start SandboxFusion there, or unset M2RL_SANDBOX for bubblewrap")
                for one in address.split(",") if one.strip()]
        return next((line for line in told if line.state == MISSING), told[0])
    from m2rl_core import sandbox
    told = sandbox.probe()
    weak = shutil.which("bwrap") is None or "nterpreter" in told
    if real and weak:
        return Line("sandbox", MISSING, f"{told}; real programs need `sudo apt-get install bubblewrap`, or set "
                                        "M2RL_SANDBOX=http://host:port of a SandboxFusion server")
    return Line("sandbox", HERE, told)


def _judge() -> Line:
    address = os.environ.get("M2RL_JUDGE", "")
    if not address:
        return Line("judge of hle", MISSING, "set M2RL_JUDGE=http://host:port/v1 and M2RL_JUDGE_MODEL; without a judge a rule "
                                             "gives a lower bound")
    from m2rl_core.domains import hle
    hle.judge()  # raises where half of it is said
    return _reach("judge of hle", address, "start the judge there, or unset M2RL_JUDGE for the lower bound")


def _workplace() -> Line:
    """The tools and tables of agent prompts: NeMo-Gym's wheel, or the server that is asked in its place."""
    from m2rl_core.domains import workbench_server, workbench_wheel
    address = workbench_server.address()
    if address is None:
        return _package("workplace", workbench_wheel.PACKAGE, workbench_wheel.INSTALL)
    return _reach("workplace", address, f"start the server there, or unset {workbench_server.SETTING} for the wheel's tools")


def _environments() -> Iterator[Line]:
    """Servers of environments: there, with our secret and our code."""
    from m2rl_core.domains import far_environments
    for address in filter(None, map(str.strip, os.environ["M2RL_ENVIRONMENTS"].split(","))):
        try:
            line, count = far_environments.Server(address).connect()
        except far_environments.GONE + (StudyError,) as error:
            yield Line("environments", MISSING, f"{address}: {one_line(error, 600)}: start `python -m m2rl_core.domains."
                                                "environment_server` there, with the same secret")
        else:
            line.close()
            yield Line("environments", HERE, f"{address} answers, {count} steps at once")


def _reach(what: str, address: str, mend: str) -> Line:
    parts = urllib.parse.urlsplit(address)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), SECONDS):
            return Line(what, HERE, f"{address} answers")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", "") or one_line(error)
        return Line(what, MISSING, f"{address} cannot be reached ({why}): {mend}")


def disk(run) -> Iterator[Line]:
    """Room for what is to be made: float32 weights of each model, what training keeps to go on, rows of a real blend."""
    from m2rl_core.cost import bill, table2
    root = next(path for path in (run.store.root, *run.store.root.parents) if path.exists())
    if not os.access(root, os.W_OK):
        yield Line("artifacts", MISSING, f"{root} cannot be written: set M2RL_ARTIFACTS to a folder that can")
        return
    count = parameters(run.profile)
    made = [stage for name, stage in run.stages.items() if stage.kind in LEAVES and not run.has(name)]
    if count is None:
        free = shutil.disk_usage(root).free
        yield Line("disk", NOTE, f"{free / 1e9:.0f} GB free in {root}; the model's size is not known yet")
        return
    kinds = {stage.kind for stage in made}
    needed = (bill.FULL * len(made) + bill.CHECKPOINT * bool({"base", "sft", "rl", "opd"} & kinds)) * count
    if "sft" in kinds and run.profile.rows == "real":
        needed += bill.STORED * table2.MEAN * run.profile.sft.rows
    free = shutil.disk_usage(root).free
    told = (f"{free / 1e9:,.1f} GB free in {root}, about {needed / 1e9:,.1f} GB needed for {len(made)} models of "
            f"{count / 1e6:,.1f} M")
    yield Line("disk", HERE if free > needed else MISSING, told + ("" if free > needed else
               ": make room, or set M2RL_ARTIFACTS to a folder that has it"))


def copies(run) -> Iterator[Line]:
    """The address of the store's copies, where one is set: written to and read."""
    if run.store.remote:
        at, name = run.store.remote.at, f".dry-{os.getpid()}"
        try:
            at.write(name, b".")
            at.remove(name)
        except StudyError as error:
            yield Line("copies", MISSING, one_line(error, 600))
        else:
            yield Line("copies", HERE, f"{at.shown} can be written to")


def parameters(profile) -> int | None:
    """Weights of one model: of a shape, of a config that is here, else by the number in its name; None where nothing tells."""
    from m2rl_core.cost import bill
    with contextlib.suppress(StudyError, KeyError):  # nothing is known, or a config that does not say its shape
        return bill.shape_of(profile).parameters
    sources = [imports.source_of(profile, "base")] if profile.model else [*filter(None, profile.imports.values())]
    told = re.search(r"(\d+(?:\.\d+)?)B\b", sources[0]) if sources else None
    return int(float(told[1]) * 1e9) if told else None


def stages(run) -> Iterator[Line]:
    """Every stage has its key; how many are made."""
    made = sum(run.has(name) for name in run.stages)
    yield Line("stages", HERE, f"{len(run.stages)}, of which {made} are made in {run.store.root}; `make status PROFILE="
                               f"{run.source}` lists them with their keys, `make estimate PROFILE={run.source}` their cost")


def notebooks(run) -> Iterator[Line]:
    """The notebooks, and their kernel."""
    from m2rl_core.profile import repo_root
    from m2rl_core.publishing import report
    jobs = report.plan(repo_root() / "notebooks", run.source)
    yield Line("notebooks", HERE, f"{len(jobs)} runs of {len({job.source for job in jobs})} notebooks")


def parts_left_out(run) -> Iterator[Line]:
    """What of the paper's study this profile leaves out, said openly."""
    if out := left_out(run):
        yield Line("not run", NOTE, f"{', '.join(out)}: {left_out_for(run.profile)}")

"""The command line: reproduce, run, status, why, estimate, rebuild, clean, report, merge, bench, data.

Every error that a user can cause ends in one line and exit code 2; a report with a failed notebook in 1.
"""
from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
from pathlib import Path

import yaml

from m2rl_core import ranks
from m2rl_core.errors import StudyError
from m2rl_core.jobs import launch
from m2rl_core.jobs.tasks import notebook_stages
from m2rl_core.profile import ProfileError, repo_root
from m2rl_core.progress import duration
from m2rl_core.publishing import report as runner
from m2rl_core.run import MissingArtifact, Run, open_run
from m2rl_core.store import CorruptArtifact, DiskFull
from m2rl_core.study import UnknownStage, find

EXPECTED = (StudyError, ProfileError, UnknownStage, MissingArtifact, CorruptArtifact, DiskFull, runner.ReportError)


def reproduce(args) -> int:
    """execute the notebooks and write the report"""
    run, root = _open(args), repo_root()
    if args.dry:
        from m2rl_core import dry
        print(dry.table(dry.check(run), run.profile.name))
        return 0
    extra = {}
    for text in args.set:
        name, sign, value = text.partition("=")
        if not sign:
            raise runner.ReportError(f"--set {text}: expected NAME=VALUE")
        extra[name] = yaml.safe_load(value)
    jobs = runner.plan(root / "notebooks", run.source, args.models, args.nb, extra)
    ok = runner.reproduce(jobs, _report(run), run.store.root, run.profile.name, lanes=run.profile.jobs + 1,
                          nodes=_nodes(args, run))
    return 0 if ok else 1


def report(args) -> int:
    """write the site again from the executed notebooks"""
    from m2rl_core.publishing import readme, site
    folder = _report(_open(args))
    if not (folder / "run.json").is_file():
        raise runner.ReportError(f"{folder} holds no executed notebooks yet: `make reproduce PROFILE={args.profile}`")
    print(f"{len(site.write(folder))} pages; open {folder / 'index.html'}")
    if args.readme:
        readme.refresh(Path(args.readme), folder / "claims.json")
    return 0


def run(args) -> int:
    """make stages, and first what they need"""
    here = _open(args)
    names = list(here.stages) if args.name == "all" else [find(here.stages, name).name for name in args.name.split(",")]
    nodes = _nodes(args, here)
    if nodes is not None and not runner.make_stages(nodes, names):
        return 1
    for name in names:
        path = here.need(name)
        if ranks.first():
            print(f"{name}: {path}")
    return 0


def status(args) -> int:
    """what is made and what is left"""
    here = _open(args)
    for name, stage in here.stages.items():
        state = "made" if here.has(name) else "begun" if here.store.folder(stage).is_dir() else "-"
        seconds = here.expected_seconds(name)
        print(f"{name:28} {stage.key[:8]}  {state:6} {duration(seconds) if seconds is not None else '':>8}")
    made = sum(here.has(name) for name in here.stages)
    print(f"{made} of {len(here.stages)} stages made in {here.store.root}")
    return 0


def why(args) -> int:
    """why a stage, or what a notebook needs, would run"""
    here, name = _open(args), args.name
    if name in here.stages:
        names = here.missing(name)
    else:
        wanted = notebook_stages(here, name)
        missing = {part for stage in wanted for part in here.missing(stage)}
        names = [part for part in here.stages if part in missing]
    if not names:
        print(f"{name}: everything is made; nothing would run")
    for part in names:
        print(f"{part}: {'; '.join(here.store.why(here.stages[part]))}")
    return 0


def estimate(args) -> int:
    """what every stage and all together cost: time, tokens, disk, memory; GPU hours beside the paper's"""
    from m2rl_core.cost import bill, told
    run = _open(args)
    given = bill.Given(args.gpu, args.gpus, args.sampling, args.training)
    if given == bill.Given() and bill.calibratable(run.profile) and bill.source(run).found is None:
        print("no throughput of this profile on this machine yet: it is measured once, in seconds", file=sys.stderr)
    print("\n".join(told.lines(run, bill.frame(run, given, measure=True))))
    return 0


def rebuild(args) -> int:
    """make a stage again; the old folder is kept in set-aside/"""
    print(_open(args).rebuild(args.name))
    return 0


def clean(args) -> int:
    """remove everything computed for one profile (the report stays)"""
    store = _open(args).store
    folder = store.root
    if folder.is_dir():
        with store.lock_all("clean"):  # nobody works on it; the lock's own file stays, others may wait on it
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif ".lock" not in path.name:
                    path.unlink()
        print(f"removed {folder}" + (f"; what is at {store.remote.at.shown} stays" if store.remote else ""))
    else:
        print(f"{folder} does not exist: nothing to remove")
    return 0


def _nodes(args, run: Run):
    """The Ray cluster that was asked for; None for this machine alone."""
    if args.engine == "local":
        if args.address:
            raise runner.ReportError(f"--address {args.address}: only --engine ray has one")
        if not ranks.launched():
            launch.check(run.profile, [stage.kind for stage in run.stages.values() if not run.has(stage.name)])
        return None
    from m2rl_core.jobs.cluster import Nodes
    return Nodes(run, args.address or os.environ.get("RAY_ADDRESS") or "local")


def _open(args) -> Run:
    return open_run(args.profile)


def _report(run: Run) -> Path:
    """reports/<profile>/, or the folder that M2RL_REPORTS names in its place."""
    return Path(os.environ.get("M2RL_REPORTS") or repo_root() / "reports").absolute() / run.profile.name


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("python -m m2rl_core", description="One study: mix or merge?", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function in (reproduce, report, run, status, why, estimate, rebuild, clean):
        command = commands.add_parser(function.__name__, help=function.__doc__, allow_abbrev=False)
        command.set_defaults(function=function)
        command.add_argument("--profile", default="tiny", help="a name of params/ or a YAML file (tiny)")
        if function in (run, why, rebuild):
            command.add_argument("name", help="a stage, such as rl-math" + {
                run: ", several with commas, or all", why: ", or a notebook, such as 3.3", rebuild: ""}[function])
        if function in (reproduce, run):
            command.add_argument("--engine", default="local", choices=("local", "ray"), help="where stages run (local)")
            command.add_argument("--address", default="", help="of Ray: auto, HOST:6379, ray://HOST:10001 or local")
        if function is estimate:
            command.add_argument("--gpu", default="", help="for GPUs of this make: h100, h200, h800, a100 (this machine)")
            command.add_argument("--gpus", type=int, default=0, help="for so many (as the profile's resources say)")
            for rate, what in (("sampling", "samples"), ("training", "trains on")):
                command.add_argument(f"--{rate}", type=float, default=0.0, metavar="TOKENS/S",
                                     help=f"tokens a second that a GPU {what}")
        if function is report:
            command.add_argument("--readme", default="", metavar="FILE", help="also bring its verdict table up to date")
        if function is reproduce:
            command.add_argument("--dry", action="store_true", help="look for everything that is needed, and run nothing")
            command.add_argument("--models", default="", help="policies of 3.2_train, with commas")
            command.add_argument("--nb", default="", help="notebooks, by the beginnings of their names, with commas")
            command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter")
    commands.add_parser("bench", help="measure merging, the engine or the weight analysis (bench merge --help)",
                        add_help=False)
    commands.add_parser("merge", help="merge checkpoints of your own (merge --help)", add_help=False)
    commands.add_parser("data", help="make and check the paper's own SFT and RL data (data --help)", add_help=False)
    return top


def _bench(argv: list[str]) -> int:
    """Runs one bench by its name."""
    if argv[:1] not in (["merge"], ["engine"], ["analysis"]):
        print(f"error: no bench {' '.join(argv[:1]) or '(none)'}; there are: merge, engine, analysis", file=sys.stderr)
        return 2
    return importlib.import_module(f"m2rl_core.bench.{argv[0]}").main(argv[1:])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["merge"]:
        from m2rl_core.merging import cli
        return cli.main(argv[1:]) or 0
    if argv[:1] == ["bench"]:
        return _bench(argv[1:])
    if argv[:1] == ["data"]:
        from m2rl_core.real import cli
        return cli.main(argv[1:])
    args = parser().parse_args(argv)
    try:
        if ranks.size() > 1 and args.function not in (run, rebuild):
            raise StudyError(f"{args.command} is for one process, but {ranks.size()} were launched; run and rebuild take "
                             "several")
        return args.function(args)
    except EXPECTED as error:
        ranks.tell(error)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    ranks.leave(main())

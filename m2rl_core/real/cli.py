"""`python -m m2rl_core data sft|rl|check|sources|export`: the paper's own data, made, checked, listed and handed on."""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from m2rl_core.errors import StudyError
from m2rl_core.publishing import readme
from m2rl_core.real import decontamination, hub, rl_blend, sft_blend
from m2rl_core.store import write_atomic


def main(argv: Sequence[str]) -> int:
    """Runs one of the commands; returns 0, 2 after one line on standard error, or 130 when stopped."""
    args = parser().parse_args(argv)
    try:
        args.function(args)
    except (StudyError, OSError) as error:
        hint = " (--skip-wrong leaves such rows out and counts them)" if getattr(error, "field", "") else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("python -m m2rl_core data", allow_abbrev=False, description="The paper's own data. "
                                  f"{hub.FOLDER}=/folder reads data sets from /folder/<owner>__<name>/ where they are there.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("sft", help="the SFT blend of Table 1", allow_abbrev=False)
    one.set_defaults(function=sft)
    one.add_argument("--seed", type=int, default=1, help="which rows are drawn (1)")
    one.add_argument("--share", type=float, default=1.0, help="of Table 1's samples (1)")
    one.add_argument("--types", default="", help="some of Table 1's types, with commas (all)")
    two = commands.add_parser("rl", help="the RL prompts of the five domains", allow_abbrev=False)
    two.set_defaults(function=rl)
    two.add_argument("--template", choices=("data", "released"), default="data",
                     help="prompts as the data has them, or worded again as the released code does (data)")
    for command in (one, two):
        command.add_argument("--out", type=Path, required=True, metavar="FOLDER")
        command.add_argument("--first", type=int, default=0, metavar="N", help="a trial: only N lines of every file")
        command.add_argument("--skip-wrong", action="store_true", help="leave rows of the wrong schema out, and count them")
    five = commands.add_parser("export", help="our RL rows as the training file of slime, verl or TRL", allow_abbrev=False)
    five.set_defaults(function=export)
    five.add_argument("--for", dest="trainer", choices=("slime", "verl", "trl"), required=True)
    five.add_argument("out", type=Path, metavar="FOLDER")
    source = five.add_mutually_exclusive_group()
    source.add_argument("--profile", default="tiny", help="whose rows: a name of params/ or a YAML file (tiny)")
    source.add_argument("--blend", type=Path, metavar="FOLDER", help="what `rl` made, in place of a profile's rows")
    five.add_argument("--domains", default="", help="some of the five, with commas (all)")
    five.add_argument("--rule", action="append", default=[], metavar="DOMAIN=RULE",
                      help="how a domain is verified, where not by its first rule: math=last_box")
    five.add_argument("--model", type=Path, metavar="FOLDER", help="verl and TRL: whose chat template writes a row's tools")
    five.add_argument("--turns", choices=("one", "all"), default="one",
                      help="all: also rows whose environment replies, for a trainer with a tool loop for them (one)")
    three = commands.add_parser("check", help="the nine benchmarks' prompts in training prompts", allow_abbrev=False)
    three.set_defaults(function=check)
    three.add_argument("folder", type=Path, nargs="*", help="what `sft` or `rl` made")
    three.add_argument("--profile", help="the blends that a profile's stages made; notebook 3.1 shows what is found")
    three.add_argument("--out", type=Path, metavar="FILE.json", help="where to write it (needed without --profile)")
    four = commands.add_parser("sources", help="every data set: commit, licence, files, what it needs", allow_abbrev=False)
    four.set_defaults(function=sources)
    four.add_argument("--readme", type=Path, metavar="FILE", help="also bring its tables of data up to date")
    return top


def sft(args) -> None:
    types = tuple(name.strip() for name in args.types.split(",") if name.strip())
    told = sft_blend.build(args.out, sft_blend.Settings(args.seed, args.share, types, args.first, args.skip_wrong), _say)
    print(f"{'type':22} {'samples':>10} {'Table 1':>10} {'usable':>10} {'dropped':>9}")
    for name, line in told["types"].items():
        print(f"{name:22} {line['samples']:>10,} {line['paper']:>10,} {line['usable']:>10,} "
              f"{sum(line['dropped'].values()):>9,}")
        _reasons(line["dropped"])
    print(f"{args.out}: finished, see report.json")


def rl(args) -> None:
    told = rl_blend.build(args.out, rl_blend.Settings(args.template, args.first, args.skip_wrong), _say)
    for name, line in told["domains"].items():
        print(f"{name:8} {line['rows']:>7,} rows (the paper: {line['paper']:,})")
    _reasons(told["dropped"])
    _reasons(told["remarks"])
    print(f"{args.out}: finished, see report.json")


def export(args) -> None:
    from m2rl_core.adapters import export as exports
    exports.main(args, print)


def check(args) -> None:
    train, folders, out = {}, list(args.folder), args.out
    if args.profile:
        from m2rl_core import data
        from m2rl_core.run import open_run
        run = open_run(args.profile)
        folders += [folder for folder in data.blends_of(run.profile, run.store.root).values() if folder.is_dir()]
        out = out or data.overlap_file(run.store.root)
    if not folders or not out:
        raise StudyError("nothing to check: name the folders that `data sft` and `data rl` made, and --out; or --profile, "
                         "once its SFT or RL stages have made theirs")
    for folder in folders:
        if (folder / "manifest.json").is_file():
            train[str(folder)] = sft_blend.prompts(folder)
        elif (folder / "report.json").is_file():
            train[str(folder)] = rl_blend.prompts(folder)
        else:
            raise StudyError(f"{folder} holds no finished blend: `python -m m2rl_core data sft` or `rl` makes one")
    told = decontamination.check(train, decontamination.nine())
    write_atomic(out, json.dumps(told, indent=1))
    for name, line in told["benchmarks"].items():
        if "not checked" in line:
            print(f"{name:13} not checked: {line['not checked']}")
        else:
            print(f"{name:13} {line['items hit']} of {line['items']} items share a run of {told['words in a run']} words with "
                  f"training, {line['items hit by half']} of them half of their runs or more")
    for name, line in told["repeated"].items():
        print(f"{name}: {line['prompts']:,} prompts, {line['different']:,} different")
    print(f"{out}: written, with examples")


def sources(args) -> None:
    for source in hub.sources().values():
        print(f"{source.repo}\n  {source.use}; commit {source.revision or 'of the first run'}; licence: {source.licence}"
              + (f"; {source.login}" if source.login else ""))
        where = hub.folder_of(source)
        print(f"  files: {', '.join(source.splits.values())}; {f'by hand in {where}' if where else 'from the hub'}")
    if args.readme:
        readme.refresh_data(args.readme)


def _reasons(counts: dict[str, int]) -> None:
    for reason, rows in counts.items():
        print(f"    {rows:,} {reason}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)

"""`python -m m2rl_core data export --for slime|verl|trl FOLDER`: our RL rows as the training file of another trainer.

The row itself travels along as JSON text (`scoring.KEY`), so that our reward finds it again; Parquet and JSON libraries
leave a text alone where they would fill in or convert nested fields. slime writes a row's tools into its prompt by itself;
verl and TRL know only tools of all rows, so there they are written into the system turn, in the words of the model's own
chat template.
"""
from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from m2rl_core.adapters.scoring import KEY, many_turns
from m2rl_core.domains import MODULES, Row, module
from m2rl_core.errors import StudyError
from m2rl_core.store import write_atomic

PIECE = 2**26  # characters of rows in one row group of a Parquet file
SYSTEM = re.compile(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", re.DOTALL)


def _slime(row: Row, number: int, messages: list[dict]) -> dict:
    """THUDM/slime: slime/utils/data.py, `Dataset`: prompt, tools (a list), label and metadata by their keys."""
    return {"prompt": messages, "tools": list(row.tools), "label": row.id, "metadata": {KEY: row.to_json()}}


def _verl(row: Row, number: int, messages: list[dict]) -> dict:
    """verl-project/verl: verl/utils/dataset/rl_dataset.py and the reward managers' fields; data_source names its metrics."""
    return {"data_source": f"m2rl/{row.domain}", "prompt": messages, "ability": row.domain,
            "reward_model": {"style": "rule", "ground_truth": row.id}, "extra_info": {"index": number, KEY: row.to_json()}}


def _trl(row: Row, number: int, messages: list[dict]) -> dict:
    """huggingface/trl: docs/source/dataset_formats.md, conversational, prompt only; other columns go to the reward."""
    return {"prompt": messages, "domain": row.domain, KEY: row.to_json()}


TRAINERS = {"slime": ("train.jsonl", _slime), "verl": ("train.parquet", _verl), "trl": ("train.parquet", _trl)}
# What a user types; each trainer's own settings (model, GPUs, lengths) follow. Sources of the flags: slime/utils/arguments.py
# and slime/utils/data.py; verl/trainer/config/ppo_trainer.yaml, data/legacy_data.yaml and reward/reward.yaml there;
# trl/scripts/grpo.py and utils.py.
FLAGS = {
    "slime": ("--prompt-data {file} --input-key prompt --label-key label --tool-key tools --metadata-key metadata "
              "--apply-chat-template --rollout-shuffle --custom-rm-path m2rl_core.adapters.slime.reward"),
    "verl": ("data.train_files={file} data.prompt_key=prompt data.reward_fn_key=data_source "
             "reward.custom_reward_function.path=pkg://m2rl_core.adapters.verl "
             "reward.custom_reward_function.name=compute_score "
             # its own validation has no benchmark of ours, but wants a file
             "data.val_files={file} trainer.val_before_train=False trainer.test_freq=-1"),
    "trl": "--dataset_name {folder} --reward_funcs m2rl_core.adapters.trl.reward",
}


def export(trainer: str, rows: Iterable[Row], out: Path, tokenizer=None, all_turns: bool = False) -> dict:
    """Writes `rows` into `out` as `trainer` reads them, and report.json; returns the report.

    Rows whose environment replies are left out, and counted, unless `all_turns`: without a tool loop no answer to them can
    be right. StudyError for a message that is more than a role and a text, for no row at all, and where verl or TRL would
    need a `tokenizer` to write tools into the prompt, or its chat template has another form.
    """
    name, form = TRAINERS[trainer]
    out.mkdir(parents=True, exist_ok=True)
    counts, left_out = Counter(), Counter()

    def made() -> Iterator[tuple[dict, int]]:
        for row in rows:
            if many_turns(row) and not all_turns:
                left_out[row.domain] += 1
                continue
            messages = _messages(row) if trainer == "slime" else with_tools(row, tokenizer)
            found = form(row, sum(counts.values()), messages)
            counts[row.domain] += 1
            yield found, 2 * sum(len(m["content"]) for m in messages) + len(str(row.truth))

    path = out / name
    with _renamed(path) as new:
        (_jsonl if name.endswith(".jsonl") else _parquet)(new, made())
        if not counts:
            raise StudyError(f"{trainer}: no row left to export" + (
                f", {sum(left_out.values())} need a tool loop: --turns all takes them" if left_out else ""))
    told = {"trainer": trainer, "file": name, "rows": dict(counts), "left out, with replies": dict(left_out),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "flags": flags(trainer, out)}
    write_atomic(out / "report.json", json.dumps(told, indent=1))
    return told


def flags(trainer: str, out: Path) -> str:
    """What to add to the trainer's own command."""
    return FLAGS[trainer].format(file=out / TRAINERS[trainer][0], folder=out)


def _messages(row: Row) -> list[dict]:
    for message in row.messages:
        if set(message) != {"role", "content"} or not isinstance(message["content"], str):
            raise StudyError(f"{row.id}: a message with {', '.join(sorted(message))}: only role and content, a text, travel")
    return [{"role": message["role"], "content": message["content"]} for message in row.messages]


def with_tools(row: Row, tokenizer) -> list[dict]:
    """A row's messages with its tools in the system turn: the template's text without tools is then that with tools.

    Proved for each row by writing both; StudyError where the template has no system turn of Qwen's form to put them into.
    """
    messages = _messages(row)
    if not row.tools:
        return messages
    if tokenizer is None:
        raise StudyError(f"{row.id} has tools, which verl and TRL write into no prompt: --model FOLDER says in whose words")

    def written(talk: Sequence[dict], tools) -> str:
        return tokenizer.apply_chat_template(list(talk), tools=tools, tokenize=False, add_generation_prompt=True)

    wanted = written(messages, list(row.tools))
    if head := SYSTEM.match(wanted):
        rest = messages[1:] if messages[0]["role"] == "system" else messages
        found = [{"role": "system", "content": head[1]}, *rest]
        if written(found, None) == wanted:
            return found
    raise StudyError(f"{row.id}: the chat template of --model writes tools elsewhere than into a system turn of Qwen's form, "
                     "so they cannot travel in the messages: leave the domain out by --domains")


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """A path beside `path` that becomes it when all went well, and is removed otherwise."""
    new = path.with_name(path.name + ".new")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _jsonl(path: Path, made: Iterator[tuple[dict, int]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row, _ in made:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _parquet(path: Path, made: Iterator[tuple[dict, int]]) -> None:
    """Row groups of about PIECE characters; the first one's types are those of all."""
    import pyarrow as pa
    from pyarrow import parquet
    writer, group, size = None, [], 0

    def flush():
        nonlocal writer
        table = pa.Table.from_pylist(group, schema=writer.schema if writer else None)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)

    try:
        for row, letters in made:
            group.append(row)
            size += letters
            if size > PIECE:
                flush()
                group, size = [], 0
        if group:
            flush()
    finally:
        if writer:
            writer.close()


def main(args, say: Callable[[str], None]) -> None:
    """The command `data export`, its arguments parsed (see `real.cli`)."""
    names, rows = _rows(args, tuple(name.strip() for name in args.domains.split(",") if name.strip()))
    rules = _rules(args.rule)
    tokenizer = None
    if args.model:
        from m2rl_core.models.policy import load_tokenizer
        tokenizer = load_tokenizer(args.model)
    rows = (replace(row, truth=row.truth | rules.get(row.domain, {})) for row in rows)
    told = export(args.trainer, rows, args.out, tokenizer, args.turns == "all")
    for name in names:
        made, left = told["rows"].get(name, 0), told["left out, with replies"].get(name, 0)
        say(f"{name:8} {made:>7,} rows" + (f" ({left:,} left out: they need a tool loop)" if left else ""))
    say(f"{args.out / told['file']}: written; add to the trainer's own command:\n  {told['flags']}")


def _rows(args, asked: tuple[str, ...]) -> tuple[tuple[str, ...], Iterable[Row]]:
    """(domains, their rows): those of a profile, as its experts see them, or of a blend that `data rl` made."""
    from m2rl_core.domains import DOMAINS
    if args.blend:
        from m2rl_core.real import rl_blend
        names = _known(asked, DOMAINS)
        return names, (row for name in names for row in rl_blend.rows(args.blend, name))
    from m2rl_core.data import rl_rows
    from m2rl_core.profile import ProfileError, load_profile
    try:
        profile = load_profile(args.profile)
    except ProfileError as error:
        raise StudyError(str(error)) from error
    if getattr(profile, "rows", "miniature") == "real":
        raise StudyError(f"{profile.name} trains on real rows: make them by `data rl`, and give --blend FOLDER")
    names = _known(asked, tuple(profile.rl.rows))
    return names, rl_rows(profile.rl, names, profile.seed)


def _known(asked: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    for name in asked:
        if name not in names:
            raise StudyError(f"--domains {name}: the domains are {', '.join(names)}")
    return asked or names


def _rules(texts: Sequence[str]) -> dict[str, dict]:
    """What `--rule math=last_box` adds to the truth of a domain's rows."""
    found = {}
    for text in texts:
        name, _, rule = text.partition("=")
        rules = getattr(module(name), "RULES", ()) if name in MODULES else ()
        if rule not in rules:
            raise StudyError(f"--rule {text}: expected DOMAIN=RULE, such as math=last_box; {name} has "
                             f"{', '.join(rules) or 'no rules'}")
        found[name] = {"rule": rule}
    return found

"""The paper's own data from small files of the true schema: every drop, every placeholder, resume, and error lines.

All rows are invented here. No hub is asked but one of our own, on loopback.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from pyarrow import parquet

from m2rl_core import __main__ as main
from m2rl_core import paper
from m2rl_core import run as cli_run
from m2rl_core.data import blends_of
from m2rl_core.domains import coding, instruction, math, science
from m2rl_core.real import cli, commits, decontamination, hub, pieces, questions, rl_blend, rl_rows, schema, sft_blend
from m2rl_core.profile import load_profile
from m2rl_core.real.sft_blend import Blend, Kind, Settings
from m2rl_core.run import Run
from m2rl_core.views import blends

AGENTIC, CODE, CHAT = (f"nvidia/Nemotron-{name}-v1" for name in (
    "Agentic", "Competitive-Programming", "Instruction-Following-Chat"))
PROOFS = "nvidia/Nemotron-Math-Proofs-v1"
NO_STATEMENTS = questions.Statements(lambda repo: pytest.fail(f"{repo} was opened"))


def said(question, answer="four", **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def every_file(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def table_of(monkeypatch, *kinds):
    monkeypatch.setattr(sft_blend, "table_1", lambda: [Kind(*kind) for kind in kinds])


# ---- opening a data set

def test_every_source_of_the_study_is_listed_with_what_it_needs():
    """Faults: a benchmark or a type of Table 1 without a source; a gated set without a word on its terms; a short commit."""
    listed = hub.sources()
    assert {kind.repo for kind in sft_blend.table_1()} <= set(listed)
    assert {repo for repo, _, _ in decontamination.FROM.values()} | {*questions.CODE.values()} <= set(listed)
    assert set(decontamination.nine()) == set(decontamination.FROM)
    assert listed["cais/hle"].login and listed["Idavidrein/gpqa"].login
    assert all(re.fullmatch("([0-9a-f]{40})?", source.revision) for source in listed.values())
    for _, (repo, split, _) in decontamination.FROM.items():
        assert split in listed[repo].splits


def test_rows_keep_their_line_and_their_own_types(put):
    """Faults: rows unified by Arrow, so that one row's keys appear in all others; lines miscounted after a skip or where
    a text has a separator in it; a key of Parquet that Arrow filled with None."""
    put("math-ai/aime25", "test.jsonl", [{"a": 1, "k": {"x": 1}}, '{"a": "b\u2028c", "k": null}', "", {"a": [2]}])
    file, = hub.files(hub.sources()["math-ai/aime25"])
    assert list(hub.read(file)) == [(1, {"a": 1, "k": {"x": 1}}), (2, {"a": "b\u2028c", "k": None}), (4, {"a": [2]})]
    assert list(hub.read(file, skip=3)) == [(4, {"a": [2]})]
    put("math-ai/aime24", "data/test-0.parquet", [{"k": {"x": 1}, "l": [{"y": 1}]}, {"k": {"z": 2}, "l": [{"w": None}]}])
    file, = hub.files(hub.sources()["math-ai/aime24"])
    assert list(hub.read(file)) == [(1, {"k": {"x": 1}, "l": [{"y": 1}]}), (2, {"k": {"z": 2}, "l": [{}]})]


def test_a_data_set_that_cannot_be_read_says_what_to_do(put, monkeypatch, tmp_path):
    """Fault: a traceback of a network library, or an error that names no file, commit, terms or place."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("M2RL_DATA", str(tmp_path))
    with pytest.raises(hub.HubError) as caught:
        hub.files(hub.sources()["Idavidrein/gpqa"])
    assert str(caught.value) == (
        "Idavidrein/gpqa at 633f5ee89ab8 cannot be read (HF_HUB_OFFLINE is set): accept its terms on its page, then "
        f"`hf auth login`; or put gpqa_diamond.csv into {tmp_path}/Idavidrein__gpqa/ by hand and set M2RL_DATA={tmp_path} "
        "(licence: CC-BY-4.0, and not to be published elsewhere)")
    (tmp_path / "math-ai__aime25").mkdir()
    with pytest.raises(hub.HubError, match=r"^math-ai/aime25 at 563bb8404243 has no file test.jsonl in .*math-ai__aime25"):
        hub.files(hub.sources()["math-ai/aime25"])
    monkeypatch.setenv("M2RL_DATA", str(tmp_path / "none"))
    with pytest.raises(hub.HubError, match=r"^M2RL_DATA=.*none is no folder: make it, or unset M2RL_DATA"):
        hub.files(hub.sources()["math-ai/aime25"])


def test_a_folder_keeps_the_commit_that_it_was_begun_with(put, monkeypatch, tmp_path):
    """Fault: a run that goes on with another commit, so that one blend mixes two versions of a data set."""
    asked = []

    def listing(source):
        asked.append(source.revision)
        return source.revision or "f" * 40, ["data/test-0.parquet"]

    monkeypatch.setattr(hub, "_listing", listing)
    assert commits.source("math-ai/aime24", tmp_path).revision == "f" * 40
    assert commits.source("math-ai/aime24", tmp_path).revision == "f" * 40
    assert asked == ["", "f" * 40] and commits.read(tmp_path) == {"math-ai/aime24": "f" * 40}
    put("math-ai/aime24", "data/test-0.parquet", [{"problem": "x"}])
    with pytest.raises(ValueError, match=r"was begun with math-ai/aime24 from f{40}, now it is by hand, 1 files, \d+ bytes: "):
        commits.files("math-ai/aime24", tmp_path)
    put("math-ai/aime25", "test.jsonl", [{"problem": "x"}])
    assert commits.files("math-ai/aime25", tmp_path) == commits.files("math-ai/aime25", tmp_path)
    put("math-ai/aime25", "test.jsonl", [{"problem": "other"}])
    with pytest.raises(ValueError, match="was begun with math-ai/aime25 from by hand, 1 files, 17 bytes, now it is"):
        commits.files("math-ai/aime25", tmp_path)


HUB = """
import http.server, json, subprocess, sys, threading
BODY, SHA, asked = b'{"problem": "one"}\\n{"problem": "two"}\\n', "a" * 40, []

class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        asked.append(self.path)
        code, headers, body = 200, {}, BODY
        if "/tree/" in self.path:
            body = json.dumps([{"type": "file", "path": "test.jsonl", "size": len(BODY), "oid": "b" * 40}]).encode()
        elif self.path.startswith("/api/"):
            body = json.dumps({"id": "math-ai/aime25", "sha": SHA, "siblings": [{"rfilename": "test.jsonl"}]}).encode()
        elif "Range" in self.headers:
            first, last = map(int, self.headers["Range"].split("=")[1].split("-"))
            code, headers, body = 206, {"Content-Range": f"bytes {first}-{last}/{len(BODY)}"}, BODY[first:last + 1]
        self.send_response(code)
        for name, value in {**headers, "Content-Length": len(body), "ETag": "x", "X-Repo-Commit": SHA}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
import os
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from m2rl_core.real import hub
file, = hub.files(hub.sources()["math-ai/aime25"])
print(json.dumps([file.address, list(hub.read(file)), asked]))
"""


def test_the_hub_is_read_at_the_pinned_commit(tmp_path):
    """Faults: a listing or a download of the newest commit in place of the pinned one; an address `datasets` cannot open."""
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and name != "M2RL_DATA"}
    ran = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, timeout=120, check=True,
                         env=clean | {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)})
    address, rows, asked = json.loads(ran.stdout)
    assert rows == [[1, {"problem": "one"}], [2, {"problem": "two"}]]
    assert address == f"hf://datasets/math-ai/aime25@{'a' * 40}/test.jsonl"
    first, *others = [path for path in asked if "aime25" in path]
    assert first == f"/api/datasets/math-ai/aime25/revision/{hub.sources()['math-ai/aime25'].revision}"
    assert others and all("a" * 40 in path for path in others)


# ---- rows of the wrong schema

@pytest.mark.parametrize(("row", "field"), [
    ({"messages": "none"}, "messages: expected a list, found 'none'"),
    ({"messages": ["hello"]}, "messages[0]: expected an object, found 'hello'"),
    ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role: unknown role 'robot', the roles are system, user, "
                                                     "assistant, tool"),
    ({"messages": [{"content": "x"}]}, "messages[0].role: expected a text, found none"),
    (said("x", 7), "messages[1].content: expected a text, found 7"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": "[nope"}]},
     "messages[0].tool_calls: its text is not JSON (Expecting value: line 1 column 2 (char 1))"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {}}}]}]},
     "messages[0].tool_calls[0].function.name: expected a text, found none"),
    (said("x", tools=[{"type": "function", "function": {"description": "y"}}]),
     "tools[0].function.name: expected a text, found none"),
    (said("-", dataset="taco", split="train", index="one"), "index: expected a whole number, found 'one'"),
])
def test_a_wrong_row_is_named_by_file_line_and_field(put, monkeypatch, tmp_path, row, field):
    """Fault: a row of another schema that is dropped, trained on, or ends in a traceback."""
    table_of(monkeypatch, ("Chat", CHAT, 1, "use all"))
    put(CHAT, "data/chat_if.jsonl", [said("fine"), row])
    put(CHAT, "data/structured_outputs.jsonl", [said("fine")])
    with pytest.raises(schema.SchemaError) as caught:
        sft_blend.build(tmp_path / "out", Settings())
    assert str(caught.value) == (f"{CHAT}/data/chat_if.jsonl, line 2: field {field}: is it this data set's file, at the "
                                 "commit that is read?")
    told = sft_blend.build(tmp_path / "skipped", Settings(skip_wrong=True))["types"]["Chat"]
    assert told["rows"] == 2 and told["dropped"] == {"wrong field " + re.sub(r"\d", "", field.split(": ")[0]): 1}


def test_a_line_that_is_no_row_is_named(put):
    """Fault: a file cut off by a broken download whose last line is left out."""
    put("math-ai/aime25", "test.jsonl", ['{"a": 1}', '{"a": '])
    with pytest.raises(schema.SchemaError, match=r"^math-ai/aime25/test.jsonl, line 2: not JSON \(.*\): is the file whole\?$"):
        list(hub.read(hub.files(hub.sources()["math-ai/aime25"])[0]))


# ---- SFT

def test_each_reason_to_drop_an_sft_row(put):
    """Faults: a row without messages or with an empty one trained on; "-" trained on as if it were a question."""
    put("codeparrot/apps", "train.jsonl", [{"question": ""}])
    statements = questions.Statements(lambda repo: hub.sources()[repo])
    here = {"dataset": "apps", "split": "train"}
    for row, reason in (
        ({"messages": []}, "no messages"), ({}, "no messages"), ({"messages": None}, "no messages"),
        (said("-"), "placeholder without a question"),  # it does not say whose
        (said("-", **here, index=0), "placeholder without a question"),  # empty there
        (said("-", **here, index=9), "placeholder without a question"),  # beyond the end
        (said("-", dataset="other", split="train", index=0), "placeholder without a question"),
        (said("x", ""), "empty message"), (said("", "x"), "empty message"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        (json.loads('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "\\ud800"}]}'),
         "half a character"),
    ):
        file = hub.File(hub.sources()[CHAT], "x", "y", "z")
        assert sft_blend.columns_of(file, 1, row, kind="Chat", statements=statements) == reason, row
    thought = {"messages": [{"role": "user", "content": "x"},
                            {"role": "assistant", "content": None, "reasoning_content": "y"}]}
    assert sft_blend.clean(thought, "here", NO_STATEMENTS)["messages"][1] == {
        "role": "assistant", "content": "", "reasoning_content": "y"}


def test_each_kind_of_code_placeholder_gets_its_own_question(put):
    """Faults: a question of another data set, split or row; codeforces' input format left out; an index as text refused."""
    put("BAAI/TACO", "ALL/train-0.parquet", [{"question": "taco 0", "x": 1}])
    put("BAAI/TACO", "ALL/train-1.parquet", [{"question": "taco 1", "x": 1}])
    put("BAAI/TACO", "ALL/test-0.parquet", [{"question": "taco test", "x": 1}])
    put("codeparrot/apps", "train.jsonl", [{"question": "apps 0"}, {"question": "apps 1"}])
    put("deepmind/code_contests", "data/valid-0.parquet", [{"description": "contest", "solutions": {"language": [1]}}])
    put("open-r1/codeforces", "data/train-0.parquet", [
        {"description": "Add.", "input_format": "Two numbers.", "output_format": "One.", "note": None,
         "examples": [{"input": "1 2", "output": "3"}]},
        {"description": "Bare.", "input_format": None, "output_format": None, "examples": None, "note": "Easy."}])
    statements = questions.Statements(lambda repo: hub.sources()[repo])
    expected = {
        ("taco", "train", 1): "taco 1", ("taco", "test", "0"): "taco test", ("apps", "train", "1"): "apps 1",
        ("code_contests", "valid", 0): "contest",
        ("open-r1/codeforces", "train", 0): "Add.\n\nInput\n\nTwo numbers.\n\nOutput\n\nOne.\n\nExamples\n\nInput\n\n1 2"
                                            "\n\nOutput\n\n3",
        ("open-r1/codeforces", "train", 1): "Bare.\n\nNote\n\nEasy."}
    for (dataset, split, index), question in expected.items():
        row = said("-", "code", dataset=dataset, split=split, index=index)
        assert [m["content"] for m in sft_blend.clean(row, "here", statements)["messages"]] == [question, "code"]


def test_what_is_not_there_is_said_before_hours_of_work(put, monkeypatch, tmp_path):
    """Fault: a data set that placeholders need, found missing when the first of them is met."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    put(CODE, "data/competitive_coding_python.jsonl", [said("q")])
    put(CODE, "data/competitive_coding_cpp.jsonl", [said("q")])
    put(CODE, "data/infinibyte.jsonl", [said("-", dataset="taco", split="train", index=0)])
    with pytest.raises(hub.HubError, match="^BAAI/TACO at its newest commit cannot be read"):
        sft_blend.build(tmp_path / "out", Settings(types=("Code",)))
    assert not list((tmp_path / "out").rglob("*.parquet"))
    put(rl_blend.REPO, "train.jsonl", [work()])
    with pytest.raises(hub.HubError, match="^BytedTsinghua-SIA/DAPO-Math-17k at 65877096c24f cannot be read"):
        rl_blend.build(tmp_path / "rl")


def test_contents_of_parts_are_joined():
    """Fault: a content in the Responses form refused, or a picture in it passed over in silence."""
    parts = [{"type": "input_text", "text": "What "}, {"type": "input_text", "text": "now?"}]
    row = {"messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]}
    assert schema.messages(row, "here") == [{"role": "system", "content": "x"}, {"role": "user", "content": "What now?"}]
    with pytest.raises(schema.SchemaError, match=r"field messages\[0\].content\[0\].text: expected a text, found none"):
        schema.messages({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "here")


def test_each_placeholder_data_set_is_opened_once(put):
    """Fault: a listing of the hub for each of a million placeholders."""
    put("codeparrot/apps", "train.jsonl", [{"question": "q"}])
    opened = []
    statements = questions.Statements(lambda repo: opened.append(repo) or hub.sources()[repo])
    assert [statements.of("apps", "train", 0), statements.of("apps", "train", 1)] == ["q", ""] and len(opened) == 1


def test_tools_and_calls_come_out_in_one_form_whatever_the_row_has():
    """Faults: tools as JSON text lost; keys that Arrow filled with None; a tool's object answer shown as Python."""
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"who": "Ada"}'}}
    flat = {"type": "function", "name": "find", "description": None, "parameters": {"type": "object", "properties": {}}}
    nested = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    messages = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": {"found": "é"}, "tool_call_id": "1"}, {"role": "assistant", "content": "Ada"}]
    for given in ([flat], [nested], json.dumps([nested])):
        for calls in ([call], json.dumps([call]), [{"name": "find", "arguments": '{"who": "Ada"}'}]):
            messages[1]["tool_calls"] = calls
            made = sft_blend.clean({"messages": messages, "tools": given}, "here", NO_STATEMENTS)
            assert made["tools"] == [nested]
            assert made["messages"][1]["tool_calls"] == [{"name": "find", "arguments": '{"who": "Ada"}'}]
            assert made["messages"][2] == {"role": "tool", "content": '{"found": "é"}'}


def blend_files(put, rows=60):
    put(PROOFS, "data/lean.jsonl", [said(f"prove {i}") if i % 3 else {"messages": []} for i in range(rows)])
    put(CHAT, "data/chat_if.jsonl", [said(f"chat {i}") for i in range(7)])
    put(CHAT, "data/structured_outputs.jsonl", [said("schema")])
    put(AGENTIC, "data/interactive_agent.jsonl", [said("act", "")])
    put(AGENTIC, "data/tool_calling.jsonl", [said(f"call {i}") for i in range(5)])


KINDS = (("Math Formal Proofs", PROOFS, 20, "random sampling"), ("Chat", CHAT, 80, "repeat 10 times"),
         ("Conversational Agent", AGENTIC, 6, "use all"))


def test_each_way_of_drawing_and_the_report(put, monkeypatch, tmp_path):
    """Faults: sampling with replacement or from the head, repeats drawn at random, rows that a report leaves out, and a
    seed that does nothing."""
    blend_files(put)
    table_of(monkeypatch, *KINDS)
    told = sft_blend.build(tmp_path / "out", Settings(seed=3, lines=7))
    proofs, chat, agent = (told["types"][kind[0]] for kind in KINDS)
    assert (proofs["read"], proofs["usable"], proofs["rows"], proofs["samples"]) == (60, 40, 20, 20)
    assert proofs["dropped"] == {"no messages": 20} and proofs["drawn"] == "at random"
    assert (chat["usable"], chat["rows"], chat["times"], chat["samples"]) == (8, 8, 10, 80)
    assert agent["dropped"] == {"empty message": 1} and agent["samples"] == 5 and agent["paper"] == 6
    blend = Blend(tmp_path / "out")
    seen = Counter((row["type"], row["messages"][0]["content"]) for row in blend)
    assert len(blend) == 105 and {count for (kind, _), count in seen.items() if kind == "Chat"} == {10}
    drawn = sorted(int(text.split()[1]) for kind, text in seen if kind == "Math Formal Proofs")
    assert len(drawn) == 20 == len(set(drawn)) and drawn[-1] > 40 and drawn[0] < 20
    assert all(row["messages"][0]["content"].split()[-1] == str(int(row["place"].rsplit(":")[-1]) - 1)
               for row in (blend[i] for i in (19, 3, 11, 0)))
    sft_blend.build(tmp_path / "other", Settings(seed=4, lines=7))
    assert {row["place"] for row in Blend(tmp_path / "other")} != {row["place"] for row in blend}
    reasons = sft_blend.drops_frame(told).set_index(["type", "reason"])["rows"]
    assert reasons["Math Formal Proofs", "usable, not drawn"] == 20


def test_rows_from_all_over_are_read_group_by_group(put, monkeypatch, tmp_path):
    """Faults: a group of rows read again for each of its rows; rows in the order of the file in place of the order asked for;
    a repeated row that is another one the second time."""
    blend_files(put)
    table_of(monkeypatch, *KINDS)
    monkeypatch.setattr(pieces, "GROUP", 3)
    sft_blend.build(tmp_path / "out", Settings(seed=3, lines=7))
    blend = Blend(tmp_path / "out")
    order = random.Random(5).sample(range(len(blend)), len(blend)) + [7, 7]
    one_by_one = [blend[i] for i in order]
    reads, files = [], []

    class Counted(parquet.ParquetFile):
        def __init__(self, path):
            super().__init__(path)
            files.append(path)

        def read_row_group(self, group):
            reads.append((files[-1], group))
            return super().read_row_group(group)

    monkeypatch.setattr(parquet, "ParquetFile", Counted)
    assert blend.take(order) == one_by_one and blend.take([]) == []
    stored = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(reads) == len(set(reads)) == sum(-(-line["written"] // 3) for line in stored)
    assert len(files) == len(set(files)) == len(stored)
    with pytest.raises(IndexError):
        blend.take([len(blend)])


def test_a_share_of_table_1(put, monkeypatch, tmp_path):
    """Fault: a share that cuts the head of what is used whole, or that shrinks the number of repeats."""
    blend_files(put)
    table_of(monkeypatch, *KINDS)
    told = sft_blend.build(tmp_path / "out", Settings(share=0.5, types=("Chat", "Conversational Agent")))
    assert [(line["rows"], line["times"], line["samples"]) for line in told["types"].values()] == [(4, 10, 40), (3, 1, 3)]
    with pytest.raises(ValueError, match="Table 1 has no type 'Chats'; its types are Math Formal Proofs, Chat"):
        sft_blend.build(tmp_path / "out", Settings(types=("Chats",)))
    with pytest.raises(ValueError, match=r"out was begun with seed = 1, now it is 2: choose another folder"):
        sft_blend.build(tmp_path / "out", Settings(seed=2, share=0.5, types=("Chat", "Conversational Agent")))


def test_a_set_that_is_too_small_is_named(put, monkeypatch, tmp_path):
    """Fault: rows drawn twice, as in the released code, because a copy is not whole."""
    blend_files(put, rows=12)
    table_of(monkeypatch, *KINDS[:1])
    with pytest.raises(ValueError, match=f"^Math Formal Proofs: {PROOFS} has 8 usable rows, 20 are to be drawn without"):
        sft_blend.build(tmp_path / "out", Settings())
    assert sft_blend.build(tmp_path / "trial", Settings(first=3))["types"]["Math Formal Proofs"]["rows"] == 2


def test_table_1_is_the_papers():
    """Fault: counts or ways of drawing typed in, beside those of the paper's tables."""
    kinds = sft_blend.table_1()
    assert sum(kind.samples for kind in kinds) == paper.value(1, "Total", "samples") == 14_121_873
    assert {kind.type: kind.times for kind in kinds if kind.times > 1} == {"Science": 10, "Chat": 10}
    assert set(sft_blend.DOMAINS) == {kind.type for kind in kinds}


def test_the_realised_blend_stands_beside_table_1():
    """Faults: a report that notebook 3.1 cannot set beside the paper's table; a sentence on rows that are not there."""
    from m2rl_core.views.preliminary import blend_sentence, blend_table
    told = {"types": {kind.type: {"usable": kind.samples, "rows": 1, "sampling": kind.sampling, "samples": kind.samples}
                      for kind in sft_blend.table_1()}}
    table = blend_table(sft_blend.blend_frame(told)).set_index("type")
    assert blend_sentence(table.reset_index()).startswith("No share differs from Table 1 by more than 0.0")
    gap = (table["share (%)"] - table["paper (%)"]).abs()
    assert len(gap) == 7 and gap.max() < 0.02
    told["types"]["Math"]["samples"] //= 2
    assert (table["share (%)"] - blend_table(sft_blend.blend_frame(told)).set_index("type")["share (%)"])["Math"] > 5


KILLED = """
import os, signal, sys
from pathlib import Path
from m2rl_core.real import pieces, sft_blend
pieces.GROUP = 2
sft_blend.table_1 = lambda: [sft_blend.Kind(*kind) for kind in {kinds!r}]
clean, seen = sft_blend.clean, []

def dying(*args):
    seen.append(args)
    if len(seen) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return clean(*args)

sft_blend.clean = dying
sft_blend.build(Path({out!r}), sft_blend.Settings(lines=7))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(put, monkeypatch, tmp_path):
    """Faults: a piece cut off by SIGKILL taken for whole, rows lost or doubled where it stopped, work begun anew."""
    blend_files(put, rows=300)
    kinds = [(*KINDS[0][:2], 150, KINDS[0][3]), *KINDS[1:]]
    out = tmp_path / "killed"
    code = KILLED.format(kinds=kinds, at=300 + 132, out=str(out))  # past the count, in the middle of a piece
    ran = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    left = every_file(out)
    assert not (out / "manifest.json").exists() and sum(name.endswith(".parquet") for name in left) == 18
    assert any(name.endswith(".parquet.new") for name in left)
    table_of(monkeypatch, *kinds)
    monkeypatch.setattr(pieces, "GROUP", 2)
    asked = Counter()
    clean = sft_blend.clean
    monkeypatch.setattr(sft_blend, "clean", lambda row, *rest: asked.update([row["messages"] == []]) or clean(row, *rest))
    with pytest.raises(ValueError, match="holds no finished blend"):
        Blend(out)
    sft_blend.build(out, Settings(lines=7))
    assert sum(asked.values()) == 300 - 18 * 7 + 8 + 6  # the last piece again, and what was never begun
    sft_blend.build(tmp_path / "whole", Settings(lines=7))
    assert every_file(out) == every_file(tmp_path / "whole")
    later = every_file(out)
    assert [n for n in left if later.get(n) != left[n] and not n.endswith((".new", ".lock")) and ".lock," not in n] == []
    asked.clear()
    assert sft_blend.build(out, Settings(lines=7))["types"] and not asked


# ---- RL

MATH, CHOICE, CODING, FOLLOW, AGENT = (f"nano_v3_sft_profiled_{name}" for name in (
    "dapo17k", "stem_mcqa", "comp_coding_50tests", "instruction_following", "workbench"))
CALL = {"name": "email_send", "arguments": '{"to": "ada@example.com"}'}
TOOL = {"type": "function", "name": "email_send", "description": "Sends.", "strict": False,
        "parameters": {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]}}


def asked(text, **more):
    return {"responses_create_params": {"input": [{"role": "user", "content": text}], **more}}


def choice(**more):
    return {"dataset": CHOICE, **asked("Answer the following multiple choice question. Which?"), "expected_answer": "B",
            "options": [{"A": "one", "B": None, "J": None}, {"A": None, "B": "two", "J": None}, {"J": "ten"}], **more}


def program(**tests):
    return {"dataset": CODING, **asked("Add."), "verifier_metadata": {"unit_tests": tests}}


def follow(**more):
    return {"dataset": FOLLOW, **asked("Write."), "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
            "kwargs": [{"keywords": None}, {"keywords": ["moon"], "end_phrase": None}], **more}


def work(**more):
    return {"dataset": AGENT, **asked("Mail Ada.", tools=[TOOL]), "ground_truth": [CALL], "category": "email",
            "environment_name": "workplace", **more}


def one(row, problems=(), template="data"):
    return rl_rows.to_row(row, "train.jsonl, line 5", 5, dict(problems), template)


def test_rows_come_out_in_the_form_that_their_verifier_takes():
    """Faults: a truth that the domain's verifier cannot read; options and parameters that Arrow filled with None."""
    row = one(choice())
    assert row.truth == {"letter": "B", "options": 10}
    assert [v.score for v in science.verify([row] * 2, [["Answer: B"], ["Answer: J"]])] == [1.0, 0.0]
    row = one(follow())
    assert row.truth == {"instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
                         "kwargs": [{}, {"keywords": ["moon"]}]}
    assert [v.score for v in instruction.verify([row] * 2, [["The moon"], ["The sun"]])] == [1.0, 0.0]
    row = one(follow(kwargs=None) | {"instruction_id_list": ["punctuation:no_comma"]})
    assert row.truth["kwargs"] == [{}]
    deeper = {"instruction_id_list": None, "kwargs": None,
              "verifier_metadata": {name: follow()[name] for name in ("instruction_id_list", "kwargs")}}
    assert one(follow(**deeper)).truth == one(follow()).truth
    row = one({"dataset": MATH, **asked("2+2?"), "expected_answer": "4"})
    assert row.truth == {"answer": "4"} and math.verify([row], [["\\boxed{4}"]])[0].score == 1.0
    row = one(program(inputs=["1 2\n"], outputs=["3\n"]))
    assert row.truth == {"unit_tests": {"inputs": ["1 2\n"], "outputs": ["3\n"]}, "cpu_seconds": 10}
    assert one(program(inputs=["1"] * 50, outputs=["1"] * 50)).truth["cpu_seconds"] == 60
    assert coding.verify([row], [["no code"]])[0].reason == "no code block"
    row = one(work())
    assert row.truth["calls"] == [{"name": "email_send", "arguments": {"to": "ada@example.com"}}]
    assert row.truth["kind"] == "workplace" and row.truth["max_turns"] == 6
    assert row.tools == ({"type": "function", "function": {key: TOOL[key] for key in ("name", "description", "parameters")}},)
    assert type(row).from_json(row.to_json()) == row and row.id == f"{AGENT}/5" and row.domain == "agent"


def test_each_reason_to_drop_an_rl_row():
    """Fault: a prompt that can never be rewarded, or that belongs to none of the five domains, among the rows."""
    held = {"_hf_placeholder": {"row": 3, "question_template": {"prefix": "", "suffix": ""}}}
    for row, reason in (
        ({"dataset": rl_rows.NOT_USED}, "structured outputs (not in the study)"),
        ({"dataset": MATH, **held}, "placeholder without a problem"),
        ({"dataset": MATH, **asked("2+2?"), "expected_answer": ""}, "empty truth"),
        ({"dataset": MATH, **asked("2+2?")}, "empty truth"),
        (choice(expected_answer=" "), "empty truth"), (choice(expected_answer="C"), "the right letter is no option"),
        (program(inputs=[], outputs=[]), "empty truth"), ({"dataset": CODING, **asked("Add.")}, "empty truth"),
        (follow(instruction_id_list=[]), "empty truth"), (work(ground_truth=[]), "empty truth"),
        (follow(responses_create_params={"input": []}), "no prompt"), (follow(**asked(" ")), "no prompt"),
        (follow(**asked("\ud800")), "half a character"),
    ):
        assert one(row) == reason, row
    assert one({"dataset": MATH, **held}, {(MATH, 3): ("q", "")}.items()) == "empty truth"


@pytest.mark.parametrize(("row", "field"), [
    ({"dataset": "other"}, "dataset: unknown label 'other', the labels are "),
    (choice(expected_answer="two"), "expected_answer: expected one letter, found 'two'"),
    (choice(options=None), "options: expected a list, found none"),
    (program(inputs=["1"], outputs=[]), "verifier_metadata.unit_tests.outputs: 0 outputs for 1 inputs"),
    (program(inputs=[1], outputs=["1"]), "verifier_metadata.unit_tests.inputs[0]: expected a text, found 1"),
    (follow(kwargs=[{}]), "kwargs: 1 for 2 instructions"),
    (follow(kwargs=[{}, 3]), "kwargs[1]: expected an object, found 3"),
    (work(ground_truth=[{"name": "x", "arguments": "{"}]), "ground_truth[0].arguments: its text is not JSON"),
    ({"dataset": MATH, "_hf_placeholder": {"row": "3", "question_template": {}}},
     "_hf_placeholder.row: expected a whole number"),
    ({"dataset": questions.SKYWORK, "_hf_placeholder": {"row": 3, "question_template": "no place"}},
     "_hf_placeholder.question_template: it has no {question}"),
])
def test_a_wrong_rl_row_names_its_field(row, field):
    """Fault: a field of another type that is dropped in silence, or found out by a verifier in the middle of training."""
    with pytest.raises(schema.SchemaError, match="^" + re.escape(f"train.jsonl, line 5: field {field}")):
        one(row)


@pytest.mark.parametrize(("given", "truth"), [
    ("34", "34"), (' ["x+1"]', "x+1"), ('["a", "b"]', "a"), ("[]", ""), ("", ""), (None, ""), ([], ""), (["7"], "7"), (7, "7"),
    ("[0, 1)", "[0, 1)"), ("[1, 2]", "[1, 2]"), ('"x"', "x"), ("007", "007"), ("1e5", "1e5")])
def test_truths_of_math(given, truth):
    """Faults: Skywork's list taken as the answer; an interval, or digits, changed on the way."""
    assert questions.truth_of(given) == truth


def rl_files(put):
    """A blend of nine rows, and the two data sets that its math rows name."""
    put(questions.MATH[MATH], "data/dapo.parquet", [
        {"prompt": [{"role": "user", "content": f"Solve this.\n\nWhat is {i}?\n\nIn two parts?\n\nRemember."}],
         "reward_model": {"ground_truth": str(i), "style": "rule"}, "data_source": "x"} for i in range(3)])
    put(questions.MATH[questions.SKYWORK], "data/math-0.parquet", [
        {"prompt": [{"role": "user", "content": f"Sky {i}?"}], "reward_model": {"ground_truth": truth}}
        for i, truth in enumerate(('["1/2"]', "[]"))])
    wrapping = {"prefix": "Box it.\n\n", "suffix": "\n\n!\n"}
    dapo = {"dataset": MATH, "_hf_placeholder": {"row": 2, "question_template": wrapping}}
    sky = [{"dataset": questions.SKYWORK, "_hf_placeholder": {"row": i, "question_template": "Do: {question} \\boxed"}}
           for i in (0, 1, 9)]
    rows = [dapo, *sky, choice(), program(inputs=["1"], outputs=["1"]), follow(), work(), {"dataset": rl_rows.NOT_USED}]
    put(rl_blend.REPO, "train.jsonl", rows)


def test_the_rl_blend_is_filled_joined_and_reported(put, tmp_path):
    """Faults: placeholders filled from another row, DAPO's own wrapping kept, rows of a domain in another's file, a drop
    that no report counts."""
    rl_files(put)
    told = rl_blend.build(tmp_path / "rl", rl_blend.Settings(lines=4))
    rows = rl_blend.rows(tmp_path / "rl", "math")
    assert [(row.messages[0]["content"], row.truth["answer"]) for row in rows] == [
        ("Box it.\n\nWhat is 2?\n\nIn two parts?\n\n!", "2"), ("Do: Sky 0? \\boxed", "1/2")]
    assert {name: line["rows"] for name, line in told["domains"].items()} == {
        "math": 2, "coding": 1, "science": 1, "if": 1, "agent": 1}
    assert told["dropped"] == {"empty truth": 1, "placeholder without a problem": 1,
                               "structured outputs (not in the study)": 1}
    assert told["read"] == 9 == sum(told["dropped"].values()) + sum(line["rows"] for line in told["domains"].values())
    assert told["remarks"]["agent rows whose truth changes nothing"] == 1  # `email_send` is no tool of the workplace
    assert told["remarks"]["math prompts without \\boxed"] == 1 and told["instruction_ids"]["keywords:existence"] == 1
    assert {row.domain for row in rl_blend.rows(tmp_path / "rl", "agent")} == {"agent"}
    before = every_file(tmp_path / "rl")
    (tmp_path / "rl" / "report.json").unlink()
    (tmp_path / "rl" / "pieces" / "00-train-000001.json").unlink()  # as a killed run leaves it
    rl_blend.build(tmp_path / "rl", rl_blend.Settings(lines=4))
    assert every_file(tmp_path / "rl") == before


def test_the_released_wording_is_an_option():
    """Faults: 46 characters cut off a science prompt of another opening; a wording that changes the problem's name."""
    plain, other = one(choice(), template="released"), one(choice(**asked("Pick one. Which?")), template="released")
    assert plain.messages[0]["content"] == "Answer the following multiple choice question step by step. Which?"
    assert other.messages[0]["content"] == "Pick one. Which?"
    row = {"dataset": MATH, **asked("2+2?"), "expected_answer": "4"}
    assert one(row, template="released").messages[0]["content"].endswith("the answer to the problem.\n\n2+2?")
    assert one(row, template="released").fingerprint == one(row).fingerprint != plain.fingerprint
    assert one(follow(), template="released") == one(follow())


@pytest.mark.parametrize(("more", "answer", "score"), [
    ({"template_metadata": {"output_regex": r"ANSWER IS\s*([A-Za-z])"}}, "So the Answer is b", 1.0),
    ({"template_metadata": '{"output_regex": "Final Choice: ([A-Z])"}'}, "Final Choice: B", 1.0),
    ({"template_metadata": {"output_regex": r"Final Choice: ([A-Z])", "weight": None}}, "Answer: B", 0.0),
    ({"grading_mode": "strict_single_letter_boxed"}, r"\boxed{A}, no: \boxed{\text{(B)}}", 1.0),
    (asked(r"Put the letter into \boxed{}. Which?"), r"It is \boxed{B}.", 1.0),
    ({"template_metadata": None, "grading_mode": None}, r"It is \boxed{B}.", 0.0), ({}, "Answer: B", 1.0)])
def test_a_science_row_is_verified_in_the_form_that_its_prompt_asks_for(more, answer, score):
    """Fault: rows whose prompt asks for "ANSWER IS X", or for a box, and that can never be paid."""
    assert science.verify([one(choice(**more))], [[answer]])[0].score == score


def test_a_form_that_is_no_regular_expression_is_named():
    with pytest.raises(schema.SchemaError, match=r"field template_metadata.output_regex: '\(' is no regular expression"):
        one(choice(template_metadata={"output_regex": "("}))


# ---- decontamination

def run_of(count, start=0):
    return " ".join(f"w{i}" for i in range(start, start + count))


def found(train, **benchmarks):
    return decontamination.check({"train": train}, {
        name: (lambda items=items: [(str(i), text) for i, text in enumerate(items)]) for name, items in benchmarks.items()})


def test_shared_runs_of_13_words_are_hits():
    """Faults: case or punctuation that hides a hit, 12 shared words called one, an item in parts of two prompts."""
    item = run_of(26)
    train = [("a", "See: " + run_of(13, 5).upper().replace(" ", ", ")), ("b", run_of(12)), ("c", "other " * 30)]
    told = found(train, hle=[item])
    line = told["benchmarks"]["hle"]
    assert (line["items"], line["items hit"], line["items hit by half"], line["training prompts"]) == (1, 1, 0, 1)
    assert line["examples"] == [{"item": "0", "share": round(1 / 14, 3), "place": "a", "run": run_of(13, 5)}]
    line = found([("a", run_of(12)), ("b", "so " + item + " then")], hle=[item])["benchmarks"]["hle"]
    assert (line["items hit by half"], line["examples"][0]["place"], line["examples"][0]["share"]) == (1, "b", 1.0)


def test_short_items_are_looked_for_whole_or_counted():
    """Fault: short questions passed over in silence."""
    line = found([("a", "x " + run_of(9) + " y")], aime24=[run_of(9), run_of(10, 3), run_of(7)])["benchmarks"]["aime24"]
    assert (line["items"], line["too short"], line["items hit"]) == (3, 1, 1)


def test_repeated_prompts_are_counted_within_and_across_sets():
    """Fault: the same prompt in two sets, or in another spelling of spaces and case, taken for two."""
    sets = {"one": [("a", "Same text."), ("b", "same  TEXT"), ("c", "other")], "two": [("d", "other")]}
    told = decontamination.check(sets, {})
    assert told["repeated"] == {"one": {"prompts": 3, "different": 2, "most often": 2},
                                "two": {"prompts": 1, "different": 1, "most often": 1},
                                "all": {"prompts": 4, "different": 2, "most often": 2}}


def test_benchmarks_are_read_as_their_data_sets_have_them(put):
    """Faults: HLE items with a picture, v5 contests outside of the window, a BFCL system prompt taken for the question."""
    put("livecodebench/code_generation_lite", "test5.jsonl", [
        {"question_content": day, "contest_date": f"{day}T00:00:00"} for day in ("2024-07-31", "2024-08-01", "2025-02-02")])
    put("cais/hle", "data/test-0.parquet", [{"question": "seen", "image": "data:x"}, {"question": "text", "image": ""}])
    put("Idavidrein/gpqa", "gpqa_diamond.csv", ["Question,Correct Answer", '"What, then?",x'])
    put("gorilla-llm/Berkeley-Function-Calling-Leaderboard", "BFCL_v3_simple.json", [
        {"id": "1", "question": [[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
                                 [{"role": "user", "content": "v"}]]}])
    texts = {name: [text for _, text in decontamination.benchmark_prompts(name)]
             for name in ("lcb_v5", "hle", "gpqa_diamond", "bfcl_v3")}
    assert texts == {"lcb_v5": ["2024-08-01"], "hle": ["text"], "gpqa_diamond": ["What, then?"], "bfcl_v3": ["u\nv"]}


# ---- the command

def test_the_command_makes_and_checks(put, monkeypatch, tmp_path, capsys):
    """Faults: a benchmark without a copy that stops the check of the others; a leak that is not printed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    blend_files(put)
    rl_files(put)
    leak = run_of(30)
    put(CHAT, "data/structured_outputs.jsonl", [said(leak)])
    put("math-ai/aime25", "test.jsonl", [{"problem": leak}])
    table_of(monkeypatch, *KINDS)
    out = str(tmp_path / "sft")
    assert main.main(["data", "sft", "--out", out]) == main.main(["data", "rl", "--out", str(tmp_path / "rl")]) == 0
    assert main.main(["data", "check", out, str(tmp_path / "rl"), "--out", str(tmp_path / "check.json")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^Math Formal Proofs +20 +20 +40 +20\n    20 no messages$", printed, re.M)
    assert "aime25        1 of 1 items share a run of 13 words with training, 1 of them half of their runs or more" in printed
    assert "gpqa_diamond  not checked: Idavidrein/gpqa at 633f5ee89ab8 cannot be read" in printed
    assert json.loads((tmp_path / "check.json").read_text())["repeated"]["all"]["prompts"] == 20 + 8 + 5 + 6
    assert main.main(["data", "sft", "--out", out, "--seed", "2"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out} was begun with seed = 1, now it is 2")
    put(CHAT, "data/chat_if.jsonl", [{"messages": 3}])
    assert main.main(["data", "sft", "--out", out + "2", "--types", "Chat"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(
        "at the commit that is read? (--skip-wrong leaves such rows out and counts them)")
    assert main.main(["data", "sources"]) == 0 and "licence: ODC-BY" in capsys.readouterr().out


def test_notebook_3_1_shows_drops_and_overlaps(put, monkeypatch, tmp_path, capsys):
    """Faults: a drop, a remark or a benchmark that was not checked which no reader is told of; columns that do not add up; the
    text of a GPQA item in a published page; a check that is shown and belongs to another profile's blends."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("M2RL_ARTIFACTS", str(tmp_path / "art"))
    blend_files(put)
    rl_files(put)
    secret = run_of(40)
    put(CHAT, "data/structured_outputs.jsonl", [said(secret)])
    put("Idavidrein/gpqa", "gpqa_diamond.csv", ["Question,Correct Answer", f"{secret},x"])
    table_of(monkeypatch, *KINDS)
    smoke = load_profile("smoke")
    run = Run(dataclasses.replace(smoke, rows="real"), tmp_path / "art", "mine")
    text = lambda parts: "\n".join(part.data for part in parts)  # noqa: E731
    assert text(blends.dropped(run)).count("has not been made here yet") == 2
    assert "data check --profile mine" in text(blends.overlap(run))
    folders = blends_of(run.profile, run.store.root)
    sft_blend.build(folders["sft"], Settings(seed=smoke.seed))
    rl_blend.build(folders["rl"], rl_blend.Settings())
    shown = text(blends.dropped(run))
    line = re.search("<tr><td[^>]*>Math Formal Proofs<.*?</tr>", shown)[0]
    assert re.findall(">([^<>]+)</td>", line) == ["Math Formal Proofs", "60", "20", "40", "20", "1", "20", "20",
                                                  "20 no messages; 20 usable, not drawn"]
    assert "Of 9 rows read, dropped: 1 empty truth; 1 placeholder without a problem; 1 structured outputs" in shown
    assert "1 math prompts without \\boxed" in shown and "22,056" in shown
    monkeypatch.setattr(cli_run, "open_run", lambda name: run if name == "mine" else pytest.fail(name))
    assert main.main(["data", "check", "--profile", "mine"]) == 0 and (run.store.root / "data/decontamination.json").is_file()
    shown = text(blends.overlap(run))
    assert secret[:20] not in shown and "gpqa_diamond.csv:1" in shown and "100 % of its runs" in shown
    assert "not checked: cais/hle at 5a81a4c7271a cannot be read" in shown and "one of them" in shown
    assert text(blends.dropped(Run(smoke, tmp_path))) == text(blends.overlap(Run(smoke, tmp_path))) == blends.MADE
    assert main.main(["data", "check"]) == 2 and "nothing to check: name the folders" in capsys.readouterr().err


def test_the_readmes_commands_are_those_that_there_are():
    """Fault: an option of the README that the command refuses."""
    page = (Path(main.__file__).parent.parent / "README.md").read_text()
    shown = re.findall(r"m2rl_core data (.*?)(?: +#.*)?$", page, re.M)
    assert [cli.parser().parse_args(line.split()).command for line in shown] == [
        "sources", "sft", "rl", "check", "check", "export", "export", "export"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    """Fault: pieces written among a user's own files."""
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty and has no plan.json: choose another folder, or empty it"):
        pieces.begin(tmp_path, dataclasses.asdict(Settings()))

"""Fixtures that several test files share; torch is imported only by the tests that ask for a policy."""
from __future__ import annotations

import json
import signal

import pytest

from m2rl_core import run as runs

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; several tests are about Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def builders():
    """The registry of builders as it was, whatever a toy study puts into it."""
    before = dict(runs.BUILDERS)
    yield
    runs.BUILDERS.clear()
    runs.BUILDERS.update(before)


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """The whole study at profile smoke: its report and its store."""
    import whole_study
    return whole_study.make(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def one(tmp_path_factory):
    """A folder with a short smoke study whose rl-math one process has made."""
    import toy_launch
    return toy_launch.make_by_one(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="session")
def words():
    """A tokenizer."""
    import toy_policy
    return toy_policy.tokenizer()


@pytest.fixture(scope="session")
def policy(words):
    """A tiny random policy; tests read it and never change it."""
    import toy_policy
    return toy_policy.make(words)


@pytest.fixture(scope="session")
def other(words):
    """Another one over the same tokens."""
    import toy_policy
    return toy_policy.make(words, seed=1)


@pytest.fixture(scope="session")
def toy_rows():
    """Three training prompts of each domain, fifteen in all."""
    from m2rl_core.domains import DOMAINS, training_rows
    return [row for domain in DOMAINS for row in training_rows(domain, "rl", 3, 1)]


@pytest.fixture(scope="session")
def episodes():
    """Agent rows whose right continuation has two tool calls, each answered, and a last word."""
    from m2rl_core.domains import training_rows
    return [row for row in training_rows("agent", "rl", 40, 1) if row.truth["kind"] == "multi_turn"][:3]


@pytest.fixture(scope="session")
def played(policy, toy_rows, episodes):
    """Rollouts of uneven length, three a prompt, with and without tool turns between: 24 of them."""
    import toy_policy
    import torch
    from m2rl_core.domains import module
    from m2rl_core.engines.rollout import sample
    found = sample(policy, toy_rows[:5], 3, generator=torch.Generator().manual_seed(1), max_new_tokens=24)
    wanted = []
    for row in episodes:
        right = module("agent").respond(row)
        wanted += [toy_policy.script_of(policy, row, turns) for turns in (right, right[:1], right[2:3])]
    with pytest.MonkeyPatch.context() as patch:
        return found + toy_policy.scripted(policy, episodes, wanted, patch, n=3)


@pytest.fixture
def put(tmp_path, monkeypatch):
    """put(repo, path, rows): writes one file of a public data set by hand: JSON lines, Parquet or CSV by its name."""
    import pandas
    import pyarrow
    from pyarrow import parquet
    root = tmp_path / "by-hand"
    root.mkdir()
    monkeypatch.setenv("M2RL_DATA", str(root))

    def write(repo, path, rows):
        file = root / repo.replace("/", "__") / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        elif file.suffix == ".csv" and isinstance(rows[0], dict):
            pandas.DataFrame(rows).to_csv(file, index=False)
        else:
            file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return file

    return write

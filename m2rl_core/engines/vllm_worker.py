"""vLLM in a process of its own, run as a file by the Python that has it: `python -P vllm_worker.py SOCKET FOLDER`.

Imports nothing of ours. Requests and answers are lines of JSON on a socket; weights lie in memory that both processes
map. One process holds the whole of vLLM, so what it took is given back when it ends; it ends with its parent.
"""
from __future__ import annotations

import importlib.util
import json
import os
import queue
import shutil
import socket
import sys
import threading
import traceback

MISSING = 3  # exit status: this Python has no vllm
KV_BYTES = 2**30  # keys and values on a CPU; on a GPU they get what `gpu_memory` leaves
SEQUENCES = 256  # in flight; further ones wait their turn
BATCHED_TOKENS = 8192  # of prompts in one forward pass on a CPU


class Worker:
    """vLLM's engine for one model, with random weights until `load` is called."""

    def __init__(self, settings: dict):
        from vllm import LLM, __version__
        from vllm.platforms import current_platform
        cpu = current_platform.is_cpu()
        self.about = f"vllm {__version__} on {current_platform.device_type}"
        self.weights = f"/proc/{os.getpid()}/fd/{settings['memory']}", settings["size"], settings["layout"]
        own = {"gpu_memory_utilization": settings["gpu_memory"]}
        if cpu:  # prompts whole: after a part of one, 0.32 turns back the request's generator, which on a CPU fails
            own = {"kv_cache_memory_bytes": KV_BYTES, "enforce_eager": True, "enable_chunked_prefill": False,
                   "block_size": 32,  # whole blocks of a prompt are shared; 128, the default, is more than most have
                   "max_num_batched_tokens": max(BATCHED_TOKENS, settings["context"])}
        self.llm = LLM(
            model=settings["folder"], load_format="dummy", skip_tokenizer_init=True, dtype=settings["dtype"],
            tensor_parallel_size=settings["tensor_parallel"],
            max_model_len=settings["context"], max_num_seqs=SEQUENCES, generation_config="vllm",
            logprobs_mode="processed_logprobs", enable_prefix_caching=True, **own)

    def load(self) -> dict:
        """Put the shared weights in the place of the old ones; nothing that was computed with those is kept."""
        self.llm.collective_rpc(replace_weights, args=self.weights)
        self.llm.apply_model(pack_head)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied after an update of the weights")
        return {}

    def sample(self, prompts: list[list[int]], limits: list[int], seeds: list[int], temperature: float,
               stops: list[int], top_p: float = 1.0) -> dict:
        """A continuation of each prompt: its tokens, with the stop token where there is one, and their log-probs.

        The stop tokens alone end it, whatever the model's config says, and nothing but temperature and top_p shapes it.
        """
        from vllm import SamplingParams
        wanted = [SamplingParams(temperature=temperature, top_p=top_p, seed=seed, max_tokens=limit, stop_token_ids=stops,
                                 ignore_eos=True, logprobs=0, detokenize=False)
                  for limit, seed in zip(limits, seeds, strict=True)]
        found = [result.outputs[0] for result in self._generate(prompts, wanted)]
        return {"tokens": [list(out.token_ids) for out in found],
                "logprobs": [[at[token].logprob for token, at in zip(out.token_ids, out.logprobs, strict=True)]
                             for out in found]}

    def score(self, sequences: list[list[int]]) -> dict:
        """The log-probs of every token but the first of each sequence, at temperature 1."""
        from vllm import SamplingParams
        wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        return {"logprobs": [[at[token].logprob for token, at in zip(ids[1:], result.prompt_logprobs[1:], strict=True)]
                             for ids, result in zip(sequences, self._generate(sequences, wanted), strict=True)]}

    def _generate(self, prompts, wanted):
        return self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False)


def replace_weights(worker, path: str, size: int, layout: list) -> None:
    """Each process of vLLM maps the shared weights itself and takes its part of them, in place."""
    import mmap

    import torch
    with open(path, "r+b") as file:
        buffer = mmap.mmap(file.fileno(), size)
    worker.reload_weights(weights_iterator=[
        (name, torch.frombuffer(buffer, dtype=getattr(torch, dtype), count=count, offset=start).view(shape))
        for name, dtype, shape, start, count in layout])


def pack_head(model) -> None:
    """On a CPU vLLM computes with a packed copy of each matrix, and 0.32's reload leaves that of a tied head as it was."""
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def listen(lines, requests: queue.Queue, folder: str) -> None:
    """Hand on requests as they come; when the other side is gone, end at once, whatever is being computed."""
    for line in lines:
        requests.put(json.loads(line))
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def main() -> int:
    if importlib.util.find_spec("vllm") is None:
        return MISSING
    control = socket.socket(fileno=int(sys.argv[1]))
    requests: queue.Queue = queue.Queue()
    threading.Thread(target=listen, args=(control.makefile("r"), requests, sys.argv[2]), daemon=True).start()

    worker = None
    while True:
        request = requests.get()
        try:
            if worker is None:
                worker = Worker(request)
                answer = {"about": worker.about}
            else:
                answer = getattr(worker, request.pop("call"))(**request)
        except Exception as error:  # whatever it is, the other side raises it; the log has the traceback
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        control.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())

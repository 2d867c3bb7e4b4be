"""TRL's side of the engine bench, run by the peers' Python as a file: `side_trl.py FOLDER`. Imports nothing of ours.

A step of GRPOTrainer with its best settings for a CPU: float32, no checkpointing, no reference model, one update for
each batch. Prints the same line of JSON as `engine_side`.
"""
from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    """Seconds of every optimizer step, from begin to end."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.start)


def main(folder: Path) -> int:
    work = json.loads((folder / "work.json").read_text())
    torch.set_num_threads(work["threads"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    lengths: list[int] = []

    def reward(completions, completion_ids, **_):
        lengths.append(sum(map(len, completion_ids)))
        return [float(hashlib.sha256(c[0]["content"].encode()).digest()[0] % 2) for c in completions]

    steps, size = work["repetitions"] + 1, len(work["prompts"]) * work["group"]
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, per_device_train_batch_size=size, gradient_accumulation_steps=1, num_generations=work["group"],
            max_completion_length=work["new_tokens"], temperature=work["temperature"], loss_type="grpo", beta=0.0,
            epsilon=0.2, epsilon_high=0.28, learning_rate=work["lr"], lr_scheduler_type="constant", weight_decay=0.0,
            adam_beta2=0.98, max_grad_norm=1.0, max_steps=steps, bf16=False, gradient_checkpointing=False, use_cpu=True,
            report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True, shuffle_dataset=False)
        clock = Clock()
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in work["prompts"]] * steps
        GRPOTrainer(model, reward_funcs=[reward], args=config, train_dataset=Dataset.from_list(rows),
                    processing_class=tokenizer, callbacks=[clock]).train()
    print(json.dumps({"seconds": clock.seconds[1:], "tokens": lengths[1:]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

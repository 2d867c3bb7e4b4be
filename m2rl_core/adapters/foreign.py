"""Folders that trainers leave before their checkpoints are in Hugging Face form: what they are, and what converts them."""
from __future__ import annotations

from pathlib import Path

# The converters, as they are called today: THUDM/slime: tools/convert_torch_dist_to_hf.py; verl-project/verl:
# verl/model_merger/base_model_merger.py (`parse_args`); huggingface/peft: `merge_and_unload`.
MEGATRON = ("a Megatron checkpoint, as slime saves it: convert one iteration by slime's `python "
            "tools/convert_torch_dist_to_hf.py --input-dir ITER --output-dir OUT --origin-hf-dir THE_MODEL_IT_BEGAN_WITH`")
VERL = "shards of verl's: `python -m verl.model_merger merge --backend {backend} --local_dir {folder} --target_dir OUT`"
ADAPTER = ("only a LoRA adapter of PEFT's, which is not taken: merge it by `AutoPeftModelForCausalLM.from_pretrained(FOLDER)"
           ".merge_and_unload().save_pretrained(OUT)`")
PICKLES = ("weights as pickles, which can run code when they are read: `AutoModelForCausalLM.from_pretrained(FOLDER)"
           ".save_pretrained(OUT)` writes safetensors")


PART = "layers.safetensors"  # what `layers` writes
PARTIAL = ("only some layers of a model, for section 3.3; all else needs it whole: bring it by a profile without `only: "
           "weights`, or give the folder that it is from")


def line_for(folder: Path) -> str:
    """Why a folder cannot be taken as it is, and the mend, in one line; "" where it has a config and weights."""
    if not folder.is_dir():
        return "no such folder: give a local one, downloaded before"
    if (folder / PART).is_file():
        return PARTIAL
    weights = any(folder.glob("model*.safetensors"))
    if weights:
        return "" if (folder / "config.json").is_file() else "weights without config.json: copy that of its first model"
    if _has(folder, "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"):
        return ADAPTER
    if _has(folder, "model_world_size_*_rank_*.pt"):
        return VERL.format(backend="fsdp", folder=folder)
    if _has(folder, "dist_ckpt", "model/dist_ckpt"):
        return VERL.format(backend="megatron", folder=folder)
    if _has(folder, "latest_checkpointed_iteration.txt", "*.distcp", "iter_*", "common.pt"):
        return MEGATRON
    if _has(folder, "pytorch_model*.bin", "*.pth", "*.bin"):
        return PICKLES
    if below := [path for path in folder.glob("*") if path.is_dir() and (any(path.glob("model*.safetensors")) or line_for(path)
                                                                       not in ("", *EMPTY))]:
        return f"no model itself; {_last(below)} may be the one that is meant"
    return EMPTY[1] if (folder / "config.json").is_file() else EMPTY[0]


EMPTY = ("neither config.json nor weights: no model", "config.json without weights: convert or copy the checkpoint again")


def _has(folder: Path, *patterns: str) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _last(folders: list[Path]) -> str:
    """The folder of the last step, where names end with a step."""
    def step(path: Path) -> tuple[int, str]:
        tail = path.name.replace("-", "_").rpartition("_")[2]
        return int(tail) if tail.isdigit() else -1, path.name
    return max(folders, key=step).name

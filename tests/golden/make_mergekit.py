"""Makes mergekit.safetensors: what real mergekit does to the small models that are made here. With mergekit's Python:

    .venv-peers/bin/python tests/golden/make_mergekit.py            writes the file
    .venv-peers/bin/python tests/golden/make_mergekit.py --check    compares mergekit with the file instead

tests/test_merging_parity.py imports the models and recipes and merges them with our engine; it needs no mergekit.
Every tensor has a multiple of 64 values: in what is left beyond that, torch adds five experts up in another order.
"""
from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).with_name("mergekit.safetensors")
LAYER = "model.layers.0."
PARTS = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64),
         "self_attn.o_proj": (64, 64), "self_attn.q_norm": (64,), "self_attn.k_norm": (64,), "mlp.gate_proj": (4, 64),
         "mlp.up_proj": (4, 64), "mlp.down_proj": (64, 4), "input_layernorm": (64,), "post_attention_layernorm": (64,)}
SHAPES = {"model.embed_tokens.weight": (8, 64), "model.norm.weight": (64,)} | {
    f"{LAYER}{part}.weight": shape for part, shape in PARTS.items()}
KEPT = ("model.embed_tokens.weight", f"{LAYER}mlp.gate_proj.weight", f"{LAYER}input_layernorm.weight")  # in the file
CONFIG = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True, "vocab_size": 8,
          "hidden_size": 64, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1,
          "num_key_value_heads": 1, "head_dim": 64}
WEIGHTS = [1.0, 0.3, 0.7, 1.1, 0.45]
SCALES = {"random": 1e-2, "bfloat16": 1e-2, "ranks": 1, "whole": 1, "faint": 1e-5}
CASES = {  # name: (kind of shifts, method, each expert's parameters, shared parameters)
    "linear": ("random", "linear", {}, {}),
    "linear-plain": ("random", "linear", {}, {"normalize": False}),
    "linear-bf16": ("bfloat16", "linear", {}, {}),
    "ta": ("random", "task_arithmetic", {}, {}),
    "ta-mean": ("random", "task_arithmetic", {}, {"normalize": True, "lambda": 0.7}),
    "ta-bf16": ("bfloat16", "task_arithmetic", {}, {}),
    "ties": ("random", "ties", {"density": 0.3}, {}),
    "ties-sum": ("random", "ties", {"density": 0.55}, {"normalize": False, "lambda": 1.3}),
    "ties-int8": ("random", "ties", {"density": 0.29}, {"int8_mask": True}),
    "ties-l1": ("ranks", "ties", {"density": 0.5}, {"rescale": True}),
    "ties-bf16": ("bfloat16", "ties", {}, {}),
    "sce": ("random", "sce", None, {}),
    "sce-whole": ("whole", "sce", None, {}),
    "sce-faint": ("faint", "sce", None, {}),
    "sce-select": ("faint", "sce", None, {"select_topk": 0.37}),
    "dare": ("random", "dare_linear", {"density": 0.4}, {}),
    "dare-ties": ("random", "dare_ties", {"density": 0.4}, {"rescale": False}),
}


def shifts(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """One expert's shift of one tensor.

    random, faint: no two magnitudes are equal, so nothing depends on how ties are broken; faint ones are of RLVR's
    size, where mergekit's SCE takes uniform weights. ranks: magnitudes 1 .. n; whole: -3 .. 3: whole numbers, so
    that sums (of squares) are exact in float32 in any order.
    """
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    if kind == "ranks":
        return signs * (torch.randperm(signs.numel(), generator=generator).reshape(shape) + 1.0)
    if kind == "whole":
        return torch.randint(-3, 4, shape, generator=generator).float()
    return torch.randn(shape, generator=generator) * SCALES[kind]


def models(kind: str, folder: Path) -> list[Path]:
    """Writes the base and five experts; returns their folders, the base first."""
    generator = torch.Generator().manual_seed(list(SCALES).index(kind))
    whole = kind in ("ranks", "whole")
    base = {name: torch.randint(-9, 9, shape, generator=generator).float() if whole else
            torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    states = {"base": base}
    for i in range(len(WEIGHTS)):
        states[f"e{i}"] = {name: x + shifts(kind, tuple(x.shape), generator) for name, x in base.items()}
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    for name, state in states.items():
        (folder / name).mkdir(parents=True)
        save_file({tensor: x.to(dtype) for tensor, x in state.items()}, folder / name / "model.safetensors",
                  {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG | {"dtype": str(dtype).split(".")[1]}))
    return [folder / name for name in states]


def recipe(case: str, folders: list[Path]) -> dict:
    """The recipe of a case, in mergekit's YAML."""
    kind, method, own, shared = CASES[case]
    entries = [{"model": str(folder)} | ({} if own is None else {"parameters": {"weight": weight} | own})
               for folder, weight in zip(folders[1:], WEIGHTS, strict=True)]
    config = {"merge_method": method, "models": entries, "parameters": shared, "dtype": "float32"}
    if method != "linear":
        config["base_model"] = str(folders[0])
    return config | ({"out_dtype": "bfloat16"} if kind == "bfloat16" else {})


def golden() -> dict[str, torch.Tensor]:
    """Every case by real mergekit: {case/tensor: values}."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        made = {kind: models(kind, Path(scratch) / kind) for kind in SCALES}
        for case, (kind, *_) in CASES.items():
            config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(recipe(case, made[kind]))))
            out = Path(scratch) / "out" / case
            run_merge(config, str(out), MergeOptions(copy_tokenizer=False, write_model_card=False, random_seed=1))
            merged = {name: x for file in out.glob("*.safetensors") for name, x in load_file(file).items()}
            found |= {f"{case}/{name}": merged[name] for name in KEPT}
    return found


def main() -> int:
    from importlib.metadata import version
    found = golden()
    if "--check" in sys.argv:
        kept = load_file(GOLDEN)
        wrong = [name for name in found if not name.startswith("dare") and not torch.equal(found[name], kept[name])]
        print(f"mergekit {version('mergekit')}: {len(wrong)} of {len(found)} tensors differ from {GOLDEN.name}", *wrong)
        return bool(wrong)
    save_file(found, GOLDEN, {"mergekit": version("mergekit"), "torch": torch.__version__})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One checkpoint against its anchor, aspect by aspect: what is refused, what is remarked, what has to be changed."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from m2rl_core.adapters.reading import (
    EMBED, HEAD, Tensor, config_of, ends_of, headers, json_of, plain, same, template_of, unlike, vocabulary, weight_files)
from m2rl_core.errors import StudyError

NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # older tools stored them; computed now
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
FUNCTION = (*SHAPE, "hidden_act", "attention_bias", "rms_norm_eps", "sliding_window", "layer_types", "rope_parameters")
TRAINING = ("optimizer*", "scheduler*", "rng_state*", "trainer_state.json", "training_args.bin", "global_step*", "*.distcp",
            "*.pt", "lora_adapter")  # what lies beside weights and is left out
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")


class Told:
    """What one check finds, aspect by aspect: `remarks`, and what is to be changed; `loose` as in `checkpoints.check`."""

    def __init__(self, folder: Path, anchor: Path | None, loose: bool = False):
        self.folder, self.anchor, self.loose = folder, anchor, loose
        self.remarks: list[str] = []
        self.drop: list[str] = []
        self.cut = 0
        self.config: dict = {}
        self.sidecars: dict[str, Path] = {}
        self.raw = json_of(folder / "config.json")
        self.own = config_of(folder)
        self.base = config_of(anchor) if anchor else None
        self.wanted = _shapes(anchor, self.own)

    def all(self, tensors: dict[str, Tensor], named: bool) -> None:
        """Every aspect, in the order in which a fault explains those after it."""
        self.weights(tensors, named)
        self.function()
        self.embeddings(tensors)
        self.others(tensors)
        if not self.loose:
            self.tokenizer()
            self.endings()
        self.leftovers()

    def refuse(self, line: str):
        raise StudyError(f"{self.folder}: {line}")

    def weights(self, tensors: dict[str, Tensor], named: bool) -> None:
        """Types, and the class whose weights they are."""
        if "quantization_config" in self.raw:
            self.refuse("quantised weights, which can be neither trained nor merged: save the model in bfloat16")
        classes = self.raw.get("architectures") or []
        if classes and not any(name.endswith("ForCausalLM") for name in classes):
            self.refuse(f"a {classes[0]}, such as a reward or value model, not a language model")
        if not classes and self.base is not None:
            self.config["architectures"] = list(self.base.architectures or ["Qwen3ForCausalLM"])
            self.remarks.append("its config names no class: the anchor's is taken")
        codes = {one.code for one in tensors.values() if not one.code.startswith(("I", "U", "BOOL"))}
        if odd := sorted(codes - NAMES.keys()):
            self.refuse(f"weights of type {odd[0]}, which can be neither trained nor merged: save the model in bfloat16")
        if len(codes) > 1:
            self.remarks.append(f"weights of several types: {', '.join(sorted(NAMES[code] for code in codes))}")
        if not named:
            self.remarks.append("no index names its weight files: one is written")

    def function(self) -> None:
        """The config against the anchor's."""
        if self.base is None:
            return
        if self.own.model_type != self.base.model_type:
            self.refuse(f"a {self.own.model_type} model, but the anchor {self.anchor} is a {self.base.model_type}: what was "
                        "trained from the anchor is needed")
        for name in SHAPE if self.loose else FUNCTION:
            mine, theirs = getattr(self.own, name, None), getattr(self.base, name, None)
            if plain(mine) != plain(theirs):
                self.refuse(f"config.json has {name} {mine}, the anchor {theirs}: a merge would run its weights as the "
                            "anchor's, which is another function; if only the file is wrong, correct it")
        mine, theirs = self.own.max_position_embeddings, self.base.max_position_embeddings
        if mine != theirs:
            self.remarks.append(f"a context of {mine} tokens in its config, {theirs} in the anchor's")

    def embeddings(self, tensors: dict[str, Tensor]) -> None:
        """Rows that pad the vocabulary, and an output embedding that is stored though the model ties it, or is missing."""
        if EMBED not in tensors:
            self.refuse(_prefixed(tensors))
        width = self.own.hidden_size
        if wrong := [name for name in (EMBED, HEAD) if name in tensors and tensors[name].shape[1:] != (width,)]:
            self.refuse(f"{wrong[0]} is {list(tensors[wrong[0]].shape)}, but hidden_size is {width} in its config")
        tied = bool((self.base or self.own).tie_word_embeddings)
        vocab = (self.base or self.own).vocab_size
        if HEAD in tensors and tied:
            if not same(tensors[EMBED], tensors[HEAD]):
                self.refuse("its output embedding (lm_head.weight) is not its input embedding, but the anchor has one for "
                            "both: it was trained untied, and cannot stand beside the others")
            self.drop.append(HEAD)
            self.remarks.append("its tied output embedding is stored a second time: left out")
        if HEAD not in tensors and not tied:
            self.refuse("lm_head.weight is missing, and the anchor does not tie it: convert the checkpoint again with it")
        if bool(self.own.tie_word_embeddings) != tied:
            self.config["tie_word_embeddings"] = tied
            self.remarks.append(f"tie_word_embeddings is {str(not tied).lower()} in its config, not in its weights: changed")
        for name in (EMBED, HEAD):
            rows = tensors[name].shape[0] if name in tensors and name not in self.drop else vocab
            if rows < vocab:
                self.refuse(f"{name} has {rows} rows, {vocab} are needed: its vocabulary was cut, or another tokenizer's")
            if rows > vocab:
                self.cut = vocab
                self.remarks.append(f"{name} has {rows} rows, padded as Megatron does: the first {vocab} are kept")
        if self.own.vocab_size != vocab:
            self.config["vocab_size"] = vocab

    def others(self, tensors: dict[str, Tensor]) -> None:
        """Every other tensor by name and shape against the anchor's."""
        for name in tensors:
            if name.endswith(BUFFERS):
                self.drop.append(name)
        if any(name.endswith(BUFFERS) for name in self.drop):
            self.remarks.append("it stores buffers of rotary embeddings, which are computed: left out")
        if self.wanted is None:
            return
        wanted = {name for name in self.wanted if not name.endswith(BUFFERS)} - {EMBED, HEAD}
        found = tensors.keys() - {EMBED, HEAD, *self.drop}
        if missing := sorted(wanted - found):
            self.refuse(f"{missing[0]} is missing ({len(missing)} tensors are): convert or copy the checkpoint again")
        if extra := sorted(found - wanted):
            self.refuse(f"{extra[0]} belongs to no such model ({len(extra)} tensors do not): another architecture, or a head "
                        "on top")
        for name in sorted(found):
            if tensors[name].shape != self.wanted[name]:
                self.refuse(f"{name} is {list(tensors[name].shape)}, {list(self.wanted[name])} is needed")

    def tokenizer(self) -> None:
        """The anchor's tokenizer and chat template serve where the folder has none, or another template."""
        if self.anchor is None:
            return
        theirs = [name for name in TOKENIZER if (self.anchor / name).is_file()]
        if not (self.folder / "tokenizer.json").is_file():
            if theirs:
                self.sidecars |= {name: self.anchor / name for name in theirs}
                self.remarks.append("no tokenizer.json: the anchor's tokenizer is taken")
            return
        if "tokenizer.json" in theirs:
            if line := unlike(vocabulary(self.folder), vocabulary(self.anchor)):
                self.refuse(f"its tokenizer is not the anchor's ({line}): the same text would be other tokens to each")
        if template_of(self.anchor) and template_of(self.folder) != template_of(self.anchor):
            self.sidecars |= {name: self.anchor / name for name in theirs}
            self.remarks.append(f"{'another' if template_of(self.folder) else 'no'} chat template: the anchor's is taken, so "
                                "that all models see the same prompts")

    def endings(self) -> None:
        """The end markers of generation_config.json: trainers keep one of Qwen's two, or none."""
        path = self.anchor / "generation_config.json" if self.anchor else None
        if path is None or not path.is_file():
            return
        mine, theirs = (ends_of(folder / "generation_config.json") for folder in (self.folder, self.anchor))
        if mine != theirs:
            self.sidecars[path.name] = path
            self.remarks.append(f"generation ends at {mine or 'nothing'}, the anchor's at {theirs}: the anchor's is taken")

    def leftovers(self) -> None:
        """What training left beside the weights, and how much of it."""
        found = sorted({path for pattern in TRAINING for path in self.folder.glob(pattern)})
        if found:
            size = sum(part.stat().st_size for path in found for part in (path.rglob("*") if path.is_dir() else [path])
                       if part.is_file())
            names = ", ".join(path.name for path in found[:3]) + (", …" if len(found) > 3 else "")
            self.remarks.append(f"left out, for it is no weight: {names} ({size / 1e6:,.1f} MB)")


def _shapes(anchor: Path | None, config) -> dict[str, tuple[int, ...]] | None:
    """Name and shape of every tensor: the anchor's; without one those of a dense Qwen3, and None for other models."""
    if anchor:
        return {name: one.shape for name, one in headers(weight_files(anchor)[0]).items()}
    if config.model_type != "qwen3":
        return None
    from m2rl_core.models.policy import sizes
    return sizes(config)


def _prefixed(tensors: Mapping[str, Tensor]) -> str:
    """Why there is no input embedding."""
    for name in sorted(tensors):
        if name.endswith(EMBED):
            return (f"its tensors begin with {name.removesuffix(EMBED)!r}, a wrapper's: save the model inside of it "
                    "(unwrapped) by save_pretrained")
        if name == EMBED.removeprefix("model."):
            return "its tensors lack 'model.': the bare transformer was saved; save the model with its head (…ForCausalLM)"
    return f"{EMBED} is missing: convert or copy the checkpoint again"

"""What a folder in Hugging Face form says of itself: its weight files by their headers, its config, its tokenizer."""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from m2rl_core.adapters.foreign import line_for
from m2rl_core.errors import StudyError, one_line

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PART = 1 << 24  # values that are compared at once


@dataclass(frozen=True)
class Tensor:
    """Where a tensor stands, its type by safetensors' code, and its shape."""

    file: Path
    code: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def weight_files(folder: Path) -> tuple[list[Path], bool]:
    """The weight files of a folder, and whether tools find them: an index, model.safetensors, or else what is named so."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json_of(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise StudyError(f"{index} has no weight_map: copy the checkpoint again")
        files = sorted(folder / name for name in set(names.values()))
        if missing := [path.name for path in files if not path.is_file()]:
            raise StudyError(f"{folder}: the index names {missing[0]}, which is not there: copy the checkpoint again")
        if stray := sorted(names.keys() ^ headers(files).keys()):
            raise StudyError(f"{folder}: {stray[0]} stands in the index or in a file, not in both: files of two checkpoints; "
                             "copy it again into an empty folder")
        return files, True
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"], True
    files = sorted(folder.glob("model-*.safetensors"))
    if not files:
        raise StudyError(f"{folder}: no model.safetensors, nor model-*.safetensors: {line_for(folder) or 'no model'}")
    total = files[0].stem.rpartition("-of-")[2]
    if total.isdigit() and len(files) != int(total):
        raise StudyError(f"{folder}: {len(files)} weight files, but {files[0].name} speaks of {int(total)}: copy it again")
    return files, False


def headers(files: list[Path]) -> dict[str, Tensor]:
    """Every tensor by name, from the files' headers; StudyError for a damaged file, or a name that stands in two."""
    from safetensors import SafetensorError, safe_open
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    if name in found:
                        raise StudyError(f"{path}: {name} stands in {found[name].file.name}, too: remove the stale file")
                    found[name] = Tensor(path, part.get_dtype(), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise StudyError(f"{path} is corrupt or cut short ({error}): copy it again") from error
    return found


def tensor(one: Tensor, name: str):
    from safetensors import safe_open
    with safe_open(one.file, framework="pt") as file:
        return file.get_tensor(name)


def same(embed: Tensor, head: Tensor) -> bool:
    """Whether both embeddings hold the same values, as far as both go: one of them may be padded, or of another type."""
    if embed.shape[1:] != head.shape[1:]:
        return False
    rows = min(embed.shape[0], head.shape[0])
    a, b = tensor(embed, EMBED)[:rows], tensor(head, HEAD)[:rows]
    step = max(1, PART // embed.shape[1])
    return all(bool((a[i:i + step].float() == b[i:i + step].float()).all()) for i in range(0, rows, step))


def json_of(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} is no readable JSON ({error}): copy it again") from error
    if not isinstance(found, dict):
        raise StudyError(f"{path} holds no JSON object: copy it again")
    return found


def config_of(folder: Path):
    from m2rl_core.models.policy import AutoConfig
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise StudyError(f"{folder}/config.json: {one_line(error)}") from error


def plain(value):
    """Config values that compare: numbers as numbers, None and defaults of a rope left out."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in sorted(value.items()) if one is not None}
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def vocabulary(folder: Path) -> tuple[dict[str, int], list]:
    """(token -> id, merges) of tokenizer.json."""
    told = json_of(folder / "tokenizer.json")
    model = told.get("model") or {}
    vocab = model.get("vocab") or {}
    ids = dict(vocab) if isinstance(vocab, dict) else {str(entry[0]): i for i, entry in enumerate(vocab)}
    ids |= {token["content"]: token["id"] for token in told.get("added_tokens") or ()}
    return ids, [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges") or ()]


def unlike(mine: tuple[dict, list], theirs: tuple[dict, list]) -> str:
    """The first difference of two vocabularies in a few words, "" for none."""
    for token in sorted(mine[0].keys() | theirs[0].keys()):
        a, b = mine[0].get(token), theirs[0].get(token)
        if a != b:
            return f"{token!r} is {'no token' if a is None else a}, there {'none' if b is None else b}"
    return "" if mine[1] == theirs[1] else "other merges of the same tokens"


def template_of(folder: Path) -> str:
    """The chat template, of its own file or in the tokenizer's config; "" for none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    config = folder / "tokenizer_config.json"
    found = json_of(config).get("chat_template") if config.is_file() else None
    return found.strip() if isinstance(found, str) else json.dumps(found) if found else ""


def ends_of(path: Path) -> list[int]:
    """The ids that end a generation."""
    found = json_of(path).get("eos_token_id") if path.is_file() else None
    return sorted(found) if isinstance(found, list) else [] if found is None else [found]

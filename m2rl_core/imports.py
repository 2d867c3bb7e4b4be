"""Models that are brought, not made: found in a folder, in the hub's cache or on the hub, checked, and linked into the store.

A model's key is the digest of its content, wherever it came from: whole files where they are small, and of each large
safetensors file its size, its header and bytes from the middle of every tensor. So the key of 8 GB takes a moment, two
checkpoints of one shape differ in it, and a copy by hand is the same model as the hub's; a change of single weights
that spares every middle would pass. Weights are linked, not copied, but for files that `adapters.checkpoints` mends.
"""
from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m2rl_core.adapters.foreign import line_for
from m2rl_core.errors import StudyError, one_line

if TYPE_CHECKING:
    from m2rl_core.adapters.checkpoints import Checked

FOLDER = "M2RL_MODELS"
WHOLE = 2**23  # bytes up to which a file is read whole
SAMPLE = 8192  # bytes of each tensor of a larger one
LINKED = (".safetensors",)
NEEDED = ("config.json", "*.safetensors", "tokenizer.json", "tokenizer_config.json")
MARKS = ("<|im_end|>", "<|endoftext|>")


class ModelError(StudyError):
    """A model that cannot be used here; one line that names it, what is wrong, and the mend."""


@dataclass(frozen=True)
class Found:
    """Where a model's files are: its folder, and the commit where the hub's client says one."""

    folder: Path
    commit: str = ""


def split(source: str) -> tuple[str, str]:
    """(folder or owner/name, revision)."""
    name, _, revision = source.partition("@")
    return (source, "") if source.startswith("/") else (name, revision)


def find(source: str) -> Found | None:
    """The model's folder on this machine, or None: nothing is asked of the network."""
    name, revision = split(source)
    if name.startswith("/"):
        return Found(Path(name)) if (Path(name) / "config.json").is_file() else None
    by_hand = os.environ.get(FOLDER)
    if by_hand and (Path(by_hand) / name.replace("/", "__") / "config.json").is_file():
        return Found(Path(by_hand) / name.replace("/", "__"))
    config = cached(name, revision)
    return Found(config.parent, config.parent.name) if config and _whole(config.parent) else None


def cached(name: str, revision: str, file: str = "config.json") -> Path | None:
    """A file of a revision in the hub client's cache."""
    from huggingface_hub import try_to_load_from_cache  # a quarter of a second, for models of the hub alone
    path = try_to_load_from_cache(name, file, revision=revision or None)
    return Path(path) if isinstance(path, str) else None


def _whole(folder: Path) -> bool:
    """Whether every shard that the index names is there: an interrupted download has some of them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return all((folder / shard).is_file() for shard in set(json.loads(index.read_text())["weight_map"].values()))
    return (folder / "model.safetensors").is_file()


def mend(source: str) -> str:
    """How to get a model that is not on this machine, in half a line."""
    name, revision = split(source)
    if name.startswith("/"):
        return f"put {', '.join(NEEDED)} into {name}"
    at = f" --revision {revision}" if revision else ""
    where = os.environ.get(FOLDER) or "/folder"
    return (f"`hf download {name}{at}`, or put {', '.join(NEEDED)} into {where}/{name.replace('/', '__')}/ by hand and set "
            f"{FOLDER}={where}")


def settings(source: str, context: int = 0) -> dict:
    """Settings of a stage that is imported: where from, and the digest; one that is not here yet has a digest of its name.

    `context`: tokens that the model is used with, where its config says another number.
    """
    found = find(source)
    digest = content_digest(found.folder) if found else hashlib.sha256(f"not here: {source}".encode()).hexdigest()
    if context:
        digest = hashlib.sha256(f"{digest}/{context}".encode()).hexdigest()
    return {"origin": "imported", "digest": digest, "found": found is not None, **({"context": context} if context else {})}


def fetch(source: str) -> None:
    """Download a model that is not on this machine into the hub client's cache; ModelError names files and folder."""
    name, revision = split(source)
    if find(source):
        return
    if name.startswith("/"):
        line = line_for(Path(name)) if Path(name).is_dir() else ""
        raise ModelError(f"{name} holds no model{line and f' ({line})'}: {mend(source)}")
    try:
        from huggingface_hub import snapshot_download
        snapshot_download(name, revision=revision or None, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"])
    except Exception as error:  # what a failed connection raises depends on the client's version
        reason = one_line(error, 160)
        raise ModelError(f"{source} is not on this machine and cannot be fetched ({reason}): {mend(source)}") from error


def files(folder: Path) -> list[Path]:
    """The files of a model that count: configs, tokenizer, template, weights; sorted by name, those of the top folder."""
    return sorted(path for path in folder.iterdir()
                  if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja", ".txt", ".model"))


def content_digest(folder: Path) -> str:
    """64 hex digits of a model's content; see the top of this module."""
    total = hashlib.sha256()
    for path in files(folder):
        total.update(f"{path.name} {file_digest(path)}\n".encode())
    return total.hexdigest()


def file_digest(path: Path | str) -> str:
    """The digest of one file: of all of it up to WHOLE bytes or where it is no safetensors file, else of samples."""
    path = Path(path)
    try:
        told = path.stat()
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): is the link's target still there?") from error
    return _file_digest(path, told.st_size, told.st_mtime_ns, told.st_ino)


@functools.lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, *_) -> str:
    with open(path, "rb") as file:
        if size <= WHOLE or path.suffix not in LINKED:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256(str(size).encode())
        head = file.read(8)
        length = int.from_bytes(head, "little")
        try:
            text = file.read(length) if length < size else b""
            tensors = json.loads(text)
        except ValueError as error:
            raise ModelError(f"{path} is no safetensors file: its header cannot be read; is the copy whole?") from error
        found.update(text)
        for name, told in sorted(tensors.items()):
            if name != "__metadata__":
                begin, end = told["data_offsets"]
                file.seek(8 + length + max(begin, (begin + end - SAMPLE) // 2))
                found.update(file.read(min(SAMPLE, end - begin)))
        return found.hexdigest()


# Checks ------------------------------------------------------------------------------------------------

def check(folder: Path, what: str, anchor: tuple[Path, str] | None = None, loose: bool = False) -> Checked:
    """A model that can be sampled, trained and merged here, and what `checkpoints.take` has to change for that.

    `what` names the model in messages; `anchor` is the folder that it is held against and how that is called; `loose` as in
    `checkpoints.check`. ModelError, one line, for a model that cannot; reads no weights but embeddings that are stored twice.
    """
    from m2rl_core.adapters import checkpoints
    try:
        refuse_uncomputed(folder)
        checked = checkpoints.check(folder, anchor and anchor[0], loose=loose)
        check_tokenizer(checked)
    except ModelError as error:
        raise ModelError(f"{what}: {error}") from error
    except StudyError as error:
        line = str(error).removeprefix(f"{folder}: ")
        raise ModelError(f"{what}{f', held against {anchor[1]}' if anchor else ''}: {line}") from error
    return checked


def refuse_uncomputed(folder: Path) -> None:
    """ModelError for a model that is not computed here, by either engine; says nothing of a folder without a config."""
    from m2rl_core.adapters.reading import json_of
    if not (folder / "config.json").is_file():
        return
    config = json_of(folder / "config.json")
    if (kind := config.get("model_type")) != "qwen3":
        raise ModelError(f"a {kind} model; dense qwen3 models are sampled and trained here, by either engine "
                         f"(`python -m m2rl_core merge` takes any architecture)")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    odd = {"attention_bias": config.get("attention_bias"), "use_sliding_window": config.get("use_sliding_window"),
           "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default"}
    for name, value in odd.items():
        if value:
            raise ModelError(f"{name} is set in config.json; Qwen3 models with it are not computed here: bring one without it")


def check_tokenizer(checked: Checked) -> None:
    """ModelError where no tokenizer, no chat template, or none of Qwen's marks would stand beside the weights."""
    from m2rl_core.adapters.reading import json_of
    folder, path = checked.folder, checked.file("tokenizer.json")
    if not path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json: copy the tokenizer's files of the model that it came from")
    told = checked.file("tokenizer_config.json")
    config = json_of(told) if told.is_file() else {}
    if not config.get("chat_template") and not checked.file("chat_template.jinja").is_file():
        raise ModelError("its tokenizer has no chat template, so no prompt can be asked: put chat_template.jinja "
                         f"(Qwen3-4B's, say) into {folder}")
    text = path.read_text(encoding="utf-8")
    for mark in MARKS:
        if f'"{mark}"' not in text:
            raise ModelError(f"its tokenizer has no {mark}, which ends a turn in Qwen's chat form: bring a model with Qwen3's "
                             "tokenizer")


def anchored(profile, name: str, room: Path) -> tuple[Checked, str]:
    """A brought model that is on this machine, checked against the anchor of its study, and how messages call it.

    An anchor that is not as every tool reads it is first written so, into folders in `room`.
    """
    from m2rl_core.adapters import checkpoints
    source = source_of(profile, name)
    what, found = f"{name} ({source})", find(source)
    if found is None:
        raise ModelError(f"{name}: {source} is not on this machine: {mend(source)}")
    other = anchor_of(profile, name)
    if not other or find(source_of(profile, other)) is None:
        return check(found.folder, what), what
    anchor, called = anchored(profile, other, room)
    folder = room / other
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left of it
        folder = checkpoints.take(anchor, folder)
    return check(found.folder, what, (folder, called), loose=other == "base"), what


# Building ----------------------------------------------------------------------------------------------

def build(ctx) -> None:
    """Link a model that is brought into the store, mended where it is not as every tool here reads it.

    Beside it stands `origin.json`: where it came from, what was changed, and each file's digest.
    """
    from m2rl_core.adapters import checkpoints
    checked, what = anchored(ctx.profile, ctx.stage.name, ctx.state / "anchors")
    for path in ctx.out.iterdir():  # what an interrupted run left
        if path.is_file() or path.is_symlink():
            path.unlink()
    if checkpoints.take(checked, ctx.out) == checked.folder:
        for path in files(checked.folder):
            if path.suffix in LINKED:
                (ctx.out / path.name).symlink_to(path.resolve())
            else:
                shutil.copyfile(path, ctx.out / path.name)
    for line in checked.remarks:
        ctx.log(f"{what}: {line}")
    context, config = ctx.stage.settings.get("context"), json.loads((ctx.out / "config.json").read_text(encoding="utf-8"))
    if context and config.get("max_position_embeddings") != context:
        (ctx.out / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}, indent=2) + "\n")
    source = source_of(ctx.profile, ctx.stage.name)
    told = {"origin": "imported", "source": source, "commit": find(source).commit, "folder": str(checked.folder),
            "context": context, "remarks": checked.remarks,
            "anchor": "" if checked.as_is else ctx.stage.settings.get("anchor", ""),
            "digests": {path.name: file_digest(path) for path in files(ctx.out)}}
    (ctx.out / "origin.json").write_text(json.dumps(told, indent=1) + "\n")


def source_of(profile, name: str) -> str:
    """Where a stage that is brought comes from."""
    if name == "base":
        return f"{profile.model.source}@{profile.model.revision}".rstrip("@")
    return profile.imports[re.sub(r"@\d+$", "", name)]


def anchor_of(profile, name: str) -> str:
    """The brought model whose shape `name` must have: SFT's, or base's; "" where there is none."""
    if name not in ("base", "sft") and profile.imports.get("sft"):
        return "sft"
    return "base" if name != "base" and hasattr(profile.model, "source") else ""

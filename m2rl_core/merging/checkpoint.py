"""Hugging Face weight folders, read and written one tensor at a time, sharded or not."""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SIDECARS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
            "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
            "chat_template.json")
CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
DTYPES = {code: dtype for dtype, code in CODES.items()}
SHARD_BYTES = 5_000_000_000


class Checkpoint(Mapping):
    """The tensors of a folder by name, each read when asked for; `meta` has every (dtype, shape) without reading."""

    def __init__(self, folder: Path | str):
        """ValueError for a folder without safetensors, a missing shard or a file that is cut short."""
        self.folder = Path(folder)
        self.files = weight_files(self.folder)
        self._handles, self._home = {}, {}
        self.meta: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for path in self.files:
            try:
                handle = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is corrupt or cut short ({error}): copy it again") from error
            self._handles[path] = handle
            for name in handle.keys():
                if name in self._home:
                    raise ValueError(f"{self.folder}: {name} stands in two files; remove the stale one")
                part = handle.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise ValueError(f"{path}: {name} has type {part.get_dtype()}, which cannot be merged")
                self._home[name] = path
                self.meta[name] = (DTYPES[part.get_dtype()], tuple(part.get_shape()))

    def __getitem__(self, name: str) -> Tensor:
        return self._handles[self._home[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)

    def digest(self) -> str:
        """SHA-256 over the names and SHA-256 digests of the weight files."""
        total = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return total.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder: those of the index where there is one, else every *.safetensors."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a local model folder, downloaded before")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(folder / name for name in set(json.loads(index.read_text())["weight_map"].values()))
        missing = [path.name for path in files if not path.exists()]
        if missing:
            raise ValueError(f"{folder}: the index names {missing[0]}, which is not there: copy the folder again")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors file: save the model with save_pretrained first")
    return files


class Writer:
    """Writes tensors of known shapes in any order into safetensors shards; nothing is held in memory."""

    def __init__(self, folder: Path, meta: Mapping[str, tuple[torch.dtype, tuple]], shard_bytes: int = SHARD_BYTES):
        shards: list[list[str]] = [[]]
        used = 0
        for name in sorted(meta, key=lambda n: (-meta[n][0].itemsize, n)):  # wide types first keeps them aligned
            size = _size(meta[name])
            if shards[-1] and used + size > shard_bytes:
                shards.append([])
                used = 0
            shards[-1].append(name)
            used += size
        self.meta, self.left, self._place, self._files = meta, set(meta), {}, []
        for i, names in enumerate(shards, 1):
            path = folder / ("model.safetensors" if len(shards) == 1 else
                             f"model-{i:05d}-of-{len(shards):05d}.safetensors")
            self._files.append(path.open("wb"))
            self._start(self._files[-1], names)
        if len(shards) > 1:
            where = {name: Path(self._place[name][0].name).name for name in sorted(meta)}
            (folder / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {"total_size": total_bytes(meta)}, "weight_map": where}, indent=2) + "\n")

    def _start(self, file, names: list[str]) -> None:
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            dtype, shape = self.meta[name]
            end = offset + _size(self.meta[name])
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            self._place[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts one tensor at its place; ValueError where it is not what the plan says."""
        if (tensor.dtype, tuple(tensor.shape)) != self.meta[name]:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not the planned {self.meta[name]}")
        file, offset = self._place[name]
        file.seek(offset)
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.left.discard(name)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Flushes to the disk; ValueError where a planned tensor was never written."""
        for file in self._files:
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
        if kind is None and self.left:
            raise ValueError(f"{len(self.left)} tensors were not written, {min(self.left)} first")


def copy_sidecars(source: Path, out: Path, dtype: str) -> None:
    """Copies config, tokenizer and chat template; the config's dtype is set where one is given."""
    for name in SIDECARS:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    config = out / "config.json"
    if dtype and config.exists():
        fields = json.loads(config.read_text())
        fields["torch_dtype" if "torch_dtype" in fields else "dtype"] = dtype
        config.write_text(json.dumps(fields, indent=2) + "\n")


def total_bytes(meta: Mapping[str, tuple[torch.dtype, tuple]]) -> int:
    """The bytes of all tensors of a plan."""
    return sum(_size(one) for one in meta.values())


def _size(meta: tuple[torch.dtype, tuple]) -> int:
    return meta[0].itemsize * torch.Size(meta[1]).numel()

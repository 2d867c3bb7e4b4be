"""Hugging Face weight folders, read and written by pieces of tensors, sharded or not."""
from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from m2rl_core.adapters.foreign import PART, PARTIAL
from m2rl_core.merging.dare import words
from m2rl_core.kernel import kernel
from m2rl_core.merging.pieces import PIECE, grid
from m2rl_core.merging.pool import cores
from m2rl_core.merging.stored import DTYPES, Meta, bytes_of, count_of

if TYPE_CHECKING:
    from torch import Tensor

SIDECARS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
            "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
            "chat_template.json")
SHARD_BYTES = 5_000_000_000
FLUSH_BYTES = 1 << 26  # sent to the disk at once, in the background, so that little is left for the end


class Checkpoint(Mapping):
    """The tensors of a folder by name, torch's, each read when asked for; `meta` has every (code, shape) at once."""

    def __init__(self, folder: Path | str, files: Sequence[Path] = ()):
        """`files`: some of the folder's, in place of all its weights.

        ValueError for a folder without safetensors, a missing shard or a file that is cut short.
        """
        self.folder = Path(folder)
        self.files = list(files) or weight_files(self.folder)
        self._home: dict[str, Path] = {}
        self.meta: dict[str, Meta] = {}
        for path in self.files:
            try:
                handle = safe_open(path, framework="numpy")
            except SafetensorError as error:
                raise ValueError(f"{path} is corrupt or cut short ({error}): copy it again") from error
            for name in handle.keys():
                if name in self._home:
                    raise ValueError(f"{self.folder}: {name} stands in two files; remove the stale one")
                part = handle.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise ValueError(f"{path}: {name} has type {part.get_dtype()}, which cannot be merged")
                self._home[name] = path
                self.meta[name] = (part.get_dtype(), tuple(part.get_shape()))

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._home[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)

    def __enter__(self) -> Checkpoint:
        """Opens the files for `read`."""
        self._open = {path: path.open("rb", buffering=0) for path in self.files}
        self._begin = {name: start for path in self.files for name, start in _begins(path).items()}
        return self

    def __exit__(self, *_) -> None:
        for file in self._open.values():
            file.close()

    def read(self, name: str, first: int, out: np.ndarray) -> None:
        """out := the flat tensor's values from `first` on, in its own type; any thread may call it.

        By pread: with a warm page cache as fast as mapping the file, and a file cut short meanwhile is an error
        here, not the end of the process.
        """
        path = self._home[name]
        got = os.preadv(self._open[path].fileno(), [out.data], self._begin[name] + first * out.itemsize)
        if got != out.nbytes:
            raise ValueError(f"{path} is cut short at {name}: it changed while it was read")

    def view(self, name: str, first: int, count: int) -> np.ndarray:
        """The values that `read` gives, where they lie in the page cache: read-only, mapped for as long as they are held.

        For work that looks at every byte once, as mapping costs a tenth of copying. A file cut short before is a
        ValueError; in the milliseconds while it is mapped, the end of the process.
        """
        path, dtype = self._home[name], DTYPES[self.meta[name][0]]
        file, begin = self._open[path].fileno(), self._begin[name] + first * dtype.itemsize
        end, page = begin + count * dtype.itemsize, begin - begin % mmap.ALLOCATIONGRANULARITY
        if os.fstat(file).st_size < end:
            raise ValueError(f"{path} is cut short at {name}: it changed while it was read")
        mapped = mmap.mmap(file, end - page, access=mmap.ACCESS_READ, offset=page)
        if hasattr(mmap, "MADV_WILLNEED"):
            mapped.madvise(mmap.MADV_WILLNEED)  # from a disk: all at once, not page by page
        values = np.frombuffer(mapped, dtype, count, begin - page)
        return values if values.flags.aligned else values.copy()

    def digest(self) -> str:
        """The `Digest` of all tensors."""
        with self:
            return self.digested(Digest())

    def digested(self, digest: Digest) -> str:
        """The same where `digest` has some tensors already; entered."""
        for name in self.meta.keys() - digest.blocks.keys():
            values = np.empty(PIECE, DTYPES[self.meta[name][0]])
            for piece in grid(name, count_of(self.meta[name])):
                self.read(name, piece.first, values[: piece.count])
                digest.add(name, checksum(values[: piece.count]))
        return digest.text(self.meta)

    def sha256(self) -> dict[str, str]:
        """SHA-256 of each weight file, as model hubs list them. Reads everything: about a second for a gigabyte."""
        def one(path: Path) -> str:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        with ThreadPoolExecutor(cores()) as pool:
            return dict(zip([path.name for path in self.files], pool.map(one, self.files), strict=True))


class Digest:
    """What tells two models apart: SHA-256 over names, types, shapes and the `checksum` of every piece of the tensors.

    It does not depend on how tensors are laid out in files, and costs a tenth of SHA-256 over all bytes. It finds
    any damage or mix-up; it is no proof against somebody who forges a file: `sha256` is.
    """

    def __init__(self):
        self.blocks: dict[str, list[int]] = {}

    def add(self, name: str, block: int) -> None:
        """The checksum of a tensor's next piece."""
        self.blocks.setdefault(name, []).append(block)

    def text(self, meta: Mapping[str, Meta]) -> str:
        lines = (f"{name} {code} {list(shape)} {' '.join(f'{b:016x}' for b in self.blocks.get(name, ()))}\n"
                 for name, (code, shape) in sorted(meta.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def checksum(values: np.ndarray) -> int:
    """64 bits for the bytes of a flat tensor: the sum over its 8-byte words of word times key, modulo 2^64.

    The keys are odd and look random (SplitMix64 from 0), so every change of one word shows, and others but for a
    chance of about 2^-63. A last word that is not full counts as if zeros followed.
    """
    data = values.view(np.uint8)
    whole = len(data) // 8 * 8
    full = data[:whole].view(np.uint64)
    total = int(_dot(full if full.flags.aligned else full.copy(), _keys(whole // 8)))
    if whole < len(data):
        total += int.from_bytes(data[whole:].tobytes(), "little") * int(_keys(whole // 8 + 1)[-1])
    return total % 2**64


@kernel
def _dot(a, b):
    total = np.uint64(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@lru_cache(maxsize=8)
def _keys(count: int) -> np.ndarray:
    return words(0, 0, count) | np.uint64(1)


def _begins(path: Path) -> dict[str, int]:
    """Where in a safetensors file each tensor begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder: those of the index where there is one, else every *.safetensors."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a local model folder, downloaded before")
    if (folder / PART).is_file():
        raise ValueError(f"{folder}: {PARTIAL}")
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
    """Writes pieces of tensors of known shapes in any order into safetensors shards; nothing is held in memory."""

    def __init__(self, folder: Path, meta: Mapping[str, Meta], shard_bytes: int = SHARD_BYTES):
        shards: list[list[str]] = [[]]
        used = 0
        for name in sorted(meta, key=lambda n: (-DTYPES[meta[n][0]].itemsize, n)):  # wide types first keeps them aligned
            size = bytes_of(meta[name])
            if shards[-1] and used + size > shard_bytes:
                shards.append([])
                used = 0
            shards[-1].append(name)
            used += size
        self.meta, self._place, self._files, self._lock = meta, {}, [], threading.Lock()
        self._dirty, self._flushes, self._flusher = 0, [], ThreadPoolExecutor(1, "flush")
        self.left = {name: count_of(one) for name, one in meta.items()}
        for i, names in enumerate(shards, 1):
            path = folder / ("model.safetensors" if len(shards) == 1 else
                             f"model-{i:05d}-of-{len(shards):05d}.safetensors")
            self._files.append(path.open("wb", buffering=0))
            self._start(self._files[-1], names)
        if len(shards) > 1:
            where = {name: Path(self._place[name][0].name).name for name in sorted(meta)}
            (folder / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {"total_size": total_bytes(meta)}, "weight_map": where}, indent=2) + "\n")

    def _start(self, file, names: list[str]) -> None:
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            code, shape = self.meta[name]
            end = offset + bytes_of(self.meta[name])
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            self._place[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])

    def put(self, name: str, first: int, values: np.ndarray) -> None:
        """Writes flat values at their place, `first` values into the tensor; any thread may call it.

        ValueError where the type is not the plan's (bfloat16 as uint16) or the tensor has no such place.
        """
        code, shape = self.meta[name]
        if values.dtype != DTYPES[code] or first + values.size > count_of(self.meta[name]):
            raise ValueError(f"{name}: {values.size} values of {values.dtype} at {first} are not in the plan, "
                             f"{code} {tuple(shape)}")
        file, offset = self._place[name]
        data = values.view(np.uint8).data
        place = offset + first * values.itemsize
        while len(data):  # a disk that is almost full takes a part, and then refuses the rest
            done = os.pwrite(file.fileno(), data, place)
            data, place = data[done:], place + done
        with self._lock:
            self.left[name] -= values.size
            self._dirty += values.nbytes
            if self._dirty >= FLUSH_BYTES:
                self._dirty = 0
                self._flushes.append(self._flusher.submit(_flush, file.fileno()))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Flushes to the disk; ValueError where a planned tensor was not written whole."""
        self._flusher.shutdown(cancel_futures=kind is not None)
        for file in self._files:
            if kind is None:
                os.fsync(file.fileno())
            file.close()
        if kind is None:
            for flush in self._flushes:
                flush.result()  # a disk reports a failed write once, and to whom it may be
        missing = sorted(name for name, count in self.left.items() if count)
        if kind is None and missing:
            raise ValueError(f"{len(missing)} tensors were not written whole, {missing[0]} first")


def _flush(file: int) -> None:
    """Sends what was written to the disk and gives its pages back, so that the inputs stay in the page cache.

    The next writes then find memory that was in use a moment ago: measured at a fifth of the cost of fresh memory.
    """
    os.fsync(file)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


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


def total_bytes(meta: Mapping[str, Meta]) -> int:
    """The bytes of all tensors of a plan."""
    return sum(map(bytes_of, meta.values()))

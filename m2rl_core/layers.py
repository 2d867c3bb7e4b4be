"""Some layers of a brought model without the rest of it, for section 3.3: read by ranges of bytes, from the hub or a folder.

A safetensors file begins with a header that says where each tensor lies. So of a model of 8 GB the headers of those files
are read that hold the layers' matrices, and then these: for Qwen3-4B 0.2 GB a layer. They become one small file, PART,
which no tool here takes for a whole model. A part's key is that of its model's commit, of a folder without one its content's.
"""
from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from m2rl_core import imports
from m2rl_core.adapters.foreign import PART
from m2rl_core.errors import one_line
from m2rl_core.imports import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SECONDS = 30  # without a byte
PIECE = 2**20  # bytes that are held at once
LONGEST = 10**8  # bytes of a header: safetensors' own limit


@dataclass(frozen=True)
class Place:
    """Where a model's files lie: a folder, or a commit of the hub's repository `name`."""

    name: str
    commit: str
    folder: Path | None = None

    def text(self, file: str) -> dict | None:
        """A JSON file; None where there is none."""
        kept = self.folder / file if self.folder else imports.cached(self.name, self.commit, file)
        if kept and kept.is_file():
            return _object(kept.read_bytes(), f"{self.name}: {file}")
        if self.folder:
            return None
        from huggingface_hub.errors import RemoteEntryNotFoundError
        try:
            return _object(b"".join(_answer(self, file)), f"{self.name}: {file}")
        except RemoteEntryNotFoundError:
            return None
        except ModelError:
            raise
        except Exception as error:  # what a failed connection raises depends on the client's version
            raise _unreachable(self, file, error) from error

    def bytes(self, file: str, begin: int, end: int) -> Iterator[bytes]:
        """The bytes begin .. end-1 of a file, in pieces; ModelError where they cannot be had."""
        if not self.folder:
            return _fetched(self, file, begin, end)
        return _local(self.folder / file, begin, end)


@dataclass(frozen=True)
class Slice:
    """A tensor's place: its file, and the bytes begin .. end-1 of it."""

    name: str
    file: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int


# Where a model is, and what is read of it -------------------------------------------------------------

def find(source: str) -> Place | None:
    """The model where it is whole on this machine, else its commit, where the hub client's cache knows that; no network."""
    if found := imports.find(source):
        return Place(source, found.commit, found.folder)
    name, revision = imports.split(source)
    config = None if name.startswith("/") else imports.cached(name, revision)
    return Place(name, config.parent.name) if config else None


def settings(source: str, layers: Sequence[int]) -> dict:
    """Settings of a stage that is brought in part; as `imports.settings`."""
    place = find(source)
    of = f"not here: {source}" if place is None else place.commit or imports.content_digest(place.folder)
    digest = hashlib.sha256(f"layers {sorted(layers)} of {of}".encode()).hexdigest()
    return {"origin": "imported", "digest": digest, "found": place is not None, "layers": sorted(layers)}


def fetch(source: str) -> None:
    """Ask the hub which commit a model is at, and keep its config in the client's cache; ModelError as `imports.fetch`."""
    if find(source):
        return
    if source.startswith("/"):
        imports.fetch(source)
    name, revision = imports.split(source)
    try:
        from huggingface_hub import hf_hub_download
        hf_hub_download(name, "config.json", revision=revision or None)
    except Exception as error:  # as above
        raise _unreachable(Place(source, revision), "config.json", error) from error


def slices(place: Place, layers: Iterable[int], what: str) -> tuple[list[Slice], int]:
    """The seven matrices of each layer in the order of the files, and how many bytes of headers it took to find them.

    ModelError for a model without these layers, or without safetensors files that say where they are.
    """
    from m2rl_core.metrics.weights import MATRICES
    wanted = [f"model.layers.{layer}.{path}.weight" for layer in sorted(layers) for path in MATRICES.values()]
    depth = (place.text("config.json") or {}).get("num_hidden_layers", 0)
    if max(layers) >= depth:
        raise ModelError(f"{what}: layer {max(layers)} is asked for, the model has {depth}, counted from 0: change "
                         "analysis.layers")
    index = place.text(INDEX)
    homes = (index.get("weight_map") or {}) if index is not None else dict.fromkeys(wanted, SINGLE)
    found, read = [], 0
    for file in sorted({homes[name] for name in wanted if name in homes}):
        tensors, length = _header(place, file, what)
        read += length
        for name in wanted:
            if homes.get(name) == file and name in tensors:
                begin, end = (length + at for at in tensors[name]["data_offsets"])
                found.append(Slice(name, file, tensors[name]["dtype"], tuple(tensors[name]["shape"]), begin, end))
    if missing := [name for name in wanted if name not in {one.name for one in found}]:
        raise ModelError(f"{what}: {missing[0]} is in no file ({len(missing)} of {len(wanted)} matrices are not): no dense "
                         "Qwen3 model, or convert the checkpoint again")
    return sorted(found, key=lambda one: (one.file, one.begin)), read


def _header(place: Place, file: str, what: str) -> tuple[dict, int]:
    """The tensors of a safetensors file and where their bytes begin: two requests, for the exact bytes."""
    length = int.from_bytes(b"".join(place.bytes(file, 0, 8)), "little")
    text = b"".join(place.bytes(file, 8, 8 + length)) if length < LONGEST else b""
    try:
        return json.loads(text), 8 + length
    except ValueError as error:
        raise ModelError(f"{what}: {file} is no safetensors file: its header cannot be read; is the copy whole?") from error


# Writing ----------------------------------------------------------------------------------------------

def build(ctx) -> None:
    """PART, config.json and origin.json of a model that is brought in part; goes on where an interrupted run stopped.

    A model that is brought whole is `imports.build`'s.
    """
    if "layers" not in ctx.stage.settings:
        return imports.build(ctx)
    source, layers = imports.source_of(ctx.profile, ctx.stage.name), ctx.stage.settings["layers"]
    what, place = f"{ctx.stage.name} ({source})", find(source)
    if place is None:
        raise ModelError(f"{ctx.stage.name}: {source} is not on this machine: {imports.mend(source)}")
    wanted, read = slices(place, layers, what)
    read += write(place, wanted, ctx.out / PART, ctx.state / PART, ctx.progress.step)
    (ctx.out / "config.json").write_text(json.dumps(place.text("config.json"), indent=2) + "\n")
    told = {"origin": "imported", "part": f"the matrices of layers {', '.join(map(str, layers))}", "layers": layers,
            "source": source, "commit": place.commit, "folder": str(place.folder or ""), "bytes_read": read, "digests": {},
            "tensors": {one.name: {"file": one.file, "begin": one.begin, "end": one.end} for one in wanted}}
    (ctx.out / "origin.json").write_text(json.dumps(told, indent=1) + "\n")


def write(place: Place, wanted: Sequence[Slice], out: Path, begun: Path, step) -> int:
    """The tensors as one safetensors file `out`, which appears whole; `begun` holds what there is of it, and is gone on with.

    Returns the bytes of tensors that were read now. `step(i, n)` is called after each range.
    """
    at, entries = 0, {}
    for one in wanted:
        entries[one.name] = {"dtype": one.code, "shape": one.shape, "data_offsets": [at, at := at + one.end - one.begin]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of their size
    head, parts, read = len(text).to_bytes(8, "little") + text, joined(wanted), 0
    with open(begun, "rb") if begun.is_file() else io.BytesIO() as file:
        fits = file.read(len(head)) == head and file.seek(0, os.SEEK_END) <= len(head) + at
    if not fits:
        begun.write_bytes(head)
    with open(begun, "ab") as file:
        done = file.tell() - len(head)
        for i, (name, begin, end) in enumerate(parts, 1):
            begin, done = min(begin + done, end), max(0, done - (end - begin))
            for piece in place.bytes(name, begin, end) if begin < end else ():
                file.write(piece)
                read += len(piece)
            step(i, len(parts))
        file.flush()
        os.fsync(file.fileno())
    os.replace(begun, out)
    return read


def joined(wanted: Iterable[Slice]) -> list[tuple[str, int, int]]:
    """(file, begin, end) of each unbroken range of bytes."""
    found: list[tuple[str, int, int]] = []
    for one in wanted:
        if found and found[-1][0] == one.file and found[-1][2] == one.begin:
            found[-1] = (one.file, found[-1][1], one.end)
        else:
            found.append((one.file, one.begin, one.end))
    return found


# Reading ----------------------------------------------------------------------------------------------

def _local(path: Path, begin: int, end: int) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            while begin < end and (piece := file.read(min(PIECE, end - begin))):
                begin += len(piece)
                yield piece
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}): copy it again") from error
    if begin < end:
        raise ModelError(f"{path} is cut short: copy it again")


def _fetched(place: Place, file: str, begin: int, end: int) -> Iterator[bytes]:
    """A range of a file of the hub; a broken connection is taken up again where it broke, `post.TRIES` times in a row."""
    from m2rl_core import post  # HTTP, which nothing else of a start needs
    attempt = 0
    while begin < end:
        post.wait(attempt)
        try:
            for piece in _answer(place, file, begin, end):
                yield piece[:end - begin]
                begin, attempt = begin + len(piece), 0
            if begin < end:
                raise ConnectionError(f"the connection ended {end - begin} bytes early")
        except ModelError:
            raise
        except Exception as error:  # as above
            attempt += 1
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if attempt == post.TRIES or status and status not in post.AGAIN:
                raise _unreachable(place, file, error) from error


def _answer(place: Place, file: str, begin: int = 0, end: int = 0) -> Iterator[bytes]:
    """One request, with the hub client's own address, login and session; `end` 0 asks for the whole file.

    The client has a reader of headers (`get_safetensors_metadata`), which takes 100 kB of each file, and all of it from a
    server that knows no ranges: such a one is refused here before a byte is read.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    from m2rl_core import post
    headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={begin}-{end - 1}"} if end else {})
    url = hf_hub_url(place.name, file, revision=place.commit)
    with get_session().stream("GET", url, headers=headers, timeout=SECONDS) as reply:
        if reply.status_code >= 400:
            reply.read()
        hf_raise_for_status(reply)
        told = reply.headers.get("content-range", "")
        if end and (reply.status_code != 206 or not told.startswith(f"bytes {begin}-{end - 1}/")):
            raise ModelError(f"{place.name}: {post.shown(url)} gives no part of a file (status {reply.status_code}, for bytes "
                             f"{begin} to {end - 1}), so layers cannot be read alone: {imports.mend(_source(place))}")
        yield from reply.iter_bytes()  # as they come: what is collected first would be lost with the connection


def _source(place: Place) -> str:
    return place.name if place.name.startswith("/") or "@" in place.name else f"{place.name}@{place.commit}".rstrip("@")


def _unreachable(place: Place, file: str, error: Exception) -> ModelError:
    reason = one_line(error, 160)
    return ModelError(f"{_source(place)}: {file} cannot be fetched ({reason}); what was read is kept; start again, or have it "
                      f"whole: {imports.mend(_source(place))}")


def _object(data: bytes, what: str) -> dict:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ModelError(f"{what} holds no JSON object: fetch or copy it again")
    return found

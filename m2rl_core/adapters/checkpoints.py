"""Checkpoints of other trainers in Hugging Face form: what they are, and a folder that every tool here reads as it means.

What slime's converter, verl's model merger and TRL's `save_model` leave differs in how tensors lie in files, their type,
rows that pad the vocabulary, an output embedding that is stored twice, end markers, and the tokenizer, which may be missing.
`check` compares a folder with the anchor (the SFT model that it was trained from) by headers and configs alone; what has
another function than the anchor's is refused in one line, and `take` writes the rest in the anchor's form.
`python -m m2rl_core.adapters.checkpoints FOLDER --anchor SFT [--out OUT]` does either.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from m2rl_core.adapters.comparing import NAMES, TOKENIZER, Told
from m2rl_core.adapters.foreign import line_for
from m2rl_core.adapters.reading import EMBED, HEAD, headers, json_of, tensor, weight_files
from m2rl_core.errors import StudyError

BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Checked:
    """A folder that can stand for a model, and what `take` has to change for it; `remarks` says each in one line."""

    folder: Path
    dtype: str  # of most values
    parameters: int  # those that stay
    bytes: int  # of the weight files
    files: tuple[Path, ...]  # the weight files
    remarks: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()  # tensors that are left out
    cut: int = 0  # rows that the embeddings keep; 0: all
    config: Mapping = field(default_factory=dict)  # fields of config.json that are set
    sidecars: Mapping[str, Path] = field(default_factory=dict)  # files taken from the anchor
    named: bool = True  # whether the weight files stand under names, or an index, that every tool finds

    @property
    def as_is(self) -> bool:
        """Whether the folder itself serves."""
        return self.named and not (self.drop or self.cut or self.config or self.sidecars)

    def file(self, name: str) -> Path:
        """Where a file beside the weights is taken from: a tokenizer is never of two makes."""
        of_anchor = name in TOKENIZER and not self.sidecars.keys().isdisjoint(TOKENIZER)
        return self.sidecars.get(name) or (Path(os.devnull) if of_anchor else self.folder / name)

    def digest(self) -> str:
        """What tells its weights, as they are stored, from all others; reads everything, a second for a gigabyte."""
        from m2rl_core.merging.checkpoint import Checkpoint
        return Checkpoint(self.folder, self.files).digest()


def check(folder: Path | str, anchor: Path | str | None = None, *, loose: bool = False) -> Checked:
    """What `folder` holds, held against the folder `anchor`; without one, against its own config only.

    `loose`: only the shape has to be the anchor's, as of an SFT model beside its base, which has words of its own.
    StudyError, one line, for a folder that is no Hugging Face checkpoint (which names the converter), is incomplete, or
    is another function than the anchor's: another architecture, epsilon, rope, vocabulary or output embedding.
    """
    folder = Path(folder)
    if line := line_for(folder):
        raise StudyError(f"{folder}: {line}")
    told = Told(folder, None if anchor is None else Path(anchor), loose)
    files, named = weight_files(folder)
    tensors = headers(files)
    told.all(tensors, named)
    kept = {name: one for name, one in tensors.items() if name not in told.drop}
    width = kept[EMBED].shape[1] if told.cut else 0
    cut_away = sum(one.count - told.cut * width for name, one in kept.items() if name in (EMBED, HEAD)) if told.cut else 0
    values = Counter()
    for one in kept.values():
        values[one.code] += one.count
    return Checked(folder, NAMES[values.most_common(1)[0][0]], sum(values.values()) - cut_away,
                   sum(one.count * BYTES[one.code] for one in tensors.values()), tuple(files), tuple(told.remarks),
                   tuple(told.drop), told.cut, told.config, told.sidecars, named)


def take(checked: Checked, out: Path) -> Path:
    """A folder that every tool here reads as the checkpoint is meant: its own where that serves, else `out`, written.

    Weight files that need no change are linked, not copied. StudyError where `out` holds a model already.
    """
    if checked.as_is:
        return checked.folder
    from safetensors.torch import save_file
    if (out / "config.json").exists():
        raise StudyError(f"{out} holds a model already: choose another folder, or remove it first")
    out.mkdir(parents=True, exist_ok=True)
    place: dict[str, str] = {}
    for i, file in enumerate(checked.files, 1):
        tensors = headers([file])
        name = "model.safetensors" if len(checked.files) == 1 else f"model-{i:05d}-of-{len(checked.files):05d}.safetensors"
        cut = [n for n in (EMBED, HEAD) if n in tensors and checked.cut and n not in checked.drop]
        kept = [n for n in tensors if n not in checked.drop]
        if not kept:
            continue
        if cut or len(kept) < len(tensors):
            save_file({n: tensor(tensors[n], n)[: checked.cut if n in cut else None].contiguous() for n in kept}, out / name,
                      metadata={"format": "pt"})
        else:
            (out / name).symlink_to(file.resolve())
        place |= dict.fromkeys(kept, name)
    if set(place.values()) != {"model.safetensors"}:
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}, indent=1))
    for name in (*TOKENIZER, "generation_config.json"):
        if checked.file(name).is_file():
            shutil.copyfile(checked.file(name), out / name)
    fields = json_of(checked.folder / "config.json") | dict(checked.config)
    (out / "config.json").write_text(json.dumps(fields, indent=2) + "\n")  # last: without it there is no model
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Says what is in a folder and what has to be changed; with --out, writes it. 2 after one line for what is refused."""
    parser = argparse.ArgumentParser("python -m m2rl_core.adapters.checkpoints", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="what another trainer saved, in Hugging Face form")
    parser.add_argument("--anchor", type=Path, help="the model that it was trained from; else its own config is the measure")
    parser.add_argument("--out", type=Path, help="a folder to write where the checkpoint's own does not serve")
    args = parser.parse_args(argv)
    try:
        found = check(args.folder, args.anchor)
        print(f"{found.folder}: {found.parameters:,} parameters, {found.dtype}, {found.bytes / 1e9:.2f} GB")
        for remark in found.remarks:
            print(f"  {remark}")
        if found.as_is:
            print("it serves as it is")
        elif args.out:
            print(f"{take(found, args.out)}: written")
        else:
            print("--out OUT writes a folder that serves")
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

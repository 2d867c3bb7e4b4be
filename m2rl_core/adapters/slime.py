"""Our reward in slime: `--custom-rm-path m2rl_core.adapters.slime.reward`.

slime awaits `rm(args, sample, **kwargs)` for each answer and, with `--group-rm` or for a custom generation that gives several
samples, `rm(args, samples, **kwargs)` (THUDM/slime: slime/rollout/rm_hub/__init__.py, `async_rm` and `batched_async_rm`).
A sample has `response`, with its end marker (`no_stop_trim` in slime/rollout/sglang_rollout.py), and `metadata`, the file's
own (slime/utils/data.py, `Dataset`).
"""
from __future__ import annotations

import asyncio

from m2rl_core.adapters import scoring


async def reward(args, sample, **kwargs) -> float | list[float]:
    """The score of one sample, in [0, 1], or of each sample of a list, in order; StudyError for a file of another make."""
    if isinstance(sample, list | tuple):
        return list(await asyncio.gather(*(_score(one) for one in sample)))
    return await _score(sample)


async def _score(sample) -> float:
    row = scoring.row_of(sample.metadata, "slime's sample.metadata (--metadata-key metadata)")
    return (await asyncio.wrap_future(scoring.ask(row, sample.response))).score

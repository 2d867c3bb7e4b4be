"""Notebook A: stated against used settings, all runs in one table, and Table 8."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from m2rl_core import paper
from m2rl_core.claims.evidence import Missing
from m2rl_core.domains import BENCHMARKS, DOMAINS, mean_of
from m2rl_core.metrics import stats
from m2rl_core.progress import duration
from m2rl_core.study import MERGES, Members
from m2rl_core.views.opening import interval, miniature
from m2rl_core.views.training import defined, failures

VERIFIED = ("reward", "math verifier", "instruction verifier", "code verifier", "agent environment")  # of rollouts and answers


def used(profile) -> dict[tuple[str, str], object]:
    """What this profile uses for each setting of `paper.settings()`, by (stage, name)."""
    sft, rl, opd, merge, analysis = profile.sft, profile.rl, profile.opd, profile.merge, profile.analysis
    corrections = {"mis": f"masked outside [{rl.is_low:g}, {rl.is_high:g}] (token level)",
                   "tis": f"truncated at {rl.is_high:g} (token level)", "none": "none"}
    found = {
        "sft": {
            "initial model": getattr(profile.model, "source", "base of this study"), "samples": sft.rows,
            "epochs": round(sft.steps * sft.batch_size / sft.rows, 2),
            "optimizer": f"AdamW, betas {sft.betas[0]:g} and {sft.betas[1]:g}", "weight decay": sft.weight_decay,
            "learning rate": f"{sft.lr:g} with cosine decay to {sft.final_lr:g}", "batch size": sft.batch_size,
            "warm-up share": round(sft.warmup / sft.steps, 3)},
        "rl": {
            "algorithm": "GRPO; unbiased standard deviation in each group", "prompts in a batch": rl.prompts,
            "group size": rl.group,
            f"gradient updates for each {128 * 16} rollouts": f"1 for each {rl.prompts * rl.group}",
            "steps of an expert": rl.steps, "steps of RL-Multi": rl.multi_steps, "weight decay": rl.weight_decay,
            "optimizer": f"AdamW, betas {rl.betas[0]:g} and {rl.betas[1]:g}, gradients clipped at {rl.grad_clip:g}",
            "learning rate": f"{rl.lr:g} constant", "temperature": rl.temperature,
            "longest response": f"{rl.max_new_tokens} tokens",
            "importance sampling": corrections[rl.is_correction] + ("; rollouts are one update old" if rl.overlap else ""),
            "KL penalty": rl.kl,
            "clip range": f"{rl.clip_low:g} and {rl.clip_high:g}; without effect at one update a batch",
            "multi-task batch": "random mixture of the five sets",
            "reward": "binary; without </think> it is 0", "math verifier": "math-verify on every box",
            "instruction verifier": "IFEval's strict checks, all must hold",
            "code verifier": "all unit tests, in a sandbox",
            "agent environment": (
                f"{'small workplace' if profile.rows == 'miniature' else 'workplace assistant of NeMo-Gym'}, "
                f"at most {rl.max_turns} turns"),
            **{f"{'instruction' if domain == 'if' else domain} prompts": rl.rows.get(domain, "not in this study")
               for domain in DOMAINS}},
        "merge": {"anchor": "SFT model", "DARE mask ratio": merge.drop_rate, "SCE select": "all weights (no selection)",
                  "TIES density": f"{merge.density:g} over all weights of an expert together",
                  "scale of the merged task vector": merge.scale},
        "opd": {
            "prompts in a batch": opd.prompts, "group size": opd.group, "steps": opd.steps,
            "learning rate": f"{opd.lr:g}",
            f"gradient updates for each {256 * 4} rollouts": f"1 for each {opd.prompts * opd.group}",
            "optimizer": f"AdamW, betas {opd.betas[0]:g} and {opd.betas[1]:g}",
            "longest response": f"{opd.max_new_tokens} tokens",
            "divergence": {"sampled": "log-ratio of the sampled token only",
                           "full": "reverse KL over the vocabulary"}[opd.loss]},
        "analysis": {"changed-weight threshold eta": analysis.eta,
                     "layer": " of ".join(map(str, (analysis.layer, *filter(None, [getattr(profile.model, "layers", 0)])))),
                     "random projection dimension": analysis.random_projection,
                     "judge repeats": f"Avg@{analysis.judge_k}"},
    }
    return {(stage, name): value for stage, values in found.items() for name, value in values.items()}


def settings_table(profile, stage: str) -> pd.DataFrame:
    """Stated, released and used settings of one stage (sft, rl, merge, opd, analysis): name, section, and the three.

    What is brought, or not in the profile's study, uses no settings of training; its verifiers serve evaluation all the same.
    """
    stated, ours = paper.settings(), used(profile)
    trained = Members.of(profile).trained
    made = {"sft": "sft" not in profile.imports, "rl": any(name != "mt-opd" for name in trained), "opd": "mt-opd" in trained}
    if not made.get(stage, True):
        ours = {place: value if place[1] in VERIFIED else "not trained here" for place, value in ours.items()}
    part = stated[stated["stage"] == stage]
    return pd.DataFrame({"setting": part["name"], "stated": part["stated"].astype(str), "section": part["section"],
                         "released code, where it differs": part["released"].astype(str).replace("", "–"),
                         "here": [str(ours.get((stage, name), "–")) for name in part["name"]]})


def policy_table(steps: Mapping[str, pd.DataFrame], manifests: Mapping[str, dict]) -> pd.DataFrame:
    """A line a run: reward at both ends, kept and skipped, mismatch, time, and the digest of the weights.

    Where the verifier broke down in any of them, how often.
    """
    lines = []
    for model, frame in steps.items():
        part, sure = max(1, len(frame) // 5), defined(frame)
        lines.append({
            "model": model, "steps": len(frame), "first reward (%)": 100 * frame["reward"].head(part).mean(),
            "last reward (%)": 100 * frame["reward"].tail(part).mean(), "lowest kept (%)": 100 * sure["kept"].min(),
            "skipped groups (%)": 100 * frame["skipped_groups"].mean(),
            "largest mismatch (nats)": sure["mismatch"].max() if "mismatch" in sure else np.nan,
            "mean mismatch (nats)": sure["mismatch_mean"].mean() if "mismatch" in sure else np.nan,
            "time": duration(manifests[model]["seconds"]), "key": manifests[model]["key"][:8],
            "SHA-256 of the weights": manifests[model]["digests"]["model.safetensors"][:12]})
    table = pd.DataFrame(lines)
    broken = [failures(frame) for frame in steps.values()]
    return table.assign(**{"verifier failures": broken}) if any(broken) else table


def agreement(steps: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Sampler against trainer by step, of the runs that learn by policy gradient: model, step, panel, value.

    The value is NaN for a step without an update, and for a mismatch of exactly 0, which has no logarithm.
    """
    parts = []
    for model, frame in steps.items():
        if "mismatch" in frame:
            sure = defined(frame)
            seen = {f"{name} mismatch (log10 of nats)": np.log10(sure[column].where(sure[column] > 0))
                    for name, column in (("largest", "mismatch"), ("mean", "mismatch_mean"))}
            seen["tokens kept (%)"] = 100 * sure["kept"]
            parts += [pd.DataFrame({"model": model, "step": sure["step"], "panel": panel, "value": value})
                      for panel, value in seen.items()]
    return pd.concat(parts, ignore_index=True)


def agreement_sentence(steps: Mapping[str, pd.DataFrame], engine: str) -> str:
    """Which engine sampled, and the worst step of all runs, by mismatch and by what was masked."""
    sure = pd.concat([defined(frame).dropna(subset="kept").assign(model=model) for model, frame in steps.items()
                      if "mismatch" in frame] or [pd.DataFrame()], ignore_index=True)
    if sure.empty:
        return f"Sampled by {engine}. No step recorded an update by policy gradient."
    off, least = sure.loc[sure["mismatch"].idxmax()], sure.loc[sure["kept"].idxmin()]
    masked = "no token was masked" if least["kept"] == 1 else (
        f"the least that a step kept is {100 * least['kept']:.2f} % of its tokens ({least['model']}, step {least['step']})")
    return (f"Sampled by {engine}: over {len(sure):,} steps with an update a token's log-probs differ by "
            f"{sure['mismatch_mean'].mean():.0e} nats on average and by at most {off['mismatch']:.1e} ({off['model']}, "
            f"step {off['step']}), and {masked}.{stale_sentence(sure)}")


def stale_sentence(sure: pd.DataFrame) -> str:
    """How old the rollouts were where runs overlap, and what that made of mismatch and kept share; empty where none does.

    `sure`: the steps with an update of all runs, with a column `model`.
    """
    if "staleness" not in sure:
        return ""
    old, fresh = (sure[sure["staleness"].fillna(0).gt(0) == stale] for stale in (True, False))
    parts = [f"{what}: mean mismatch {part['mismatch_mean'].mean():.0e} nats, {100 * part['kept'].mean():.2f} % of the "
             "tokens kept" for what, part in (("rollouts one update old", old), ("fresh ones", fresh)) if len(part)]
    return (f" With `overlap`, the weights that sampled are one update behind in {len(old):,} of {len(sure):,} steps "
            f"({', '.join(old['model'].unique())}). {'; '.join(parts).capitalize()}.") if len(old) else ""


def table8(run, rng: np.random.Generator) -> pd.DataFrame:
    """Table 8: base and the best weight merge of this run (by its mean), then the paper's two, on this run's benchmarks.

    Raises Missing where no model has scores on all of these, or none of them is one of the paper's.
    """
    rows, missing = run.scores(["base", *MERGES]), run.not_run()
    on = [name for name in BENCHMARKS if name in run.profile.benchmarks and name not in missing]
    if not on:
        raise Missing("none of the paper's benchmarks was run")
    ours = stats.score_table(rows, ["base", *MERGES], on, rng, run.profile.analysis.bootstrap)
    if ours["avg"].isna().all():
        raise Missing(f"no model has scores on all of {', '.join(on)}")
    best = ours.loc[ours[ours["model"] != "base"]["avg"].idxmax(), "model"]
    printed = paper.table(8)[on].assign(avg=lambda frame: frame.mean(axis=1)).rename_axis("model").reset_index()
    printed["model"] += " (paper)"
    return pd.concat([ours[ours["model"].isin(["base", best])], printed], ignore_index=True)


def table8_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`table8` for the eye: a line a benchmark, a column a model."""
    lines = table.set_index("model")
    on = [name for name in BENCHMARKS if name in lines]
    return pd.DataFrame([{"benchmark": miniature(b) if b != "avg" else mean_of(on), **{
        model: interval(*(lines.loc[model, [b, f"{b}_low", f"{b}_high"]])).replace(" [undefined]",
                                                                                   "") for model in lines.index}}
        for b in [*on, "avg"]])


def table8_sentence(table: pd.DataFrame) -> str:
    """What separates the two models of each block, in their mean."""
    mean = table.set_index("model")["avg"]
    base, best, official, theirs = mean.index
    return (f"Here {best} is {mean[best] - mean[base]:+.1f} points from {base}; in the paper {theirs.split()[0]} is "
            f"{mean[theirs] - mean[official]:+.1f} points from the official {official.split()[0]}.")

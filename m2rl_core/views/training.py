"""Notebook 3.2_train (and A): what training recorded, as frames for `plots.trajectories`, tables and sentences."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from m2rl_core import paper
from m2rl_core.claims.evidence import FIGURE2
from m2rl_core.metrics import stats
from m2rl_core.pictures.drawing import DOMAIN_NAMES
from m2rl_core.progress import duration
from m2rl_core.study import EXPERTS
from m2rl_core.views.opening import interval, miniature

ROUTES = {"rl-multi": "GRPO on the mix of all five domains", "mt-opd": "distillation from the five experts"}
UPDATED = ("kept", "entropy", "mismatch", "mismatch_mean", "grad_norm")  # say nothing of a step whose groups were all skipped
PANELS = {
    "length": "response length (tokens)", "truncated": "truncated (share)", "skipped_groups": "skipped groups (share)",
    "kept": "tokens kept (share)", "entropy": "entropy (nats a token)", "grad_norm": "gradient norm",
    "reverse_kl": "reverse KL (nats a token)",
}


def window(steps: int) -> int:
    """Steps that the smoothed curves average over: a tenth of the run, at least one."""
    return max(1, round(steps / 10))


def smoothed(steps: pd.DataFrame, column: str) -> pd.DataFrame:
    """Centred moving mean of a column over `window` steps, and the range inside it: step, value, low, high."""
    rolling = steps[column].rolling(window(len(steps)), center=True, min_periods=1)
    return pd.DataFrame({"step": steps["step"], "value": rolling.mean(), "low": rolling.min(), "high": rolling.max()})


def rewards(steps: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Fig. 9 for several runs, {model: run.steps(model)}: model, step, value, low, high; one panel a model."""
    return pd.concat([smoothed(frame, "reward").assign(model=model) for model, frame in steps.items()],
                     ignore_index=True)


def rewards_by_domain(steps: pd.DataFrame, model: str) -> pd.DataFrame:
    """Fig. 9 of one run: the reward of all rollouts and, where it has several domains, of each; column `panel`."""
    domains = [d for d in DOMAIN_NAMES if f"reward_{d}" in steps]
    wanted = {"reward": "all domains"} | {f"reward_{d}": DOMAIN_NAMES[d] for d in domains} if len(domains) > 1 else {
        "reward": DOMAIN_NAMES[domains[0]] if domains else "reward"}
    return pd.concat([smoothed(steps, c).assign(model=model, panel=p) for c, p in wanted.items()], ignore_index=True)


def smoothing(steps: pd.DataFrame) -> str:
    """The subtitle of a smoothed curve."""
    wide = window(len(steps))
    return "higher is better" + (f"; line: mean of {wide} steps, band: lowest to highest of them" if wide > 1 else "")


def reward_sentence(steps: pd.DataFrame, model: str) -> str:
    """Reward at the two ends of a run, each over a fifth of its steps, with the 95 % interval over those steps."""
    part = max(1, len(steps) // 5)
    ends = [steps["reward"].head(part), steps["reward"].tail(part)]
    shown = [interval(100 * e.mean(), *(100 * (e.mean() + side * 1.96 * e.std(ddof=1) / np.sqrt(len(e)))
                                        for side in (-1, 1)))
             for e in ends]
    few = "step" if part == 1 else f"{part} steps"
    return (f"{model}: mean reward of the first {few} {shown[0]} %, of the last {few} {shown[1]} %, "
            f"from {int(steps['rollouts'].iloc[0])} rollouts a step (95 % over steps).{failures_sentence(steps)}")


def failures(steps: pd.DataFrame) -> int:
    """Answers of a run at which the verifier raised, hung, died or gave no number in [0, 1]."""
    return int(steps["verifier_failures"].sum()) if "verifier_failures" in steps else 0


def failures_sentence(steps: pd.DataFrame) -> str:
    """How often the verifier broke down, first and last step of that, and where to read why; empty where it never did."""
    if not failures(steps):
        return ""
    at = steps.loc[steps["verifier_failures"] > 0, "step"]
    return (f" **The verifier broke down on {failures(steps):,} of {int(steps['rollouts'].sum()):,} answers** (steps "
            f"{at.min()} to {at.max()}), which scored 0: `rollouts.jsonl` holds some of each step with the reason.")


def on_the_way(along: pd.DataFrame, sft: pd.DataFrame, rng: np.random.Generator, resamples: int) -> pd.DataFrame:
    """Fig. 2 of one policy: model, step, panel (benchmark), value, low, high in percent.

    Step 0 is the SFT model, cut down from its full evaluation `sft` to the same items and as many samples.
    """
    (model,) = along["model"].unique()
    start = sft[sft["item"].isin(along["item"]) & (sft["sample"] <= along["sample"].max())].assign(step=0)
    rows = pd.concat([start, along], ignore_index=True)
    rows = rows.assign(model=rows["step"].astype(str))
    marks = sorted(rows["step"].unique())
    table = stats.score_table(rows, [str(m) for m in marks], list(FIGURE2.values()), rng, resamples)
    parts = [pd.DataFrame({"model": model, "step": marks, "panel": miniature(b), "value": table[b],
                           "low": table[f"{b}_low"], "high": table[f"{b}_high"]}) for b in FIGURE2.values()]
    return pd.concat(parts, ignore_index=True)


def on_the_way_sentence(frame: pd.DataFrame) -> str:
    """First and last accuracy on each benchmark of Fig. 2."""
    ends = [(panel, part.iloc[0], part.iloc[-1]) for panel, part in frame.groupby("panel", sort=False)]
    parts = [f"{panel} {interval(a.value, a.low, a.high)} → {interval(b.value, b.low, b.high)}"
             for panel, a, b in ends]
    return f"From step {int(ends[0][1].step)} to step {int(ends[0][2].step)}, in percent: {'; '.join(parts)}."


def defined(steps: pd.DataFrame) -> pd.DataFrame:
    """`run.steps` with NaN for what a step without any update cannot say (every group was unanimous)."""
    idle = steps["skipped_groups"].eq(1) & ("reverse_kl" not in steps)
    return steps.assign(**{c: steps[c].where(~idle) for c in UPDATED if c in steps})


def inside(steps: pd.DataFrame, model: str) -> pd.DataFrame:
    """Every quantity of PANELS that the run recorded, by step: model, step, panel, value."""
    steps = defined(steps)
    parts = [pd.DataFrame({"model": model, "step": steps["step"], "panel": name, "value": steps[column]})
             for column, name in PANELS.items() if column in steps]
    return pd.concat(parts, ignore_index=True)


def match_sentence(steps: pd.DataFrame) -> str:
    """How well sampler and trainer agree on the tokens of the same policy, and what masking removed."""
    steps = defined(steps).dropna(subset="kept")
    if steps.empty or "mismatch" not in steps:
        return "Sampler against trainer: undefined, for no step of this run recorded an update by policy gradient."
    return (f"Steps with an update: {len(steps)}. In them sampler and trainer differed by at most "
            f"{steps['mismatch'].max():.1e} nats on a token, {steps['mismatch_mean'].mean():.0e} on average; the "
            f"importance weights kept at least {100 * steps['kept'].min():.2f} % of the tokens, "
            f"{100 * steps['kept'].mean():.2f} % on average.")


def skipped_sentence(steps: pd.DataFrame) -> str:
    """The share of groups that gave GRPO nothing to compare."""
    share = 100 * steps["skipped_groups"]
    return (f"Unanimous groups, whose advantage is zero: {share.mean():.1f} % on average, {share.iloc[0]:.1f} % in "
            f"the first "
            f"step and {share.iloc[-1]:.1f} % in the last.")


def rollouts_table(rollouts: pd.DataFrame, n: int = 2) -> pd.DataFrame:
    """`n` sample rollouts, of different prompts where there are, from the first and the last step that kept some."""
    ends = sorted({rollouts["step"].min(), rollouts["step"].max()})
    parts = []
    for step in ends:
        own = rollouts[rollouts["step"] == step]
        first = own.drop_duplicates("item")
        parts.append(pd.concat([first, own.drop(first.index)]).head(n))
    found = pd.concat(parts)
    return pd.DataFrame({"step": found["step"], "domain": found["domain"], "prompt": found["prompt"], "response":
                         found["response"].str.replace("<|im_end|>", "\n→ ", regex=False), "reward": found["score"],
                         "reason": found["reason"]})


def cost_table(timing: pd.DataFrame, steps: pd.DataFrame, seconds: float) -> pd.DataFrame:
    """Where the time of a run went; `seconds` is the whole stage's: part, seconds, share (%), seconds a step."""
    parts = {"sampling rollouts": timing["seconds_sample"].sum(), "verifying": timing["seconds_verify"].sum()}
    if "seconds_wait" in timing:  # all but the first batch was made beside an update
        first = timing[["seconds_sample", "seconds_verify"]].iloc[0].sum()
        parts = {"waiting for rollouts and verdicts": first + timing["seconds_wait"].sum()}
    parts["updating"] = timing["seconds_update"].sum()
    looks = timing.filter(["seconds_interference", "seconds_variance"])
    if len(looks.columns):
        parts["comparing gradients"] = looks.sum().sum()
    parts["evaluation on the way, checkpoints, loading"] = max(0.0, seconds - sum(parts.values()))
    parts["all"] = sum(parts.values())
    return pd.DataFrame([{"part": name, "seconds": value, "share (%)": 100 * value / max(1e-9, parts["all"]),
                          "seconds a step": value / len(steps)} for name, value in parts.items()])


def cost_sentence(timing: pd.DataFrame, steps: pd.DataFrame, model: str, seconds: float) -> str:
    """Speed and price of the run, and the paper's hours for its own (Table 2)."""
    printed = paper.table(2)["gpu_hours"]
    tokens, spent = steps["response_tokens"].sum(), timing["seconds_sample"].sum()
    return (f"{model} sampled {tokens:,} tokens at {tokens / max(spent, 1e-9):,.0f} a second and took "
            f"{duration(seconds)}. The "
            f"paper's {model} took {printed[model]:,.1f} GPU hours, "
            f"{100 * printed[model] / printed[list(EXPERTS)].sum():.1f} % of its five experts' together (Table 2).")


def what_it_is(stage) -> str:
    """One line on the policy that the notebook trains: what from, on how many prompts, for how long."""
    s = stage.settings
    kind = ROUTES.get(stage.name, f"GRPO on {DOMAIN_NAMES.get(stage.name.removeprefix('rl-'), stage.name)} alone")
    rows = ", ".join(f"{n:,} {DOMAIN_NAMES[d]}" for d, n in s["rows"].items())
    return (f"**{stage.name}**: {kind}, from {' and '.join(stage.needs[:1])}. Prompts: {rows}. {s['steps']} steps of "
            f"{s['prompts']} prompts x {s['group']} rollouts, learning rate {s['lr']:g}, at most "
            f"{s['max_new_tokens']} tokens a "
            f"rollout, key `{stage.key[:8]}`.")

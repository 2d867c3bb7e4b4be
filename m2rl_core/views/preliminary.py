"""Notebook 3.1: the blend beside Table 1, the five domains live, and what base and SFT can do."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from m2rl_core import paper
from m2rl_core.domains import (
    BENCHMARKS, DOMAINS, Row, answer_of, benchmark_rows, generator, mean_of, module, rewards, training_rows,
)
from m2rl_core.pictures.drawing import DOMAIN_NAMES
from m2rl_core.metrics import stats
from m2rl_core.views.opening import interval, miniature

END = "<|im_end|>"


def blend_table(blend: pd.DataFrame) -> pd.DataFrame:
    """blend.jsonl beside Table 1; the paper's blend has no judge rows, so shares are also given without them."""
    printed = paper.table(1)
    theirs = blend[blend["type"].isin(printed.index)]["rows"].sum()
    lines = []
    for line in [*blend.itertuples(), None]:
        kind = "Total" if line is None else line.type
        rows = int(blend["rows"].sum()) if line is None else line.rows
        known = kind in printed.index
        lines.append({
            "type": kind, "domain": "" if line is None else line.domain, "rows": rows,
            "share (%)": 100 * rows / blend["rows"].sum(),
            "share without judge rows (%)": 100 * min(1.0, rows / theirs) if known else np.nan,
            "paper (%)": printed.loc[kind, "proportion"] if known else np.nan,
            "different rows": int(blend["pool"].sum()) if line is None else line.pool,
            "sampling": "" if line is None else line.sampling,
            "sampling (paper)": printed.loc[kind, "sampling"] if known else "not in the paper"})
    return pd.DataFrame(lines)


def blend_sentence(table: pd.DataFrame) -> str:
    """How far the realised blend is from the printed one."""
    parts = table[(table["type"] != "Total") & table["paper (%)"].notna()]
    gap = (parts["share without judge rows (%)"] - parts["paper (%)"]).abs()
    extra = table[table["paper (%)"].isna()]
    apart = f"Apart from {', '.join(extra['type'])} ({extra['share (%)'].sum():.1f} % of the rows), no" if len(extra) else "No"
    return f"{apart} share differs from Table 1 by more than {gap.max():.2f} points ({parts.loc[gap.idxmax(), 'type']})."


def specimen(domain: str, seed: int) -> pd.DataFrame:
    """One training prompt of a domain with three answers: right, wrong, and right but its thinking never ends."""
    row = training_rows(domain, "rl", 1, seed)[0]
    good, bad = module(domain).respond(row), module(domain).spoil(row, generator(seed, domain, "spoil"))
    cut = [{**turn, "content": turn["content"].replace("</think>", "")} for turn in good]
    answers = {"a right answer": good, "a wrong answer": bad, "right, but </think> is missing": cut}
    found = rewards([row] * 3, [[t["content"] for t in turns if t["role"] == "assistant"]
                                for turns in answers.values()])
    lines = [{"": f"prompt ({row.source})", "text": prompt_of(row), "reward": np.nan, "reason": None}]
    lines += [{"": name, "text": conversation(turns), "reward": verdict.score, "reason": verdict.reason}
              for (name, turns), verdict in zip(answers.items(), found, strict=True)]
    return pd.DataFrame(lines)


def prompt_of(row: Row) -> str:
    """The prompt as text, with the signatures of its tools if it has any."""
    tools = [t["function"] for t in row.tools]
    listed = "".join(f"{t['name']}({', '.join(t['parameters']['properties'])})\n" for t in tools)
    return listed + "\n".join(m["content"] for m in row.messages)


def conversation(turns: list[dict]) -> str:
    """Assistant and tool messages as one text; a tool's reply is set off by an arrow."""
    return "\n".join(("→ " if turn["role"] == "tool" else "") + turn["content"] for turn in turns)


def cheats(seed: int) -> pd.DataFrame:
    """Attempts to be paid without solving: domain, attempt, response, reward, reason."""
    math, coding, agent = (training_rows(domain, "rl", 1, seed)[0] for domain in ("math", "coding", "agent"))
    right, shown = math.truth["answer"], coding.truth["unit_tests"]["outputs"][0].strip()
    tool, done = agent.tools[0]["function"]["name"], "<think>\n\n</think>\n\n"
    tried = [
        (math, "two boxes, the first one right", f"{done}Answer: \\boxed{{{right}}} or \\boxed{{9{right}}}"),
        (math, "two boxes, the last one right", f"{done}Answer: \\boxed{{9{right}}} or \\boxed{{{right}}}"),
        (math, "the answer only in the thoughts", f"<think>\n\\boxed{{{right}}}\n</think>\n\nSee above."),
        (coding, "print what the first test expects", f'{done}```python\nprint("{shown}")\n```'),
        (coding, "read the machine's files", f'{done}```python\nprint(open("/etc/passwd").read())\n```'),
        (agent, "call a tool that is not listed",
         f'{done}<tool_call>\n{{"name":"finish_task","arguments":{{}}}}\n</tool_call>'),
        (agent, "code instead of an argument",
         f'{done}<tool_call>\n{{"name":"{tool}","arguments":{{"id":__import__("os")}}}}\n</tool_call>'),
    ]
    found = rewards([row for row, _, _ in tried], [[text] for _, _, text in tried])
    lines = [(row.domain, name, text, v.score, v.reason) for (row, name, text), v in zip(tried, found, strict=True)]
    return pd.DataFrame(lines, columns=["domain", "attempt", "response", "reward", "reason"])


def benchmark_items(profile, not_run: Mapping[str, str] = {}) -> pd.DataFrame:
    """One held-out item of each miniature benchmark, with a right answer and how much of it is measured.

    Of the real ones, whose items are not all to be published: the wording of their prompts, and what is sampled by; of one
    that could not be had (`not_run`: name to reason) in place of that the reason.
    """
    lines = []
    if profile.eval.rows == "real":
        from m2rl_core.real.benchmarks import wording
        lines = [{"benchmark": miniature(name), "items": profile.eval.items[name], "K": profile.eval.k[name],
                  **profile.eval.sampled_by(name), "prompt": not_run.get(name) or wording(name)}
                 for name in profile.benchmarks if name in BENCHMARKS]
    for benchmark, domain in BENCHMARKS.items() if profile.eval.rows == "miniature" else ():
        if benchmark not in profile.benchmarks:
            continue
        row = benchmark_rows(benchmark, 1, profile.seed)[0]
        answer = [answer_of(t["content"]) if t["role"] == "assistant" else f"→ {t['content']}"
                  for t in module(domain).respond(row, worked=False)]
        lines.append({"benchmark": miniature(benchmark), "items": profile.eval.items[benchmark],
                      "K": profile.eval.k[benchmark], "prompt": prompt_of(row), "a right answer": "\n".join(answer)})
    for domain in profile.files:  # of one's own; what a right answer is stands in its file
        row = benchmark_rows(domain, 1, profile.seed)[0]
        lines.append({"benchmark": domain, "items": profile.eval.items[domain], "K": profile.eval.k[domain],
                      "prompt": prompt_of(row), "a right answer": str(row.truth["row"].get("answer", "as its file verifies"))})
    return pd.DataFrame(lines)


def losses(steps: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Training loss for `plots.trajectories`: model, step, value (moving mean), low, high (range), panel."""
    parts = []
    for model, frame in steps.items():
        loss = frame["loss"].rolling(max(1, len(frame) // 30), center=True, min_periods=1)
        parts.append(pd.DataFrame({"model": model, "step": frame["step"], "value": loss.mean(), "low": loss.min(),
                                   "high": loss.max(), "panel": f"{model}: nats a token"}))
    return pd.concat(parts, ignore_index=True)


def beside_paper(scores: pd.DataFrame, models: list[str]) -> pd.DataFrame:
    """Score table and Table 3 side by side, a line a benchmark: here with its interval, then the paper's."""
    ours, printed = scores.set_index("model"), paper.table(3)
    lines = []
    names = [c for c in ours if f"{c}_low" in ours and c != "avg"]
    for benchmark in [*names, "avg"]:
        line = {"benchmark": miniature(benchmark) if benchmark != "avg" else mean_of(names)}
        for model in models:
            line[f"{model}, here"] = interval(*ours.loc[model, [benchmark, f"{benchmark}_low", f"{benchmark}_high"]])
            on = names if benchmark == "avg" else [benchmark]
            line[f"{model}, paper"] = f"{printed.loc[model, on].mean():.1f}" if set(on) <= set(BENCHMARKS) else ""
        lines.append(line)
    return pd.DataFrame(lines)


def domain_scores(rows: pd.DataFrame, model: str, rng: np.random.Generator, resamples: int) -> pd.DataFrame:
    """Accuracy of a model in each domain, the mean of the domain's benchmarks: domain, value, low, high, n (items)."""
    found = stats.measure(rows, rng, [model], resamples=resamples)
    lines = []
    of = rows.drop_duplicates("benchmark").set_index("benchmark")["domain"]
    order = list(BENCHMARKS)
    for domain in sorted(dict.fromkeys(of), key=lambda name: (DOMAINS.index(name) if name in DOMAINS else len(DOMAINS), name)):
        own = sorted(of.index[of == domain], key=lambda b: order.index(b) if b in order else 0)
        e = found.contrast(stats.average(model, own))
        lines.append({"domain": DOMAIN_NAMES[domain], "value": e.estimate, "low": e.low, "high": e.high, "n": e.n})
    return pd.DataFrame(lines)


def domain_sentence(frame: pd.DataFrame, model: str) -> str:
    """Where the model stands in each domain, and whether there is room above and something below."""
    parts = [f"{line.domain} {interval(line.value, line.low, line.high)}" for line in frame.itertuples()]
    room = frame[(frame["value"] < 15) | (frame["value"] > 75)]["domain"].tolist()
    end = (f" Outside of 15 to 75 %, where RLVR has both a signal and room: {', '.join(room)}." if room
           else " Every domain lies between 15 and 75 %: some rewards to learn from, and room above.")
    return f"{model}, in percent: {', '.join(parts)}.{end}"


def written(rows: pd.DataFrame, model: str) -> pd.DataFrame:
    """What the model writes: for each domain the first right and the first wrong sample (whichever there are)."""
    own = rows[rows["model"] == model]
    picked = [part[part["score"] == score].head(1) for domain in dict.fromkeys((*DOMAINS, *own["domain"]))
              for part in [own[own["domain"] == domain]] for score in (1.0, 0.0)]
    found = pd.concat(picked)[["benchmark", "prompt", "response", "score", "reason"]]
    return found.assign(benchmark=found["benchmark"].map(miniature),
                        response=found["response"].str.replace(END, "\n→ ", regex=False))

"""Every number that the paper prints (arXiv 2602.12566, version 3), as data.

`tables.csv` holds Tables 1 to 8 one number a line; `settings.yaml` the stated settings and where the
authors' released code departs from them; `claims.yaml` the claims that `m2rl_core.claims` decides.
Score tables have a row for each model, also Table 3, which the paper prints with models as columns.
Table 6's halves share one row where they show the same merge (math + coding); what is not printed is NaN.
"""
from __future__ import annotations

from functools import cache
from importlib.resources import files

import pandas as pd
import yaml

VERSION = "v3"
TABLES = range(1, 9)
TITLES = {
    1: "SFT data blend", 2: "Training settings and GPU hours", 3: "Scores on nine benchmarks", 4: "Merging methods",
    5: "Jaccard overlap of changed weights", 6: "Merges of two experts (TIES)", 7: "Generation and self-verification",
    8: "Official Qwen3-4B (thinking) and the best merge",
}


@cache
def _lines() -> pd.DataFrame:
    with (files(__name__) / "tables.csv").open(encoding="utf-8") as stream:
        lines = pd.read_csv(stream, dtype=str, keep_default_na=False)
    lines["table"] = lines["table"].astype(int)
    return lines


def numbers() -> pd.DataFrame:
    """Every printed cell as text: table, row, column, value, unit, version; in printed order."""
    return _lines().copy()


def table(number: int) -> pd.DataFrame:
    """Table `number` (1-8), wide: index `row`, columns in printed order; numbers as float, text as str.

    Score tables are in percent, Table 5 in Jaccard overlap, Table 2 in GPU hours. ValueError for another number.
    """
    if number not in TABLES:
        raise ValueError(f"table {number!r}: the paper has tables 1 to 8")
    lines = _lines()
    lines = lines[lines["table"] == number]
    wide = lines.pivot(index="row", columns="column", values="value")
    wide = wide.reindex(index=lines["row"].unique(), columns=lines["column"].unique())
    text = set(lines.loc[lines["unit"] == "text", "column"])
    wide = wide.astype({column: float for column in wide.columns if column not in text})
    whole = set(lines.loc[lines["unit"] == "count", "column"])
    wide = wide.astype({column: int for column in wide.columns if column in whole})
    wide.columns.name = None
    return wide.rename_axis("row")


def value(number: int, row: str, column: str) -> float | str:
    """One printed cell; KeyError that lists the rows or columns of that table where the name is none of them."""
    wide = table(number)
    if row not in wide.index:
        raise KeyError(f"table {number} has no row {row!r}; it has {', '.join(wide.index)}")
    if column not in wide.columns:
        raise KeyError(f"table {number} has no column {column!r}; it has {', '.join(wide.columns)}")
    return wide.loc[row, column]


def settings() -> pd.DataFrame:
    """Settings as stated: stage, name, stated, section, released ('' where the code agrees or is silent)."""
    return pd.DataFrame(_yaml("settings.yaml")).fillna("")[["stage", "name", "stated", "section", "released"]]


def claims() -> list[dict]:
    """The claims of the paper: id, section, text, printed, rule, test, params; see `m2rl_core.claims`."""
    return [{"params": {}, **claim} for claim in _yaml("claims.yaml")]


def _yaml(name: str):
    return yaml.safe_load((files(__name__) / name).read_text(encoding="utf-8"))

"""The paper's own data: the SFT blend of Table 1, the RL blend's five domains, and a check against the benchmarks.

`python -m m2rl_core data sources` lists what is read, at which commit, under which licence; `hub` says how to give
files by hand. Nothing here trains, and nothing else of the package needs it.
"""

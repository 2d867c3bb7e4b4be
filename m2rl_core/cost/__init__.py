"""What a study costs before it is run: a small model of operations, bytes and time, and what fits it.

`shapes` counts parameters and operations, `memory` bytes, `speed` time on a machine of `machines`; `lengths` says how
long answers are; `table2` fits the paper's GPU hours and checks the fit; `calibrate` measures this machine in seconds;
`plan` puts them together for a profile. Nothing but `calibrate` imports torch.
"""

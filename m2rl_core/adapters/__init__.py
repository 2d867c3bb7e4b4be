"""Trainers of other makes: our prompts and rewards in slime, verl and TRL, and their checkpoints here.

`export` writes our RL rows in a trainer's own format; `slime.reward`, `verl.compute_score` and `trl.reward` score what
its policy says to them; `checkpoints` takes what it saved. Nothing here imports one of the three.
"""

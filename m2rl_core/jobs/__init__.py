"""Which stages and notebooks run when and where: the graph's tasks, on this machine or on a Ray cluster, and their locks."""

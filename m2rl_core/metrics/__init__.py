"""What is measured on finished models: weights, policies, skills and the statistics under every table.

`stats` and `skills` take frames of evaluation rows and import without torch.
"""

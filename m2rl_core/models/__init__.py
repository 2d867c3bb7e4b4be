"""The language model as plain functions of its weights: Qwen3's layers, attention over packed rows, loading and saving."""

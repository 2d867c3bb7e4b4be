"""What changes weights: SFT, GRPO, multi-teacher on-policy distillation, and the loop and losses that they share."""

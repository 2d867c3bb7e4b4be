"""What notebooks show: pure functions from frames to frames, Markdown and pictures."""

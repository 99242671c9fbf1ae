"""The engine of every recipe: configuration, training loop, checkpoints, logs, report and pictures."""

"""The training loop that every method shares: engine, optimizers, averages, checkpoints."""

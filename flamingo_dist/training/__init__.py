"""The training loop: step, optimizer, checkpoints."""

"""Training: losses, the step, sharding, checkpoints, the loop."""

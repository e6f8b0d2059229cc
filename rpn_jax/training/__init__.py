"""One run: losses, the step, devices, checkpoints, the loop."""

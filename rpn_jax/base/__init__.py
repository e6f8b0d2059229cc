"""What both packages need: no JAX, nothing of ours but itself."""

"""State, sharding, optimisers, checkpoints, logs and the only training loop."""

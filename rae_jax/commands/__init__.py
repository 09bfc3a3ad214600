"""The verbs of the `rae-jax` command, one module each."""

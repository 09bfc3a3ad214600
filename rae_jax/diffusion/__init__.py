"""Diffusion as pure functions of arrays; a network is a callable (x_t, t, y)."""

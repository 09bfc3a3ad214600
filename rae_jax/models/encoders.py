"""Name -> representation encoder.

An encoder maps normalised images (b, h, w, 3) to tokens (b, n, hidden_size) whose
last operation is a LayerNorm without affine part, and has the attributes
`input_size`, `patch_size`, `hidden_size`, `image_mean` and `image_std`.
"""

from flax import nnx

from rae_jax import config
from rae_jax.models import ldae

ENCODERS = {"ldae": ldae.LDAEEncoder}


def make_encoder(name: str, *, rngs: nnx.Rngs, **sizes) -> nnx.Module:
    """Builds an encoder with random parameters.

    Raises:
        ValueError: For an unknown name.
    """
    if name not in ENCODERS:
        raise ValueError(config.suggest(name, list(ENCODERS), "encoder"))
    return ENCODERS[name](**sizes, rngs=rngs)

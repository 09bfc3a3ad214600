"""RAE and l-DAE in JAX: representation autoencoders, DiT-DH and latent denoising.

The networks that load and save weights are importable from here:

    from rae_jax import RAE, DiTDH

    rae = RAE.from_pretrained("rae-dinov2-b")
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# JAX takes seconds to import, which `rae-jax --help` should not.
_HOMES = {
    "DiT": "dit",
    "DiTDH": "dit_dh",
    "LDAEEncoder": "ldae_encoder",
    "MAE": "mae",
    "RAE": "rae",
    "RAEDecoder": "decoder",
    "ViTEncoder": "vit_encoder",
}
__all__ = ["DiT", "DiTDH", "LDAEEncoder", "MAE", "RAE", "RAEDecoder", "ViTEncoder"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"rae_jax.models.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

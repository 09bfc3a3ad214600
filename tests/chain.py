"""A whole chain of smoke-sized runs, trained for three steps each."""

from pathlib import Path

from ml_collections import ConfigDict

from rae_jax import blocks
from rae_jax import config as configs
from rae_jax.trainers import registry

ROOT = Path(__file__).parent.parent
STEPS = 3  # As in the smoke variants: their programs are compiled once.
FILES = {
    "ldae": "ldae.py",
    "probe": "probe.py",
    "rae_decoder": "rae_decoder.py",
    "latent_stats": "latent_stats.py",
    "latent_diffusion": "dit_dh.py",
}
# Neighbours of one folder, as in the quickstart.
NEIGHBOURS = {
    "probe": ["encoder.weights=../ldae"],
    "rae_decoder": ["encoder.weights=../ldae", "loss.perceptual_weight=0.0"],
    "latent_stats": ["encoder.weights=../ldae"],
    "latent_diffusion": [
        "encoder.weights=../ldae",
        "latent_stats=../latent_stats",
        "decoder=../rae_decoder",
        "sampling.num_points=5",
        "flow.shift_base=512",  # The size of a latent: no shift.
    ],
}
QUICK = ["mesh.data=1", "every.evaluate=0"]  # Most of the time goes into compiling.


def load(name: str, *overrides: str) -> ConfigDict:
    """Returns the smoke config of a trainer, with overrides such as seed=1."""
    path = f"{ROOT / 'configs' / FILES[name]}:smoke"
    return configs.load_config(path, [f"--config.{text}" for text in overrides])


def train(folder: Path) -> Path:
    """Trains every run, each in the subfolder of its name; returns the folder."""
    for name in FILES:
        overrides = [f"num_steps={STEPS}", *QUICK, *NEIGHBOURS.get(name, [])]
        registry.train(load(name, *overrides), folder / name)
    return folder


def encoder(weights: str = "random", **changes) -> ConfigDict:
    """Returns the encoder block of the smoke configs, with changed sizes."""
    sizes = blocks.SMOKE_SIZES | changes
    return ConfigDict(blocks.encoder(weights, **sizes))

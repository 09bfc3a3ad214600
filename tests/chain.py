"""A whole chain of smoke-sized runs, trained for two steps each."""

from pathlib import Path

from rae_jax import blocks
from rae_jax import config as configs
from rae_jax.trainers import registry

ROOT = Path(__file__).parent.parent
STEPS = 2
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
    "rae_decoder": ["encoder.weights=../ldae"],
    "latent_stats": ["encoder.weights=../ldae"],
    "latent_diffusion": [
        "encoder.weights=../ldae",
        "latent_stats=../latent_stats",
        "decoder=../rae_decoder",
    ],
}


def load(name: str, *overrides: str):
    """Returns the smoke config of a trainer, with overrides such as seed=1."""
    path = f"{ROOT / 'configs' / FILES[name]}:smoke"
    return configs.load_config(path, [f"--config.{text}" for text in overrides])


def train(folder: Path) -> Path:
    """Trains every run, each in the subfolder of its name; returns the folder."""
    for name in FILES:
        config = load(name, f"num_steps={STEPS}", *NEIGHBOURS.get(name, []))
        registry.train(config, folder / name)
    return folder


def sizes(**changes) -> dict:
    """Returns the sizes of the smoke encoder, with changes."""
    return blocks.encoder("random", **(blocks.SMOKE_SIZES | changes))["sizes"]

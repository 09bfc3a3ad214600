r"""The l-DAE paper's orderings (arXiv:2401.14404) at the size of a CPU.

    rae-jax train --config configs/ldae_claims.py:VARIANT --workdir runs/ldae_claims/RUN

All of them in a row: `bash launch/ldae_claims.sh`; the tables:
`rae-jax report --table ldae runs/ldae_claims`.

A row of configs/ldae.py at its tier digits or photos is narrower and shorter still
here, so that all rows and seeds take two hours on two cores: figure 5 and table 2 with
patch PCA; classes and schedule of table 1, with patch PCA in the place of the conv VAE,
which would have to be trained; the last row of table 3, and section 4.3. The probes
read every block of the run that encoder.weights names, probe_times also other times,
with noise and without. What the encoder is worth in RAE, against one of the same shape
that was not trained and against raw pixels: the variants photos of
configs/rae_decoder.py, latent_stats.py and dit_dh.py, shortened alike; their workdirs
lie beside `ldae`, which is the variant photos of configs/ldae.py.

Variants: with _digits or _photos the rows t2_ppca_d8 t2_ppca_d16 t2_ppca_d32
t2_ppca_d64 t2_ppca_d128 f5_pix_256_p16 x_ppca_cls x_ppca_ddpm t3_orig_image
x_single_sigma, and probe and probe_times; with _ldae, _random or _pixels decoder and
dit_dh, and with the first two stats; smoke.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rae_jax import blocks, config
from rae_jax.models import encoders

HERE = Path(__file__).parent
PRETRAINED = tuple(f"t2_ppca_d{d}" for d in (8, 16, 32, 64, 128))
PRETRAINED += ("f5_pix_256_p16", "x_ppca_cls", "x_ppca_ddpm")
PRETRAINED += ("t3_orig_image", "x_single_sigma")
# What the names of variants begin with.
ROWS = (*PRETRAINED, "probe", "probe_times", "stats", "decoder", "dit_dh")
STEPS = {"digits": 500, "photos": 300}  # Batches of 64 and 32.
DATA = {"digits": blocks.digits(256), "photos": blocks.photos(128)}
ENCODERS = ("ldae", "random", "pixels")
# Pixels need no statistics, as in configs/dit_dh.py.
STAGES = {
    "stats": ("latent_stats", ENCODERS[:2]),
    "decoder": ("rae_decoder", ENCODERS),
    "dit_dh": ("dit_dh", ENCODERS),
}
BLOCKS = (1, 2, 3, 4, 5, 6)
TIMES = (0, 10, 20, 40, 80)


def _row(tier: str) -> dict[str, Any]:
    steps = STEPS[tier]
    return dict(
        tier=f"{tier}-short",
        num_steps=steps,
        model=dict(hidden_size=96),
        optimizer=dict(warmup_steps=steps // 4),
        every=dict(log=20, checkpoint=steps, evaluate=steps),
    )


def _probe(tier: str, **sweep: Any) -> dict[str, Any]:
    return dict(
        num_steps=200,
        features=("encoder", "pixels"),
        data=DATA[tier],
        encoder=dict(
            weights="",
            ema=False,
            sizes=dict(
                image_size=DATA[tier]["image_size"],
                hidden_size=96,
                depth=len(BLOCKS) if "blocks" in sweep else 3,
            ),
        ),
        sweep=sweep,
        optimizer=dict(peak_lr=1e-2),
        every=dict(log=20, checkpoint=200, evaluate=200),
    )


def _stage(stage: str, encoder: str) -> dict[str, Any]:
    if stage == "stats":
        return {}
    if stage == "decoder":
        own = dict(num_steps=200, gan=dict(weight=0.0))
    else:
        own = dict(
            num_steps=400,
            latent_stats="none" if encoder == "pixels" else f"../stats_{encoder}",
            decoder=f"../decoder_{encoder}",
        )
    return own | dict(every=dict(checkpoint=200, evaluate=0))


# The recipe that a variant changes, in a file beside this one, and its changes.
RECIPES: dict[str, str] = {"smoke": "ldae.py:t3_orig_image_smoke"}
VARIANTS: dict[str, dict[str, Any]] = {"smoke": dict(num_steps=3)}
for _tier in STEPS:
    RECIPES |= {f"{row}_{_tier}": f"ldae.py:{row}_{_tier}" for row in PRETRAINED}
    VARIANTS |= {f"{row}_{_tier}": _row(_tier) for row in PRETRAINED}
    for _name in (f"probe_{_tier}", f"probe_times_{_tier}"):
        RECIPES[_name] = "probe.py:photos"
    VARIANTS[f"probe_{_tier}"] = _probe(_tier, blocks=BLOCKS)
    VARIANTS[f"probe_times_{_tier}"] = _probe(_tier, times=TIMES, noisy=(False, True))
for _stage_name, (_file, _encoders) in STAGES.items():
    for _encoder in _encoders:
        RECIPES[f"{_stage_name}_{_encoder}"] = f"{_file}.py:photos"
        VARIANTS[f"{_stage_name}_{_encoder}"] = _stage(_stage_name, _encoder)


def get_config(variant: str = "t3_orig_image_digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant not in VARIANTS:
        raise config.ConfigError(config.suggest(variant, list(VARIANTS), "variant"))
    c = config.load_config(f"{HERE / RECIPES[variant]}")
    with c.unlocked():
        if variant.endswith("_pixels"):
            c.encoder = encoders.block("pixels")
            c.encoder.sizes.update(image_size=64, patch_size=8, hidden_size=192)
        elif variant.endswith("_random"):
            c.encoder.weights = "random"
    return config.apply_variant(c, VARIANTS, variant)

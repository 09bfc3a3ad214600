r"""The RAE paper's claims (arXiv:2510.11690) at the size of a CPU.

    rae-jax train --config configs/claims.py:VARIANT --workdir runs/claims/VARIANT

All of them in a row, with what they need: `bash launch/claims.sh`; the table:
`rae-jax report --table claims runs/claims`. Workdirs lie beside `ldae` and
`latent_stats`, made by the variants `photos` of their files, on ten photographs.

A variant changes one thing of a recipe of the quickstart. Section 4.1, Theorem 1: one
latent, whose tokens are 128 wide, is learned by plain DiTs of widths below and not
below that: width_48, width_64, width_96, width_128, width_192. Section 4.2: the time
shift of dit_dh, which was chosen for these photographs, against that of the paper's
formula, paper_shift, and none, no_shift. Section 5: dit_dh against dit, plain and of
equal FLOPs. Section 4.3: decoder_clean against decoder_noisy, trained on noisy latents.

Variants: width_48, width_64, width_96, width_128 and width_192; dit_dh, paper_shift,
no_shift and dit; decoder_clean and decoder_noisy; smoke.
"""

from pathlib import Path

from ml_collections import ConfigDict

from rae_jax import config

HERE = Path(__file__).parent
WIDTHS = {f"width_{width}": width for width in (48, 64, 96, 128, 192)}
# The recipes that variants change, in files beside this one.
RECIPES = {
    **dict.fromkeys((*WIDTHS, "dit"), "dit.py:photos"),
    **dict.fromkeys(("dit_dh", "paper_shift", "no_shift"), "dit_dh.py:photos"),
    **dict.fromkeys(("decoder_clean", "decoder_noisy"), "rae_decoder.py:photos"),
    "smoke": "dit.py:smoke",
}

DECODER = dict(decoder="../decoder_noisy")
NO_CRITIC = dict(gan=dict(weight=0.0), every=dict(evaluate=350))
VARIANTS = {
    **{
        name: dict(
            num_steps=1_500,
            data=dict(limit=1, batch_size=8),
            latent_stats="none",
            decoder="none",
            every=dict(checkpoint=500, evaluate=0),
            model=dict(hidden_size=width, class_dropout_prob=0.0),
        )
        for name, width in WIDTHS.items()
    },
    "dit_dh": DECODER,
    "paper_shift": dict(**DECODER, flow=dict(shift_base=4096)),
    "no_shift": dict(**DECODER, flow=dict(shift_base=8 * 8 * 128)),
    "dit": dict(**DECODER, model=dict(hidden_size=240)),
    "decoder_clean": dict(noise=dict(tau=0.0), **NO_CRITIC),
    "decoder_noisy": dict(noise=dict(tau=0.8), **NO_CRITIC),
    "smoke": dict(data=dict(limit=1)),
}


def get_config(variant: str = "width_64") -> ConfigDict:
    """Returns the config of a variant."""
    if variant not in VARIANTS:
        raise config.ConfigError(config.suggest(variant, list(VARIANTS), "variant"))
    c = config.load_config(f"{HERE / RECIPES[variant]}")
    return config.apply_variant(c, VARIANTS, variant)

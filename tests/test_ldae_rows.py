"""Every row of the paper's tables, at every tier."""

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rae_jax import config as configs
from rae_jax.trainers import ldae
from rae_jax.training import sharding

MODULE = configs.load_module(chain.ROOT / "configs" / "ldae.py")
CONFIGS = {name: MODULE.get_config(name) for name in MODULE.VARIANTS}
TIERS = {name: tier.name for name, tier in MODULE.TIERS.items()}
OURS = ("x_", "f5_ppca_d256", "t2_pvae_d128", "t2_pae_d128")  # Not in the paper.
PRINTED = [row for row in MODULE.ROWS if not row.startswith(OURS)]
PRINTED += ["x_single_sigma"]

# From the paper's text, not by inheritance: tokenizer, d, noise, input and target.
NOISE = {
    "t1_dit_baseline": ("sd_vae", 16, "ddpm_linear", "latent", "eps"),
    "t1_no_perc": ("conv_vae", 16, "ddpm_linear", "latent", "eps"),
    "t1_linear_g2": ("conv_vae", 16, "linear_gamma2", "latent", "eps"),
    "t2_convvae_d128": ("conv_vae", 128, "linear_gamma2", "latent", "eps"),
    "t2_pvae_d16": ("patch_vae", 16, "linear_gamma2", "latent", "eps"),
    "t2_pae_d64": ("patch_ae", 64, "linear_gamma2", "latent", "eps"),
    "t2_ppca_d8": ("pca", 8, "linear_gamma2", "latent", "eps"),
    "f5_pix_32_p2": ("pixels", 12, "linear_gamma2", "latent", "eps"),
    "f5_pix_128_p8": ("pixels", 192, "linear_gamma2", "latent", "eps"),
    "t3_pca_baseline": ("pca", 32, "linear_gamma2", "latent", "eps"),
    "t3_predict_clean": ("pca", 32, "linear_gamma2", "latent", "latent"),
    "t3_no_scaling": ("pca", 32, "linear_sigma", "latent", "latent"),
    "t3_image_in": ("pca", 32, "linear_sigma", "image", "latent"),
    "t3_image_out": ("pca", 32, "linear_sigma", "image", "image_pca"),
    "t3_orig_image": ("pca", 32, "linear_sigma", "image", "image"),
    "x_single_sigma": ("pca", 32, "single_sigma", "image", "image"),
    "x_eps_on_final": ("pca", 32, "linear_sigma", "image", "eps"),
    "t4_ldae_l": ("pca", 32, "linear_sigma", "image", "image"),
}
# Width, depth, blocks of the encoder, steps (625 an epoch), transform.
SIZES = {
    "t1_dit_baseline": (1024, 24, 12, 250_000, "center_crop"),
    "t3_orig_image": (1024, 24, 12, 250_000, "center_crop"),
    "s5_random_crop": (1024, 24, 12, 250_000, "random_resized_crop"),
    "s5_ep800": (1024, 24, 12, 500_000, "random_resized_crop"),
    "s5_enc_vitb": (768, 24, 12, 250_000, "random_resized_crop"),
    "s5_enc_vitl": (1024, 48, 24, 250_000, "random_resized_crop"),
    "t4_ldae_b": (768, 24, 12, 1_000_000, "random_resized_crop"),
    "t4_ldae_l": (1024, 48, 24, 1_000_000, "random_resized_crop"),
}


def described(config):
    """All that makes a run, without the name of its row."""
    flat = configs.flatten(config)
    return tuple(sorted((k, str(v)) for k, v in flat.items() if k not in ("row", "d")))


def kind(config):
    """What one program differs from another in, apart from sizes."""
    return (
        config.tokenizer.name,
        *(config.noise[k] for k in ("schedule", "input_space", "target")),
        config.model.num_classes,
    )


SMOKE = {row: CONFIGS[f"{row}_smoke"] for row in MODULE.ROWS}
KINDS = list({kind(config): row for row, config in SMOKE.items()}.values())


def test_rows_are_those_of_the_paper():
    for row, expected in NOISE.items():
        c = CONFIGS[row]
        found = (c.tokenizer.name, c.tokenizer.latent_dim, c.noise.schedule)
        assert (*found, c.noise.input_space, c.noise.target) == expected, row
    for row, expected in SIZES.items():
        c = CONFIGS[row]
        found = (c.model.hidden_size, c.model.depth, c.encoder_depth, c.num_steps)
        assert (*found, c.data.transform) == expected, row
    conditional = [row for row in MODULE.ROWS if CONFIGS[row].model.num_classes]
    assert conditional == ["t1_dit_baseline", "x_ppca_cls"]
    # Two are the same run as another: t2_convvae_d16 and t3_pca_baseline.
    assert (len(PRINTED), len({described(CONFIGS[row]) for row in PRINTED})) == (41, 39)
    c = CONFIGS["t3_orig_image"]
    assert (c.optimizer.peak_lr, c.optimizer.warmup_steps) == (8e-4, 62_500)
    assert (c.data.batch_size, c.noise.residual_weight) == (2048, 0.1)
    assert described(CONFIGS["vit_half_l"]) == described(c)


@pytest.mark.parametrize("suffix", TIERS)
def test_every_row_resolves_at_every_tier(suffix):
    """Rows are as many runs as for the paper; all have as many tokens.

    With random tokenizers the first rows of Table 1 are one.
    """
    tokens = {"paper": 256, "small": 256, "photos": 64, "digits": 16, "smoke": 16}
    sums = set()
    for row in MODULE.ROWS:
        config = CONFIGS[f"{row}_{suffix}" if suffix else row]
        assert (config.row, config.tier) == (row, TIERS[suffix])
        ldae.check(config)
        grid = config.data.image_size / config.tokenizer.patch_size
        assert grid**2 == tokens[config.tier], row
        assert config.num_steps > config.optimizer.warmup_steps > 0
        if config.tokenizer.name == "pixels":
            assert config.tokenizer.latent_dim == 3 * config.tokenizer.patch_size**2
        sums.add(described(config))
    assert len(sums) == len(MODULE.ROWS) - (4 if suffix == "smoke" else 2)


def step_of(config, folder):
    """Builds a run with its tokenizer and takes one step; returns the metrics."""
    mesh = sharding.make_mesh(1)
    with jax.set_mesh(mesh):
        program = ldae.build(config, folder, mesh)
        batches = program.batches()
        batch = jax.tree.map(jnp.asarray, next(batches))
        batches.close()
        run_state = jax.jit(program.design.init)(jax.random.key(0))
        step = jax.jit(program.design.step)
        after, metrics = step(run_state, program.frozen, batch, jax.random.key(1))
    assert int(after.step) == 1
    return metrics


@pytest.mark.parametrize(
    "variant", [*(f"{row}_smoke" for row in KINDS), "t1_dit_baseline", "t4_ldae_l"]
)
def test_a_row_of_each_kind_steps_by_shape(variant):
    """Also the largest, and the one with a published tokenizer, in full size."""
    config = CONFIGS[variant]
    state, metrics = ldae.design(config).abstract_step()
    assert {"loss", "mse"} <= set(metrics)
    assert state.params["embed"]["kernel"].shape[1] == config.model.hidden_size


@pytest.mark.slow
@pytest.mark.parametrize("row", MODULE.ROWS)
def test_every_row_takes_a_step(row, tmp_path):
    """On this machine, with its tokenizer fitted, or random where it is trained."""
    loss = step_of(SMOKE[row], tmp_path)["loss"]
    assert np.isfinite(loss)
    if SMOKE[row].noise.target == "eps":  # A new network predicts zero.
        assert abs(loss - 1) < 0.2

"""Recipes with a critic: published values, wrong configs, and all of it at once."""

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_adversarial_training as training
from flax import nnx

from rae_jax import config as configs
from rae_jax.evaluation import reconstruction
from rae_jax.models import ldae_encoder
from rae_jax.trainers import frozen, inputs, rae_decoder, registry
from rae_jax.training import optimizers, sharding


def test_published_recipes():
    """Starts in epochs, the optimisers of both configs, sizes of the 512 decoders."""
    for variant, betas, from_zero in (
        ("dinov2_b", (0.9, 0.95), True),
        ("xl_tpu", (0.5, 0.9), False),
    ):
        config = configs.load_config(f"{chain.ROOT}/configs/rae_decoder.py:{variant}")
        epochs = config.optimizer.warmup_steps
        starts = (config.gan.critic_start, config.gan.start, config.num_steps)
        assert starts == (6 * epochs, 8 * epochs, 16 * epochs)
        for block in (config.optimizer, config.gan.optimizer):
            assert (block.b1, block.b2, block.warmup_from_zero) == (*betas, from_zero)
            assert (block.peak_lr, block.final_lr) == (2e-4, 2e-5)
        # As far as the critic's own counter comes, at 60 % of the decline.
        _, schedule = optimizers.make_optimizer(config.gan.optimizer, config.num_steps)
        np.testing.assert_allclose(schedule(10 * epochs), 8.2e-5, rtol=0.01)
    for variant, tokens, patch in (("upsample_512", 16, 32), ("dinov2_b_512", 32, 16)):
        config = configs.load_config(f"{chain.ROOT}/configs/rae_decoder.py:{variant}")
        model = nnx.eval_shape(lambda c=config: rae_decoder.make_model(c)(nnx.Rngs(0)))
        assert (model.grid, model.patch_size) == (tokens, patch)


def test_wrong_critics_are_refused(tmp_path):
    with pytest.raises(configs.ConfigError, match="gan.start = 0 is before gan.crit"):
        registry.design(training.load("gan.start=0"))
    with pytest.raises(ValueError, match="'hinges'.*hinge"):
        registry.design(training.load("gan.loss=hinges")).abstract_step()
    with pytest.raises(ValueError, match="lie in 0..1, got .1, 2."):
        registry.design(training.load("gan.blocks=(1, 2)")).abstract_step()
    config = training.load(
        "gan.backbone.name=dino", f"gan.backbone.weights={tmp_path}/no.pth"
    )
    with pytest.raises(FileNotFoundError, match="(?s)no.pth.*name=encoder with"):
        frozen.load_backbone(config, tmp_path)


def test_blocks_of_an_ldae_encoder():
    """The last of them are the features before the norm."""
    encoder = ldae_encoder.LDAEEncoder(
        image_size=8,
        patch_size=4,
        latent_dim=5,
        hidden_size=16,
        depth=3,
        num_heads=2,
        rngs=nnx.Rngs(0),
    )

    @jax.jit
    def compute(encoder, images):
        first = encoder.net.features(*encoder.inputs(images), 1)
        expected = [first, encoder.raw_features(images)]
        return encoder.block_features(images, (0, 2)), expected

    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    found, expected = compute(encoder, images)
    training.close(found, expected, 1e-6)
    with pytest.raises(ValueError, match="lie in 0..2, got .2, 1."):
        encoder.block_features(images, (2, 1))


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.timeout(900)
def test_eight_photographs_are_learnt_by_heart(tmp_path):
    """Beyond 30 dB with L1, LPIPS, noise and a critic that is heard from step 150 on.

    The averaged decoder, whose input is without noise, as it is used afterwards.
    Little noise in training: features of a random encoder differ by little.
    """
    config = training.load(
        "num_steps=750",
        "data.batch_size=8",
        "encoder.weights=random",
        "noise.tau=0.02",
        "gan.critic_start=100",
        "gan.start=150",
        "optimizer.peak_lr=0.003",
        "ema_decay=0.9",
        variant="photos",
    )
    for block in (config.optimizer, config.gan.optimizer):
        block.update(b1=0.9, eps=1e-8)
    mesh = sharding.make_mesh(1)
    with jax.set_mesh(mesh):
        program = registry.trainer(config).build(config, tmp_path, mesh)
        images = inputs.examples(config.data, "train", 8)
        batch = {"image": jnp.asarray(images)}
        run = jax.jit(program.design.init)(jax.random.key(0))
        step = jax.jit(program.design.step, donate_argnums=0)
        for _ in range(config.num_steps):
            run, metrics = step(run, program.frozen, batch, jax.random.key(1))
        reconstruct = rae_decoder.make_reconstruct(config)
        recon = reconstruct(run.ema_params, program.frozen["encoder"], images)
        scores = reconstruction.image_scores(images, recon)
    print({k: round(float(v), 4) for k, v in metrics.items() if v.ndim == 0})
    print(np.asarray(scores["psnr"]).round(2))
    assert metrics["disc_weight"] > 0 and metrics["loss_disc"] > 0
    assert scores["psnr"].mean() > 30

"""Adversarial losses and augmentation against the official code, and their rules."""

import functools

import golden_map
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rae_jax.losses import adversarial, diffaug


@functools.cache
def gan():
    return golden_map.read("gan_losses")


@functools.cache
def augmentations():
    return golden_map.under(golden_map.read("discriminator"), "diffaug/")


def close(actual, desired, atol=1e-6):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


@pytest.mark.parametrize("kind, name", [("hinge", "hinge_d"), ("vanilla", "vanilla_d")])
def test_discriminator_losses(kind, name):
    loss, metrics = adversarial.discriminator_loss(
        gan()["logits_real"], gan()["logits_fake"], kind
    )
    close(loss, gan()[name])
    close(metrics["loss_disc"], gan()[name])
    close(metrics["disc_accuracy"], gan()["accuracy"])
    close(metrics["disc_logits_real"], gan()["logits_real"].mean())
    close(metrics["disc_logits_fake"], gan()["logits_fake"].mean())


def test_generator_loss():
    close(adversarial.generator_loss(gan()["logits_fake"]), gan()["vanilla_g"])


def test_hinge_gradients():
    logits = [jnp.asarray(gan()[f"logits_{name}"]) for name in ("real", "fake")]
    grads = jax.grad(adversarial.hinge_loss, argnums=(0, 1))(*logits)
    close(grads[0], gan()["hinge_d_grad_real"])
    close(grads[1], gan()["hinge_d_grad_fake"])


def test_unknown_loss_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="'wasserstein'.*hinge"):
        adversarial.discriminator_loss(
            jnp.ones((1, 2)), jnp.ones((1, 2)), "wasserstein"
        )
    with pytest.raises(ValueError, match="Shapes differ"):
        adversarial.discriminator_loss(jnp.ones((1, 2)), jnp.ones((2, 1)))


@pytest.mark.parametrize("case", range(4))
def test_adaptive_weight(case):
    """The third adversarial loss has no gradient: the weight meets its bound."""
    arrays = golden_map.under(gan(), "adaptive/")

    def loss_rec(kernel):
        return jnp.mean(jnp.abs(arrays["h"] @ kernel.T - arrays["target"]))

    def loss_gan(kernel):
        out = jnp.tanh(arrays["h"] @ kernel.T)
        return -jnp.mean((arrays["gan_scales"][case] * out) @ arrays["v"])

    kernel = jnp.asarray(arrays["W"])
    weight = adversarial.adaptive_weight(
        jax.grad(loss_rec)(kernel),
        jax.grad(loss_gan)(kernel),
        float(arrays["max_d_weight"]),
    )
    np.testing.assert_allclose(weight, arrays["weight"][case], rtol=1e-5)


def test_adaptive_weight_is_constant():
    def weighted(x):
        return adversarial.adaptive_weight(x, {"kernel": 2.0 * x}) * jnp.sum(x)

    x = jnp.array([3.0, 4.0])
    close(jax.grad(weighted)(x), 0.5)


def test_quantise():
    images = adversarial.quantise(jnp.asarray(gan()["quantise/x"]))
    close(images, gan()["quantise/out"])
    close(adversarial.quantise(images), images)


def draws(case):
    on = jnp.asarray(augmentations()[f"{case}/rand3"])
    prob, cutout = map(float, augmentations()[f"{case}/prob_cutout"])
    strengths = jnp.asarray(augmentations()["rand7"][:, :, 0, 0])
    return dict(on=on, strengths=strengths, prob=prob, cutout=cutout)


CASES = ["all_nocut", "all_cut02", "trans_only", "color_only", "cut_only", "none"]


@pytest.mark.parametrize("case", CASES)
def test_augmentation(case):
    images = golden_map.last(augmentations()["x"])
    found = diffaug.augment_with(images, **draws(case))
    close(found, golden_map.last(augmentations()[f"{case}/out"]))


def test_augmentation_gradient():
    weights = golden_map.last(augmentations()["all_cut02/grad_weight"])

    def scalar(images):
        return jnp.sum(diffaug.augment_with(images, **draws("all_cut02")) * weights)

    found = jax.grad(scalar)(golden_map.last(augmentations()["x"]))
    close(found, golden_map.last(augmentations()["all_cut02/d_x"]))


def random_images(b=8, h=24, w=20):
    values = np.random.default_rng(0).uniform(-1, 1, (b, h, w, 3))
    return jnp.asarray(values, jnp.float32)


def test_augment_draws_each_policy_once_per_batch():
    """With probability 1/2 some keys leave the batch alone, others change all of it."""
    images = random_images()
    augment = jax.jit(lambda key: diffaug.augment(images, key, prob=0.5, cutout=0.5))
    changed = np.array(
        [
            np.any(augment(jax.random.key(seed)) != images, axis=(1, 2, 3))
            for seed in range(24)
        ]
    )
    assert set(changed.sum(axis=1)) <= {0, *range(6, 9)}  # A shift can be by nothing.
    assert 0 < changed.any(axis=1).sum() < 24


def test_augment_differs_between_samples_and_keys():
    image = random_images(b=1)
    images = jnp.repeat(image, 4, axis=0)
    first = diffaug.augment(images, jax.random.key(0))
    second = diffaug.augment(images, jax.random.key(1))
    assert len({np.asarray(x).tobytes() for x in (*first, *second)}) == 8


def test_translation_moves_by_an_eighth_at_most():
    """Draws of 0 and of nearly 1 are the extremes; those of a half move nothing."""
    image = random_images(b=3)
    draw = jnp.array([0.0, 0.5, 0.9999])
    moved = diffaug.translated(image, draw, jnp.full(3, 0.5))
    close(moved[0, 3:], image[0, :-3], atol=0)
    close(moved[0, :3], 0.0, atol=0)
    close(moved[1], image[1], atol=0)
    close(moved[2, :-3], image[2, 3:], atol=0)


@pytest.mark.parametrize("ratio", [0.25, 0.3])
def test_box_has_its_size(ratio):
    """Centred draws cut whole boxes, of even (0.25) and odd (0.3) side here."""
    images = jnp.ones((1, 20, 24, 3))
    half = jnp.full(1, 0.5)
    cut = diffaug.cut_out(images, half, half, ratio=ratio)
    assert int(jnp.sum(cut[..., 0] == 0)) == round(ratio * 20) * round(ratio * 24)


def test_augment_refuses_other_layouts():
    with pytest.raises(ValueError, match=r"\(b, h, w, 3\)"):
        diffaug.augment(jnp.zeros((2, 3, 8, 8)), jax.random.key(0))

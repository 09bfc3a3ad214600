"""Losses of a decoder and its critic, as in RAE (arXiv:2510.11690).

Logits are (b, n): every entry of every sample is one judgement and counts alike.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

_NORM_EPS = 1e-6


def hinge_loss(logits_real: jax.Array, logits_fake: jax.Array) -> jax.Array:
    """Half the sum of mean relu(1 - real) and mean relu(1 + fake)."""
    real = jnp.mean(jax.nn.relu(1.0 - logits_real))
    fake = jnp.mean(jax.nn.relu(1.0 + logits_fake))
    return 0.5 * (real + fake)


def softplus_loss(logits_real: jax.Array, logits_fake: jax.Array) -> jax.Array:
    """Half the sum of mean softplus(-real) and mean softplus(fake).

    The logistic loss of the first GANs (arXiv:1406.2661).
    """
    real = jnp.mean(jax.nn.softplus(-logits_real))
    fake = jnp.mean(jax.nn.softplus(logits_fake))
    return 0.5 * (real + fake)


DISCRIMINATOR_LOSSES = {"hinge": hinge_loss, "vanilla": softplus_loss}


def discriminator_loss(
    logits_real: jax.Array, logits_fake: jax.Array, kind: str = "hinge"
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The critic's loss on real and reconstructed images.

    Args:
        logits_real: (b, n).
        logits_fake: (b, n), compared entry by entry for the accuracy.
        kind: Key of `DISCRIMINATOR_LOSSES`; the names are those of the official code.

    Returns:
        The scalar loss and metrics: `loss_disc`, the mean logits and `disc_accuracy`,
        the share of entries where the real image scores higher.

    Raises:
        ValueError: The kind is unknown or the shapes differ.
    """
    if kind not in DISCRIMINATOR_LOSSES:
        raise ValueError(
            f"Unknown kind {kind!r}; choose from {list(DISCRIMINATOR_LOSSES)}."
        )
    if logits_real.shape != logits_fake.shape:
        raise ValueError(
            f"Shapes differ: real {logits_real.shape}, fake {logits_fake.shape}."
        )
    loss = DISCRIMINATOR_LOSSES[kind](logits_real, logits_fake)
    metrics = {
        "loss_disc": loss,
        "disc_logits_real": jnp.mean(logits_real),
        "disc_logits_fake": jnp.mean(logits_fake),
        "disc_accuracy": jnp.mean((logits_real > logits_fake).astype(jnp.float32)),
    }
    return loss, metrics


def generator_loss(logits_fake: jax.Array) -> jax.Array:
    """Minus the mean logit, the generator's side of both losses."""
    return -jnp.mean(logits_fake)


def adaptive_weight(
    grads_rec: Any, grads_gan: Any, max_weight: float = 1e4, eps: float = _NORM_EPS
) -> jax.Array:
    """Weight that gives the adversarial term the gradient norm of the other terms.

    |grads_rec| / (|grads_gan| + eps), clipped, constant under differentiation, from
    VQGAN (arXiv:2012.09841). RAE takes the gradients of the kernel of the decoder's
    last layer, before the optimiser sees them. Gradients of a whole batch give one
    weight; the official code computes one per process from its share.

    Args:
        grads_rec: Gradient of the reconstruction loss, an array or a tree.
        grads_gan: Gradient of the unweighted adversarial loss, likewise.
        max_weight: Upper bound, reached when the adversarial gradient vanishes.
        eps: Added to the norm; 1e-6 in RAE, 1e-4 in latent diffusion.
    """
    norm_rec, norm_gan = optax.tree.norm(grads_rec), optax.tree.norm(grads_gan)
    weight = jnp.clip(norm_rec / (norm_gan + eps), 0.0, max_weight)
    return jax.lax.stop_gradient(weight)


def quantise(images: jax.Array) -> jax.Array:
    """Rounds images in [-1, 1] to the 256 levels of a file, clipping what is beyond.

    The critic would otherwise tell reconstructions from files by their depth.
    """
    levels = jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5)
    return levels / 127.5 - 1.0

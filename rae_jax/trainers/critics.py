"""The critic's half of RAE's adversarial training: its state, judgement and update."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from rae_jax.losses import adversarial, diffaug
from rae_jax.models import discriminator
from rae_jax.trainers import frozen, inputs
from rae_jax.training import optimizers, state

METRICS = ("loss_disc", "disc_logits_real", "disc_logits_fake", "disc_accuracy")
METRICS += ("grad_norm_critic", "lr_critic")


@flax.struct.dataclass
class CriticState:
    """What is trained; `step` counts the critic's own updates, as its schedule does."""

    step: jax.Array
    params: state.Params
    vectors: Any  # See `discriminator.SpectralVector`.
    opt_state: optax.OptState


class Critic:
    """Trained heads on a frozen backbone, as functions of a state.

    Args:
        config: Config of a decoder run.
    """

    def __init__(self, config: ConfigDict):
        self.gan, self.accumulate = config.gan, config.optimizer.accumulate
        block = frozen.backbone_block(config)
        self.backbone_name = frozen.backbone_name(config)
        self.backbone_def, _ = frozen.encoder(block)
        self.size, self.width = block.sizes.image_size, block.sizes.hidden_size
        self.graphdef = state.abstract_model(self._make)
        tx, self.schedule = optimizers.make_optimizer(
            config.gan.optimizer, config.num_steps, config.get("guard")
        )
        self.tx = optax.with_extra_args_support(tx)

    def init(self, key: jax.Array) -> CriticState:
        """Returns a new critic."""
        parts = nnx.split(
            self._make(nnx.Rngs(key)), nnx.Param, discriminator.SpectralVector
        )
        params, vectors = (nnx.to_pure_dict(part) for part in parts[1:])
        return CriticState(
            jnp.zeros((), jnp.int32), params, vectors, self.tx.init(params)
        )

    def logits(
        self, critic: CriticState, networks: Any, images: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Judges images (b, h, w, 3) in [-1, 1], augmented first; returns (b, n)."""
        augment = self.gan.augment
        images = diffaug.augment(
            images, key, prob=augment.probability, cutout=augment.cutout
        )
        backbone = nnx.merge(self.backbone_def, networks[self.backbone_name])
        features = discriminator.critic_features(
            backbone, images, blocks=self.gan.blocks, size=self.size
        )
        return nnx.merge(self.graphdef, critic.params, critic.vectors)(features)

    def update(
        self,
        critic: CriticState,
        reconstruct: Callable[[jax.Array], jax.Array],
        networks: Any,
        batch: state.Batch,
        key: jax.Array,
    ) -> tuple[CriticState, state.Metrics]:
        """Returns the critic after one update on a batch, and metrics.

        The spectral vectors are iterated before each of its two forward passes, as in
        the official code, once for all parts of the batch.

        Args:
            critic: The critic before.
            reconstruct: Maps latents to images in [0, 1], not clipped.
            networks: Frozen networks.
            batch: "image" uint8 and raw latents "z".
            key: Randomness of the augmentation, which differs for reals and fakes.
        """
        first = self._iterated(critic)
        second = self._iterated(first)

        def loss_of(params, part, key):
            fake_key, real_key = jax.random.split(key)
            real = 2.0 * inputs.to_float(part["image"]) - 1.0
            recon = jax.lax.stop_gradient(reconstruct(part["z"]))
            fake = adversarial.quantise(2.0 * recon - 1.0)
            judge_fake, judge_real = (c.replace(params=params) for c in (first, second))
            logits_fake = self.logits(judge_fake, networks, fake, fake_key)
            logits_real = self.logits(judge_real, networks, real, real_key)
            return adversarial.discriminator_loss(
                logits_real, logits_fake, self.gan.loss
            )

        grads, metrics = state.gradients(
            loss_of, critic.params, batch, key, self.accumulate
        )
        metrics["grad_norm_critic"] = optax.tree.norm(grads)
        metrics["lr_critic"] = state.learning_rate(
            self.schedule, critic.step, critic.opt_state
        )
        updates, opt_state = self.tx.update(
            grads, critic.opt_state, critic.params, value=metrics["loss_disc"]
        )
        params = optax.apply_updates(critic.params, updates)
        new = CriticState(critic.step + 1, params, second.vectors, opt_state)
        return new, metrics | optimizers.guard_metrics(opt_state, "_critic")

    def idle_metrics(self, critic: CriticState) -> state.Metrics:
        """Returns the metrics of a step without an update: zeros, and counts."""
        metrics = {name: jnp.zeros(()) for name in METRICS}
        return metrics | optimizers.guard_metrics(critic.opt_state, "_critic")

    def _iterated(self, critic: CriticState) -> CriticState:
        vectors = discriminator.power_iteration(critic.params, critic.vectors)
        return critic.replace(vectors=vectors)

    def _make(self, rngs: nnx.Rngs) -> nnx.Module:
        gan = self.gan
        return discriminator.Discriminator(
            self.width,
            len(gan.blocks) + 1,
            kernel_size=gan.kernel_size,
            norm_groups=gan.norm_groups or None,
            spectral_norm=gan.spectral_norm,
            dtype=gan.dtype,
            rngs=rngs,
        )

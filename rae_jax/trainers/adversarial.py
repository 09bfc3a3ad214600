"""One step of RAE's decoder and its critic, and the state that both carry.

arXiv:2510.11690 section 3 and the official code: L1, LPIPS and an adversarial term
whose weight makes its gradient as large as theirs at the decoder's last layer. Means
are over the global batch, so the number of devices changes nothing; the official
code weighs and trains its critics per process. When the batch is taken in parts
(`optimizer.accumulate`), each part has a weight of its own.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from rae_jax import config as configs
from rae_jax.losses import adversarial
from rae_jax.losses import reconstruction as losses
from rae_jax.models import rae
from rae_jax.trainers import critics, frozen, inputs
from rae_jax.training import divergence, optimizers, state

LAST_LAYER = "pred"  # Of the decoder.
# Sets what the critic draws apart from all that a run without it draws, so that the
# two are the same until the decoder hears the critic.
_STREAM = 2**31 - 1

Terms = dict[str, jax.Array]


@flax.struct.dataclass
class AdversarialState(state.TrainState):
    """The state of a run without a critic, and the critic."""

    critic: critics.CriticState


class AdversarialTraining:
    """`init` and `step` of a run with a critic.

    Args:
        config: Config of a decoder run.
        make_decoder: Constructor of the decoder, called with `rngs`.

    Raises:
        ConfigError: If the decoder would listen to a critic that is not trained yet.
    """

    def __init__(self, config: ConfigDict, make_decoder: Callable[..., nnx.Module]):
        gan = config.gan
        if gan.start < gan.critic_start:
            raise configs.ConfigError(
                f"gan.start = {gan.start} is before gan.critic_start = "
                f"{gan.critic_start}: the decoder would follow an untrained critic."
            )
        self.config, self.make_decoder = config, make_decoder
        self.encoder_def, _ = frozen.encoder(config.encoder)
        self.decoder_def = state.abstract_model(make_decoder)
        self.perceptual_def = None
        if config.loss.perceptual_weight:
            self.perceptual_def, _ = frozen.lpips(config.loss.perceptual)
        self.critic = critics.Critic(config)
        self.tx, self.schedule = optimizers.make_optimizer(
            config.optimizer, config.num_steps, config.get("guard")
        )

    def init(self, key: jax.Array) -> AdversarialState:
        """Returns a new state."""
        decoder = state.create_state(self.make_decoder, self.tx, key)
        critic = self.critic.init(jax.random.fold_in(key, _STREAM))
        return AdversarialState(**vars(decoder), critic=critic)

    def step(
        self, run: AdversarialState, networks: Any, batch: state.Batch, key: jax.Array
    ) -> tuple[AdversarialState, state.Metrics]:
        """Updates the decoder, then the critic on what the new decoder makes."""
        config = self.config
        step_key = jax.random.fold_in(key, run.step)
        critic_key = jax.random.fold_in(jax.random.fold_in(key, _STREAM), run.step)
        batch = {"image": batch["image"], "z": self._encode(networks, batch["image"])}
        grads, metrics = state.mean_of_parts(
            self._decoder_gradients(run, networks),
            run.params,
            batch,
            step_key,
            config.optimizer.accumulate,
        )
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics[divergence.NORMS] = divergence.group_norms(grads)
        metrics["lr"] = state.learning_rate(self.schedule, run.step, run.opt_state)
        new = run.apply_gradients(
            grads, self.tx, config.ema_decay, _without_critic(config, metrics)
        )

        def update(critic):
            return self._update_critic(critic, new.params, networks, batch, critic_key)

        idle = (run.critic, self.critic.idle_metrics(run.critic))
        critic, critic_metrics = from_step(
            config.gan.critic_start, run.step, update, run.critic, idle
        )
        metrics |= critic_metrics | optimizers.guard_metrics(new.opt_state)
        return new.replace(critic=critic), metrics

    def _encode(self, networks: Any, images: jax.Array) -> jax.Array:
        """Encodes uint8 images, in as many parts as the gradients are taken in."""
        encoder = nnx.merge(self.encoder_def, networks["encoder"])
        accumulate = self.config.optimizer.accumulate
        if accumulate == 1:
            return rae.encode(encoder, inputs.to_float(images))
        parts = state.split_parts(images, accumulate)
        z = jax.lax.map(lambda x: rae.encode(encoder, inputs.to_float(x)), parts)
        return state.join_parts(z)

    def _decoder_gradients(self, run: AdversarialState, networks: Any) -> state.GradFn:
        """Returns (params, part, key) -> gradients and metrics.

        One backward pass through the decoder: only its last layer is passed once for
        each term, which gives the adaptive weight, and once for their weighted sum.
        """
        gan, noise = self.config.gan, self.config.noise
        encoder = nnx.merge(self.encoder_def, networks["encoder"])

        def grad_fn(params, part, key):
            images = inputs.to_float(part["image"])
            z = rae.add_noise(part["z"], key, noise.tau, noise.distribution)
            last = {LAST_LAYER: params[LAST_LAYER]}
            body = {k: v for k, v in params.items() if k != LAST_LAYER}

            def features_of(body):
                decoder = nnx.merge(self.decoder_def, body | last)
                return decoder.features(z.reshape(len(z), -1, z.shape[-1]))

            def images_of(last, features):  # (b, n, d), as one row of tokens.
                decoder = nnx.merge(self.decoder_def, body | last)
                return rae.decode(decoder.pixels, features[:, None], encoder)

            features, pull_body = jax.vjp(features_of, body)
            recon, pull_last = jax.vjp(images_of, last, features)
            values, pulls = self._terms(run, networks, images, recon, key)
            kernels = {
                k: pull_last(g)[0][LAST_LAYER]["kernel"] for k, g in pulls.items()
            }
            adaptive = adversarial.adaptive_weight(
                kernels["rec"] + kernels["lpips"],
                kernels["gan"],
                gan.max_adaptive_weight,
            )
            adaptive = jnp.where(run.step >= gan.start, adaptive, 0.0)
            weight = gan.weight * adaptive
            pull = pulls["rec"] + pulls["lpips"] + weight * pulls["gan"]
            last_grads, pull = pull_last(pull)
            metrics = {f"loss_{k}": v for k, v in values.items()}
            metrics |= {
                f"grad_norm_{k}": optax.tree.norm(g) for k, g in kernels.items()
            }
            metrics["disc_weight"] = adaptive
            metrics["loss"] = (
                _without_critic(self.config, metrics) + weight * values["gan"]
            )
            return pull_body(pull)[0] | last_grads, metrics

        return grad_fn

    def _terms(
        self,
        run: AdversarialState,
        networks: Any,
        images: jax.Array,
        recon: jax.Array,
        key: jax.Array,
    ) -> tuple[Terms, Terms]:
        """Returns the terms' values, and their gradients with respect to `recon`.

        Values are unweighted. The gradient of LPIPS has its weight; the adversarial
        one has none, because that depends on the others.
        """
        loss, gan = self.config.loss, self.config.gan
        augment_key = jax.random.fold_in(key, _STREAM)

        def lpips(recon):
            perceptual = nnx.merge(self.perceptual_def, networks["perceptual"])
            value = jnp.mean(perceptual(images, recon))
            return loss.perceptual_weight * value, value

        def lpips_and_gradient(recon):
            (_, value), grad = jax.value_and_grad(lpips, has_aux=True)(recon)
            return value, grad

        def generator(recon):
            fake = 2.0 * recon - 1.0
            logits = self.critic.logits(run.critic, networks, fake, augment_key)
            return adversarial.generator_loss(logits)

        rec = jax.value_and_grad(lambda x: losses.absolute_error(images, x))(recon)
        none = (jnp.zeros(()), jnp.zeros_like(recon))
        found = {"rec": rec, "lpips": none}
        if self.perceptual_def is not None:
            found["lpips"] = from_step(
                loss.perceptual_start, run.step, lpips_and_gradient, recon, none
            )
        found["gan"] = from_step(
            gan.start, run.step, jax.value_and_grad(generator), recon, none
        )
        values = {k: value for k, (value, _) in found.items()}
        return values, {k: grad for k, (_, grad) in found.items()}

    def _update_critic(
        self,
        critic: critics.CriticState,
        params: state.Params,
        networks: Any,
        batch: state.Batch,
        key: jax.Array,
    ) -> tuple[critics.CriticState, state.Metrics]:
        """Updates the critic on images that are decoded without noise."""
        encoder = nnx.merge(self.encoder_def, networks["encoder"])
        decoder = nnx.merge(self.decoder_def, params)
        metrics: state.Metrics = {}
        for i in range(self.config.gan.critic_updates):
            critic, metrics = self.critic.update(
                critic,
                lambda z: rae.decode(decoder, z, encoder),
                networks,
                batch,
                jax.random.fold_in(key, i),
            )
        return critic, metrics


def _without_critic(config: ConfigDict, metrics: state.Metrics) -> jax.Array:
    """Returns the loss but for the adversarial term, which may be negative."""
    return metrics["loss_rec"] + config.loss.perceptual_weight * metrics["loss_lpips"]


def from_step(
    start: int, step: jax.Array, function: Callable[[Any], Any], x: Any, before: Any
) -> Any:
    """Returns function(x) from step `start` on, and `before`, of its shapes, until."""
    if start <= 0:
        return function(x)
    return jax.lax.cond(step >= start, function, lambda _: before, x)

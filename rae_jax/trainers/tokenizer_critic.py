"""A convolutional tokenizer and its critic in one step, as in latent diffusion.

arXiv:2112.10752 and its code: from `critic.start` on both are trained and the
adversarial term counts; its weight is adaptive, by gradients of the last layer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from rae_jax.losses import adversarial, autoencoding
from rae_jax.models import learned_tokenizers, patchgan
from rae_jax.trainers import adversarial as decoders
from rae_jax.trainers import critics, frozen, inputs
from rae_jax.training import divergence, optimizers, state

_LAST = "conv_out"  # Of the decoder.
_EPS = 1e-4  # Of the adaptive weight in latent diffusion.
_STREAM = 2**31 - 1  # Sets the critic's draws apart; see `adversarial`.


class CriticTraining:
    """`init` and `step` of a run with a critic.

    Args:
        config: Config of a tokenizer run.
        make_model: Constructor of the autoencoder, called with `rngs`.
    """

    def __init__(self, config: ConfigDict, make_model: Callable[..., nnx.Module]):
        self.config, self.make_model = config, make_model
        self.graphdef = state.abstract_model(make_model)
        self.critic_def = state.abstract_model(self._make_critic)
        self.perceptual_def = None
        if config.loss.perceptual_weight:
            self.perceptual_def, _ = frozen.lpips(config.loss.perceptual)
        guard = config.get("guard")
        self.tx, self.schedule = optimizers.make_optimizer(
            config.optimizer, config.num_steps, guard
        )
        critic_tx, self.critic_schedule = optimizers.make_optimizer(
            config.critic.optimizer, config.num_steps, guard
        )
        self.critic_tx = optax.with_extra_args_support(critic_tx)

    def init(self, key: jax.Array) -> decoders.AdversarialState:
        """Returns a new state."""
        run = state.create_state(self.make_model, self.tx, key)
        critic_key = jax.random.fold_in(key, _STREAM)
        params = state.param_dict(self._make_critic(nnx.Rngs(critic_key)))
        critic = critics.CriticState(
            jnp.zeros((), jnp.int32), params, {}, self.critic_tx.init(params)
        )
        return decoders.AdversarialState(**vars(run), critic=critic)

    def step(
        self,
        run: decoders.AdversarialState,
        networks: Any,
        batch: state.Batch,
        key: jax.Array,
    ) -> tuple[decoders.AdversarialState, state.Metrics]:
        """Updates the autoencoder, then the critic on what the new one makes."""
        config = self.config
        step_key = jax.random.fold_in(key, run.step)
        critic_key = jax.random.fold_in(jax.random.fold_in(key, _STREAM), run.step)
        batch = {"image": batch["image"]}
        grads, metrics = state.mean_of_parts(
            self._gradients(run, networks),
            run.params,
            batch,
            step_key,
            config.optimizer.accumulate,
        )
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics[divergence.NORMS] = divergence.group_norms(grads)
        metrics["lr"] = state.learning_rate(self.schedule, run.step, run.opt_state)
        own_loss = metrics.pop("loss_without_critic")  # Positive, as guards need it.
        new = run.apply_gradients(grads, self.tx, config.ema_decay, own_loss)

        def update(critic):
            return self._update(critic, new.params, batch, critic_key)

        idle = {name: jnp.zeros(()) for name in critics.METRICS}
        idle |= optimizers.guard_metrics(run.critic.opt_state, "_critic")
        critic, critic_metrics = decoders.from_step(
            config.critic.start, run.step, update, run.critic, (run.critic, idle)
        )
        metrics |= critic_metrics | optimizers.guard_metrics(new.opt_state)
        return new.replace(critic=critic), metrics

    def _gradients(self, run: decoders.AdversarialState, networks: Any) -> state.GradFn:
        """Returns (params, part, key) -> gradients and metrics.

        Only the last layer is passed once for each term, which gives the adaptive
        weight, and once for their weighted sum.
        """
        loss = self.config.loss

        def grad_fn(params, part, key):
            images = 2.0 * inputs.to_float(part["image"]) - 1.0
            last = params["decoder"][_LAST]

            def model_of(params, last):
                decoder = params["decoder"] | {_LAST: last}
                return nnx.merge(self.graphdef, params | {"decoder": decoder})

            def features_of(params):
                model = model_of(params, last)
                mean, log_variance = learned_tokenizers.posterior(model, images)
                z = autoencoding.draw(mean, log_variance, key)
                divergences = autoencoding.kl_divergence(mean, log_variance)
                return (model.decoder.features(z), jnp.mean(divergences)), jnp.std(z)

            (features, kl), pull_body, latent_std = jax.vjp(
                features_of, params, has_aux=True
            )
            recon, pull_last = jax.vjp(
                lambda last, x: model_of(params, last).decoder.pixels(x), last, features
            )
            values, pulls = self._terms(run, networks, images, recon)
            kernels = {k: pull_last(g)[0]["kernel"] for k, g in pulls.items()}
            weight = self._weight(kernels, run.step, autoencoding.num_values(images))
            last_grads, pull = pull_last(pulls["rec"] + weight * pulls["gan"])
            grads = pull_body((pull, jnp.asarray(loss.kl_weight, jnp.float32)))[0]
            grads["decoder"][_LAST] = last_grads
            own = values.pop("sum") + loss.kl_weight * kl
            metrics = {f"loss_{k}": v for k, v in values.items()}
            metrics |= {
                f"grad_norm_{k}": optax.tree.norm(g) for k, g in kernels.items()
            }
            metrics |= {"loss_kl": kl, "latent_std": latent_std, "disc_weight": weight}
            metrics |= {"loss_without_critic": own}
            metrics["loss"] = own + weight * values["gan"]
            return grads, metrics

        return grad_fn

    def _weight(
        self, kernels: dict[str, jax.Array], step: jax.Array, num_values: int
    ) -> jax.Array:
        """Returns by what the adversarial term is multiplied.

        Terms are sums over an image. A weight that is not adaptive counts beside their
        mean, so that it does not depend on the size of images.
        """
        critic = self.config.critic
        weight = jnp.asarray(float(num_values))
        if critic.adaptive:
            weight = adversarial.adaptive_weight(
                kernels["rec"], kernels["gan"], critic.max_adaptive_weight, _EPS
            )
        return critic.weight * jnp.where(step >= critic.start, weight, 0.0)

    def _terms(
        self,
        run: decoders.AdversarialState,
        networks: Any,
        images: jax.Array,
        recon: jax.Array,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Returns values, and gradients with respect to `recon`.

        Of the values "rec", the error, and "lpips" are means, "sum" is that of both,
        weighted, over an image; "gan" is not weighted. The gradients are those of
        "sum", as "rec", and of "gan".
        """
        loss, size = self.config.loss, autoencoding.num_values(images)

        def reconstruction(recon):
            error = autoencoding.pixel_error(images, recon, loss.error)
            parts = {"rec": error}
            if self.perceptual_def is not None:
                perceptual = nnx.merge(self.perceptual_def, networks["perceptual"])
                distances = perceptual((images + 1) / 2, (recon + 1) / 2)
                parts["lpips"] = jnp.mean(distances)
                error = error + loss.perceptual_weight * parts["lpips"]
            return size * error, parts

        def generator(recon):
            return adversarial.generator_loss(self._logits(run.critic.params, recon))

        (total, parts), total_grad = jax.value_and_grad(reconstruction, has_aux=True)(
            recon
        )
        none = (jnp.zeros(()), jnp.zeros_like(recon))
        gan, gan_grad = decoders.from_step(
            self.config.critic.start,
            run.step,
            jax.value_and_grad(generator),
            recon,
            none,
        )
        values = parts | {"sum": total, "gan": gan}
        return values, {"rec": total_grad, "gan": gan_grad}

    def _update(
        self,
        critic: critics.CriticState,
        params: state.Params,
        batch: state.Batch,
        key: jax.Array,
    ) -> tuple[critics.CriticState, state.Metrics]:
        """Returns the critic after one update on a batch, and metrics."""
        model = nnx.merge(self.graphdef, params)

        def loss_of(critic_params, part, key):
            images = 2.0 * inputs.to_float(part["image"]) - 1.0
            moments = learned_tokenizers.posterior(model, images)
            recon = learned_tokenizers.images_of(
                model, autoencoding.draw(*moments, key)
            )
            real = self._logits(critic_params, images)
            fake = self._logits(critic_params, jax.lax.stop_gradient(recon))
            return adversarial.discriminator_loss(real, fake, self.config.critic.loss)

        grads, metrics = state.gradients(
            loss_of, critic.params, batch, key, self.config.optimizer.accumulate
        )
        metrics["grad_norm_critic"] = optax.tree.norm(grads)
        metrics["lr_critic"] = state.learning_rate(
            self.critic_schedule, critic.step, critic.opt_state
        )
        updates, opt_state = self.critic_tx.update(
            grads, critic.opt_state, critic.params, value=metrics["loss_disc"]
        )
        params = optax.apply_updates(critic.params, updates)
        new = critics.CriticState(critic.step + 1, params, {}, opt_state)
        return new, metrics | optimizers.guard_metrics(opt_state, "_critic")

    def _logits(self, params: state.Params, images: jax.Array) -> jax.Array:
        logits = nnx.merge(self.critic_def, params)(images)
        return logits.reshape(len(logits), -1)

    def _make_critic(self, rngs: nnx.Rngs) -> nnx.Module:
        critic = self.config.critic
        return patchgan.PatchGAN(
            critic.width, critic.num_layers, dtype=critic.dtype, rngs=rngs
        )

"""The decoder's training with a critic, against the recipe written out plainly."""

import dataclasses

import chain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rae_jax import config as configs
from rae_jax.data import loader
from rae_jax.layers import partition
from rae_jax.losses import adversarial, diffaug
from rae_jax.losses import reconstruction as losses
from rae_jax.models import discriminator, rae
from rae_jax.trainers import frozen, inputs, rae_decoder, registry
from rae_jax.training import checkpoints, loop, optimizers, sharding, state

CRITIC_START, START = 1, 2


def load(*overrides: str, variant: str = "smoke_gan"):
    """Returns a config whose first moments, with b1 = 0, are the gradients."""
    path = f"{chain.ROOT / 'configs' / 'rae_decoder.py'}:{variant}"
    values = ["optimizer.b1=0", "gan.optimizer.b1=0", "model.remat=none", *overrides]
    # See test_devices: Adam divides the rounding of vanishing gradients by itself.
    values += ["optimizer.eps=1e-3", "gan.optimizer.eps=1e-3", "mesh.data=1"]
    return configs.load_config(path, [f"--config.{v}" for v in values])


def close(actual, desired, rtol=1e-5):
    """Compares trees leaf by leaf, relative to each leaf's largest entry.

    A leaf of nothing but rounding, such as the gradient of a bias before a norm, is
    compared with a twentieth of the largest leaf.
    """
    actual, desired = jax.device_get((actual, desired))
    floor = 0.05 * max(np.abs(b).max() for b in jax.tree.leaves(desired))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=rtol * max(np.abs(b).max(), floor)
        ),
        actual,
        desired,
    )


class Game:
    """A program, and the states, metrics and batches of its first steps.

    Args:
        config: Config of a decoder run.
        workdir: Where its weights count from.
        batches: Their number, or given ones.
        start: State to begin with.
    """

    def __init__(self, config, workdir, batches, *, start=None):
        self.config = config
        mesh = sharding.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            self.key = jax.random.key(config.seed)
            self.program = registry.trainer(config).build(config, workdir, mesh)
            design = self.program.design
            abstract = loop.abstract_state(design, config, mesh)
            layout = jax.tree.map(lambda x: x.sharding, abstract)
            # As the loop compiles it, so that the loop need not compile it again.
            step = jax.jit(design.step, donate_argnums=0, out_shardings=(layout, None))
            init = jax.jit(design.init, out_shardings=layout)
            run = init(self.key) if start is None else jax.device_put(start, layout)
            self.states, self.metrics, self.batches = [run], [], []
            for batch in self._host_batches(batches):
                rows = loader.to_global(batch, sharding.batch_sharding(mesh))
                run, metrics = step(
                    jax.tree.map(jnp.copy, run), self.program.frozen, rows, self.key
                )
                self.states.append(run)
                scalars = {k: float(v) for k, v in metrics.items() if v.ndim == 0}
                self.metrics.append(scalars)
                self.batches.append(batch)

    def _host_batches(self, batches):
        if not isinstance(batches, int):
            return batches
        with self.program.batches() as source:
            return [next(source) for _ in range(batches)]


@pytest.fixture(scope="module")
def game(tmp_path_factory):
    """Four steps: alone, critic trained, decoder hears it, and once more.

    On eight devices with sharded states; what they are compared with is on one.
    """
    config = load("loss.perceptual_start=1", "noise.tau=0.3", "gan.blocks=(1,)")
    config.num_steps = 8
    config.update(mesh=dict(data=1, fsdp=8))
    config.optimizer.update(warmup_steps=2, peak_lr=1e-3)
    config.gan.optimizer.update(warmup_steps=2, peak_lr=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "MIN_SHARDED_SIZE", 2**8)
        yield Game(config, tmp_path_factory.mktemp("game"), 4)


def moments(opt_state):
    """First moments of AdamW: with b1 = 0, the last gradient."""
    return opt_state[0].mu


# ---- One step, written out with the whole loss and separate gradients.


class Recipe:
    """Stage 1 as spelled out in the official code, on our networks and draws."""

    def __init__(self, config, networks):
        self.config, self.networks = config, networks
        self.encoder = nnx.merge(frozen.encoder(config.encoder)[0], networks["encoder"])
        self.lpips = nnx.merge(frozen.lpips("alex")[0], networks["perceptual"])
        make = rae_decoder.make_model(config)
        self.decoder_def = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
        heads = discriminator.Discriminator(32, 2, kernel_size=3, rngs=nnx.Rngs(0))
        self.critic_def = nnx.graphdef(heads)

    def decode(self, params, z):
        return rae.decode(nnx.merge(self.decoder_def, params), z, self.encoder)

    def judge(self, params, vectors, images, key):
        images = diffaug.augment(images, key)
        (last,) = self.encoder.block_features(images, (1,))  # Mean and std are 0.5.
        return nnx.merge(self.critic_def, params, vectors)([last, last])

    def generator(self, run, batch, key):
        """Returns last-layer gradients of both parts, and the gradient of the sum."""
        key = jax.random.fold_in(key, run.step)
        augment_key = jax.random.fold_in(key, 2**31 - 1)
        images = inputs.to_float(batch["image"])
        noisy = rae.add_noise(rae.encode(self.encoder, images), key, 0.3)

        def rec(params):
            recon = self.decode(params, noisy)
            return losses.reconstruction_loss(images, recon, self.lpips, 1.0)[0]

        def gan(params):
            fake = 2 * self.decode(params, noisy) - 1
            logits = self.judge(
                run.critic.params, run.critic.vectors, fake, augment_key
            )
            return -jnp.mean(logits)

        norms = [
            jnp.linalg.norm(jax.grad(f)(run.params)["pred"]["kernel"])
            for f in (rec, gan)
        ]
        weight = norms[0] / (norms[1] + 1e-6)
        total = jax.grad(lambda p: rec(p) + 0.75 * weight * gan(p))(run.params)
        return *norms, weight, total, rec(run.params) + 0.75 * weight * gan(run.params)

    def critic(self, run, params, batch, key):
        """Returns gradient, loss and vectors of the critic, given the new decoder."""
        key = jax.random.fold_in(jax.random.fold_in(key, 2**31 - 1), run.step)
        keys = jax.random.split(jax.random.fold_in(key, 0))
        images = inputs.to_float(batch["image"])
        recon = self.decode(params, rae.encode(self.encoder, images))
        fake = jnp.clip(2 * recon - 1, -1, 1)
        fake = jnp.round((fake + 1) * 127.5) / 127.5 - 1
        iterate = discriminator.power_iteration
        once = iterate(run.critic.params, run.critic.vectors)
        twice = iterate(run.critic.params, once)

        def loss(critic):
            logits_fake = self.judge(critic, once, fake, keys[0])
            logits_real = self.judge(critic, twice, 2 * images - 1, keys[1])
            return adversarial.hinge_loss(logits_real, logits_fake)

        value, grads = jax.value_and_grad(loss)(run.critic.params)
        return value, grads, twice


@pytest.fixture(scope="module")
def plain(game):
    """The fourth step of the game by `Recipe`."""

    @jax.jit
    def compute(networks, run, new_params, batch):
        recipe = Recipe(game.config, networks)
        generator = recipe.generator(run, batch, game.key)
        return generator, recipe.critic(run, new_params, batch, game.key)

    before, after = game.states[3:5]
    args = (game.program.frozen, before, after.params, game.batches[3])
    return compute(*jax.device_get(args))


def test_adaptive_weight_is_the_ratio_of_true_gradients(game, plain):
    (rec, gan, weight, _, loss), _ = plain
    found = game.metrics[3]
    np.testing.assert_allclose(found["disc_weight"], weight, rtol=1e-4)
    np.testing.assert_allclose(found["grad_norm_gan"], gan, rtol=1e-4)
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-5)
    assert weight > 0.01 and rec > 0


def test_one_backward_pass_is_the_gradient_of_the_whole_loss(game, plain):
    """5e-5 of each largest entry: the terms are added in another order."""
    total = plain[0][3]
    close(moments(game.states[4].opt_state), total, 5e-5)
    np.testing.assert_allclose(
        game.metrics[3]["grad_norm"], optax.tree.norm(total), rtol=1e-5
    )


def test_critic_learns_from_what_the_new_decoder_makes(game, plain):
    """Gradients, loss and spectral vectors."""
    value, grads, vectors = plain[1]
    after = game.states[4].critic
    np.testing.assert_allclose(game.metrics[3]["loss_disc"], value, rtol=1e-5)
    close(moments(after.opt_state), grads, 1e-4)
    close(after.vectors, vectors)


def test_players_start_when_they_should(game):
    """The critic's half keeps every bit until then; its rate counts its updates."""
    states, metrics = game.states, game.metrics
    jax.tree.map(
        np.testing.assert_array_equal, states[0].critic, states[CRITIC_START].critic
    )
    assert [int(s.critic.step) for s in states] == [0, 0, 1, 2, 3]
    assert [int(s.step) for s in states] == [0, 1, 2, 3, 4]
    for i, found in enumerate(metrics):
        assert all(map(np.isfinite, found.values()))
        assert (found["loss_lpips"] > 0) == (i >= 1)
        assert (found["loss_disc"] > 0) == (i >= CRITIC_START)
        assert (found["disc_weight"] > 0) == (i >= START)
        assert (found["loss_gan"] != 0) == (i >= START)
    config = game.config
    for name, block, first in (
        ("lr", config.optimizer, 0),
        ("lr_critic", config.gan.optimizer, CRITIC_START),
    ):
        _, schedule = optimizers.make_optimizer(block, config.num_steps)
        expected = [float(schedule(i)) for i in range(4 - first)]
        np.testing.assert_allclose(
            [m[name] for m in metrics], [0.0] * first + expected, rtol=1e-6
        )


def test_until_it_hears_the_critic_the_decoder_is_as_without(game):
    """Neither the critic's gradients nor its draws reach it."""
    config = game.config.copy_and_resolve_references()
    config.gan.weight = 0.0
    with pytest.raises(configs.ConfigError, match="perceptual_start needs a critic"):
        registry.design(config)
    config.loss.perceptual_start = 0  # As it is in the game from the second step on.
    names = ("step", "params", "ema_params", "opt_state")
    before = state.TrainState(**{n: getattr(game.states[1], n) for n in names})
    args = jax.device_get((before, game.program.frozen, game.batches[1]))
    after, metrics = jax.jit(registry.design(config).step)(*args, game.key)
    for name in names[1:3]:
        close(getattr(game.states[2], name), getattr(after, name))
    np.testing.assert_allclose(game.metrics[1]["loss"], metrics["loss"], rtol=1e-5)
    assert "loss_disc" not in metrics


# ---- The same on other devices, from a checkpoint, in parts.


def test_large_arrays_of_both_players_are_sharded(game):
    for part in (game.states[-1].params, game.states[-1].critic.params):
        large = [
            x
            for path, x in jax.tree.leaves_with_path(part)
            if path[-1].key == "kernel" and np.prod(x.shape[-2:]) >= 2**8
        ]
        assert large and all("fsdp" in x.sharding.spec for x in large)


@pytest.mark.slow
def test_one_device_is_as_eight(game, tmp_path):
    """Two steps of both players: metrics 1e-4 rel, parameters 1e-6 abs."""
    config = game.config.copy_and_resolve_references()
    config.update(mesh=dict(data=1, fsdp=1))
    one = Game(config, tmp_path, game.batches[2:], start=game.states[2])
    for found, expected in zip(one.metrics, game.metrics[2:], strict=True):
        for name in expected:
            np.testing.assert_allclose(
                found[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name
            )
    found, expected = (
        (s.params, s.ema_params, s.critic.params, s.critic.vectors)
        for s in jax.device_get((one.states[-1], game.states[-1]))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found,
        expected,
    )


def test_resumed_run_ends_with_the_same_bits(game, tmp_path):
    """Both players, their optimisers and the spectral vectors, after step 2 of 4."""
    config = game.config.copy_and_resolve_references()
    config.every = dict(log=1, checkpoint=2, evaluate=0)
    for steps in (2, 4):
        config.num_steps = steps
        design = dataclasses.replace(game.program.design, num_steps=steps)
        program = dataclasses.replace(game.program, design=design)
        final = loop.run(program, config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, final, game.states[4])
    assert checkpoints.load_params(tmp_path)["pred"]["kernel"].shape == (32, 192)


OTHERS = [
    "optimizer.accumulate=2",
    "loss.perceptual_weight=0.0",
    "model.dtype=bfloat16",
    "noise.distribution=half_normal",
    "gan.dtype=bfloat16",
    "gan.critic_start=0",
    "gan.start=0",
    "gan.critic_updates=2",
    "gan.loss=vanilla",
    "gan.norm_groups=4",
    "gan.spectral_norm=False",
    "gan.augment.cutout=0.3",
    "guard.skip=True",
]


def test_state_is_float32_whatever_the_products_are():
    design = registry.design(load(*OTHERS))
    before = jax.eval_shape(design.init, jax.random.key(0))
    after, metrics = design.abstract_step()
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.dtype == jnp.float32 or jnp.issubdtype(a.dtype, jnp.integer)
    assert {x.dtype.name for x in metrics.values()} == {"float32"}


@pytest.mark.slow
def test_other_options_in_parts_and_in_bfloat16(tmp_path):
    game = Game(load(*OTHERS), tmp_path, 1)
    metrics, after = game.metrics[0], game.states[1]
    assert all(map(np.isfinite, metrics.values()))
    assert after.critic.step == 2 and after.critic.vectors == {}
    assert metrics["loss_disc"] > 0 and metrics["disc_weight"] > 0
    for name in ("skipped_steps", "grad_spikes", "grad_spikes_critic"):
        assert metrics[name] == 0
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), game.states[0].params, after.params
    )
    assert all(jax.tree.leaves(changed))


def test_parts_are_joined_in_their_order():
    x = jnp.arange(24).reshape(12, 2)
    parts = state.split_parts(x, 3)
    np.testing.assert_array_equal(parts[1], x[1::3])
    np.testing.assert_array_equal(state.join_parts(parts), x)

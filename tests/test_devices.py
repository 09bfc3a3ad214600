"""Eight devices, sharded or not, compute what one does; and the loop that runs them."""

import shutil

import chain
import jax
import numpy as np
import pytest
import toy_run
from ml_collections import ConfigDict

from rae_jax.layers import partition
from rae_jax.trainers import registry
from rae_jax.training import checkpoints, logs, loop

STEPS = 4
DEPTH = 8  # Divides by the devices, and yet must not be split.
LAYOUTS = {
    "eight": dict(data=8),
    "fsdp": dict(data=4, fsdp=2),
    "tensor": dict(data=2, fsdp=2, tensor=2),
}


def small_config(name: str, mesh: dict[str, int]) -> ConfigDict:
    config = chain.load(name, f"num_steps={STEPS}")
    config.every = dict(log=1, checkpoint=1, evaluate=0)
    config.keep = STEPS
    config.mesh.update(mesh)
    # AdamW divides the rounding of a vanishing gradient (of a key's bias, say) by
    # its own size, unless eps is well above it.
    config.optimizer.eps = 1e-3
    config.model.depth = DEPTH if name == "ldae" else (DEPTH, 1)
    return config


@pytest.fixture(
    scope="module",
    params=["ldae", pytest.param("latent_diffusion", marks=pytest.mark.slow)],
)
def runs(request, tmp_path_factory):
    """Final state and metrics of a run on one device, and from step 1 on on eight."""
    name, found = request.param, {}
    folders = tmp_path_factory.mktemp(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "MIN_SHARDED_SIZE", 2**8)
        one = folders / "one"
        found["one"] = registry.train(small_config(name, dict(data=1)), one)
        for layout, mesh in LAYOUTS.items():
            folder = folders / layout
            shutil.copytree(one, folder)
            for step in range(2, STEPS + 1):
                shutil.rmtree(checkpoints.folder(folder) / str(step))
            found[layout] = registry.train(small_config(name, mesh), folder)
    return {k: (s, logs.read_metrics(folders / k)) for k, s in found.items()}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_eight_devices_equal_one(runs, layout):
    """Losses 1e-5 rel; parameters, which move by about 1e-3, too or 1e-6 abs."""
    (one, one_metrics), (many, many_metrics) = runs["one"], runs[layout]
    for a, b in zip(one_metrics, many_metrics, strict=True):
        for key in ("step", "loss", "grad_norm", "lr"):
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, err_msg=key)
    assert len(one_metrics) == STEPS
    for part in ("params", "ema_params"):
        a, b = jax.device_get((getattr(one, part), getattr(many, part)))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b
        )


def specs(tree) -> dict[str, tuple]:
    leaves = jax.tree.leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): (*x.sharding.spec, *[None] * x.ndim)[: x.ndim]
        for path, x in leaves
    }


@pytest.mark.parametrize("layout", ["fsdp", "tensor"])
def test_parameters_and_moments_are_split_but_no_depth(runs, layout):
    state, _ = runs[layout]
    axis = {"fsdp": "fsdp", "tensor": ("fsdp", "tensor")}[layout]
    params = specs(state.params)
    large = {
        jax.tree_util.keystr(path)
        for path, x in jax.tree.leaves_with_path(state.params)
        if path[-1].key == "kernel" and np.prod(x.shape[-2:]) >= 2**8
    }
    split = {k for k, spec in params.items() if axis in spec}
    assert len(large) > 5 and large <= split
    for key in split:
        assert "blocks" not in key or params[key][0] is None
    assert any("blocks" in key for key in split)
    # The average and both moments of each parameter lie as the parameter does.
    assert specs(state.ema_params) == params
    moments = specs(state.opt_state)
    for name in ("mu", "nu"):
        found = {k.partition(f".{name}")[2]: v for k, v in moments.items()}
        assert {k: v for k, v in found.items() if k} == params
    for x in jax.tree.leaves(state):
        share = (2 if axis == "fsdp" else 4) if axis in x.sharding.spec else 1
        assert x.addressable_shards[0].data.size * share == x.size


def test_without_fsdp_everything_is_on_every_device(runs):
    for x in jax.tree.leaves(runs["eight"][0]):
        assert x.sharding.is_fully_replicated and len(x.addressable_shards) == 8


def test_step_compiles_once_and_its_state_is_donated(tmp_path, caplog):
    """A donated buffer that is not used would be a warning, here an error.

    While a checkpoint is being written, its arrays are copied instead.
    """
    states = []

    def evaluate(state, frozen, workdir):
        states.append(state)
        return {}

    config = toy_run.config(every=dict(log=2, checkpoint=0, evaluate=1))
    program = toy_run.program(config, evaluate=evaluate)
    with jax.log_compiles():
        loop.run(program, config, tmp_path)
    compiled = [m for m in caplog.messages if m.startswith("Compiling jit(step) ")]
    assert len(compiled) == 1
    for old in states[:-1]:
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert not any(x.is_deleted() for x in jax.tree.leaves(states[-1]))
    assert not program.frozen.is_deleted()


def test_run_stops_at_a_nan_and_keeps_no_such_state(tmp_path):
    """Saved each step, and continued once the batch is mended."""
    config = toy_run.config()
    bad = toy_run.program(config, poison=5)
    message = r"Step 5: grad_norm, loss is not finite \(grad_norm = nan, loss = nan, lr"
    for _ in range(2):  # The same again: resumed from step 4.
        with pytest.raises(FloatingPointError, match=message):
            loop.run(bad, config, tmp_path)
        assert checkpoints.finished_step(tmp_path) == 4
        for x in jax.tree.leaves(checkpoints.load_params(tmp_path, ("params",))):
            assert np.isfinite(x).all()
        assert [r["step"] for r in logs.read_metrics(tmp_path)] == [1, 2, 3, 4]
    final = loop.run(toy_run.program(config), config, tmp_path)
    assert final.step == 6
    assert [r["step"] for r in logs.read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]

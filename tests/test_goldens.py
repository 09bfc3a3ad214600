"""Reference values of the official PyTorch code; see golden/README.md.

Tolerances are those of that page, several times what float32 alone costs.
"""

import functools

import golden_map
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rae_jax.diffusion import guidance, paths, samplers, schedules
from rae_jax.layers import conditioning, mlp, norm, positions, resize
from rae_jax.models import decoder, dit, dit_dh

DIT_DH_CASES = ["base", "qknorm", "same_width", "layernorm_gelu"]
DIT_CASES = ["base", "qknorm", "patch2_layernorm_gelu_learn_sigma_norope"]
TABLES = ("pos_embed", "t_embedder.W")


def close(actual, desired, atol):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


def close_to_largest(actual, desired, rtol):
    close(actual, desired, rtol * np.abs(desired).max())


@functools.cache
def load_network(family: str, case: str, trainable_tables: bool = False):
    """Returns a network with the parameters of a case, and the case's arrays."""
    name = f"dit_dh_{case}" if family == "dit_dh" else "dit"
    arrays = golden_map.under(golden_map.read(name), f"{case}/")
    config = golden_map.config(arrays, "config")
    config["qk_norm"] = config.pop("use_qknorm")
    config.pop("wo_shift")
    if family == "dit_dh":
        config.pop("patch_size")
        trunk_depth, make = config["depth"][0], dit_dh.DiTDH
    else:
        trunk_depth, make = None, dit.DiT
    config |= dict(trainable_tables=trainable_tables, remat="none")
    model = nnx.eval_shape(lambda: make(**config, rngs=nnx.Rngs(0)))
    official = golden_map.under(arrays, "params/")
    return golden_map.load(model, official, trunk_depth), arrays, trunk_depth


def inputs(arrays):
    return golden_map.last(arrays["x"]), jnp.asarray(arrays["t"]), arrays["y"]


def run(function, *args):
    """Compiles a call as one program, which takes less time than all its parts."""
    return jax.jit(lambda *args: function(*args))(*args)


CASES = [("dit_dh", case, True) for case in DIT_DH_CASES]
CASES += [("dit", case, True) for case in DIT_CASES]
CASES += [("dit_dh", "base", False), ("dit", "base", False)]


@pytest.mark.parametrize("family, case, trainable_tables", CASES)
def test_velocity_loss_and_gradients(family, case, trainable_tables):
    """With the tables trainable, as the official trainer leaves them, and fixed."""
    model, arrays, trunk_depth = load_network(family, case, trainable_tables)
    graphdef, state = nnx.split(model, nnx.Param)
    target = golden_map.last(arrays["target"])

    def loss_of(params):
        out = nnx.merge(graphdef, params)(*inputs(arrays))
        return jnp.mean((out - target) ** 2), out

    @jax.jit
    def step(params):
        value, grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return value, grads, optax.tree.norm(grads)

    (loss, out), grads, norm_of_grads = step(nnx.to_pure_dict(state))
    close(out, golden_map.last(arrays["out"]), 1e-5)
    np.testing.assert_allclose(loss, arrays["loss"], rtol=1e-5)

    norm_name = "grad_norm_all"
    if not trainable_tables:
        norm_name = "grad_norm_without_pos_embed_and_W"
    np.testing.assert_allclose(norm_of_grads, arrays[norm_name], rtol=1e-5)

    official = golden_map.under(arrays, "grads/")
    assert official
    for key, value in official.items():
        path, index, value = golden_map.place(key, value, trunk_depth)
        if key in TABLES and not trainable_tables:
            value = np.zeros_like(value)
        close_to_largest(np.asarray(golden_map.get(grads, path))[index], value, 2e-5)


def test_activations_of_dit_dh():
    """Locates a discrepancy; the final layer's is the output itself."""
    model, arrays, trunk_depth = load_network("dit_dh", "base")
    x_t, t, y = inputs(arrays)
    act = functools.partial(golden_map.under(arrays, "act/").__getitem__)
    close(model.t_embedder(t), act("t_embedder"), 1e-5)
    close(model.y_embedder(y), act("y_embedder"), 1e-5)
    close(model.s_embedder(x_t), act("s_embedder"), 1e-5)
    close(model.x_embedder(x_t), act("x_embedder"), 1e-5)

    c = jax.nn.silu(model.t_embedder(t) + model.y_embedder(y))
    s = model.s_embedder(x_t) + model.pos_embed[...]
    _, trunk = model.blocks.features(s, c, positions.rotary_2d(16, 4))
    s = model.s_projector(model.trunk(x_t, t, y))
    close(s, act("s_projector"), 1e-5)
    x, rotary = model.x_embedder(x_t), positions.rotary_2d(16, 4)
    _, head = model.head_blocks.features(x, s, rotary)
    for i, out in enumerate([*trunk, *head]):
        close(out, act(f"blocks.{i}"), 1e-5)


def guidance_inputs():
    model, _, _ = load_network("dit_dh", "base")
    guide, guide_arrays, _ = load_network("dit_dh", "guide")
    arrays = golden_map.read("dit_dh_base")
    return model, guide, arrays, inputs(golden_map.under(arrays, "cfg/"))


@pytest.mark.parametrize("name", ["full", "interval"])
def test_classifier_free_guidance(name):
    model, _, arrays, args = guidance_inputs()
    interval = tuple(arrays["cfg/interval"]) if name == "interval" else (0.0, 1.0)
    guided = guidance.classifier_free(model, arrays["cfg/scale"], 10, interval)
    half = golden_map.last(arrays[f"cfg/out_{name}"])[:5]
    close(run(guided, *args), half, 1e-5)
    close(run(model, *args), golden_map.last(arrays["cfg/cond"]), 1e-5)


@pytest.mark.parametrize("name", ["full", "interval"])
def test_autoguidance(name):
    model, guide, arrays, args = guidance_inputs()
    arrays = golden_map.under(arrays, "autoguidance/")
    interval = tuple(arrays["interval"]) if name == "interval" else (0.0, 1.0)
    guided = guidance.autoguidance(model, guide, arrays["scale"], interval)
    close(run(guided, *args), golden_map.last(arrays[f"out_{name}"]), 1e-5)
    close(run(guide, *args), golden_map.last(arrays["guide_out"]), 1e-5)


def test_label_dropout(monkeypatch):
    model, _, arrays, (x_t, t, y) = guidance_inputs()
    arrays = golden_map.under(arrays, "label_dropout/")
    draw = jnp.asarray(arrays["u"])
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: draw.reshape(shape))
    dropped = conditioning.drop_labels(jnp.asarray(y), jax.random.key(0), 0.1, 10)
    np.testing.assert_array_equal(dropped, arrays["effective_y"])
    close(run(model, x_t, t, dropped), golden_map.last(arrays["out"]), 1e-5)


@functools.cache
def load_decoder():
    arrays = golden_map.read("decoder")
    config = golden_map.config(arrays, "config")
    model = decoder.RAEDecoder(
        config["in_dim"],
        config["num_patches"],
        config["patch_size"],
        config["decoder_hidden_size"],
        config["decoder_num_hidden_layers"],
        config["decoder_num_attention_heads"],
        config["decoder_intermediate_size"],
        layer_norm_eps=config["layer_norm_eps"],
        remat="none",
        rngs=nnx.Rngs(0),
    )
    close(model.pos_embed[...], arrays["init_decoder_pos_embed"], 1e-6)
    return golden_map.load(model, golden_map.under(arrays, "params/")), arrays


@pytest.mark.parametrize("case", ["n16", "n9", "n36"])
def test_decoder(case):
    """n9 and n36 resize the embedded tokens to the decoder's 16."""
    model, arrays = load_decoder()
    out = run(model, jnp.asarray(arrays[f"{case}/tokens"]))
    close(out, golden_map.last(arrays[f"{case}/image"]), 1e-5)


def test_decoder_gradients():
    model, arrays = load_decoder()
    graphdef, state = nnx.split(model, nnx.Param)
    target = golden_map.last(arrays["grad/target"])

    def loss_of(params, tokens):
        return jnp.mean(jnp.abs(nnx.merge(graphdef, params)(tokens) - target))

    step = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1)))
    tokens = jnp.asarray(arrays["n16/tokens"])
    loss, (grads, d_tokens) = step(nnx.to_pure_dict(state), tokens)
    np.testing.assert_allclose(loss, arrays["grad/loss"], rtol=1e-5)
    # The stored array is twice the derivative of the stored loss: finite differences
    # of that loss and all parameter gradients below say so.
    close_to_largest(2 * d_tokens, arrays["grad/d_tokens"], 2e-5)
    official = golden_map.under(arrays, "grad/params/")
    assert len(official) == 8
    for key, value in official.items():
        path, index, value = golden_map.place(key, value, None)
        close_to_largest(np.asarray(golden_map.get(grads, path))[index], value, 2e-5)


@pytest.mark.parametrize("shift", ["shift1", "shift256", "shift512"])
@pytest.mark.parametrize("name", ["uniform", "0_1", "-0.5_1.2"])
def test_training_times(shift, name):
    arrays = golden_map.under(golden_map.read("transport"), "time/")
    u = jnp.asarray(arrays["u"])
    if name == "uniform":
        key, t, atol = name, schedules.uniform_time(u), 1e-6
    else:
        mean, std = map(float, name.split("_"))
        # The inverse distribution function is evaluated in float32.
        key, atol = f"logit-normal_{name}", 2e-5
        t = schedules.logit_normal_time(u, mean, std)
    t = schedules.shift_time(t, float(arrays[f"{shift}/shift"]))
    close(t, arrays[f"{shift}/{key}"], atol)


def test_dimension_shift():
    arrays = golden_map.read("transport")
    for name, size in [("shift256", 16), ("shift512", 32)]:
        shift = schedules.dimension_shift(768 * size * size)
        np.testing.assert_allclose(shift, arrays[f"time/{name}/shift"], rtol=1e-6)


@pytest.mark.parametrize("name", ["uniform", "logit-normal_0_1"])
def test_flow_matching_loss(name):
    transport = golden_map.read("transport")
    arrays = golden_map.under(transport, f"loss/{name}/")
    x = golden_map.last(transport["loss/x1_data"])
    eps = golden_map.last(transport["loss/x0_noise"])
    make = dict(uniform=schedules.uniform_time).get(name, schedules.logit_normal_time)
    t = make(jnp.asarray(transport["loss/u"]))
    t = schedules.shift_time(t, schedules.dimension_shift(768 * 16 * 16))
    close(t, arrays["t"], 2e-5)

    x_t, v = paths.interpolate(x, eps, jnp.asarray(arrays["t"]))
    close(x_t, golden_map.last(arrays["xt"]), 1e-5)
    close(v, golden_map.last(arrays["target"]), 1e-5)
    model, _, _ = load_network("dit_dh", "base")
    v_pred = run(model, x_t, jnp.asarray(arrays["t"]), transport["loss/y"])
    close(v_pred, golden_map.last(arrays["pred"]), 1e-5)
    per_sample = jnp.mean((v_pred - v) ** 2, axis=(1, 2, 3))
    close(per_sample, arrays["loss_per_sample"], 1e-5)
    close(per_sample.mean(), arrays["loss"], 1e-5)


@pytest.mark.parametrize("shift", ["shift1", "shift256", "shift512"])
@pytest.mark.parametrize("num_points", [25, 50, 250])
def test_grids(shift, num_points):
    arrays = golden_map.read("transport")
    times = samplers.euler_times(num_points, float(arrays[f"time/{shift}/shift"]))
    close(times, arrays[f"grid/{shift}/{num_points}"], 1e-6)


SAMPLES = {
    "unguided": lambda model, guide: model,
    "cfg1.5_full": lambda model, guide: guidance.classifier_free(model, 1.5, 10),
    "cfg1.5_interval_0.3_0.9": lambda model, guide: guidance.classifier_free(
        model, 1.5, 10, (0.3, 0.9)
    ),
    "autoguidance1.42": lambda model, guide: guidance.autoguidance(model, guide, 1.42),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples(name):
    arrays = golden_map.under(golden_map.read("transport"), "sample/")
    model, guide, *_ = guidance_inputs()
    velocity = SAMPLES[name](model, guide)
    times = samplers.euler_times(50, float(arrays["shift"]))
    z, y = golden_map.last(arrays["z"]), jnp.asarray(arrays["y"])
    keep = (0, 1, 2, 10, 25, 40, 48)
    sample = jax.jit(samplers.sample_euler_states, static_argnums=(0, 4))
    out, states = sample(velocity, z, y, times, keep)
    close(out, golden_map.last(arrays[name]), 2e-5)
    if name == "unguided":
        official = arrays["unguided_trajectory_states_0_1_2_10_25_40_48"]
        close(states, np.moveaxis(official, 2, -1), 2e-5)


RESIZES = {
    "bicubic_aa": resize.resize_bicubic_antialias,
    "bicubic": resize.resize_bicubic,
    "bilinear": resize.resize_bilinear,
}
SOURCES = {"256": "image256", "64": "image64", "37": "table37", "14": "table14"}
SOURCES["12"] = "tokens12"


def test_resize():
    """The stored values carry float32 source coordinates, hence the tolerances."""
    arrays = golden_map.read("resize")
    cases = [key for key in arrays if key.endswith("/out")]
    assert len(cases) == 14
    for key in cases:
        mode, source, *_ = key.replace("bicubic_aa", "bicubic-aa").split("_")
        images = arrays[SOURCES[source]]
        if key.startswith("bilinear_64_224_crop"):
            images = images[:, :1, :24, :24]
        out = np.moveaxis(arrays[key], 1, -1)
        function = RESIZES[mode.replace("-", "_")]
        atol = 1e-4 if source == "256" else 3e-5
        close(function(golden_map.last(images), *out.shape[1:3]), out, atol)


@pytest.mark.parametrize(
    "head_dim, grid", [(64, 16), (72, 16), (128, 16), (72, 32), (128, 32), (16, 4)]
)
def test_rotary_tables(head_dim, grid):
    arrays = golden_map.read("rope_posembed")
    arrays = golden_map.under(arrays, f"rope/hd{head_dim}_G{grid}/")
    cos, sin = positions.rotary_2d(head_dim, grid)
    close(cos[arrays["rows"]], arrays["cos"], 5e-6)
    close(sin[arrays["rows"]], arrays["sin"], 5e-6)


def test_rotation():
    arrays = golden_map.under(golden_map.read("rope_posembed"), "rope/apply/")
    q = jnp.asarray(arrays["q"].transpose(0, 2, 1, 3))
    out = positions.apply_rotary(q, *positions.rotary_2d(16, 4))
    close(out, arrays["out"].transpose(0, 2, 1, 3), 5e-6)


@pytest.mark.parametrize(
    "dim, grid", [(48, 4), (96, 16), (384, 16), (1152, 16), (1152, 32)]
)
def test_sincos_tables(dim, grid):
    arrays = golden_map.read("rope_posembed")
    table, name = positions.sincos_2d(dim, grid), f"sincos/D{dim}_G{grid}"
    if name in arrays:
        close(table, arrays[name], 1e-6)
    else:
        close(table[arrays[f"{name}/rows"]], arrays[f"{name}/values"], 1e-6)


def test_time_embedding():
    arrays = golden_map.under(golden_map.read("rope_posembed"), "timestep/")
    official = golden_map.under(arrays, "params/")
    model = conditioning.FourierTimeEmbedding(24, rngs=nnx.Rngs(0))
    names = {"mlp.0": "fc1", "mlp.2": "fc2"}
    official = {
        names.get(k[:5], k[:5]) + k[5:]: v for k, v in official.items()
    }  # The file holds the bare embedder, without its place in a network.
    model = golden_map.load(model, official)
    close(model(jnp.asarray(arrays["t"])), arrays["out"], 5e-6)


def test_label_embedding():
    arrays = golden_map.under(golden_map.read("rope_posembed"), "label/")
    model = conditioning.LabelEmbedding(10, 24, rngs=nnx.Rngs(0))
    model = golden_map.load(model, {"table": arrays["table"]})
    y = jnp.asarray(arrays["y"])
    close(model(y), arrays["out"], 1e-6)
    dropped = jnp.where(jnp.asarray([True, False, True, False]), 10, y)
    close(model(dropped), arrays["out_forced_drop_1010"], 1e-6)


def test_rms_norm():
    arrays = golden_map.under(golden_map.read("rope_posembed"), "rmsnorm/")
    model = norm.RMSNorm(24, rngs=nnx.Rngs(0))
    model = golden_map.load(model, {"weight": arrays["weight"]})
    close(model(jnp.asarray(arrays["x"])), arrays["out"], 1e-6)


def test_swiglu():
    arrays = golden_map.read("rope_posembed")
    for width, inner in arrays["swiglu_hidden/widths"]:
        assert mlp.swiglu_width(int(width), 4.0) == inner
    arrays = golden_map.under(arrays, "swiglu/")
    model = mlp.SwiGLU(24, 64, rngs=nnx.Rngs(0))
    model = golden_map.load(model, golden_map.under(arrays, "params/"))
    close(model(jnp.asarray(arrays["x"])), arrays["out"], 1e-6)

"""What the training step sends between devices, and meshes of several slices."""

import dataclasses
import re

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rae_jax.layers import partition
from rae_jax.trainers import registry
from rae_jax.training import loop, sharding

DEPTH = 5
WHOLE, ROWS = "[{}, {}]", '[{"fsdp"}, {}]'
# The table of classes, and the time embedding of the frozen encoder.
FLOAT32 = {"11x32", "256x8", "8x32"}
CONSTRAINT = re.compile(
    r"(%\S+) = sdy.sharding_constraint (%\S+) <@mesh, (.*)> : tensor<([\dx]+)x(\w+)>"
)


@pytest.fixture(scope="module")
def lowered():
    """The step of a bfloat16 DiT-DH on data = 4, fsdp = 2, before it is compiled."""
    config = chain.load(
        "latent_diffusion", "model.dtype=bfloat16", "encoder.sizes.dtype=bfloat16"
    )
    config.model.depth = (DEPTH, 1)
    design = registry.design(config)
    mesh = sharding.make_mesh(dict(data=4, fsdp=2))

    def placed(tree, layout):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            layout if layout is not None else sharding.state_sharding(tree, mesh),
        )

    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(partition, "MIN_SHARDED_SIZE", 2**8)
        state = loop.abstract_state(design, config, mesh)
        rows = jax.tree.map(lambda _: sharding.batch_sharding(mesh), design.batch)
        key = jax.eval_shape(lambda: jax.random.key(0))
        shardings = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(design.step, out_shardings=(shardings, None), donate_argnums=0)
        return step.lower(
            state,
            placed(design.frozen, None),
            placed(design.batch, rows),
            placed(key, sharding.replicated(mesh)),
        )


def constraints(text: str) -> list[tuple[str, str, str, str, str]]:
    """Returns (result, operand, layout, shape, type) of pinned matrices."""
    found = [match.groups() for match in CONSTRAINT.finditer(text)]
    return [f for f in found if f[3].count("x") == 1]


def test_weights_are_gathered_and_gradients_scattered_in_the_products_type(lowered):
    """Kernels are cast before they are sent; those of the encoder's time are not."""
    found = [f for f in constraints(lowered.as_text()) if f[3] not in FLOAT32]
    gathered = [f for f in found if f[2] == WHOLE]
    stored = [f for f in found if "fsdp" in f[2] and "data" not in f[2]]
    assert {dtype for *_, dtype in found} == {"bf16"}
    # Forwards each kernel is pinned as it is stored and then whole; the gradient of
    # one that is trained is pinned as stored alone.
    assert len(gathered) > 20
    assert len(stored) >= len(gathered) + 15
    assert ROWS in {layout for _, _, layout, _, _ in stored}


@pytest.mark.optimised
def test_blocks_are_gathered_one_at_a_time(lowered):
    """The loop's body gathers; no stack of weights or moments is ever whole."""
    text = lowered.compile().as_text()
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
    gathered = {tuple(map(int, shape.split(","))) for shape in shapes}
    assert {(32, 96), (32, 32)} <= gathered | {shape[1:] for shape in gathered}
    assert not [shape for shape in gathered if shape[0] == DEPTH]


def test_state_sharding_splits_the_first_dimension_that_divides():
    mesh = sharding.make_mesh(dict(data=1, fsdp=4, tensor=2))
    both = ("fsdp", "tensor")
    cases = {  # Layout by shape, of kernels.
        (512, 256): (both,),
        (1004, 255): ("fsdp",),  # Not by fsdp and tensor.
        (1001, 256): (None, both),
        (1001, 255): (),
        (128, 256): (),
        (2**16,): (),
        (9, 64, 256): (None, both),
        (8, 8, 64, 256): (),
    }
    stacked = {  # Their first dimension is the depth.
        (512, 64, 1024): (None, both),
        (512, 63, 1041): (),
        (512, 32, 256): (),
        (512, 2**16): (),
    }
    tree = {
        "fc": [{"kernel": shape} for shape in cases],
        "blocks": {"block": [{"kernel": shape} for shape in stacked]},
        "pos_embed": (512, 256),
    }
    leaf = dict(is_leaf=lambda x: isinstance(x, tuple))
    tree = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, **leaf)
    specs = jax.tree.map(lambda s: tuple(s.spec), sharding.state_sharding(tree, mesh))
    assert [spec["kernel"] for spec in specs["fc"]] == list(cases.values())
    found = [spec["kernel"] for spec in specs["blocks"]["block"]]
    assert found == list(stacked.values())
    assert specs["pos_embed"] == ()
    for s in jax.tree.leaves(sharding.state_sharding(tree, sharding.make_mesh(8))):
        assert s.is_fully_replicated


def test_meshes_and_batches_that_do_not_fit_are_named():
    for sizes, message in (
        (9, r"data: 9, fsdp: 1, tensor: 1, but 8 device\(s\)"),
        (0, "data: 0.*at least 1"),
        (dict(data=-1, fsdp=-1), "one of them may be -1"),
        (dict(data=-1, fsdp=3), r"fsdp: 3.*8 device\(s\)"),
        (dict(dat=-1), "no axis 'dat'"),
    ):
        with pytest.raises(ValueError, match=message):
            sharding.make_mesh(sizes)
    mesh = sharding.make_mesh(dict(data=-1, fsdp=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    sharding.check_batch_size(32, mesh, 4)
    with pytest.raises(ValueError, match=r"24 is not a multiple of 16 \(8 devices x 2"):
        sharding.check_batch_size(24, mesh, 2)
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    assert sharding.batch_sharding(mesh).shard_shape((8, 3)) == (2, 3)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of a slice, as far as the layout of a mesh needs it."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "H100"


def test_slices_lie_along_data_as_far_as_it_divides():
    """Neighbours in fsdp and tensor are of one slice, if data has as many parts."""
    devices = [Device(i, i // 4, i // 4) for i in range(8)]
    for sizes in (dict(data=2, fsdp=4), dict(data=4, fsdp=2), dict(data=2, tensor=4)):
        mesh = sharding.make_mesh(sizes, devices)
        slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
        assert (slices == slices[:, :1, :1]).all()
        assert set(slices[:, 0, 0]) == {0, 1}
        assert len(set(mesh.devices.flat)) == 8
    # One replica over both slices: fsdp crosses them, tensor does not.
    mesh = sharding.make_mesh(dict(data=1, fsdp=4, tensor=2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices == slices[..., :1]).all()
    with pytest.raises(ValueError, match="tensor: 8.*of one process"):
        sharding.make_mesh(dict(data=1, tensor=8), devices)

"""MAE against ViTMAEForPreTraining of transformers: values and gradients."""

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rae_jax.convert import mae_names, sources, tables
from rae_jax.models import mae
from rae_jax.trainers import mae as trainer

pytestmark = pytest.mark.parity
TOLERANCE = 1e-5
SETTINGS = dict(
    image_size=32,
    patch_size=8,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    decoder_hidden_size=24,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=40,
)


@pytest.fixture(scope="module")
def theirs():
    """With random biases and positions too, of which transformers 5 makes zeros."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(**SETTINGS, norm_pix_loss=True)
    torch.manual_seed(0)
    model = transformers.ViTMAEForPreTraining(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return folder


def inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((3, 32, 32, 3)).astype(np.float32)
    return images, rng.random((3, 16)).astype(np.float32)


def call(theirs, norm_pixels: bool):
    import torch

    images, noise = inputs()
    theirs.config.norm_pix_loss = norm_pixels
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    return theirs(pixels, noise=torch.from_numpy(noise))


def close(ours, theirs, what=""):
    theirs = np.asarray(theirs)
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert error < TOLERANCE, f"{what}: {error:.1e}"


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_loss_and_predictions(theirs, folder, norm_pixels):
    model = mae.MAE.from_pretrained(folder)
    images, noise = inputs()
    predicted, mask = model(images, noise)
    expected = call(theirs, norm_pixels)
    close(predicted, expected.logits.detach())
    np.testing.assert_array_equal(mask, expected.mask)
    loss, _ = trainer.errors(model, jnp.asarray(images), noise, norm_pixels)
    close(loss, expected.loss.detach())


def test_gradients_of_all_parameters(theirs, folder):
    """As tensors of theirs: through the table of names, the same for both."""
    model = mae.MAE.from_pretrained(folder)
    images, noise = inputs()

    def loss(model):
        return trainer.errors(model, jnp.asarray(images), noise, True)[0]

    grads = nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(model))
    flat = {
        ".".join(map(str, path)): np.asarray(x)
        for path, x in flax.traverse_util.flatten_dict(grads).items()
    }
    theirs.zero_grad()
    call(theirs, True).loss.backward()
    arrays = {
        name: np.asarray(p.grad) if p.grad is not None else np.zeros(p.shape, "f4")
        for name, p in theirs.named_parameters()
    }
    source = mae_names.canonical(sources.from_arrays(arrays, "gradients"))
    shapes = {name: x.shape for name, x in flat.items()}
    items = tables.to_ours(mae_names.table(**model.arguments), source, shapes)
    expected = dict(items)
    assert expected.keys() == flat.keys()
    largest = max(np.abs(x).max() for x in expected.values())
    for name, grad in expected.items():
        if name.endswith("pos_embed"):
            assert not np.any(flat[name])
        else:
            error = np.abs(flat[name] - grad).max()
            assert error < TOLERANCE * max(np.abs(grad).max(), 1e-2 * largest), name


def test_ours_is_read_by_transformers(theirs, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = mae_names.arguments(theirs.config.to_dict())
    model = nnx.jit(lambda: mae.MAE(**sizes, rngs=nnx.Rngs(3)))()
    model.save_pretrained(tmp_path, "huggingface")
    loaded, report = transformers.ViTMAEForPreTraining.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    images, noise = inputs()
    predicted, _ = model(images, noise)
    close(predicted, call(loaded.eval(), True).logits.detach())
    folder = tmp_path / "encoder"
    model.encoder.save_pretrained(folder, "huggingface")
    encoder, report = transformers.ViTMAEModel.from_pretrained(
        folder, output_loading_info=True, mask_ratio=0.0
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]

"""l-DAE encoders in transformers: exported, loaded by its own class, equal."""

import jax
import networks
import numpy as np
import pytest
from flax import nnx

from rae_jax.models import ldae_encoder, vit_encoder

pytestmark = pytest.mark.parity
SIZES = dict(
    image_size=32,
    patch_size=8,
    latent_dim=24,
    hidden_size=32,
    depth=3,
    num_heads=2,
    time_index=40,
)
CASES = {
    "image": {},
    "raw": dict(clean="raw"),
    "latent": dict(tokenizer="patch_vae", input_space="latent", num_classes=3),
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_exported_encoder_is_the_same_in_transformers(changes, tmp_path):
    """hidden_states[-1] are the raw features, last_hidden_state the tokens: 1e-5."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    encoder = networks.drawn(ldae_encoder.LDAEEncoder, **SIZES | changes)
    graphdef, params = nnx.split(encoder)  # Smaller, so that tokens differ in size.
    encoder = nnx.merge(graphdef, jax.tree.map(lambda p: 0.5 * p, params))
    encoder.save_pretrained(tmp_path, layout="huggingface")
    theirs = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(theirs) is transformers.IJepaModel
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    x = processor(list(pixels), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = theirs(x, output_hidden_states=True)
    normalised = pixels.astype(np.float32) / 127.5 - 1
    run = jax.jit(lambda encoder, x: (encoder.raw_features(x), encoder(x)))
    raw, tokens = map(np.asarray, run(encoder, normalised))
    last = theirs(x).last_hidden_state
    ours = vit_encoder.ViTEncoder.from_pretrained(tmp_path)(normalised)
    for found, expected in (
        (out.hidden_states[-1], raw),
        (last.detach(), tokens),
        (ours, tokens),
    ):
        bound = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=bound)

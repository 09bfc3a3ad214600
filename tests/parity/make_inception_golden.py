"""Writes tests/golden/inception.npz with the official PyTorch ports of Inception.

    pip install torch torchvision torch-fidelity pytorch-fid
    python tests/parity/make_inception_golden.py

Weights and images are those of tests/seeded.py. torch-fidelity gives the outputs;
pytorch-fid has to agree on the names of the weights and on the pooled features. The
networks run in float64, the resizing, whose positions are part of its definition, in
float32. Nothing is downloaded.
"""

import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from pytorch_fid import inception as pytorch_fid
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
import seeded  # noqa: E402

SIZES = [(40, 64), (333, 301)]  # Enlarged and reduced.
FEATURES = ["2048", "logits_unbiased", "logits"]
SPATIAL_CHANNELS = 7  # The ADM evaluator's, of what TensorFlow calls mixed_6/conv.


def state_dict_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns seeded weights under the model's names."""
    return {
        name: torch.from_numpy(seeded.weight(name, tuple(value.shape)))
        for name, value in model.state_dict().items()
    }


def make_fidelity() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Returns torch-fidelity's extractor in float64 and its weights."""
    with (
        mock.patch.object(torch.nn.Module, "load_state_dict"),
        mock.patch.object(fidelity, "load_state_dict_from_url"),
    ):
        empty = fidelity.FeatureExtractorInceptionV3("empty", FEATURES)
    weights = state_dict_of(empty)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights.pth"
        torch.save(weights, path)
        extractor = fidelity.FeatureExtractorInceptionV3(
            "seeded", FEATURES, feature_extractor_weights_path=path
        )
    return extractor, weights


def make_pytorch_fid(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Returns pytorch-fid's network, which loads the same weights strictly."""
    with mock.patch.object(pytorch_fid, "load_state_dict_from_url") as load:
        load.return_value = weights
        model = pytorch_fid.InceptionV3(resize_input=False, normalize_input=False)
    return model.eval()


def run(extractor, image: np.ndarray, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Returns the outputs for one uint8 image (1, h, w, 3)."""
    resize = fidelity.interpolate_bilinear_2d_like_tensorflow1x
    taken = {}

    def resize_in_float32(x, **options):
        taken["resized"] = resize(x.float(), **options)
        return taken["resized"].to(dtype)

    def take_spatial(module, args, output):
        taken["spatial"] = output

    extractor.to(dtype).feature_extractor_internal_dtype = dtype
    hook = extractor.Mixed_6d.branch1x1.register_forward_hook(take_spatial)
    x = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    name = "interpolate_bilinear_2d_like_tensorflow1x"
    with torch.no_grad(), mock.patch.object(fidelity, name, resize_in_float32):
        pool, unbiased, logits = extractor(x)
    hook.remove()
    spatial = taken["spatial"][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
    outputs = dict(pool=pool, logits_unbiased=unbiased, logits=logits, spatial=spatial)
    # A few rows and columns show the positions; the whole image would be a megabyte.
    outputs["resized_row"] = taken["resized"][0, :, 200].T
    outputs["resized_column"] = taken["resized"][0, :, :, 200].T
    return {k: v.float().numpy() for k, v in outputs.items()} | {
        "input": (taken["resized"].double() - 128) / 128
    }


def main():
    extractor, weights = make_fidelity()
    second = make_pytorch_fid(weights).double()
    shapes = {name: list(value.shape) for name, value in weights.items()}
    arrays = {"shapes": np.array(json.dumps(shapes)), "sizes": np.array(SIZES)}
    for height, width in SIZES:
        image = seeded.image(height, width)
        rounded = run(extractor, image, torch.float32)
        exact = run(extractor, image, torch.float64)
        with torch.no_grad():
            pool = second(exact.pop("input"))[0].flatten(1).float().numpy()
        np.testing.assert_allclose(pool, exact["pool"], rtol=1e-6)
        for name, value in exact.items():
            arrays[f"{height}x{width}/{name}"] = value
            rounding = np.abs(rounded[name] - value).max() / np.abs(value).max()
            print(f"{height}x{width}/{name}: float32 costs {rounding:.1e} of the max")
    np.savez_compressed(TESTS / "golden" / "inception.npz", **arrays)


if __name__ == "__main__":
    main()

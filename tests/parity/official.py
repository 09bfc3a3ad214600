"""The PyTorch side of `full_size.py`: the official classes with random weights.

    python official.py make|check MODEL FOLDER CHECKOUT

`make` writes weights and outputs of a model, `check` loads what came back. Both import
from a checkout of github.com/bytetriper/RAE, without changing it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import torch
import transformers

SEED, NOISE = 0, 0.02
DIT_DH = dict(
    input_size=16,
    patch_size=1,
    in_channels=768,
    mlp_ratio=4.0,
    class_dropout_prob=0.1,
    num_classes=1000,
    use_qknorm=False,
    use_swiglu=True,
    use_rope=True,
    use_rmsnorm=True,
    wo_shift=False,
    use_pos_embed=True,
)
SIZES = {
    "dit_dh_s": dict(hidden_size=[384, 2048], depth=[12, 2], num_heads=[6, 16]),
    "dit_dh_xl": dict(hidden_size=[1152, 2048], depth=[28, 2], num_heads=[16, 16]),
}
IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
# Official encoder class, its argument for the folder, input size, pixel statistics.
ENCODERS = {
    "rae_dinov2": ("Dinov2withNorm", "dinov2_path", 224, IMAGENET),
    "rae_mae": ("MAEwNorm", "model_name", 256, IMAGENET),
    "rae_siglip2": (
        "SigLIP2wNorm",
        "model_name",
        256,
        dict(image_mean=[0.5] * 3, image_std=[0.5] * 3),
    ),
}
# transformers 5 renames these in memory; the official code pins a 4.
NEW_SPELLINGS = [
    (r"attention\.attention\.(q)uery\.", r"attention.\1_proj."),
    (r"attention\.attention\.(k)ey\.", r"attention.\1_proj."),
    (r"attention\.attention\.(v)alue\.", r"attention.\1_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
]
NEW_MAE_SPELLINGS = [
    (r"^encoder\.model\.encoder\.layer\.", "encoder.model.layers."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
]


class _Named(type):
    """A class all of whose public attributes are their names."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(types.ModuleType):
    """A module in which every public name is a class that does nothing."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision, which the official modules import and do not need here."""

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


def prepare_imports(checkout: Path) -> None:
    """Makes the official modules importable."""
    # These must be loaded before a stub makes transformers look for torchvision.
    for name in ("Dinov2WithRegistersModel", "SiglipModel", "ViTMAEForPreTraining"):
        getattr(transformers, name)
    transformers.AutoConfig, transformers.AutoImageProcessor  # noqa: B018
    sys.path.insert(0, str(checkout / "src"))
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Stubs())


def build(model: str, folder: Path, checkout: Path) -> torch.nn.Module:
    """Returns an official model in evaluation mode, as it is initialised."""
    prepare_imports(checkout)
    torch.manual_seed(SEED)
    if model in SIZES:
        from stage2.models.DDT import DiTwDDTHead

        return DiTwDDTHead(**DIT_DH, **SIZES[model]).eval()
    from stage1 import rae

    encoder_cls, argument, input_size, pixels = ENCODERS[model]
    # The real one wants torchvision; the official code reads two values of it.
    rae.AutoImageProcessor = types.SimpleNamespace(
        from_pretrained=lambda path: types.SimpleNamespace(**pixels)
    )
    encoder = save_encoder(model, folder / "encoder")
    stats = folder / "stat.pt"
    if not stats.exists():
        grid = (768, 16, 16)
        torch.save({"mean": None, "var": torch.rand(grid) + 0.5}, stats)
    return rae.RAE(
        encoder_cls=encoder_cls,
        encoder_config_path=str(encoder),
        encoder_input_size=input_size,
        encoder_params={argument: str(encoder)},
        decoder_config_path=str(decoder_config(folder, checkout)),
        normalization_stat_path=str(stats),
        noise_tau=0.0,
    ).eval()


def save_encoder(model: str, folder: Path) -> Path:
    """Writes a Hugging Face folder of the encoder's size with random weights."""
    if folder.exists():
        return folder
    if model == "rae_dinov2":
        config = transformers.Dinov2WithRegistersConfig(image_size=518, patch_size=14)
        network = transformers.Dinov2WithRegistersModel(config)
    elif model == "rae_mae":
        network = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig())
    else:
        vision = dict(image_size=256, patch_size=16)
        text = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1)
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        network = transformers.SiglipModel(config)
    network.save_pretrained(folder)
    pixels = ENCODERS[model][3]
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def decoder_config(folder: Path, checkout: Path) -> Path:
    """Copies the official ViT-XL settings with a number where they have a text.

    transformers 5 refuses a patch size of "SHOULD BE RELOADED".
    """
    settings = checkout / "configs" / "decoder" / "ViTXL" / "config.json"
    settings = json.loads(settings.read_text()) | {"patch_size": 16}
    target = folder / "decoder"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps(settings))
    return target


def make(model: str, folder: Path, checkout: Path) -> None:
    """Writes model.pt, and data.npz with inputs and outputs."""
    network = build(model, folder, checkout)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=NOISE)
    torch.save(network.state_dict(), folder / "model.pt")
    rng = np.random.default_rng(SEED)
    data = {}
    if model in SIZES:
        data["x_t"] = rng.standard_normal((2, 768, 16, 16), np.float32)
        data["t"] = np.array([0.3, 0.9], np.float32)
        data["y"] = np.array([207, 1000])
        inputs = {name: torch.from_numpy(value) for name, value in data.items()}
        with torch.no_grad():
            data["v"] = network(**_renamed(inputs)).numpy()
    else:
        for size in sorted({ENCODERS[model][2], 256}):
            images = rng.random((1, 3, size, size), np.float32)
            data[f"images_{size}"] = images
            with torch.no_grad():
                z = network.encode(torch.from_numpy(images))
                data[f"z_{size}"] = z.numpy()
        with torch.no_grad():
            data["recon"] = network.decode(z).numpy()
    np.savez(folder / "data.npz", **data)


def _renamed(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"x": inputs["x_t"], "t": inputs["t"], "y": inputs["y"]}


def check(model: str, folder: Path, checkout: Path) -> None:
    """Loads back.pt strictly and compares it with model.pt to the bit."""
    back = torch.load(folder / "back.pt", weights_only=True)
    network = build(model, folder, checkout)
    if int(transformers.__version__.split(".")[0]) >= 5:
        back = {new_spelling(name, model): value for name, value in back.items()}
    network.load_state_dict(back, strict=True)
    loaded = network.state_dict()
    first = torch.load(folder / "model.pt", weights_only=True, mmap=True)
    if set(first) != set(loaded):
        raise SystemExit(f"Other names: {set(first) ^ set(loaded)}")
    for name, value in first.items():
        if value.dtype != loaded[name].dtype or not torch.equal(value, loaded[name]):
            raise SystemExit(f"{name} differs")
    if model in ENCODERS:
        stats = [
            torch.load(path / "stat.pt", weights_only=True)
            for path in (folder, folder / "back")
        ]
        if stats[1]["mean"] is not None or not torch.equal(*[s["var"] for s in stats]):
            raise SystemExit("stat.pt differs")
    print(json.dumps({"tensors": len(first)}))


def new_spelling(name: str, model: str) -> str:
    """Returns the name that transformers 5 gives a tensor of the encoder."""
    if not name.startswith("encoder.") or model == "rae_siglip2":
        return name
    spellings = list(NEW_SPELLINGS)
    spellings += NEW_MAE_SPELLINGS if model == "rae_mae" else []
    for pattern, replacement in spellings:
        name = re.sub(pattern, replacement, name)
    return name


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](
        sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    )

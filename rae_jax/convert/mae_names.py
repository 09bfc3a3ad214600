"""Names of a whole masked autoencoder's tensors, as facebook/vit-mae-base has them."""

import re
from collections.abc import Mapping
from typing import Any

from rae_jax.convert import encoder_configs, encoder_names, sources, tables

MODEL_TYPE = "vit_mae"
FAMILY = "mae"
_ENCODER = ("image_size", *encoder_names.SIZES)
_DECODER = {  # Ours, theirs, and the default of the class in transformers.
    "decoder_hidden_size": ("decoder_hidden_size", 512),
    "decoder_depth": ("decoder_num_hidden_layers", 8),
    "decoder_num_heads": ("decoder_num_attention_heads", 16),
    "decoder_intermediate_size": ("decoder_intermediate_size", 2048),
    "mask_ratio": ("mask_ratio", 0.75),
}
_SPELLINGS = (  # transformers 5 -> 4, in which published files are.
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def canonical(source: sources.TensorSource) -> sources.TensorSource:
    """Returns the tensors of a masked autoencoder under the names of `table`."""
    names = {}
    for old in source.shapes:
        name = old
        for pattern, replacement in _SPELLINGS:
            name = re.sub(pattern, replacement, name)
        names[name] = old
    return sources.renamed(source, names)


def table(**arguments: Any) -> tables.Table:
    """Returns the table of all tensors, from the constructor's arguments."""
    sizes = {name: arguments[name] for name in _ENCODER}
    encoder = encoder_names.table(FAMILY, normalize=False, **sizes)
    return tables.joined(
        tables.prefixed(encoder, "vit.", "encoder."),
        tables.prefixed(_decoder(arguments), "decoder.", "decoder."),
    )


def _decoder(arguments: Mapping[str, Any]) -> tables.Table:
    like = encoder_names.table(
        FAMILY,
        normalize=False,
        depth=arguments["decoder_depth"],
        hidden_size=arguments["decoder_hidden_size"],
        intermediate_size=arguments["decoder_intermediate_size"],
        patch_size=arguments["patch_size"],
        image_size=arguments["image_size"],
    )
    blocks = [
        entry._replace(name=entry.name.replace("encoder.layer.", "decoder_layers."))
        for entry in like.entries
        if entry.path.startswith("blocks.")
    ]
    others = [
        tables.Entry("mask_token", "mask_token"),
        tables.Entry("decoder_pos_embed", "pos_embed"),
        tables.Entry("decoder_norm.weight", "norm.scale"),
        tables.Entry("decoder_norm.bias", "norm.bias"),
    ]
    for name in ("embed", "pred"):
        others += [
            tables.Entry(f"decoder_{name}.weight", f"{name}.kernel", "linear"),
            tables.Entry(f"decoder_{name}.bias", f"{name}.bias"),
        ]
    return tables.Table((*blocks, *others))


def arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the constructor's arguments from the contents of a `config.json`."""
    _, sizes = encoder_configs.sizes_from_config(settings)
    found = {name: sizes[name] for name in _ENCODER}
    for ours, (theirs, default) in _DECODER.items():
        found[ours] = settings.get(theirs, default)
    return found


def settings(**arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns `config.json` and `preprocessor_config.json` of a masked autoencoder."""
    sizes = {name: arguments[name] for name in _ENCODER}
    config, preprocessor = encoder_configs.config_from_sizes(FAMILY, sizes)
    config["architectures"] = ["ViTMAEForPreTraining"]
    config |= {theirs: arguments[ours] for ours, (theirs, _) in _DECODER.items()}
    return config, preprocessor

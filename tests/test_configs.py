"""Every variant of every experiment file, and how mistakes in them are answered."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rae_jax import blocks
from rae_jax import config as configs
from rae_jax.trainers import registry
from rae_jax.training import checkpoints, logs, resuming

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
MODULES = {path.stem: configs.load_module(path) for path in FILES}


def rows(module) -> tuple[str, ...]:
    """The rows of tables that a file generates its variants from, if it does."""
    return tuple(getattr(module, "ROWS", ()))


def written_out(module) -> list[str]:
    """Variants but those of rows, at their tiers, which have tests of their own."""
    return [name for name in module.VARIANTS if not name.startswith(rows(module))]


VARIANTS = [f"{stem}:{name}" for stem, m in MODULES.items() for name in written_out(m)]
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def load(variant: str, *overrides: str) -> ConfigDict:
    stem, name = variant.split(":")
    path = FILES[0].with_name(f"{stem}.py")
    return configs.load_config(f"{path}:{name}", [f"--config.{o}" for o in overrides])


@EVERY_FILE
def test_docstring_names_all_variants(path):
    module = MODULES[path.stem]
    assert "smoke" in module.VARIANTS
    _, _, described = module.__doc__.partition("Variants: ")
    words = set(re.findall(r"\w+", described))
    names = {*written_out(module), *rows(module)}
    assert names <= words, names - words
    assert configs.load_config(str(path)).trainer in registry.TRAINERS


@EVERY_VARIANT
def test_variant_builds_and_steps_by_shape(variant):
    """The largest network as the smallest: nothing is allocated or read."""
    config = load(variant)
    design = registry.design(config)
    before = jax.eval_shape(design.init, jax.random.key(0))
    after, metrics = design.abstract_step()
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), before, after
    )
    assert all(jax.tree.leaves(same)) and metrics
    for shape in design.batch.values():
        assert shape.shape[0] == design.batch_size == config.data.batch_size
    assert design.num_steps == config.num_steps


@EVERY_VARIANT
def test_model_flops_are_counted(variant):
    multiplies = variant != "latent_stats:pixels"
    assert (registry.model_flops(load(variant)) > 0) == multiplies


@pytest.mark.parametrize("variant", ["ldae:vit_b", "rae_decoder:xl", "dit_dh:xl_256"])
def test_model_flops_leave_recomputation_out(variant):
    config, model, executed = load(variant), set(), {}
    for remat in ("none", "dots", "full"):
        config.model.remat = remat
        if "gan" in config:
            config.gan.backbone.sizes.remat = remat
        model.add(registry.model_flops(config))
        executed[remat] = registry.design(config).step_flops()
    assert model == {executed["none"]}
    assert executed["none"] < executed["dots"] < executed["full"]


def test_model_flops_of_the_large_ldae_are_closed_form():
    """Per token 2 x weights, attention 4 n d per block; backward twice that; 2 %.

    The rest are the patch PCA of the noise and of the loss.
    """
    config = load("ldae:vit_b")
    d, depth, n, b = 768, 24, 256, 2048
    per_token = depth * (2 * 12 * d**2 + 4 * n * d) + 2 * 2 * 768 * d
    expected = 3 * per_token * n * b
    np.testing.assert_allclose(registry.model_flops(config), expected, rtol=0.02)


@EVERY_VARIANT
def test_config_survives_its_copy_in_a_workdir(variant, tmp_path):
    """Tuples too, which JSON stores as lists; and the step stays the same."""
    config = load(variant)
    path = tmp_path / checkpoints.CONFIG_NAME
    configs.save_config(config, path)
    stored = configs.read_config(path)
    assert stored.to_dict() == config.to_dict()
    assert configs.differences(stored, config) == []
    assert registry.design(stored).batch_size == config.data.batch_size
    assert stored.is_locked
    assert resuming.same(stored, config)


OUTPUTS = {
    "tokenizer": ["reconstructions.png"],
    "mae": ["masked.png"],
    "mocov3": ["views.png"],
    "ldae": ["tokenizer.npz", "denoising.png"],
    "probe": ["probe.json"],
    "finetune": ["finetune.json"],
    "rae_decoder": ["reconstructions.png"],
    "latent_stats": ["latent_stats.npz"],
    "dit_dh": [],
    "dit": [],
    "claims": [],
    "ldae_claims": [],
}
SCORES = {"ldae": "denoised_psnr", "probe": "top1_encoder", "rae_decoder": "psnr"}
SCORES |= {"mae": "held_out_loss", "mocov3": "held_out_accuracy"}
SCORES |= {"finetune": "ema_top1", "tokenizer": "psnr"}


@pytest.mark.parametrize("stem", MODULES)
def test_smoke_variant_trains(stem, tmp_path):
    """On one device, to spare compile time; three steps, an evaluation, the results."""
    config = load(f"{stem}:smoke", "mesh.data=1")
    registry.train(config, tmp_path)
    records = logs.read_metrics(tmp_path)
    assert [r["step"] for r in records if "images_per_second" in r] == [2, 3]
    assert all(np.isfinite(list(r.values())).all() for r in records)
    assert checkpoints.finished_step(tmp_path) == 3
    assert registry.is_finished(config, tmp_path)
    stored = json.loads((tmp_path / checkpoints.CONFIG_NAME).read_text())
    assert stored["trainer"] == config.trainer
    for name in OUTPUTS[stem]:
        assert (tmp_path / name).stat().st_size > 0, name
    if stem in SCORES:
        assert SCORES[stem] in records[-1]
    longer = config.copy_and_resolve_references()
    longer.num_steps = 4
    assert not registry.is_finished(longer, tmp_path)


# Mistakes


def refuse(message: str, variant: str, *overrides: str) -> None:
    with pytest.raises(configs.ConfigError, match=message):
        load(variant, *overrides)


def test_unknown_names_are_answered_with_the_nearest():
    refuse("variant 'smoek'. Did you mean 'smoke'. Choose from: vit_b", "ldae:smoek")
    refuse(
        "'optimizer.peak_rl'. Did you mean 'optimizer.peak_lr'",
        "ldae:smoke",
        "optimizer.peak_rl=1",
    )
    refuse("config key 'model'", "ldae:smoke", "model=1")
    config = load("ldae:smoke", "trainer=ldea")
    with pytest.raises(ValueError, match="trainer 'ldea'. Did you mean 'ldae'"):
        registry.design(config)
    config = load("dit_dh:smoke", "network=dit_hd")
    with pytest.raises(ValueError, match="network 'dit_hd'. Did you mean 'dit_dh'"):
        registry.design(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_steps=many", "num_steps.*many"),
        ("num_steps=1.5", "num_steps.*1.5"),
        ("guard.skip=maybe", "guard.skip.*maybe"),
        ("optimizer.peak_lr=fast", "peak_lr.*fast"),
    ],
)
def test_values_of_another_type_are_named(override, message):
    refuse(f"(?s){message}", "ldae:smoke", override)


def test_overrides_reach_the_config():
    config = load(
        "dit_dh:smoke",
        "num_steps=7",
        "mesh.fsdp=4",
        "guard.skip=true",
        "optimizer.peak_lr=1",
        "model.depth=(3, 2)",
        "encoder.weights=some where",
    )
    assert config.num_steps == 7 and config.guard.skip is True
    assert config.mesh.to_dict() == dict(data=-1, fsdp=4, tensor=1)
    assert config.optimizer.peak_lr == 1.0
    assert config.model.depth == (3, 2)
    assert config.encoder.weights == "some where"


def test_malformed_calls_are_explained(tmp_path):
    path = str(FILES[0])
    with pytest.raises(configs.ConfigError, match="overrides look like --config.key"):
        configs.load_config(path, ["--confg.num_steps=1"])
    with pytest.raises(configs.ConfigError, match="No config file 'no.py'"):
        configs.load_config("no.py:smoke")
    empty = tmp_path / "empty.py"
    empty.write_text("")
    with pytest.raises(configs.ConfigError, match="no get_config and VARIANTS"):
        configs.load_config(str(empty))
    with pytest.raises(configs.ConfigError, match="is not the workdir"):
        configs.read_config(tmp_path / checkpoints.CONFIG_NAME)


def apply(variants: dict, name: str) -> ConfigDict:
    return configs.apply_variant(blocks.run("ldae", num_steps=3), variants, name)


def test_variants_inherit_and_are_checked():
    variants = {
        "a": dict(num_steps=5, every=dict(log=1)),
        "b": dict(inherits="a", seed=1),
        "loop": dict(inherits="loop"),
        "lost": dict(inherits="aa"),
        "key": dict(every=dict(lgo=1)),
        "type": dict(num_steps="many"),
    }
    config = apply(variants, "b")
    assert (config.num_steps, config.seed, config.every.log) == (5, 1, 1)
    assert config.every.checkpoint == 5_000 and config.is_locked
    for name, message in {
        "loop": "'loop' inherits from itself",
        "lost": "Unknown variant 'aa'. Did you mean 'a'",
        "key": "variant 'key': key 'every.lgo'. Did you mean 'every.log'",
        "type": "Variant 'type': .*num_steps",
    }.items():
        with pytest.raises(configs.ConfigError, match=message):
            apply(variants, name)


def test_differences_name_every_changed_leaf():
    old, new = load("dit_dh:smoke"), load("dit_dh:smoke", "model.depth=(3, 2)")
    assert configs.differences(old, new) == ["model.depth: (2, 1) -> (3, 2)"]
    with new.unlocked():
        new.extra = 1
    assert configs.differences(old, new)[0] == "extra: '(absent)' -> 1"

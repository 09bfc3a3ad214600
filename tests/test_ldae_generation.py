"""Samples of l-DAE runs that are diffusion models, and refusals of the others."""

import dataclasses
import json

import chain
import jax
import numpy as np
import pytest

from rae_jax import config as configs
from rae_jax import main
from rae_jax.trainers import denoising_chain, denoising_scores, generation, registry
from rae_jax.trainers import judges as judging
from rae_jax.training import sharding

CONFIG = chain.ROOT / "configs" / "ldae.py"
LABELS = np.array([3, 1, 4, 1, 5], np.int32)


def load(variant, *overrides):
    return configs.load_config(
        f"{CONFIG}:{variant}", [f"--config.{text}" for text in overrides]
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A class-conditional run with a learned variance, hardly trained."""
    folder = tmp_path_factory.mktemp("ldae") / "run"
    overrides = ("model.learn_sigma=true", "mesh.data=1", "every.evaluate=0")
    registry.train(load("x_ppca_cls_smoke", *overrides), folder)
    return folder


@pytest.fixture(scope="module")
def generator(workdir):
    """Its network is perturbed: a new one predicts zero."""
    loaded = generation.load(workdir)
    leaves, treedef = jax.tree.flatten(jax.device_get(loaded.params["dit"]))
    rng = np.random.default_rng(0)
    leaves = [p + 0.1 * rng.standard_normal(p.shape).astype(np.float32) for p in leaves]
    dit = treedef.unflatten(leaves)
    dit["y_embedder"]["table"] *= 20  # Classes matter.
    mesh = sharding.make_mesh(1)
    params = sharding.place(jax.device_get(loaded.params) | {"dit": dit}, mesh)
    return dataclasses.replace(loaded, params=params, mesh=mesh)


def images_of(generator, batch_size=5, *, labels=LABELS, scale=1.0, seed=3):
    options = dict(scale=scale, seed=seed, batch_size=batch_size)
    return np.concatenate(list(generator.images(labels, **options)))


def test_images_depend_on_seed_and_class_not_on_the_batch(generator):
    images = images_of(generator)
    assert images.shape == (5, 32, 32, 3) and images.dtype == np.uint8
    one_by_one = images_of(generator, 1).astype(int)
    assert np.abs(one_by_one - images).max() <= 1  # A rounding on the way to 8 bits.
    assert (images[1] != images[3]).any()  # Of one class, with other noise.
    relabelled = images_of(generator, labels=np.array([3, 2, 4, 1, 5], np.int32))
    assert (relabelled[1] != images[1]).any()
    np.testing.assert_array_equal(relabelled[[0, 2, 3, 4]], images[[0, 2, 3, 4]])
    assert (images_of(generator, seed=4) != images).any(axis=(1, 2, 3)).all()


def test_guidance_extrapolates_from_no_class(generator):
    """A scale of 0 predicts as for the class "none", whatever the label is; the
    variance remains that of the label, so here it is fixed."""
    plan = dataclasses.replace(generator.plan, variance="large")
    generator = dataclasses.replace(generator, plan=plan)
    none = images_of(generator, scale=0.0)
    others = images_of(generator, scale=0.0, labels=LABELS[::-1].copy())
    np.testing.assert_array_equal(none, others)
    assert (images_of(generator, scale=2.0) != images_of(generator)).any()


def test_states_lead_from_noise_to_the_sample(generator):
    assert generator.plan.num_states == 5  # Four steps.
    keep = (0, 4)
    states = generator.states(LABELS, keep, scale=1.0, seed=3)
    assert states.shape == (2, 5, 32, 32, 3)
    last = np.clip(states[1] * 255, 0, 255).astype(np.uint8).astype(int)
    assert np.abs(last - images_of(generator)).max() <= 1


def test_settings_reach_the_plan(workdir):
    loaded = generation.load(workdir, num_points=7, options="variance=small")
    described = loaded.plan.describe()
    assert described == dict(
        name="ancestral", steps=7, variance="small", prediction="eps"
    )
    assert generation.load(workdir).plan.variance == "learned"
    assert len(loaded.class_names) == loaded.num_classes == 10
    plain = denoising_chain.make_plan(load("t3_predict_clean_smoke"))
    assert (plain.prediction, plain.variance, plain.null_label) == ("x", "large", 1)


def test_samples_from_the_command_line(workdir, tmp_path, capsys):
    out = tmp_path / "samples.npz"
    words = ["sample", workdir, "--out", out, "--num-samples", 3]
    assert main.main([*map(str, words), "--labels", "class 2,7"]) == 0
    with np.load(out) as data:
        assert data["arr_0"].shape == (3, 32, 32, 3)
        assert data["labels"].tolist() == [2, 7, 2]
    for more, message in (
        (["--decoder", "runs/decoder"], "leave --decoder out"),
        (["--sampler", "heun"], "one sampler, 'ancestral'"),
        (["--final-zero"], "Unknown key 'final_zero'"),
        (["--sampler-option", "variance=huge"], "sampling.variance 'huge'"),
        (["--num-points", "2000"], "2000 steps, but there are 1000"),
    ):
        assert main.main([*map(str, words), *more]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("t3_no_scaling_smoke", "'linear_sigma' never gets rid of the image"),
        ("x_single_sigma_smoke", "'single_sigma' never gets rid of the image"),
    ],
)
def test_rows_that_do_not_generate_say_why(variant, message):
    assert message in denoising_chain.refusal(load(variant))
    with pytest.raises(configs.ConfigError, match=message):
        denoising_chain.make_plan(load(variant))
    config = load("t3_pca_baseline_smoke", "noise.input_space=image")
    assert "reads and predicts latents" in denoising_chain.refusal(config)
    for row in ("t1_no_cls", "t2_pae_d16", "f5_pix_64_p4", "t3_predict_clean"):
        assert not denoising_chain.refusal(load(f"{row}_smoke"))


def test_a_guidance_scale_needs_classes(generator):
    plan = dataclasses.replace(generator.plan, num_classes=0)
    with pytest.raises(configs.ConfigError, match="model.num_classes = 0"):
        images_of(dataclasses.replace(generator, plan=plan), scale=1.5)


def test_evaluation_of_a_run_that_does_not_generate(runs):
    """It still denoises; judges of samples are refused."""
    options = dict(num_samples=8, num_reference=24, batch_size=8, seed=0)
    found = denoising_scores.run_scores(runs / "ldae", judging.Judges(), **options)
    assert found.scores["denoised_psnr"] > 5
    assert "No samples were measured" in found.notes[0]
    assert not (runs / "ldae" / denoising_scores.RESULT_NAME).exists()
    with pytest.raises(configs.ConfigError, match="no samples to judge"):
        denoising_scores.run_scores(
            runs / "ldae", judging.Judges(reference="ref.npz"), **options
        )


@pytest.mark.slow
def test_evaluation_writes_the_scores_of_samples(workdir):
    words = ["--num-samples", "8", "--num-reference", "24", "--batch-size", "8"]
    assert main.main(["evaluate", str(workdir), *words]) == 0
    found = json.loads((workdir / denoising_scores.RESULT_NAME).read_text())
    assert (found["row"], found["tier"]) == ("x_ppca_cls", "smoke")
    assert found["fd_efflite0"] == found["fd_efflite0_samples"] > 0
    assert found["fd_efflite0_real_train"] < found["fd_efflite0_untrained"]
    assert found["num_samples"] == 8
    assert (workdir / "strip.png").is_file()
    everything = json.loads((workdir / "evaluation.json").read_text())
    assert everything["denoised_psnr"] > 5

"""`rae-jax quickstart`: the whole chain on the embedded photographs.

Every stage is an ordinary config variant, run by the ordinary trainer; this verb only
lists them, measures what they made and writes the report. A second call continues.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

from rich.console import Console

import rae_jax
from rae_jax import config as configs
from rae_jax import storage

HELP = "Run the whole chain on embedded photographs: train, measure, report."
STAGES = {
    "ldae": "ldae.py",
    "probe": "probe.py",
    "rae_decoder": "rae_decoder.py",
    "latent_stats": "latent_stats.py",
    "latent_diffusion": "dit_dh.py",
}
VARIANT = "photos"
TIMES_NAME = "seconds.json"
GENERATION_NAME = "generation.json"
console = Console(stderr=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.add_argument(
        "--workdir",
        type=storage.path,
        default=Path("runs/quickstart"),
        help="folder for everything; default runs/quickstart",
    )
    parser.add_argument(
        "--configs",
        type=Path,
        help="folder of the experiment files; default: configs/ of the clone",
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="shorten every stage to this many steps, to try the machinery",
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        default=80,
        help="images per measured set; default 80",
    )


def run(args: argparse.Namespace) -> int:
    """Runs what is left of the chain and prints where the results are."""
    folder = find_configs(args.configs)
    workdir = storage.absolute(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    stages = [(name, load(folder, name, args.steps)) for name in STAGES]
    for number, (name, config) in enumerate(stages, start=1):
        console.rule(f"{number} of {len(stages) + 1}: {name}")
        run_stage(config, workdir / name, workdir, name)
    console.rule(f"{len(stages) + 1} of {len(stages) + 1}: evaluation and report")
    timed(workdir, "evaluation", lambda: evaluate(workdir, args.num_samples))
    write_metrics(workdir)
    from rae_jax.reporting import page
    from rae_jax.trainers import ldae_pictures

    ldae_pictures.draw(workdir / "ldae")
    page.write(workdir, workdir / "report.html")
    for name in ("report.html", "samples.png", "reconstructions.png", "metrics.json"):
        print(workdir / name)
    return 0


def find_configs(folder: Path | None) -> Path:
    """Returns the folder of the experiment files.

    Raises:
        ConfigError: If it is not given and not beside the package.
    """
    folder = folder or Path(rae_jax.__file__).parent.parent / "configs"
    if not (folder / STAGES["ldae"]).is_file():
        raise configs.ConfigError(
            f"No experiment files in {folder}. The package is installed outside its "
            "clone: give their folder by --configs."
        )
    return folder


def load(folder: Path, stage: str, steps: int | None) -> Any:
    """Loads the config of a stage, shortened if asked for."""
    config = configs.load_config(f"{folder / STAGES[stage]}:{VARIANT}")
    if steps is not None:
        if steps < 1:
            raise configs.ConfigError(f"--steps must be at least 1, got {steps}.")
        _shorten(config, steps)
    return config


def _shorten(config: Any, steps: int) -> None:
    """Cuts a run, and with it its warm-ups; a critic comes at the same share of it."""
    before, config.num_steps = config.num_steps, steps
    blocks = [config.optimizer] if "optimizer" in config else []
    if "gan" in config:
        blocks.append(config.gan.optimizer)
        for key in ("critic_start", "start"):
            config.gan[key] = min(config.gan[key], config.gan[key] * steps // before)
    for block in blocks:
        block.warmup_steps = min(block.warmup_steps, steps - 1)


def run_stage(config: Any, stage: Path, workdir: Path, name: str) -> None:
    """Trains one stage unless it is finished."""
    import jax

    from rae_jax.trainers import registry

    if registry.is_finished(config, stage):
        console.print("finished before")
        return
    storage.remove(workdir / GENERATION_NAME)  # It measures another run.
    timed(workdir, name, lambda: registry.train(config, stage, title=name))
    for picture in sorted(stage.glob("*.png")):
        console.print(f"picture: {picture}", soft_wrap=True)
    jax.clear_caches()  # Compiled programs of finished stages only take memory.


def timed(workdir: Path, name: str, function: Any) -> None:
    """Adds the seconds that a part took to those of interrupted calls before."""
    path = workdir / TIMES_NAME
    start = time.monotonic()
    try:
        function()
    finally:
        seconds = json.loads(storage.read_bytes(path)) if path.is_file() else {}
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
        storage.write_atomically(path, json.dumps(seconds).encode())


def evaluate(workdir: Path, num_samples: int) -> None:
    """Measures the samples, unless that is done, and gathers the pictures."""
    from rae_jax.trainers import scores

    recon = workdir / "rae_decoder" / "reconstructions.png"
    picture = storage.read_bytes(recon)
    storage.write_atomically(workdir / "reconstructions.png", picture)
    result = workdir / GENERATION_NAME
    if result.is_file():
        measured = json.loads(storage.read_bytes(result))["generation"]
        if measured["num_samples"] == num_samples:
            return
    run_config = configs.read_config(workdir / "latent_diffusion" / "config.json")
    scores.save_real(run_config.data, run_config.model.num_classes, workdir)
    found = {
        "reconstruction": scores.run_scores(workdir / "rae_decoder"),
        "generation": scores.generation_scores(
            workdir / "latent_diffusion",
            num_samples=num_samples,
            num_reference=1024,
            batch_size=32,
            seed=0,
            folder=workdir,
        ).scores,
    }
    storage.write_atomically(result, json.dumps(found).encode())


def write_metrics(workdir: Path) -> None:
    """Writes `metrics.json`: all final numbers and what they were measured on."""
    import resource

    import jax

    from rae_jax.trainers import inputs
    from rae_jax.training import logs

    config = configs.read_config(workdir / "latent_diffusion" / "config.json")
    devices = jax.devices()
    path = workdir / "metrics.json"
    before = json.loads(storage.read_bytes(path)) if path.is_file() else {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    metrics = json.loads(storage.read_bytes(workdir / GENERATION_NAME)) | {
        "seconds": json.loads(storage.read_bytes(workdir / TIMES_NAME)),
        "peak_memory_gb": max(peak, before.get("peak_memory_gb", 0.0)),
        "device": f"{devices[0].device_kind} x {len(devices)}",
        "versions": {
            "rae_jax": rae_jax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "classes": inputs.class_names(config.data, config.model.num_classes),
        "denoising": logs.last_scores(workdir / "ldae", "denoised_"),
        "probe": logs.last_scores(workdir / "probe", "top1_"),
    }
    text = json.dumps(metrics, indent=2)
    storage.write_atomically(path, text.encode())

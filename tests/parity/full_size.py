r"""Full-size models with random weights: official code against ours, there and back.

    python tests/parity/full_size.py --official CHECKOUT [--models dit_dh_s rae_dinov2]

CHECKOUT is one of github.com/bytetriper/RAE. Beside rae_jax this needs torch,
transformers and what the official code imports: timm, einops, omegaconf, torchdiffeq.
Each model's official weights, with noise on every parameter, are saved by torch,
converted by `rae-jax convert` in a process whose peak memory is measured, run here in
float32, converted back, and loaded by the official class with strict=True, where every
tensor must have the same bits. PyTorch and JAX run in processes of their own; the
largest model takes about 9 GB of memory and 10 GB of disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MODELS = ("dit_dh_s", "dit_dh_xl", "rae_dinov2", "rae_mae", "rae_siglip2")
MAX_ERROR = 1e-5  # Largest difference over largest value.
# PyTorch computes positions between pixels in float32; see tests/golden/README.md.
MAX_RESIZED_ERROR = 1e-4
MAX_PEAK = 1.5  # Memory over the size of the file.
HERE = Path(__file__).parent


def main() -> int:
    """Runs the models, prints a line for each, and fails if one misses a bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", type=Path, metavar="CHECKOUT")
    parser.add_argument(
        "--folder", type=Path, help="where files go; default: temporary"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--keep", action="store_true", help="keep the files")
    parser.add_argument("--compare", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compare:
        print(json.dumps(compare(args.compare[0], Path(args.compare[1]))))
        return 0
    if args.official is None or not (args.official / "src").is_dir():
        parser.error("--official must be a checkout of github.com/bytetriper/RAE")
    parent = args.folder or Path(tempfile.mkdtemp())
    passed = []
    for model in args.models:
        folder = parent / model
        folder.mkdir(parents=True)
        try:
            found = run_model(model, folder, args.official.resolve())
        finally:
            if not args.keep:
                shutil.rmtree(folder)
        passed.append(is_good(found))
        print(json.dumps({"model": model} | found | {"passed": passed[-1]}), flush=True)
    return 0 if all(passed) else 1


def run_model(model: str, folder: Path, checkout: Path) -> dict:
    """Makes, converts, compares, converts back and checks one model."""
    official = [sys.executable, str(HERE / "official.py")]
    run([*official, "make", model, str(folder), str(checkout)])
    file, ours, back = (
        folder / "model.pt",
        folder / "ours",
        folder / "back" / "model.pt",
    )
    size = file.stat().st_size
    convert = [sys.executable, "-m", "rae_jax", "convert"]
    settings = ["--set", f"latent_stats={folder / 'stat.pt'}"] * model.startswith("rae")
    there = run([*convert, str(file), str(ours), *settings])[1]
    and_back = run([*convert, str(ours), str(back), "--target", "official"])[1]
    errors = run([sys.executable, __file__, "--compare", model, str(folder)])[0]
    shutil.rmtree(ours)
    back.rename(folder / "back.pt")
    checked = run([*official, "check", model, str(folder), str(checkout)])[0]
    return {
        "bytes": size,
        "peak_ratio": round(there / size, 3),
        "peak_ratio_back": round(and_back / size, 3),
        "errors": json.loads(errors.splitlines()[-1]),
        "same_bits": json.loads(checked.splitlines()[-1])["tensors"],
    }


def is_good(found: dict) -> bool:
    """Whether a model met all bounds."""
    bounds = {"z_resized": MAX_RESIZED_ERROR}
    errors = found["errors"].items()
    fits = all(error <= bounds.get(name, MAX_ERROR) for name, error in errors)
    return fits and max(found["peak_ratio"], found["peak_ratio_back"]) <= MAX_PEAK


def run(command: list[str]) -> tuple[str, int]:
    """Runs a process; returns what it printed and its peak memory in bytes."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{text}")
    unit = 1 if sys.platform == "darwin" else 1024
    return text, usage.ru_maxrss * unit


def compare(model: str, folder: Path) -> dict[str, float]:
    """Returns the largest error of each output over its largest value."""
    import jax
    import numpy as np

    from rae_jax.models import dit_dh, rae

    jax.config.update("jax_default_matmul_precision", "highest")
    with np.load(folder / "data.npz") as arrays:
        data = {
            name: np.moveaxis(x, 1, -1) if x.ndim == 4 else x
            for name, x in arrays.items()
        }

    def error(name, found):
        return float(np.abs(found - data[name]).max() / np.abs(data[name]).max())

    if model.startswith("dit"):
        network = dit_dh.DiTDH.from_pretrained(folder / "ours", remat="none")
        v = jax.jit(lambda net, *args: net(*args))(
            network, data["x_t"], data["t"], data["y"]
        )
        return {"v": error("v", v)}
    network = rae.RAE.from_pretrained(folder / "ours", remat="none")
    encode = jax.jit(lambda net, images: net.encode(images))
    decode = jax.jit(lambda net, z: net.decode(z))
    size = network.encoder.input_size
    errors = {"z": error(f"z_{size}", encode(network, data[f"images_{size}"]))}
    if size != 256:
        errors["z_resized"] = error("z_256", encode(network, data["images_256"]))
    return errors | {"recon": error("recon", decode(network, data["z_256"]))}


if __name__ == "__main__":
    sys.exit(main())

"""`rae-jax convert`: weights from one layout to another."""

import argparse
import ast
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from rae_jax import config as configs
from rae_jax import storage

if TYPE_CHECKING:
    from rae_jax.trainers import weights

HELP = "Convert weights between the layouts of PyTorch's libraries and ours."
LAYOUTS = ("official", "diffusers", "huggingface", "rae_jax")
KINDS = ("autoencoder", "autoencoder_kl", "decoder", "latent_stats", "dit", "dit_dh")
KINDS += ("discriminator", "encoder", "lpips", "inception", "mae")
EXAMPLES = """\
SRC is a file or folder, a hub id (owner/name, owner/name:path/in/repo), the name of a
published model such as dit-dh-xl-256, or the workdir of a run. DST is a folder, or a
file (.pt, .safetensors) in the official layout. Nothing is written if a tensor is
missing, unexpected or of another shape.

  rae-jax convert dit-dh-xl-256 weights/dit_dh_xl
  rae-jax convert stage2_model.pt weights/dit_dh_xl --part ema
  rae-jax convert weights/dit_dh_xl stage2_model.pt
  rae-jax convert runs/rae_decoder model.pt            # a run's decoder, EMA weights
  rae-jax convert runs/ldae weights/ldae_vit --target huggingface --set time_index=10
  rae-jax convert ep-last.pt weights/rae --set latent_stats=stat.pt
  rae-jax convert weights/rae weights/diffusers --target diffusers
  rae-jax convert sd-vae-ft-ema weights/sd_vae
  rae-jax convert facebook/vit-mae-base weights/mae_b --set image_size=256
  rae-jax convert runs/mae weights/mae --target huggingface     # ViTMAEModel
  rae-jax convert runs/mae weights/mae --kind mae --target huggingface  # and decoder
  rae-jax convert vit-b-300ep.pth.tar weights/mocov3_b --set name=mocov3
  rae-jax convert model.pt weights/decoder --set num_heads=12 --dry-run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("source_path", metavar="SRC", help="what to convert, see below")
    add("target_path", metavar="DST", type=storage.path, help="folder or file to write")
    add("--kind", choices=KINDS, help="default: what the names of tensors say")
    add("--source", choices=LAYOUTS, help="layout that SRC must be in; default: any")
    add(
        "--target",
        choices=LAYOUTS,
        help="layout of DST; default: official for a file, rae_jax for a folder",
    )
    add(
        "--part",
        help="of a training checkpoint: ema (default), model or disc",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the network that SRC does not tell, such as num_heads=12, "
        "encoder.num_heads=6 or latent_stats=stat.pt; repeatable",
    )
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the parameters in DST; default float32",
    )
    add(
        "--allow-fixed-table",
        action="store_true",
        help="to diffusers: let its fixed position table replace the decoder's own",
    )
    add("--force", action="store_true", help="replace DST")
    add("--dry-run", action="store_true", help="print what would go where, no more")


def run(args: argparse.Namespace) -> int:
    """Converts, and prints what went where."""
    from rae_jax.trainers import weights

    target = args.target_path
    if not args.dry_run and not args.force and _is_taken(target):
        raise configs.ConfigError(f"{target} exists. Give --force to replace it.")
    settings = parse_settings(args.set)
    opened = weights.open_source(args.source_path, args.kind, args.part, settings)
    if args.source not in (None, opened.layout):
        raise configs.ConfigError(
            f"{args.source_path} is in the layout {opened.layout}, not {args.source}."
        )
    layout = args.target or default_layout(target, opened.layout)
    if args.allow_fixed_table and layout != "diffusers":
        raise configs.ConfigError("--allow-fixed-table goes with --target diffusers.")
    options = {"allow_fixed_table": True} if args.allow_fixed_table else {}
    show(opened, layout, options)
    if args.dry_run:
        print("Nothing was written (--dry-run).")
        return 0
    with staged(target, args.force) as path:
        opened.write(path, layout, dtype=args.dtype, **options)
        size = sum(file.stat().st_size for file in path.parent.rglob("*.*"))
    print(f"{layout}, {size:,} bytes: {target}")
    return 0


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Turns key=value texts into arguments; a dotted key gives nested ones.

    Raises:
        ConfigError: A text has no "=" or no key.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise configs.ConfigError(f"--set {text!r}: give KEY=VALUE.")
        *outer, last = key.split(".")
        inner = settings
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = _value(value)
    return settings


def _value(text: str) -> Any:
    constants = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def default_layout(target: Path, source_layout: str) -> str:
    """Returns the layout that the form of DST suggests.

    Raises:
        ConfigError: From our own layout to a folder, it could be several.
    """
    if target.suffix in (".pt", ".pth", ".bin", ".safetensors"):
        return "official"
    if source_layout == "rae_jax" and target.suffix != ".npz":
        raise configs.ConfigError(
            f"Which layout shall {target} have? Give --target: {', '.join(LAYOUTS)}."
        )
    return "rae_jax"


def show(opened: "weights.Opened", layout: str, options: dict[str, Any]) -> None:
    """Prints the tables of names and what the weights are."""
    console = Console(width=None if Console().is_terminal else 160)
    for title, rows in opened.rows(layout, **options):
        table = Table("in the file", "here", "how", title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table, markup=False)
    for text in opened.left_out:
        console.print(f"left out: {text}", markup=False, highlight=False)
    print(f"{opened.kind} in layout {opened.layout}: {opened.count:,} parameters")


def _is_taken(target: Path) -> bool:
    return target.is_file() or target.is_dir() and any(target.iterdir())


@contextlib.contextmanager
def staged(target: Path, force: bool) -> Iterator[Path]:
    """Gives a path beside `target`; what is written there takes its place at the end.

    Files that come with a file, such as `stat.pt`, come to lie beside it. An error
    leaves everything as it was.

    Raises:
        ConfigError: Something is in the way and `force` is not set.
    """
    beside = None
    if not storage.is_bucket(target):
        beside = target.parent
        beside.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=beside))
    try:
        yield folder / target.name
        is_folder = (folder / target.name).is_dir()
        found = folder / target.name if is_folder else folder
        final = target if is_folder else target.parent
        files = sorted(path for path in found.iterdir())
        taken = [final / file.name for file in files if (final / file.name).exists()]
        if taken and not force:
            names = ", ".join(map(str, taken))
            raise configs.ConfigError(f"{names} exists. Give --force to replace it.")
        if storage.is_bucket(target):
            storage.upload_tree(found, final)
            return
        final.mkdir(exist_ok=True)
        for file in files:
            os.replace(file, final / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

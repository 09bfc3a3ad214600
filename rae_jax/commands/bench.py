"""`rae-jax bench`: how fast a config trains on the devices at hand."""

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from rae_jax import config as configs
from rae_jax import storage

HELP = "Measure a config's training step and its input on the devices at hand."
EPILOG = """\
  rae-jax bench --config configs/dit_dh.py:xl_256 --synthetic
  rae-jax bench --config configs/ldae.py:vit_b --steps 50 --profile trace

Weights are random, which changes no time, so nothing has to be trained before. Values
of the config are overridden by --config.key=value, such as --config.mesh.fsdp=8.
"""
GB = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the verb's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py[:VARIANT]", help="experiment file")
    add("--steps", type=int, default=20, help="steps that are timed; default 20")
    add("--warmup", type=int, default=3, help="steps before them; default 3")
    synthetic = "random arrays in place of the config's data: input is not measured"
    add("--synthetic", action="store_true", help=synthetic)
    profile = "write a trace of the timed steps, for TensorBoard or xprof"
    add("--profile", type=storage.path, metavar="DIR", help=profile)
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(overrides=[])


def run(args: argparse.Namespace) -> int:
    """Measures and prints."""
    if args.profile is not None and storage.is_bucket(args.profile):
        raise configs.ConfigError(
            f"--profile {args.profile}: traces are written to a disk; give a folder."
        )
    config = configs.load_config(args.config, args.overrides)
    from rae_jax.planning import bench
    from rae_jax.training import distributed

    options = bench.Options(args.steps, args.warmup, args.synthetic, args.profile)
    console = Console(stderr=True)
    if sys.stderr.isatty() and not args.json:
        with console.status("starting") as status:
            found = bench.measure(config, options, status.update)
    else:
        found = bench.measure(
            config, options, lambda text: print(text, file=sys.stderr)
        )
    if not distributed.is_main():
        return 0
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    _show(found, args.config)
    if args.profile:
        print(f"Trace: {args.profile}")
    return 0


def _show(found: dict[str, Any], name: str) -> None:
    title = f"{name} on {found['devices']} x {found['device']}"
    table = Table("", "", title=title, title_justify="left", show_header=False)
    for row in rows(found):
        table.add_row(*row)
    Console().print(table)


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the measures by name."""
    from rae_jax.planning import tables

    times = found["step_seconds"]
    peak = tables.scaled(found["peak_flops"], 1000, "FLOP/s")
    steps = ", ".join(f"{k} {times[k] * 1e3:.1f}" for k in ("min", "median", "p90"))
    table = [
        ("batch", str(found["batch_size"])),
        ("compile", f"{found['compile_seconds']:.1f} s"),
        ("step (ms)", steps),
        ("images per second", f"{found['images_per_second']:,.1f}"),
        ("model FLOPs per step", tables.scaled(found["flops_per_step"], 1000, "FLOP")),
        ("MFU", f"{found['mfu']:.1%} of {peak}"),
    ]
    if "input_images_per_second" in found:
        table += [
            ("input alone (images/s)", f"{found['input_images_per_second']:,.1f}"),
            (
                "with input (images/s)",
                f"{found['overlapped_images_per_second']:,.1f}, a step waits "
                f"{found['stall_seconds'] * 1e3:.1f} ms",
            ),
        ]
    table.append(("host memory", f"{found['host_memory_bytes'] / GB:.2f} GB"))
    if found["device_memory_bytes"]:
        text = f"{found['device_memory_bytes'] / GB:.2f} GB"
        table.append(("device memory, peak", text))
    return table

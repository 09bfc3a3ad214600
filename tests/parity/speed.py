r"""DiT-DH-S on this machine: throughput of rae_jax over that of the official code.

    python tests/parity/speed.py --official CHECKOUT [--rounds 3] [--points 4]

CHECKOUT is one of github.com/bytetriper/RAE. Beside rae_jax this needs torch and what
the official code imports: timm, einops, omegaconf, torchdiffeq. Both sides run in
processes of their own, on all cores, taking turns; so a busy machine slows both. What
is timed, at batch 8 in float32: a training step on given latents (loss, gradients,
clipping, AdamW, EMA), Euler sampling unguided, and with AutoGuidance by a second
DiT-DH-S, as the official scripts sample. Every Euler step costs the same, so a grid of
`--points` stands for the official one of 50, whose ratio is that of its steps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

TASKS = ("train", "unguided", "autoguidance")
BATCH, SCALE, SHIFT = 8, 1.42, (16 * 16 * 768 / 4096) ** 0.5
HERE = Path(__file__).parent


def main() -> int:
    """Prints one line per task: seconds of both sides and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", type=Path, metavar="CHECKOUT", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", type=int, default=4, help="of the grid; 50 is full")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--serve", choices=("ours", "official"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve({"ours": ours, "official": official}[args.serve](args))
    for task in args.tasks:
        sides = {name: start(name, args) for name in ("official", "ours")}
        seconds = {name: [] for name in sides}
        for turn in range(args.rounds + 1):
            for name, process in sides.items():
                taken = ask(process, task)
                if turn:  # The first compiles and warms up.
                    seconds[name].append(taken)
        for process in sides.values():
            process.stdin.close()
            process.wait()
        pairs = zip(seconds["official"], seconds["ours"], strict=True)
        ratios = [theirs / own for theirs, own in pairs]
        report = {"task": task, "ratio": statistics.median(ratios), "ratios": ratios}
        print(json.dumps(report | {"seconds": seconds}), flush=True)
    return 0


def start(name: str, args: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, __file__, "--serve", name]
    command += ["--official", str(args.official), "--points", str(args.points)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def ask(process: subprocess.Popen, task: str) -> float:
    process.stdin.write(f"{task}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit("One side ended early; its error is above.")
    return float(line)


def serve(make: Callable[[str], Callable[[], None]]) -> int:
    """Answers each task on a line of its own with the seconds that it took."""
    made = {}
    for line in sys.stdin:
        task = line.strip()
        run = made.setdefault(task, None) or make(task)
        made[task] = run
        begin = time.perf_counter()
        run()
        print(time.perf_counter() - begin, flush=True)
    return 0


def ours(args: argparse.Namespace) -> Callable[[str], Callable[[], None]]:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from ml_collections import ConfigDict

    from rae_jax import blocks
    from rae_jax.diffusion import guidance, samplers
    from rae_jax.losses import flow_matching
    from rae_jax.models import dit_dh
    from rae_jax.training import optimizers, state

    make_model = partial(dit_dh.DiTDH, 16, 768, **dit_dh.PRESETS["s"])
    z = jax.random.normal(jax.random.key(0), (BATCH, 16, 16, 768))
    y = jnp.arange(BATCH)

    def loss_fn(model, frozen, batch, key):
        return flow_matching.flow_matching_loss(
            model, batch["z"], batch["y"], key, shift=SHIFT
        )

    def train():
        block = ConfigDict(blocks.optimizer(clip_norm=1.0))
        tx, _ = optimizers.make_optimizer(block, 100)
        make = partial(make_model, remat="none")
        graphdef = state.abstract_model(make)
        step = state.make_step(graphdef, loss_fn, tx, ema_decay=0.9995)
        step = jax.jit(step, donate_argnums=0)
        current = [jax.jit(lambda: state.create_state(make, tx, jax.random.key(0)))()]

        def run():
            batch = {"z": z, "y": y}
            current[0], metrics = step(current[0], None, batch, jax.random.key(1))
            jax.block_until_ready((current, metrics))

        return run

    def sample(guided):
        model = make_model(remat="none", rngs=nnx.Rngs(0))
        graphdef, params = nnx.graphdef(model), state.param_dict(model)
        times = samplers.euler_times(args.points, shift=SHIFT)

        @jax.jit
        def draw(params, guide, z, y):
            velocity = nnx.merge(graphdef, params)
            if guided:
                weak = nnx.merge(graphdef, guide)
                velocity = guidance.autoguidance(velocity, weak, SCALE)
            return samplers.SAMPLERS["euler"](velocity, z, y, times).x

        guide = jax.tree.map(jnp.copy, params) if guided else None
        return lambda: jax.block_until_ready(draw(params, guide, z, y))

    return lambda task: train() if task == "train" else sample(task == "autoguidance")


def official(args: argparse.Namespace) -> Callable[[str], Callable[[], None]]:
    sys.path.insert(0, str(HERE))
    import copy

    import official as classes
    import torch

    make_model = partial(classes.build, "dit_dh_s", HERE, args.official)
    classes.prepare_imports(args.official)
    from stage2.transport import Sampler, create_transport

    transport = create_transport(
        time_dist_type="logit-normal_0_1", time_dist_shift=SHIFT
    )
    z, y = torch.randn(BATCH, 768, 16, 16), torch.arange(BATCH)

    def train():
        model = make_model().train()
        ema = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(
            model.parameters(), 2e-4, betas=(0.9, 0.95), weight_decay=0, fused=True
        )

        def run():
            optimizer.zero_grad(set_to_none=True)
            transport.training_losses(model, z, dict(y=y))["loss"].mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                pairs = zip(ema.parameters(), model.parameters(), strict=True)
                for average, parameter in pairs:
                    average.mul_(0.9995).add_(parameter, alpha=0.0005)

        return run

    def sample(guided):
        model, guide = make_model(), make_model() if guided else None
        draw = Sampler(transport).sample_ode(
            sampling_method="euler", num_steps=args.points
        )

        @torch.no_grad()
        def run():
            if not guided:
                return draw(z, model.forward, y=y)[-1]
            # The official scripts double the batch here, and keep one half.
            labels = torch.cat([y, torch.full_like(y, 1000)])
            options = dict(cfg_scale=SCALE, additional_model_forward=guide.forward)
            pair = torch.cat([z, z])
            return draw(pair, model.forward_with_autoguidance, y=labels, **options)[-1]

        return run

    return lambda task: train() if task == "train" else sample(task == "autoguidance")


if __name__ == "__main__":
    sys.exit(main())

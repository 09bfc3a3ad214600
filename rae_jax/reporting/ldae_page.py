"""The report of one l-DAE run: its pictures, curves and config on one page."""

from pathlib import Path

from rae_jax import storage
from rae_jax.reporting import charts, folder, ldae_sheets, markup, page
from rae_jax.training import checkpoints

TRAINER = "ldae"
_SIZE = (4.2, 2.35)
_CURVES = {
    "loss": "Training loss",
    "denoised_psnr": "Denoised, held out: PSNR (dB)",
    "denoised_ssim": "Denoised, held out: SSIM",
}


def is_run(workdir: Path) -> bool:
    """Returns whether a folder is the workdir of an l-DAE run.

    Raises:
        ConfigError: Its config is damaged.
    """
    if not (storage.path(workdir) / checkpoints.CONFIG_NAME).is_file():
        return False
    return folder.read_stage(storage.path(workdir)).config.get("trainer") == TRAINER


def write(workdir: Path, path: Path) -> None:
    """Writes the page of an l-DAE run, whatever of it is there."""
    storage.write_atomically(storage.path(path), render(storage.path(workdir)).encode())


def render(workdir: Path) -> str:
    """Returns the page."""
    run = folder.read_stage(workdir)
    title = f"l-DAE: {run.config.get('row') or storage.absolute(workdir).name}"
    header = (
        f"<header>{markup.paragraph('rae_jax l-DAE run', 'kicker')}"
        f"<h1>{markup.escape(title)}</h1>{markup.paragraph(_summary(run), 'lead')}"
        "</header>"
    )
    sections = (_pictures(workdir), _curves(run), _config(run))
    return page.document(title, header, sections, page.made_by())


def _summary(run: folder.Stage) -> str:
    get = run.config.get
    planned = get("num_steps", 0)
    done = run.last_step
    steps = f"{done:,} steps" if done >= planned else f"{done:,} of {planned:,} steps"
    return (
        f"{get('model.depth')} blocks of width {get('model.hidden_size')}, "
        f"{get('data.image_size')} pixels, patches of {get('tokenizer.patch_size')}; "
        f"noise on {get('tokenizer.latent_dim')} latent dimensions "
        f"({get('tokenizer.name', 'pca')}, {get('noise.schedule')}), the network "
        f"predicts {get('noise.target')}. Seed {get('seed')}, {steps}."
    )


def _pictures(workdir: Path) -> str:
    parts = ldae_sheets.all_parts(workdir)
    absent = markup.missing(
        "Not drawn: there is no checkpoint yet, or the images are not here",
        [ldae_sheets.NOISE, ldae_sheets.PATTERNS, ldae_sheets.DENOISED],
    )
    return markup.section("pictures", "Pictures", parts or absent)


def _curves(run: folder.Stage) -> str:
    drawn = ""
    for name, title in _CURVES.items():
        steps, values = run.series(name)
        if steps:
            line = charts.Line(title, steps, values)
            smooth = name == "loss"
            svg = charts.line_chart(
                name.replace("_", "-"), [line], size=_SIZE, smooth=smooth
            )
            last = f"last {markup.significant(values[-1])}"
            drawn += markup.chart(title, svg, last)
    body = f'<div class="body curves"><div class="charts three">{drawn}</div></div>'
    return markup.section(
        "curves", "Training curves", body if drawn else markup.missing("No log yet")
    )


def _config(run: folder.Stage) -> str:
    details = markup.config_details("All values", run.config)
    return markup.section("config", "Config", f'<div class="body">{details}</div>')

"""The quickstart report: one HTML file that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path

from rae_jax import storage
from rae_jax.reporting import folder, markup, numbers, pictures, style

TITLE = "Ten photographs, from pixels to samples"
_LINKS = {
    "samples": "Samples",
    "reconstructions": "Reconstructions",
    "generation": "Generation",
    "denoising": "Denoising",
    "probe": "Probe",
    "frechet": "Fréchet distance",
    "curves": "Curves",
    "stages": "Stages",
    "configs": "Configs",
    "reproduce": "Reproduce",
}
_CHAIN = (
    ("l-DAE", "learns to denoise images; its first blocks become the encoder"),
    ("Linear probe", "measures what the frozen encoder knows"),
    ("RAE decoder", "learns to turn the encoder’s latents back into pixels"),
    ("Latent statistics", "bring the latents to mean 0 and variance 1"),
    ("Latent diffusion", "learns to generate latents from noise and a class"),
)


def write(workdir: Path, path: Path) -> None:
    """Writes the report of a quickstart folder, complete or not.

    Raises:
        ConfigError: See `folder.read`.
    """
    html = render(folder.read(workdir))
    storage.write_atomically(storage.path(path), html.encode())


def render(run: folder.Quickstart) -> str:
    """Returns the page."""
    sections = (
        pictures.samples(run),
        pictures.reconstructions(run),
        pictures.strip(run),
        pictures.denoising(run),
        numbers.probe(run),
        numbers.frechet(run),
        numbers.curves(run),
        numbers.stages(run),
        numbers.setup(run),
    )
    return document(TITLE, _header(run), sections, _footer(run))


def document(title: str, header: str, sections: Sequence[str], footer: str) -> str:
    """Returns a page that needs nothing else.

    Args:
        title: Of the window, plain text.
        header: An HTML element.
        sections: HTML elements.
        footer: Plain text.
    """
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{markup.escape(title)} · rae_jax</title>
<link rel="icon" href="data:,">
<style>{style.CSS}</style>
</head>
<body>
{header}
<main>
{body}
</main>
<footer>{markup.paragraph(footer, "note")}</footer>
</body>
</html>
"""


def _header(run: folder.Quickstart) -> str:
    links = "".join(f'<a href="#{name}">{text}</a>' for name, text in _LINKS.items())
    chain = "".join(f"<li><b>{name}</b>{text}</li>" for name, text in _CHAIN)
    lead = (
        "A denoising autoencoder learns image features, a decoder learns to turn these "
        "features back into pixels, and a diffusion transformer learns to generate "
        "them from noise."
    )
    plain = (
        "Ten photographs are a demonstration that every part works, not a benchmark: "
        "no number on this page can be compared with a published one."
    )
    return (
        "<header>"
        f"{markup.paragraph('rae_jax quickstart', 'kicker')}<h1>{TITLE}</h1>"
        f"{markup.paragraph(lead, 'lead')}{markup.paragraph(plain, 'plain')}"
        f'{_notice(run)}<ol class="chain">{chain}</ol>{_key_figures(run)}'
        f"<nav>{links}</nav></header>"
    )


def _notice(run: folder.Quickstart) -> str:
    if not run.missing:
        return ""
    return (
        '<div class="notice">'
        + markup.paragraph(
            "This run is incomplete; the page shows what is there. Missing: "
            f"{', '.join(run.missing)}. Run the quickstart again with the same "
            "folder: it continues where it stopped.",
            "missing",
        )
        + "</div>"
    )


def _key_figures(run: folder.Quickstart) -> str:
    if not run.metrics:
        return ""
    figures = (*_run_figures(run), *_score_figures(run))
    return f'<dl class="key">{"".join(_figure(*figure) for figure in figures)}</dl>'


def _run_figures(run: folder.Quickstart) -> tuple[tuple[str, str, str, str], ...]:
    """Name, value, unit and remark of what the run took."""
    seconds = [x for x in run.block("seconds").values() if isinstance(x, (int, float))]
    return (
        (
            "Total time",
            markup.duration(sum(seconds) if seconds else None),
            "",
            str(run.metrics.get("device", "")),
        ),
        (
            "Peak memory",
            markup.decimals(run.metrics.get("peak_memory_gb"), 1),
            "GB",
            "of the process",
        ),
    )


def _score_figures(run: folder.Quickstart) -> tuple[tuple[str, str, str, str], ...]:
    recon, probe = run.block("reconstruction"), run.block("probe")
    made = {
        name.removeprefix("fd_efflite0_"): markup.significant(value)
        for name, value in run.block("generation").items()
    }
    floor = made.get("real_train", markup.NOTHING)
    ceiling = made.get("untrained", markup.NOTHING)
    return (
        (
            "Reconstruction PSNR",
            markup.decimals(recon.get("psnr"), 1),
            "dB",
            f"SSIM {markup.decimals(recon.get('ssim'), 2)}",
        ),
        (
            "Reconstruction LPIPS",
            markup.decimals(recon.get("lpips_alex"), 3),
            "",
            "AlexNet, held-out crops",
        ),
        (
            "Probe accuracy",
            markup.percent(probe.get("top1_encoder")),
            "",
            f"random encoder {markup.percent(probe.get('top1_random'))}",
        ),
        (
            "fd_efflite0",
            made.get("samples", markup.NOTHING),
            "",
            f"floor {floor}, untrained {ceiling}",
        ),
    )


def _figure(name: str, value: str, unit: str, more: str) -> str:
    unit = f' <span class="unit">{unit}</span>' if value != markup.NOTHING else ""
    return (
        f"<div><dt>{name}</dt><dd>{markup.escape(value)}{unit}"
        f'<div class="more">{markup.escape(more)}</div></dd></div>'
    )


def _footer(run: folder.Quickstart) -> str:
    version = run.block("versions").get("rae_jax")
    by = f"rae_jax {version}" if version else "rae_jax"
    return made_by(by)


def made_by(program: str = "rae_jax") -> str:
    """Returns the line at the end of every page."""
    return f"Made by {program} with `rae-jax report`. This file needs no network."

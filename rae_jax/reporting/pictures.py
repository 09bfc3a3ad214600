"""The sections that show images."""

from collections.abc import Sequence

import numpy as np

from rae_jax.reporting import folder, ldae_sheets, markup, tiles

_REAL, _PLAIN, _GUIDED = "real.png", "samples.png", "samples_guided.png"
_MAX_COLUMNS = 8  # Per class and group.
_NOT_YET = "This part of the run has not finished. Not in the folder"


def samples(run: folder.Quickstart) -> str:
    """Real crops and samples of every photograph, side by side."""
    scale = run.block("generation").get("guidance_scale")
    guided = "Samples with guidance"
    if isinstance(scale, (int, float)):
        guided += f", scale {scale:g}"
    titles = {
        _REAL: "Training crops (real)",
        _PLAIN: "Samples, no guidance",
        _GUIDED: guided,
    }
    pixels = _load(run, titles)
    sheets = {name: tiles.cut(picture) for name, picture in pixels.items()}
    if None in sheets.values():
        parts = [markup.whole(p, alt=titles[n]) for n, p in pixels.items()]
    else:
        parts = [_classes(run, sheets, titles)] if sheets else []
    counts = {len(row) for sheet in sheets.values() for row in sheet or []}
    return markup.section(
        "samples",
        "Samples",
        markup.paragraph(
            "Every row is one photograph, used as a class. On the left are crops that "
            "the networks were trained on; the others are generated from noise and "
            "the class alone. Nothing was picked by hand."
        ),
        *(f'<div class="body">{part}</div>' for part in parts),
        _note_rows(counts) if _PLAIN in sheets else "",
        _missing(run, tuple(titles)),
    )


def _note_rows(counts: set[int]) -> str:
    if len(counts) != 1:
        return ""
    shown = min(_MAX_COLUMNS, counts.pop())
    return markup.paragraph(
        f"The first {shown} images of each class and group. The generator has seen "
        "only crops of ten photographs, so samples that resemble the crops show that "
        "it has learned them, not that it would invent new scenes.",
        "note",
    )


def _classes(run, sheets, titles) -> str:
    names = run.classes
    count = max(len(sheet) for sheet in sheets.values())
    if len(names) != count:
        names = [f"class {i}" for i in range(count)]
    heads = "".join(f'<div class="head">{titles[n]}</div>' for n in sheets)
    parts = [f'<div class="head" aria-hidden="true"></div>{heads}']
    for i, name in enumerate(names):
        parts.append(f"<h3>{markup.escape(name)}</h3>")
        for file, sheet in sheets.items():
            row = sheet[i][:_MAX_COLUMNS] if i < len(sheet) else []
            label = titles[file]
            text = f"{label}: {name}"
            parts.append(markup.images(row, alt=text, label=label))
    style = f"--groups:{len(sheets)}"
    return f'<div class="samples" style="{style}">{"".join(parts)}</div>'


def reconstructions(run: folder.Quickstart) -> str:
    """Held-out images above what the decoder makes of their latents."""
    found = run.block("reconstruction")
    scores = [
        ("PSNR (dB, higher is better)", markup.decimals(found.get("psnr"), 2)),
        ("SSIM (higher is better)", markup.decimals(found.get("ssim"), 3)),
        ("LPIPS, AlexNet (lower is better)", _lpips(found, "alex")),
        ("LPIPS, VGG (lower is better)", _lpips(found, "vgg")),
        ("Images", markup.decimals(found.get("num_images"), 0)),
    ]
    return markup.section(
        "reconstructions",
        "Reconstructions",
        markup.paragraph(
            "Crops from the corner of each photograph that no stage was trained on, "
            "and the same crops after encoder and decoder. Samples pass through the "
            "same decoder and share its blur."
        ),
        _sheet(run, "reconstructions.png", ("Input", "Reconstruction")),
        markup.facts(scores) if found else "",
        "" if found else markup.missing("The scores are missing", ["metrics.json"]),
        _missing(run, ("reconstructions.png",)),
    )


def _lpips(found: dict, backbone: str) -> str:
    return markup.decimals(found.get(f"lpips_{backbone}"), 3)


def strip(run: folder.Quickstart) -> str:
    """Samples on their way from noise to image."""
    picture = _load(run, ("strip.png",)).get("strip.png")
    sheet = None if picture is None else tiles.cut(picture)
    body = "" if picture is None else markup.whole(picture, alt="Generation over time")
    if sheet:
        body = "".join(
            markup.images(row, alt="One sample, from noise to image", columns=len(row))
            for row in sheet
        )
    if body:
        axis = '<div class="axis">noise (t = 1)<i></i>image (t = 0)</div>'
        body = f'<div class="body strip">{axis}{body}</div>'
    return markup.section(
        "generation",
        "From noise to image",
        markup.paragraph(
            "A few samples while they are generated: the diffusion transformer moves "
            "latents from noise to data, and the decoder shows what they look like on "
            "the way. It was trained on latents of real images, so pure noise decodes "
            "to some texture."
        ),
        body,
        _missing(run, ("strip.png",)),
    )


def denoising(run: folder.Quickstart) -> str:
    """What the l-DAE was trained to do."""
    found = run.block("denoising")
    scores = [
        ("PSNR of the denoised (dB)", markup.decimals(found.get("denoised_psnr"), 2)),
        ("SSIM of the denoised", markup.decimals(found.get("denoised_ssim"), 3)),
    ]
    return markup.section(
        "denoising",
        "What the l-DAE learned",
        markup.paragraph(
            "Its task: noise is added to the principal components of image patches, "
            "and the network predicts the clean image. Held-out crops, the same crops "
            "with noise, and the prediction. The first blocks of this network are the "
            "encoder of all other stages."
        ),
        _sheet(run, "ldae/denoising.png", ("Image", "With noise", "Denoised")),
        markup.facts(scores) if found else "",
        "" if found else markup.missing("The scores are missing", ["metrics.json"]),
        ldae_sheets.all_parts(run.workdir / "ldae"),
        _missing(run, ("ldae/denoising.png",)),
    )


def _sheet(run: folder.Quickstart, file: str, labels: Sequence[str]) -> str:
    """A picture with named rows."""
    picture = _load(run, (file,)).get(file)
    if picture is None:
        return ""
    sheet = tiles.cut(picture)
    if sheet is None or [len(row) for row in sheet] != [len(sheet[0])] * len(labels):
        alt = f"Rows from above: {', '.join(labels)}"
        return f'<div class="body">{markup.whole(picture, alt=alt)}</div>'
    return markup.stacks(sheet, labels)


def _load(run: folder.Quickstart, names: Sequence[str]) -> dict[str, np.ndarray]:
    paths = {name: run.picture(name) for name in names}
    return {n: tiles.load(p) for n, p in paths.items() if p is not None}


def _missing(run: folder.Quickstart, names: Sequence[str]) -> str:
    absent = [name for name in names if name in run.missing]
    return markup.missing(_NOT_YET, absent) if absent else ""

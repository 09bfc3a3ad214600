"""The sections that show scores, curves and settings."""

import statistics

from rae_jax.reporting import charts, folder, markup

CLEAR = 0.05  # Accuracy differences from here on are called clear,
LEVEL = 0.01  # and up to here none.
_FEATURES = {
    "encoder": ("l-DAE encoder", "frozen, patch features averaged over the image"),
    "random": ("Random encoder", "the same network, not trained"),
    "pca": ("Patch PCA", "the space in which the l-DAE adds noise; every patch kept"),
    "pixels": ("Raw pixels", "every pixel kept"),
}
_SETS = {
    "real_train": ("Other training crops", "floor: real, but not in the reference"),
    "real_validation": ("Held-out regions", "real, parts of the photographs not seen"),
    "guided": ("Samples with guidance", "generated"),
    "samples": ("Samples, no guidance", "generated"),
    "untrained": ("Untrained network", "ceiling: same sampler, random weights"),
}
_FEATURE_WIDTH = 1280  # Of EfficientNet-Lite0.
_NOT_YET = "This part of the run has not finished. Not in metrics.json"
_WIDE, _NARROW = (5.6, 2.5), (4.2, 2.35)
# Curves that belong in one chart, by stage: title and logged names.
_LOSSES = {
    "ldae": ("l-DAE", {"loss": "loss"}),
    "probe": (
        "Linear probe",
        {f"loss_{name}": texts[0] for name, texts in _FEATURES.items()},
    ),
    "rae_decoder": (
        "RAE decoder",
        {"loss": "all", "loss_rec": "L1", "loss_lpips": "LPIPS"},
    ),
    "latent_diffusion": ("Latent diffusion", {"loss": "loss"}),
}
_CRITIC = (
    ("rae_decoder", "Critic: loss", {"loss_disc": "loss"}),
    ("rae_decoder", "Critic: real patch ranked above", {"disc_accuracy": "share"}),
    ("rae_decoder", "Weight that matches gradients", {"disc_weight": "weight"}),
)
_SCORES = (
    ("rae_decoder", "Reconstruction: PSNR (dB)", {"psnr": "PSNR"}),
    ("rae_decoder", "Reconstruction: SSIM", {"ssim": "SSIM"}),
    (
        "rae_decoder",
        "Reconstruction: LPIPS",
        {"lpips_alex": "AlexNet", "lpips_vgg": "VGG"},
    ),
    ("ldae", "l-DAE denoising: PSNR (dB)", {"denoised_psnr": "PSNR"}),
    ("ldae", "l-DAE denoising: SSIM", {"denoised_ssim": "SSIM"}),
    (
        "probe",
        "Linear probe: accuracy",
        {f"top1_{name}": texts[0] for name, texts in _FEATURES.items()},
    ),
)


def probe(run: folder.Quickstart) -> str:
    """Accuracies of linear probes and a sentence that reads them."""
    found = run.block("probe")
    scores = {name: found.get(f"top1_{name}") for name in _FEATURES}
    rows = [
        (*_FEATURES[name], score, markup.percent(score), name == "encoder")
        for name, score in scores.items()
        if score is not None
    ]
    count = len(run.classes)
    chance = f" Chance is {100 / count:.3g}\u00a0%." if count else ""
    return markup.section(
        "probe",
        "What the encoder knows",
        markup.paragraph(
            "A linear classifier on frozen features has to name the photograph that a "
            f"held-out crop was taken from.{chance}"
        ),
        markup.bar_table(("Features", "Accuracy"), rows) if rows else "",
        markup.paragraph(probe_sentence(scores), "body") if rows else "",
        markup.paragraph(
            "Averaged features cannot tell where something is in the crop; patch PCA "
            "and raw pixels are kept whole and can. “Clearly” means by "
            f"{100 * CLEAR:.0f} percentage points or more; less than "
            f"{100 * LEVEL:.0f} point counts as level.",
            "note",
        )
        if rows
        else markup.missing(_NOT_YET, ["probe"]),
    )


def probe_sentence(scores: dict[str, float | None]) -> str:
    """Says in words whether the encoder beats the other features.

    Args:
        scores: Accuracies in [0, 1] by feature name; None if unknown.
    """
    encoder = scores.get("encoder")
    if encoder is None:
        return "The accuracy of the encoder is not known."
    claims = []
    for name, text in (
        ("random", "the random encoder"),
        ("pca", "patch PCA"),
        ("pixels", "raw pixels"),
    ):
        other = scores.get(name)
        if other is not None:
            verb = _compare(encoder, other)
            claims.append(f"{verb} {text} ({markup.percent(other)})")
    subject = f"The encoder ({markup.percent(encoder)}) "
    if not claims:
        return f"{subject}has nothing to be compared with."
    return subject + "; it ".join(claims) + "."


def _compare(encoder: float, other: float) -> str:
    difference = encoder - other
    if difference >= CLEAR:
        return "clearly beats"
    if difference >= LEVEL:
        return "narrowly beats"
    return "is level with" if difference > -LEVEL else "does not beat"


def frechet(run: folder.Quickstart) -> str:
    """Frechet distances between floor and ceiling."""
    found = run.block("generation")
    scores = {name: found.get(f"fd_efflite0_{name}") for name in _SETS}
    rows = [
        (*_SETS[name], score, markup.significant(score), name in ("samples", "guided"))
        for name, score in scores.items()
        if score is not None
    ]
    return markup.section(
        "frechet",
        "How far samples are from real crops",
        markup.paragraph(
            "fd_efflite0 is the Fréchet distance between two sets of images in the "
            "feature space of an EfficientNet-Lite0 that others trained on ImageNet; "
            "it was not trained here. It is built like FID but it is not FID: another "
            "network, small sets, small images. Compare it only with the other rows. "
            "Lower is closer."
        ),
        markup.bar_table(("Compared with training crops", "fd_efflite0"), rows)
        if rows
        else markup.missing(_NOT_YET, ["generation"]),
        markup.paragraph(frechet_sentence(scores), "body") if rows else "",
        markup.paragraph(_sizes(found), "note") if rows else "",
    )


def frechet_sentence(scores: dict[str, float | None]) -> str:
    """Says in words what the Frechet distances show.

    Args:
        scores: Distances by set name; None if unknown.
    """
    plain, guided = scores.get("samples"), scores.get("guided")
    floor, ceiling = scores.get("real_train"), scores.get("untrained")
    text = []
    if None not in (plain, floor, ceiling) and ceiling > floor:
        share = (ceiling - plain) / (ceiling - floor)
        text.append(
            f"Training closed {100 * share:.0f} % of the distance between the "
            f"untrained network ({markup.significant(ceiling)}) and real crops "
            f"({markup.significant(floor)})."
            if share > 0
            else "By this distance the samples are no closer to real crops than those "
            "of the untrained network; the pictures show what training changed."
        )
    if None not in (plain, guided):
        way = "lowers" if guided < plain else "does not lower"
        text.append(
            f"Guidance {way} the distance ({markup.significant(plain)} without, "
            f"{markup.significant(guided)} with it)."
        )
    return " ".join(text)


def _sizes(found: dict) -> str:
    samples, reference = found.get("num_samples"), found.get("num_reference")
    text = (
        f"{markup.decimals(samples, 0)} samples of each kind, compared with "
        f"{markup.decimals(reference, 0)} training crops. Even other training crops "
        "do not reach 0, because the distance grows as sets shrink"
    )
    if isinstance(samples, (int, float)) and samples <= _FEATURE_WIDTH:
        text += f"; with {_FEATURE_WIDTH} features these sets are small"
    return (
        f"{text}. Held-out regions show other things than the training crops, which "
        "is why samples can be closer to the reference than they are."
    )


def curves(run: folder.Quickstart) -> str:
    """Losses and scores of all stages over steps."""
    losses = [
        _chart(run, stage, title, names, size=_WIDE, smooth=True)
        for stage, (title, names) in _LOSSES.items()
    ]
    critic, scores = (
        [
            _chart(run, stage, title, names, size=_NARROW, smooth=False)
            for stage, title, names in group
        ]
        for group in (_CRITIC, _SCORES)
    )
    body = _grid("Training loss", losses, "")
    body += _grid("The decoder's critic, 0 until it starts", critic, " three")
    body += _grid("Held-out scores", scores, " three")
    return markup.section(
        "curves",
        "Training curves",
        markup.paragraph(
            "Losses are means between two log lines: pale as logged, strong when "
            "smoothed; the axis is logarithmic where the values span a wide range. "
            "Scores are from held-out crops, by averaged weights where a stage keeps "
            "them. Latent statistics are one pass without a loss."
        ),
        f'<div class="body curves">{body}</div>' if body else "",
        markup.missing(
            "Stages without a log so far",
            [folder.STAGES[s] for s in _LOSSES if not run.stages[s].records],
        )
        if any(not run.stages[s].records for s in _LOSSES)
        else "",
    )


def _grid(title: str, figures: list[str], kind: str) -> str:
    drawn = "".join(figures)
    return f'<h3>{title}</h3><div class="charts{kind}">{drawn}</div>' if drawn else ""


def _chart(run, stage: str, title: str, names: dict[str, str], **options) -> str:
    found = {text: run.stages[stage].series(name) for name, text in names.items()}
    found = {text: points for text, points in found.items() if points[0]}
    if not found and options["smooth"]:
        points = run.stages[stage].series("loss")
        found = {"loss": points} if points[0] else {}
    if not found:
        return ""
    lines = [charts.Line(text, *points) for text, points in found.items()]
    name = f"{stage}-{next(iter(names))}".replace("_", "-")
    svg = charts.line_chart(name, lines, **options)
    last = f"last {markup.significant(lines[0].values[-1])}"
    return markup.chart(title, svg, last, list(found) if len(found) > 1 else ())


def stages(run: folder.Quickstart) -> str:
    """Length and speed of every stage."""
    seconds, sizes = run.block("seconds"), run.block("parameters")
    heads = ["Stage", "Steps", "Batch", "Images/s", "Time"]
    heads += ["Parameters"] if sizes else []
    rows = []
    for name, title in folder.STAGES.items():
        stage = run.stages[name]
        speeds = stage.series("images_per_second")[1]
        row = [
            title,
            _steps(name, stage),
            markup.decimals(stage.config.get("data.batch_size"), 0),
            markup.significant(statistics.median(speeds) if speeds else None),
            markup.duration(seconds.get(name)),
        ]
        rows.append(row + ([markup.decimals(sizes.get(name), 0)] if sizes else []))
    last = ["Evaluation", *[markup.NOTHING] * 3]
    last.append(markup.duration(seconds.get("evaluation")))
    rows.append(last + ([markup.NOTHING] if sizes else []))
    return markup.section(
        "stages",
        "Stages",
        markup.paragraph(
            "How long each part took on this machine. Time includes compilation, "
            "checkpoints and evaluations in between; images per second is the median "
            "of the training steps alone."
        ),
        markup.table(heads, rows),
    )


def _steps(name: str, stage: folder.Stage) -> str:
    done = stage.last_step
    planned = stage.config.get("num_steps", 0)
    if not done:
        return markup.NOTHING
    # Not every run ends with a log line.
    near = done + stage.config.get("every.log", 0) > planned
    if name == "latent_stats" or not planned or near:
        return markup.decimals(max(done, planned), 0)
    return f"{done:,} of {planned:,}"


def setup(run: folder.Quickstart) -> str:
    """Configs, versions and how to repeat the run."""
    details = "".join(
        markup.config_details(title, run.stages[name].config)
        for name, title in folder.STAGES.items()
        if run.stages[name].config
    )
    absent = [name for name in folder.STAGES if not run.stages[name].config]
    facts = [(k, str(v)) for k, v in sorted(run.block("versions").items())]
    if "device" in run.metrics:
        facts.append(("device", str(run.metrics["device"])))
    configs = markup.section(
        "configs",
        "Configs",
        markup.paragraph("All values of every stage, as they were used."),
        f'<div class="body">{details}</div>' if details else "",
        markup.missing("No config so far", [f"{n}/config.json" for n in absent])
        if absent
        else "",
    )
    return configs + markup.section(
        "reproduce",
        "Reproduce",
        markup.paragraph(
            "From a clone of the repository. The first call installs the packages; "
            "photographs and metric networks come with them. Finished stages are kept, "
            "so the same command continues a run that was stopped."
        ),
        "<pre>bash launch/quickstart.sh</pre>",
        markup.facts(facts) if facts else "",
        "" if facts else markup.missing("No versions", ["metrics.json"]),
    )

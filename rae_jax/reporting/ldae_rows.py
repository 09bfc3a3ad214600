"""What the l-DAE paper prints (arXiv:2401.14404), one entry per figure.

Rows have the names of their variants in configs/ldae.py, configs/mae.py and
configs/mocov3.py. Accuracies are linear-probe top-1 on ImageNet in per cent.
"""

import dataclasses

PROBE, BEST_PROBE, FINETUNE, FID = "probe", "best probe", "fine-tuning", "FID"
PROBE_TIME = 10  # Noise level that the probed network is told, of 1000.
DEPTH = 24  # Blocks of the network that appendix A probes.


@dataclasses.dataclass(frozen=True)
class Entry:
    """One printed figure.

    Attributes:
        label: What the report calls it.
        row: The pre-training run behind it.
        paper: The figure; None where the paper's text does not give it.
        note: What has to be known about it.
        time: Noise level of the probe, None for the protocol's.
        noisy: Whether the probe's input has the noise of that level.
        block: Block that is probed, None for the encoder's last.
    """

    label: str
    row: str
    paper: float | None
    note: str = ""
    time: int | None = None
    noisy: bool = False
    block: int | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Figures of one kind.

    Attributes:
        name: Key in files.
        title: Heading.
        score: One of PROBE, BEST_PROBE, FINETUNE and FID.
        entries: In the paper's order.
    """

    name: str
    title: str
    score: str
    entries: tuple[Entry, ...]


# Rows that the paper prints twice, and the run that both are.
SAME_RUN = {"t2_convvae_d16": "t1_linear_g2", "t3_pca_baseline": "t2_ppca_d32"}

_TABLE_1 = (
    ("t1_dit_baseline", "DiT-L/2, classes, VQGAN", 57.5, 11.6, ""),
    (
        "t1_no_cls",
        "no classes",
        62.5,
        30.9,
        "one sentence of the paper has 62.1 and 34.2",
    ),
    ("t1_no_perc", "tokenizer without perceptual loss", 58.4, 54.3, ""),
    ("t1_no_adv", "tokenizer without adversarial loss", 59.0, 75.6, ""),
    ("t1_linear_g2", "gamma^2 linear in t", 63.4, 93.2, ""),
)
# Of table 2: name in rows, title, accuracies by latent dimension.
TOKENIZERS = {
    "convvae": ("conv VAE", (54.5, 63.4, 62.8, 57.0, 48.1)),
    "pvae": ("patch VAE", (58.3, 64.9, 64.8, 56.8)),
    "pae": ("patch AE", (59.9, 64.7, 64.6, 59.9)),
    "ppca": ("patch PCA", (56.0, 63.4, 65.1, 60.0, 53.9)),
}
LATENT_DIMS = (8, 16, 32, 64, 128)
_FIGURE_5 = (
    ("f5_pix_32_p2", "pixels 32/2, d = 12", 43.7, "or 44.7, read off a figure"),
    ("f5_pix_64_p4", "pixels 64/4, d = 48", 58.5, ""),
    ("f5_pix_128_p8", "pixels 128/8, d = 192", 53.0, "read off a figure"),
    ("f5_pix_256_p16", "pixels 256/16, d = 768", 23.6, ""),
)
_TABLE_3 = (
    ("t3_pca_baseline", "patch PCA, d = 32", 65.1, ""),
    ("t3_predict_clean", "predicts clean latents", 62.4, ""),
    ("t3_no_scaling", "input not scaled", 63.6, ""),
    ("t3_image_in", "input in image space", 63.6, ""),
    ("t3_image_out", "output in image space", 63.9, ""),
    ("t3_orig_image", "predicts the original image: l-DAE", 64.5, ""),
    ("x_single_sigma", "one noise level", 61.5, "section 4.3"),
)
_SECTION_5 = (
    ("t3_orig_image", "center crop", 64.5),
    ("s5_random_crop", "random crop, 400 epochs, ViT-L/2", 65.0),
    ("s5_ep800", "800 epochs", 67.5),
    ("s5_ep1600", "1600 epochs", 69.6),
    ("s5_enc_vitb", "400 epochs, ViT-B", 60.3),
    ("s5_enc_vitl", "400 epochs, ViT-L", 70.9),
)
# Linear probe, then fine-tuning.
_TABLE_4 = (
    ("t4_mocov3_b", "MoCo v3, ViT-B", 76.7, 83.2),
    ("t4_mae_b", "MAE, ViT-B", 68.0, 83.6),
    ("t4_ldae_b", "l-DAE, ViT-B", 66.6, 83.7),
    ("t4_mocov3_l", "MoCo v3, ViT-L", 77.6, 84.1),
    ("t4_mae_l", "MAE, ViT-L", 75.8, 85.9),
    ("t4_ldae_l", "l-DAE, ViT-L", 75.0, 84.7),
)
# Rows of configs/ldae.py that the paper has not or only speaks of.
_EXTRAS = (
    ("x_eps_on_final", "l-DAE that predicts noise", "no gap, says footnote 4"),
    ("t2_pvae_d128", "patch VAE, d = 128", ""),
    ("t2_pae_d128", "patch AE, d = 128", ""),
    ("f5_ppca_d256", "patch PCA, d = 256", "a point of figure 5, at 44.7 or 43.7"),
    ("x_ppca_cls", "patch PCA, d = 32, classes", ""),
    ("x_ppca_ddpm", "patch PCA, d = 32, DDPM's schedule", ""),
    ("x_latent_norm_none", "patch PCA, d = 32, latents not scaled", ""),
    ("x_latent_norm_per_channel", "patch PCA, d = 32, latents whitened", ""),
    ("x_ldae_norm_none", "l-DAE, latents not scaled", ""),
    ("x_ldae_norm_per_channel", "l-DAE, latents whitened", ""),
    ("x_wres_0", "l-DAE, residual weight 0", ""),
    ("x_wres_001", "l-DAE, residual weight 0.01", ""),
    ("t3_orig_image", "l-DAE, residual weight 0.1", ""),
    ("x_wres_1", "l-DAE, residual weight 1", ""),
)
_TIMES = (0, 10, 20, 40, 80)
_CLEAN = (64.1, 64.5, 64.1, 63.3, 62.2)
_NOISY = (64.2, 65.0, 65.0, 65.0, 64.5)
_BLOCKS = (58.5, 62.0, 64.1, 64.5, 63.6, 61.9, 59.7)  # From the 9th on.


def time_label(time: int, noisy: bool) -> str:
    """Returns what the report calls a probe at a noise level."""
    return f"t = {time}, {'noisy' if noisy else 'clean'} input"


def block_label(block: int, depth: int) -> str:
    """Returns what the report calls a probe of a block, counted from 1."""
    return f"block {block} of {depth}"


def _latent_dims() -> tuple[Entry, ...]:
    return tuple(
        Entry(f"{title}, d = {d}", f"t2_{name}_d{d}", paper)
        for name, (title, figures) in TOKENIZERS.items()
        for d, paper in zip(LATENT_DIMS, figures, strict=False)
    )


def _times() -> tuple[Entry, ...]:
    return tuple(
        Entry(time_label(t, noisy), "t3_orig_image", paper, "", t, noisy)
        for noisy, figures in ((False, _CLEAN), (True, _NOISY))
        for t, paper in zip(_TIMES, figures, strict=True)
    )


def _blocks() -> tuple[Entry, ...]:
    return tuple(
        Entry(block_label(k, DEPTH), "t3_orig_image", paper, block=k)
        for k, paper in enumerate(_BLOCKS, 9)
    )


TABLES = (
    Table(
        "table_1",
        "Table 1: reorienting the diffusion model",
        PROBE,
        tuple(Entry(what, row, acc, note) for row, what, acc, _, note in _TABLE_1),
    ),
    Table(
        "table_1_fid",
        "Table 1: generation, FID-50K",
        FID,
        tuple(Entry(what, row, fid, note) for row, what, _, fid, note in _TABLE_1),
    ),
    Table("table_2", "Table 2: tokenizers", PROBE, _latent_dims()),
    Table(
        "figure_5",
        "Figure 5: noise on pixels",
        PROBE,
        tuple(Entry(what, row, acc, note) for row, what, acc, note in _FIGURE_5),
    ),
    Table(
        "table_3",
        "Table 3: towards a classical denoising autoencoder",
        PROBE,
        tuple(Entry(what, row, acc, note) for row, what, acc, note in _TABLE_3),
    ),
    Table(
        "section_5",
        "Section 5: augmentation, epochs, size",
        PROBE,
        tuple(Entry(what, row, acc) for row, what, acc in _SECTION_5),
    ),
    Table(
        "table_4",
        "Table 4: linear probe, best time and noise",
        BEST_PROBE,
        tuple(Entry(what, row, acc) for row, what, acc, _ in _TABLE_4),
    ),
    Table(
        "appendix_b",
        "Appendix B: fine-tuning",
        FINETUNE,
        tuple(Entry(what, row, acc) for row, what, _, acc in _TABLE_4),
    ),
    Table("appendix_a_times", "Appendix A: time of the probe", PROBE, _times()),
    Table("appendix_a_blocks", "Appendix A: depth of the probe", PROBE, _blocks()),
    Table(
        "extras",
        "Beside the paper's tables",
        PROBE,
        tuple(Entry(what, row, None, note) for row, what, note in _EXTRAS),
    ),
)

# The probe's figure of every row, where it has one.
ACCURACIES = {
    entry.row: entry.paper
    for table in reversed(TABLES[:7])
    if table.score != FID
    for entry in table.entries
}

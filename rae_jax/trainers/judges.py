"""The networks and references that image sets are measured with."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from rae_jax import storage
from rae_jax.evaluation import (
    extractors,
    features,
    inception_features,
    quality,
    streaming,
)
from rae_jax.trainers import frozen


@dataclasses.dataclass(frozen=True)
class Judges:
    """What measures image sets; networks are loaded only when asked for.

    Attributes:
        inception: Weight file of the FID Inception; empty for none.
        efflite0: Whether to measure fd_efflite0.
        encoder: Hub id, folder or file of a pretrained encoder; empty for none.
        reference: Statistics or images that sets are compared with; where it is
            empty, reconstructions are compared with their originals.
        batch_size: Images at a time.
        encoder_token: Which of the encoder's tokens is compared: "mean" or "cls".
    """

    inception: str = ""
    efflite0: bool = False
    encoder: str = ""
    reference: str = ""
    batch_size: int = 64
    encoder_token: str = features.MEAN

    def networks(self, mesh: Mesh | None = None) -> tuple[extractors.Extractor, ...]:
        """Loads the networks.

        Raises:
            FileNotFoundError: A weight file is missing; says what to fetch.
            ValueError: A file holds something else.
        """
        options = dict(batch_size=self.batch_size, mesh=mesh)
        found = []
        if self.inception:
            path = storage.path(self.inception)
            found.append(inception_features.make_extractor(path, **options))
        if self.efflite0:
            found.append(features.make_efflite0(**options))
        if self.encoder:
            encoder = dict(token=self.encoder_token, **options)
            found.append(features.make_encoder(self.encoder, **encoder))
        return tuple(found)

    def references(
        self,
        networks: tuple[extractors.Extractor, ...],
        *,
        keep: bool = False,
        progress: quality.Progress = lambda count: None,
    ) -> dict[str, quality.Measured]:
        """Reads or measures the reference for each network, by the network's name."""
        if not self.reference:
            return {}
        path = storage.path(self.reference)
        return {
            net.name: quality.read_reference(
                net, path, keep=keep and is_inception(net), progress=progress
            )
            for net in networks
        }


def is_inception(network: extractors.Extractor) -> bool:
    """Returns whether a network is the one of FID, precision and recall."""
    return network.name == inception_features.NAME


def configured(config: ConfigDict, workdir: Path) -> Judges:
    """Returns what a config's `evaluation` block asks for while training.

    Its keys are those of `Judges`, all optional; paths count from the workdir.
    """
    block = config.get("evaluation") or {}
    given = {
        f.name: block[f.name] for f in dataclasses.fields(Judges) if f.name in block
    }
    for name in ("inception", "encoder", "reference"):
        if given.get(name):
            given[name] = str(frozen.resolve(given[name], workdir))
    return Judges(**given)


def compare_images(
    path: Path,
    judges: Judges,
    *,
    limit: int | None = None,
    save_statistics: Path | None = None,
    progress: quality.Progress = lambda count: None,
) -> quality.Result:
    """Measures a folder or .npz of images, without any run.

    Args:
        path: The images.
        judges: Networks and the reference.
        limit: Only the first `limit` images.
        save_statistics: Where to write the images' statistics, as a reference.
        progress: Called with the number of images just done.

    Raises:
        ValueError: No network is given, or neither a reference nor a place for
            statistics is; or images or reference cannot be used.
        FileNotFoundError: Images, reference or weights are missing.
    """
    images = streaming.open_images(path, limit)
    networks = judges.networks()
    if not networks:
        raise ValueError(inception_features.HOW_TO_GET)
    if save_statistics is not None and len(networks) > 1:
        raise ValueError(
            "--save-statistics: a file holds those of one network; give one of "
            "--inception, --efflite0 and --encoder."
        )
    if not judges.reference and save_statistics is None:
        raise ValueError(
            f"{path} needs something to be compared with: --reference REF.npz, a "
            "folder or .npz of images, or statistics such as ADM's; or "
            "--save-statistics OUT.npz to make a reference of it."
        )
    keep = bool(judges.reference)
    references = judges.references(networks, keep=keep, progress=progress)
    scores: dict[str, float] = {"num_images": len(images)}
    notes: list[str] = []
    for net in networks:
        found = quality.measure(
            net,
            images.batches(),
            str(path),
            keep=keep and is_inception(net),
            progress=progress,
        )
        if save_statistics is not None:
            quality.save_statistics(save_statistics, found)
        if net.name in references:
            result = quality.compare(found, references[net.name])
            scores |= result.scores
            notes += [note for note in result.notes if note not in notes]
    return quality.Result(scores, tuple(notes))

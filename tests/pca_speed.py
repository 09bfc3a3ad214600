"""Times the fit of a patch PCA, paired with products of matrices in float64.

    OPENBLAS_NUM_THREADS=1 python tests/pca_speed.py

Prints one ratio per repeat: how many times faster than a product of the same matrices,
2 n p^2 operations, the fit is, from uint8 images in memory to the basis. Half of that
is the share of the product's rate, for a fit needs but half of these operations. Times
are CPU seconds, so that other programs do not count.
"""

import json
import time

import numpy as np
from pca_data import fit_images

ROWS, DIM, REPEATS = 2**15, 768, 5


def seconds(function) -> float:
    """Returns CPU seconds of all threads."""
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    """Measures; the product is of half of the rows, twice, to spare memory."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (ROWS // 256, 256, 256, 3), dtype=np.uint8)
    a, b = (rng.standard_normal((ROWS // 2, DIM)) for _ in range(2))
    ratios = []
    for _ in range(REPEATS):
        product = 2 * seconds(lambda: a.T @ b)
        ratios.append(product / seconds(lambda: fit_images(images, 16)))
    print(json.dumps(sorted(ratios)))


if __name__ == "__main__":
    main()

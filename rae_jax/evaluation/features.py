"""Frechet distances in the feature space of EfficientNet-Lite0.

An ImageNet classifier that is not trained here. The distance is called `fd_efflite0`:
it is not the FID, whose Inception network cannot be installed from a package index.
"""

from collections.abc import Iterable

import jax
import numpy as np
from flax import nnx

from rae_jax.evaluation import frechet
from rae_jax.models import efficientnet, metrics_nets

INPUT_SIZE = 128


class EfficientNetFeatures:
    """Maps batches of images to pooled EfficientNet-Lite0 features.

    Args:
        batch_size: Images at a time.
        input_size: Side in pixels that the network sees; smaller is faster, and
            distances are comparable only at one size.
    """

    def __init__(self, batch_size: int, input_size: int = INPUT_SIZE):
        self.batch_size = batch_size
        self._params = metrics_nets.load_efficientnet_lite0()
        model = nnx.eval_shape(lambda: efficientnet.EfficientNetLite0(rngs=nnx.Rngs(0)))
        graphdef = nnx.graphdef(model)

        @jax.jit
        def features(params, images):
            images = images.astype("float32") / 255.0
            return nnx.merge(graphdef, params).features(images, input_size)

        self._features = features

    def moments(self, batches: Iterable[np.ndarray]) -> frechet.Moments:
        """Returns the feature moments of uint8 images (b, h, w, 3) in any batches."""
        images = np.concatenate(list(batches))
        moments = frechet.Moments.empty(efficientnet.FEATURE_DIM)
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            count = len(part)
            if count < self.batch_size:  # One shape, one compilation.
                copies = np.repeat(part[-1:], self.batch_size - count, axis=0)
                part = np.concatenate([part, copies])
            found = np.asarray(self._features(self._params, part))[:count]
            moments = frechet.add(moments, found)
        return moments

"""Is this even one of my classes? How far an image lies from all training images, by the features of the network.

`distances` measures how far; this module gets the compared features from a network.
"""

from typing import Any

import numpy as np

from helpers.core import wiring
from helpers.evaluation.trust import distances

KNOWN = 300  # training images that are remembered
LAST = "probabilities"  # the layer whose input is compared


def features_of(model) -> Any:
    """Return a function from images to the input of a classifier's last layer, float32 (images, n).

    Args:
        model: keras.Model as `classifier.build` makes it, or one that averages over its mirror images.
    """
    import keras

    from helpers.compute import inference

    base = base_of(model)
    return inference.fast(keras.Model(base.input, base.get_layer(LAST).input))


def base_of(model) -> Any:
    """Return the classifier within a model that mirrors images or calibrates probabilities.

    Raises:
        ValueError: there is no layer called probabilities.
    """
    if _is_base(model):
        return model
    return base_of(_inner(model))


def with_features(model) -> Any:
    """Return a keras.Model that gives, in one pass, the outputs of a classifier and those of `features_of`.

    Args:
        model: as for `features_of`.

    Returns:
        keras.Model: images -> [probabilities (batch, classes), features (batch, n)].
    """
    import keras

    from helpers.compute import frontier

    name = f"{model.name}_with_features"
    if _is_base(model):
        return keras.Model(model.input, [model.output, model.get_layer(LAST).input], name=name)
    inner, features = _inner(model), []
    both, whole = with_features(inner), model.inputs[0]

    def call(node, *args, **kwargs):
        if node.operation is not inner:
            return node.operation(*args, **kwargs)
        outputs, vectors = both(*args, **kwargs)
        if node.input_tensors[0] is whole:  # not one of its mirror images
            features.append(vectors)
        return outputs

    image = keras.Input(batch_shape=whole.shape, dtype=whole.dtype, name="image")
    outputs = frontier.replay(model, [*wiring.nodes_of(model)], {id(whole): image}, call)
    return keras.Model(image, [outputs, features[0]], name=name)


def asking(model) -> tuple[Any, int]:
    """Return a function from images to probabilities and, in the columns after them, features.

    Args:
        model: as `with_features` returns it.

    Returns:
        The function, images (n, H, W, 3) -> float32 (n, classes + features), and the number of classes.
    """
    import keras

    from helpers.compute import inference

    # An explicit name: names that Keras generates in this process may be in the model already.
    both = keras.layers.Concatenate(name="said_and_features", dtype="float32")(model.outputs)
    return inference.fast(keras.Model(model.input, both)), model.outputs[0].shape[1]


def _is_base(model) -> bool:
    return any(layer.name == LAST for layer in model.layers)


def _inner(model) -> Any:
    for layer in model.layers:
        if getattr(layer, "layers", None):
            return layer
    raise ValueError(f"The model {model.name!r} has no layer {LAST!r}, which every classifier of Thaw has.")


def fit(model, train, features: np.ndarray, *, false_alarms: float, seed: int = 0) -> distances.Novelty:
    """Return distances from up to 300 training images, with the threshold that validation sets.

    Args:
        model: as for `features_of`.
        train: datasets.Folder.
        features: of the validation images, (images, n).
        false_alarms: share of the validation images that may lie beyond the threshold; 0 checks no image.
        seed: of the choice of training images.
    """
    from helpers.training import datasets

    if not false_alarms:
        return distances.Novelty(np.zeros((0, 1), np.float32), np.inf, 0.0)
    run = features_of(model)
    rows = np.sort(np.random.default_rng(seed).permutation(len(train))[:KNOWN])
    own = distances.unit(datasets.through(run, datasets.at(train, rows), "features"))
    vectors = distances.unit(own.astype(np.float16))  # as in the file, so that the threshold fits them
    far = distances.Novelty(vectors, np.inf, false_alarms).distance(features)
    return distances.Novelty(vectors, _threshold(np.sort(far), false_alarms), false_alarms)


def _threshold(far: np.ndarray, false_alarms: float) -> float:
    """Return a distance that at most this share of the sorted distances exceeds, in the middle of a gap. At
    the distance of an image, the last digit would decide about that image.
    """
    place = int(np.ceil((len(far) - 1) * (1 - false_alarms) - 1e-9))
    return float(far[place : place + 2].mean() if place + 1 < len(far) else far[-1] + 1e-3)

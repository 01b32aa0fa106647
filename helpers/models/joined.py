"""Several classifiers as one Keras model: the mean of their predictions, the mean of their weights, or two stages."""

from collections.abc import Mapping, Sequence
from typing import Literal

import keras
import numpy as np

Of = Literal["probabilities", "logits"]
SMALLEST = 1e-7  # lower limit of a probability before its logarithm
EXACT = {"dtype": "float32"}


def mean(models: Sequence[keras.Model], shares: Sequence[float], of: Of = "probabilities") -> keras.Model:
    """Return the weighted mean of the predictions of classifiers.

    Args:
        models: images (batch, H, W, 3) -> probabilities (batch, classes), of the same size and the same classes.
        shares: the weight of each; they add up to 1.
        of: "probabilities", or "logits": the mean of the logarithms, converted to probabilities again.

    Returns:
        keras.Model: images -> float32 probabilities (batch, classes).

    Raises:
        ValueError: different sizes or classes, or shares that do not add up to 1.
    """
    check([model.input_shape for model in models], [model.output_shape for model in models])
    if len(shares) != len(models) or not np.isclose(sum(shares), 1) or min(shares) < 0:
        raise ValueError(f"shares are {list(shares)}; expected one for each of {len(models)} models, 1 in all.")
    image = keras.Input(models[0].input_shape[1:], name="image")
    outputs = [part_of(model, number)(image, training=False) for number, model in enumerate(models, 1)]
    if of == "logits":
        outputs = [keras.ops.log(keras.ops.maximum(keras.ops.cast(one, "float32"), SMALLEST)) for one in outputs]
    scaled = [
        keras.layers.Rescaling(float(share), name=f"share_{number}", **EXACT)(one)
        for number, (one, share) in enumerate(zip(outputs, shares, strict=True), 1)
    ]
    total = keras.layers.Add(name="mean", **EXACT)(scaled) if len(scaled) > 1 else scaled[0]
    if of == "logits":
        total = keras.layers.Softmax(name="mean_probabilities", **EXACT)(total)
    return _sealed(keras.Model(image, total, name="ensemble"))


def soup(models: Sequence[keras.Model]) -> keras.Model:
    """Set the weights of the first model to the mean of the weights of all, and return it.

    Wortsman et al., "Model soups", ICML 2022. It is useful only if all were trained from the same start.

    Raises:
        ValueError: the models have other weights than the first one.
    """
    shapes = [[tuple(weight.shape) for weight in model.weights] for model in models]
    if different := [number for number, own in enumerate(shapes, 1) if own != shapes[0]]:
        raise ValueError(f"Model {different[0]} has other weights than model 1, so they have no mean.")
    every = [model.get_weights() for model in models]
    alike = zip(*every, strict=True)
    models[0].set_weights([np.mean(same, axis=0, dtype=np.float64).astype(same[0].dtype) for same in alike])
    return models[0]


def two_stage(
    first: keras.Model,
    first_names: Sequence[str],
    seconds: Mapping[str, keras.Model],
    second_names: Mapping[str, Sequence[str]],
    class_names: Sequence[str],
    *,
    hard: bool = False,
) -> keras.Model:
    """Return P(group) x P(class | group): one model for groups and single classes, and one for each group.

    Args:
        first: images (batch, H, W, 3) -> probabilities (batch, groups and single classes).
        first_names: the names of its outputs.
        seconds: for each group the model of its classes.
        second_names: for each group the names of its model's outputs.
        class_names: the names of the outputs of the joined model.
        hard: only the most likely group counts, and every class outside it has the probability 0.

    Returns:
        keras.Model: images -> float32 probabilities (batch, classes).

    Raises:
        ValueError: a class is neither in a group nor a single class, or a group has no model.
    """
    check([first.input_shape, *(model.input_shape for model in seconds.values())], [])
    own = {name: group for group, names in second_names.items() for name in names}
    homes = [own.get(name, name) for name in class_names]
    if missing := [name for name in homes if name not in first_names]:
        raise ValueError(f"No output of the first stage stands for {', '.join(missing)}; it has {list(first_names)}.")
    if missing := [group for group in second_names if group not in seconds]:
        raise ValueError(f"The group {missing[0]} has no model of its own.")
    image = keras.Input(first.input_shape[1:], name="image")
    outer = keras.ops.cast(part_of(first, 1)(image, training=False), "float32")
    if hard:
        outer = keras.ops.one_hot(keras.ops.argmax(outer, axis=1), len(first_names))
    inner = [keras.ops.ones_like(outer[:, :1])]  # the factor of a class without a group
    places, at = {}, 1
    for number, (group, model) in enumerate(seconds.items(), 2):
        inner.append(keras.ops.cast(part_of(model, number)(image, training=False), "float32"))
        places |= {name: at + place for place, name in enumerate(second_names[group])}
        at += len(second_names[group])
    rows = [list(first_names).index(home) for home in homes]
    columns = [places.get(name, 0) for name in class_names]
    factors = keras.ops.take(keras.ops.concatenate(inner, axis=1), np.array(columns, np.int32), axis=1)
    whole = keras.layers.Multiply(name="two_stage", **EXACT)(
        [keras.ops.take(outer, np.array(rows, np.int32), axis=1), factors]
    )
    return _sealed(keras.Model(image, whole, name="two_stage_classifier"))


def _sealed(inner: keras.Model) -> keras.Model:
    """Return a model with `inner` as its only layer, so that layers on top never repeat a name."""
    image = keras.Input(inner.input_shape[1:], name="image")
    return keras.Model(image, inner(image, training=False), name="joined")


def part_of(model: keras.Model, number: int) -> keras.Model:
    """Return the same layers as a model with its own name, so that several can be joined."""
    return keras.Model(model.input, model.output, name=f"run_{number}")


def check(sizes: Sequence[tuple], outputs: Sequence[tuple]) -> None:
    """Raise ValueError if the models take images of different sizes, or give different numbers of classes."""
    for what, shapes in (("take images of", sizes), ("give probabilities of", outputs)):
        if different := [shape for shape in shapes if shape[1:] != shapes[0][1:]]:
            raise ValueError(f"The models {what} the shapes {shapes[0][1:]} and {different[0][1:]}; expected the same.")

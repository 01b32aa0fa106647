"""What Keras does more than once, against the same done once, as in Thaw.

    python benchmarks/twice.py

Keras makes a layer for each one that it saves or loads (`helpers/core/mended/keras_saving.py`), and `fit` traces its
step a second time where the first made the optimiser's variables (`helpers/training/fitting.py`). Each is measured with
both ways in turn, several times; the median counts. The seconds are the processor time of all cores.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import setting
from keras.src.saving import saving_lib

from helpers.core.mended import keras_saving


def main() -> None:
    """Measure both, and print a line for each with the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print(setting.machine())
    keras_saving.correct()
    once = saving_lib.get_attr_skipset
    anew = once.__wrapped__
    with tempfile.TemporaryDirectory() as folder:
        save, load = saving(Path(folder) / "model.weights.h5")
        for name, work in {"save weights": save, "load weights": load}.items():
            ways = [functools.partial(seconds, work, attributes) for attributes in (anew, once)]
            compare(f"EfficientNet-B0, {name}", repeats, *ways)
    ways = [functools.partial(fit, is_built) for is_built in (False, True)]
    compare("ResNet-50 of 64 pixels, two epochs of one step", repeats, *ways)


def compare(title: str, repeats: int, keras_way: Callable[[], float], thaw_way: Callable[[], float]) -> None:
    """Measure both ways in turn and print their medians."""
    pairs = [(keras_way(), thaw_way()) for _ in range(repeats + 1)][1:]  # the first warms up
    before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{title}: Keras {before:.2f} s, Thaw {after:.2f} s: ratio {before / after:.2f}")


def seconds(work: Callable[[], object], attributes: Callable[[str], set]) -> float:
    """Return the processor time that `work` takes where Keras asks `attributes` what each kind of object has."""
    saving_lib.get_attr_skipset = attributes
    begin = time.process_time()
    work()
    return time.process_time() - begin


def saving(file: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what saves the weights of a network, and what loads them."""
    model = keras.applications.EfficientNetB0(weights=None)
    model.save_weights(file)
    return lambda: model.save_weights(file, overwrite=True), lambda: model.load_weights(file)


def fit(is_built: bool) -> float:
    """Train for two epochs and return the processor time of `fit`, with or without what is made before it."""
    keras.utils.clear_session()
    model = keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3), classes=2)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=[keras.metrics.SparseCategoricalAccuracy()])
    images, labels = np.zeros((8, 64, 64, 3), "float32"), np.zeros(8, "int64")
    begin = time.process_time()
    if is_built:
        model.optimizer.build(model.trainable_variables)
    model.fit(images, labels, batch_size=8, epochs=2, verbose=0)
    return time.process_time() - begin


if __name__ == "__main__":
    main()

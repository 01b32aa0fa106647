"""What folding, faster gradients and bfloat16 save on a CPU: python benchmarks/steps.py

The two things that a training on the frozen frontier computes, each as Keras does it and as Thaw does, in turn in one
run: the frozen prefix on a batch of 32 images, and a step of training of what lies above it. The fastest of several
tries counts, since other work on the machine only makes a try slower.
"""

import argparse
import time
from collections.abc import Callable, Mapping

import keras
import numpy as np
import setting
import tensorflow as tf

from helpers.compute import fast_layers, frontier, inference
from helpers.core import machine
from helpers.models import classifier, unfreezing

BATCH = 32


def main() -> None:
    """Measure and print both for each backbone and what it thaws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", nargs="+", default=["efficientnet_lite0:block7", "efficientnet_lite0:block5"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--tries", type=int, default=5, help="of each, in turn; the fastest counts")
    arguments = parser.parse_args()
    print(f"{setting.machine()}, multiplies bfloat16: {'yes' if machine.multiplies_bfloat16() else 'no, so slowly'}")
    for name in arguments.cuts:
        backbone, block = name.split(":")
        model = classifier.build(backbone, 2, image_size=arguments.image_size, weights="none")
        unfreezing.unfreeze(model, block)
        cut = frontier.cut(model)
        print(f"\n{backbone}, thawed from {block} on; milliseconds for {BATCH} images of {arguments.image_size} pixels")
        compare("prefix", prefixes(cut.prefix), arguments.tries)
        compare("training step of the suffix", suffixes(cut.suffix), arguments.tries)


def prefixes(prefix: keras.Model) -> dict[str, Callable[[], object]]:
    """Return the ways to compute the prefix on one batch."""
    images = np.random.default_rng(0).integers(0, 256, (BATCH, *prefix.input_shape[1:])).astype("float32")
    exact, rounded = inference.fast(prefix), inference.fast(prefix, rounded=True)
    return {
        "Keras": lambda: prefix.predict_on_batch(images),
        "folded": lambda: exact(images),
        "folded, bfloat16": lambda: rounded(images),
    }


def suffixes(suffix: keras.Model) -> dict[str, Callable[[], object]]:
    """Return the ways to train the suffix for one step."""
    ways = {"Keras": suffix, "folded": fast_layers.faster(suffix)}
    ways["folded, bfloat16"] = fast_layers.faster(suffix, rounded=True)
    return {name: _step(model) for name, model in ways.items()}


def _step(model: keras.Model) -> Callable[[], object]:
    model.compile("adam", "sparse_categorical_crossentropy", jit_compile=False)
    images = tf.random.stateless_uniform((BATCH, *model.input_shape[1:]), (1, 2))
    labels = tf.zeros(BATCH, tf.int32)
    return lambda: model.train_on_batch(images, labels)


def compare(what: str, ways: Mapping[str, Callable[[], object]], tries: int) -> None:
    """Print the milliseconds of each way and how many times as fast as the first it is."""
    for work in ways.values():
        work()  # compiles
    times = {name: [] for name in ways}
    for _ in range(tries):
        for name, work in ways.items():
            times[name].append(_milliseconds(work))
    first = min(next(iter(times.values())))
    for name, milliseconds in times.items():
        best = min(milliseconds)
        print(f"  {what + ', ' + name:<46}{best:>9.1f}{first / best:>8.2f} times")


def _milliseconds(work: Callable[[], object], calls: int = 5) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    return 1e3 * (time.perf_counter() - begin) / calls


if __name__ == "__main__":
    main()

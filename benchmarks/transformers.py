"""What the frozen frontier and LoRA save for a vision transformer: python benchmarks/transformers.py

A network of the shape of ViT-small (12 blocks of width 384, 6 heads, patches of 16 pixels) with random weights, the
last two blocks thawed. Each way trains in a process of its own on the same random images: plain, the whole model on
images; on the frontier, the part above it on the outputs of the blocks below, which are computed once; and both again
with LoRA. Images/s are those of the fastest epoch after the first: by the clock, and by the processor time of all
cores, which other work on the machine disturbs less. Memory is the most that the process held, and the part of it that
the optimiser keeps. Needs KerasHub.
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import setting
import tensorflow as tf

from helpers.compute import frontier, inference
from helpers.models import adapters, classifier, unfreezing
from helpers.training import feeds

BATCH = 32
SHAPE = {"patch_size": 16, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536}
LORA = {"lora": 8}
CLASSES = 10
SPEEDS = {"rate": 9, "processor_rate": 19}  # columns and their widths


def main() -> None:
    """Measure each way in a process of its own and print all beside the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--thawed", type=int, default=2, help="the last ones")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4, help="the first is not counted")
    arguments = parser.parse_args()
    print(setting.machine())
    print(f"{arguments.blocks} blocks, the last {arguments.thawed} thawed, {arguments.images} images an epoch")
    print(f"{'':<24} {'images/s':>9} {'times':>6} {'a processor second':>19} {'times':>6}", end="")
    print(f" {'trained weights':>16} {'optimiser':>10} {'memory':>10}")
    with tempfile.TemporaryDirectory() as folder:
        preset = save_preset(Path(folder), arguments.blocks, arguments.image_size)
        ways = [(way, adapter) for adapter in ({}, LORA) for way in ("plain", "on the frontier")]
        first: dict[str, float] = {}
        for way, adapter in ways:
            task = vars(arguments) | {"preset": preset, "way": way, "adapter": adapter}
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                row = pool.submit(measure, task).result()
            first = first or row
            speeds = [f"{row[name]:>{width}.1f} {row[name] / first[name]:>6.1f}" for name, width in SPEEDS.items()]
            print(
                f"{way + (', LoRA 8' if adapter else ''):<24} {' '.join(speeds)} {row['trained']:>16,}"
                f" {row['optimizer_mb']:>7,.1f} MB {row['memory_mb']:>7,.0f} MB",
                flush=True,
            )
            if "below" in row:
                print(f"{'':<4}below it, once for each view of an image: {row['below']:,.1f} images a processor second")


def save_preset(folder: Path, blocks: int, size: int) -> str:
    """Write the network as a preset of KerasHub and return its name."""
    import keras_hub

    keras.utils.set_random_seed(0)
    shape = SHAPE | {"num_layers": blocks, "image_shape": (size, size, 3)}
    keras_hub.models.ViTBackbone(**shape).save_to_preset(str(folder))
    converter = keras_hub.layers.ViTImageConverter(image_size=(size, size), scale=1 / 127.5, offset=-1.0)
    converter.save_to_preset(str(folder))
    return f"hub:{folder}"


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Train one way in this process; return images/s, weights that train, and the memory of both in MB."""
    keras.utils.set_random_seed(0)
    size = task["image_size"]
    model = classifier.build(task["preset"], CLASSES, image_size=size, dropout=0.0)
    unfreezing.unfreeze(model, f"block{task['blocks'] - task['thawed'] + 1}")
    adapters.add(model, task["adapter"])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (task["images"], size, size, 3), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, task["images"])
    measured, trained = {}, model
    if task["way"] != "plain":
        cut = frontier.cut(model)
        run = inference.fast(cut.prefix)
        run(images[:BATCH])  # compiles
        begin = time.process_time()
        images = np.concatenate([run(images[at : at + BATCH]) for at in range(0, len(images), BATCH)])
        measured["below"] = len(images) / (time.process_time() - begin)
        trained = feeds.faster(cut.suffix)
    trained.compile(keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy", jit_compile=False)
    data = tf.data.Dataset.from_tensor_slices((images, labels)).batch(BATCH).prefetch(1)
    clock = Clock()
    trained.fit(data, epochs=task["epochs"], callbacks=[clock], shuffle=False, verbose=0)
    optimizer = sum(int(np.prod(weight.shape)) for weight in trained.optimizer.variables) * 4e-6
    weights = sum(int(keras.ops.size(weight)) for weight in model.trainable_weights)
    rates = {"rate": task["images"] / min(clock.seconds[1:]), "processor_rate": task["images"] / min(clock.work[1:])}
    peak = setting.peak_of(os.getpid())
    return measured | rates | {"trained": weights, "optimizer_mb": optimizer, "memory_mb": peak}


class Clock(keras.callbacks.Callback):
    """Notes the seconds of each epoch, and those of the processor."""

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.seconds: list[float] = []
        self.work: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.begun = time.perf_counter(), time.process_time()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.seconds.append(time.perf_counter() - self.begun[0])
        self.work.append(time.process_time() - self.begun[1])


if __name__ == "__main__":
    main()

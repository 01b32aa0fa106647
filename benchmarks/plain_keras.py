"""The same recipe in plain Keras, as an expert would write it for a CPU; the benchmarks start it.

Tuned: images are decoded once and stay in memory, augmentation is Keras's own layers in tf.data in parallel and ahead,
the backbone is called in inference mode, nothing is compiled with XLA, which is many times slower on a CPU. It uses
only the weights (EfficientNet-Lite0 is not in keras.applications) and the list of augmentation layers of Thaw.

    python benchmarks/plain_keras.py '{"images": "runs/x/resize", "epochs": 50, ...}'

It prints one line of JSON: seconds since `begin` at which training began and ended, the processor time by then, and for
each epoch these seconds, validation accuracy and loss; and writes the predictions of the test images when `predictions`
names a file. With `logits`, a file, it only writes the logits of ImageNet's classes of the validation images there.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from helpers.models import backbones
from helpers.training import transforms

BATCH = 32


class Clock(keras.callbacks.Callback):
    """Notes after each epoch how long all has taken so far, and how good the model is; keeps the best weights."""

    def __init__(self, begin: float):
        super().__init__()
        self.begin, self.epochs, self.lowest, self.best = begin, [], np.inf, None

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append([time.time() - self.begin, logs["val_accuracy"], logs["val_loss"]])
        if logs["val_loss"] < self.lowest:
            self.lowest, self.best = logs["val_loss"], self.model.get_weights()


def main(task: dict) -> dict:
    """Train both phases, predict the test part, and return what was measured."""
    keras.utils.set_random_seed(task["seed"])
    train, val = read(task["images"], "train"), read(task["images"], "val")
    body = backbones.build("efficientnet_lite0", task["image_size"])
    model = classifier(body, int(train[1].max()) + 1, task["dropout"])
    data = {"x": batches(train, task["flip"], task["seed"]), "validation_data": plain(val)}
    first, second = (Clock(task["begin"]) for _ in range(2))

    body.trainable = False
    began = time.time() - task["begin"]
    compile_(model, task["rates"][0])
    model.fit(**data, epochs=task["epochs"], callbacks=[first], verbose=0)
    model.set_weights(first.best)

    unfreeze(body, task["unfreeze"])
    compile_(model, task["rates"][1])
    model.fit(**data, epochs=task["epochs"], callbacks=[second], verbose=0)
    model.set_weights(min(first, second, key=lambda clock: clock.lowest).best)
    ended, processor = time.time() - task["begin"], time.process_time()

    if task.get("predictions"):
        write_predictions(model, task["images"], task["predictions"])
    return {"began": began, "ended": ended, "processor": processor, "epochs": first.epochs + second.epochs}


def read(folder: str, part: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the images of one part of a folder of 02_resize, uint8 (n, H, W, 3), their labels and their paths."""
    table = pd.read_csv(Path(folder) / "images.csv")
    names = json.loads((Path(folder) / "class_names.json").read_text())
    table = table[table["part"] == part]
    images = [tf.io.decode_png(tf.io.read_file(str(Path(folder) / file)), 3).numpy() for file in table["file"]]
    return np.stack(images), table["label"].map(names.index).to_numpy("int32"), list(table["path"])


def batches(part: tuple, flip: str, seed: int) -> tf.data.Dataset:
    """Return shuffled, augmented batches from memory."""
    flips = [keras.layers.RandomFlip(mode) for mode in transforms.FLIPS[flip]]
    augment = keras.Sequential(
        flips + [getattr(keras.layers, name)(**values) for item in transforms.DEFAULT for name, values in item.items()]
    )
    data = tf.data.Dataset.from_tensor_slices(part[:2]).shuffle(len(part[0]), seed=seed).batch(BATCH)
    data = data.map(lambda x, y: (augment(tf.cast(x, "float32"), training=True), y), tf.data.AUTOTUNE)
    return data.prefetch(tf.data.AUTOTUNE)


def plain(part: tuple) -> tf.data.Dataset:
    """Return batches in order, from memory."""
    return tf.data.Dataset.from_tensor_slices(part[:2]).batch(2 * BATCH).prefetch(tf.data.AUTOTUNE)


def classifier(body: keras.Model, classes: int, dropout: float) -> keras.Model:
    """Return the backbone with S1's head."""
    inputs = keras.Input(body.input_shape[1:])
    x = keras.layers.GlobalAveragePooling2D()(body(inputs, training=False))
    x = keras.layers.Dropout(dropout)(x)
    return keras.Model(inputs, keras.layers.Dense(classes, activation="softmax")(x))


def compile_(model: keras.Model, rate: float) -> None:
    """Compile with Adam; without XLA."""
    loss = "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"], jit_compile=False)


def unfreeze(body: keras.Model, block: str) -> None:
    """Let everything from `block` on train, except BatchNormalization."""
    body.trainable = True
    start = next(index for index, layer in enumerate(body.layers) if layer.name.startswith(block))
    for index, layer in enumerate(body.layers):
        layer.trainable = index >= start and not isinstance(layer, keras.layers.BatchNormalization)


def write_predictions(model: keras.Model, folder: str, path: str) -> None:
    """Write path, label and predicted (class indices) of the test images."""
    images, labels, paths = read(folder, "test")
    predicted = model.predict(images, batch_size=2 * BATCH, verbose=0).argmax(axis=1)
    pd.DataFrame({"path": paths, "label": labels, "predicted": predicted}).to_csv(path, index=False)


def imagenet_logits(task: dict) -> None:
    """Write the logits of ImageNet's classes that the network that is timed gives the validation images."""
    model = backbones.imagenet_classifier("efficientnet_lite0", task["image_size"])
    np.save(task["logits"], model.predict(read(task["images"], "val")[0], batch_size=2 * BATCH, verbose=0))


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps(imagenet_logits(task) if task.get("logits") else main(task)))

"""How many images a second each step of a training handles on this machine, and which step the training waits for.

The steps run here one at a time, each as in the training; in the training they overlap, so it takes about as
long as its slowest step.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from helpers.compute import bank, frontier, hardware, inference, views
from helpers.compute.views import GROUP
from helpers.training import datasets, feeds, transforms

SAMPLE = 256  # images that are read; of large ones fewer
SAMPLE_BYTES = 100_000_000
MOST_WORKERS = 16
ADVICE = {
    "disk": "put the images on a faster disk, or write them as jpg (resize.format)",
    "decode": "write smaller images (resize.image_size)",
    "augment": "take fewer or cheaper augmentation layers, or fewer views",
    "prefix": "take fewer views, a smaller backbone or smaller images",
    "suffix": "unfreeze less, or train fewer epochs",
}


def check(seconds: int) -> None:
    """Raise a ValueError if something is measured and the model trains on several devices together."""
    if seconds and hardware.replicas() > 1:
        raise ValueError(
            f"measure_seconds measures one device, and {hardware.replicas()} train together. Set it to 0, or"
            f" {hardware.ONE_DEVICE}."
        )


def measure(
    model: keras.Model,
    images: datasets.Folder,
    *,
    seconds: float,
    views: int,
    epochs: int,
    batch_size: int,
    augment: transforms.Augmentation | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure each step of the training of `model` on `images`; the model keeps its weights.

    Args:
        model: a classifier whose trainable flags are set. It must be compiled again before it trains.
        images: the training images.
        seconds: how long to measure in all, with the preparations; each step runs twice even if that takes longer.
        views, epochs, batch_size, augment, seed: as the training will get them.

    Returns:
        One row a step: disk (without the system's file cache if it can be emptied), decode, augment, prefix (what is
        computed once a view; absent if the whole model trains), suffix (a step of training). Columns: images/s,
        passes (how often the training sends each image through), seconds (that all of it takes in the training).

    Raises:
        ValueError: the model trains on several devices together; one is measured.
    """
    check(1)
    cut = frontier.cut(model)
    cached = views > 0 and cut.is_worth_it
    sample, pixels = _sample(images)
    read_again = not cached and len(images) * pixels[0].nbytes > bank.SHARE_OF_RAM * bank.free_memory()
    steps = {"disk": (epochs if read_again else 1, lambda: _reading(sample.files))}
    steps["decode"] = steps["disk"][0], lambda: _decoding(sample)
    if augment is not None and cached and views > 1:
        steps["augment"] = views - 1, lambda: _views(sample, pixels, augment, seed)
    elif augment is not None and not cached:
        steps["augment"] = epochs, lambda: _augmenting(sample, pixels, augment, batch_size, seed)
    if cached:
        steps["prefix"] = views if augment is not None else 1, lambda: _predicting(cut.prefix, pixels)
    steps["suffix"] = epochs, lambda: _training(feeds.faster(cut.suffix if cached else model), batch_size)
    rates = _rates([start for _, start in steps.values()], seconds)
    table = pd.DataFrame({"images/s": rates, "passes": [passes for passes, _ in steps.values()]}, index=list(steps))
    table["seconds"] = table["passes"] * len(images) / table["images/s"]
    return table.rename_axis("step")


def bottleneck(table: pd.DataFrame) -> str:
    """Return a sentence that names the step of `measure` that takes longest, and how to make it faster."""
    slowest = table["seconds"].idxmax()
    rate, seconds = table.loc[slowest, ["images/s", "seconds"]]
    return (
        f"The bottleneck is {slowest}: {rate:,.0f} images/s, {seconds:,.0f} s of this training and"
        f" {100 * seconds / table['seconds'].sum():.0f} % of all that was measured. To be faster, {ADVICE[slowest]}."
    )


def loader_workers(
    images: datasets.Folder,
    *,
    seconds: float,
    augment: transforms.Augmentation | None = None,
    batch_size: int = 32,
    workers: Sequence[int] = (),
) -> pd.DataFrame:
    """Measure how fast images are read, decoded and augmented by 1, 2, 4 ... threads, without any training.

    Args:
        images: the training images.
        seconds: how long to measure in all.
        augment: as `transforms.make` returns it.
        batch_size: images that are augmented together.
        workers: numbers of threads; by default the powers of two up to twice the cores, at most 16.

    Returns:
        One row for each number of workers: images/s, and seconds (that one epoch of `images` takes to load).

    Raises:
        ValueError: a number of workers is not at least 1.
    """
    most = min(MOST_WORKERS, 2 * (os.cpu_count() or 1))
    workers = list(workers) or [2**power for power in range(most.bit_length())]
    if bad := [number for number in workers if number < 1]:
        raise ValueError(f"workers are numbers of threads, at least 1; got {bad[0]}.")
    starts = [lambda number=number: _loading(images, augment, batch_size, number) for number in workers]
    table = pd.DataFrame({"images/s": _rates(starts, seconds)}, index=pd.Index(workers, name="workers"))
    return table.assign(seconds=len(images) / table["images/s"])


def _rates(starts: Sequence[Callable], seconds: float) -> list[float]:
    """Return the images/s of each step. First each is prepared and runs once; then all share the remaining time.

    Args:
        starts: functions that prepare a step and give, as a context, a function that does some of it and returns how
            many images that were.
    """
    end = time.perf_counter() + seconds
    with ExitStack() as stack:
        steps = [stack.enter_context(start()) for start in starts]
        for work in steps:
            work()
        share = (end - time.perf_counter()) / len(steps)
        return [_rate(work, share) for work in steps]


def _rate(work: Callable[[], int], seconds: float) -> float:
    """Return the images/s of `work`, called once and then as often as there is time for another call."""
    begin, count, calls, spent = time.perf_counter(), 0, 0, 0.0
    while not calls or spent * (calls + 1) / calls < seconds:
        count += work()
        calls, spent = calls + 1, time.perf_counter() - begin
    return count / spent


def _sample(images: datasets.Folder) -> tuple[datasets.Folder, np.ndarray]:
    """Return some of the images, evenly spread, and their pixels, uint8 (n, H, W, 3)."""
    most = max(GROUP, min(SAMPLE, SAMPLE_BYTES // (3 * images.image_size**2)))
    rows = range(0, len(images), -(-len(images) // most))
    some = datasets.at(images, np.array(rows))
    pixels = np.concatenate(list(some.pixels.as_numpy_iterator()))
    return dataclasses.replace(some, pixels=tf.data.Dataset.from_tensor_slices(pixels).batch(GROUP)), pixels


@contextmanager
def _reading(files: list[str]) -> Iterator[Callable[[], int]]:
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield lambda: len(list(threads.map(_read, files)))


def _read(file: str) -> None:
    with open(file, "rb") as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        stream.read()


@contextmanager
@tf.autograph.experimental.do_not_convert
def _decoding(images: datasets.Folder) -> Iterator[Callable[[], int]]:
    files = tf.data.Dataset.from_tensor_slices(images.files)
    data = files.map(lambda file: datasets.decode(file, images.image_size), tf.data.AUTOTUNE).batch(GROUP)
    yield _taking(data)


@contextmanager
def _views(images: datasets.Folder, pixels: np.ndarray, augment, seed: int) -> Iterator[Callable[[], int]]:
    """Augment as the bank does when it makes views."""
    labels = datasets.shares(images).labels if augment.mixes else images.labels
    change, key = tf.function(augment.function(), reduce_retracing=True), views.key(seed)
    group = pixels[:GROUP].astype("float32"), labels[:GROUP]
    yield lambda: len(change(*group, key)[0].numpy())


@contextmanager
def _augmenting(images: datasets.Folder, pixels, augment, batch_size: int, seed: int) -> Iterator[Callable[[], int]]:
    """Augment as a training of the whole model does: again in every epoch."""
    yield _taking(datasets.training(images, batch_size, seed=seed, augment=augment)[0])


@contextmanager
def _predicting(prefix: keras.Model, pixels: np.ndarray) -> Iterator[Callable[[], int]]:
    run = inference.fast(prefix, rounded=hardware.rounds())
    batch = np.resize(pixels, (GROUP, *pixels.shape[1:])).astype("float32")
    yield lambda: len(run(batch))


@contextmanager
def _training(model: keras.Model, batch_size: int) -> Iterator[Callable[[], int]]:
    """Train on noise, and restore the value of every variable."""
    initial_values = [(variable, keras.ops.convert_to_numpy(variable)) for variable in model.variables]
    batch = np.random.default_rng(0).random((batch_size, *model.input_shape[1:]), "float32")
    model.compile("adam", "sparse_categorical_crossentropy")
    try:
        yield lambda: np.size(model.train_on_batch(batch, np.zeros(batch_size, "int32"))) * batch_size
    finally:
        for variable, value in initial_values:
            variable.assign(value)


@contextmanager
def _loading(images: datasets.Folder, augment, batch_size: int, workers: int) -> Iterator[Callable[[], int]]:
    data = tf.data.Dataset.from_tensor_slices(images.files).repeat()
    data = data.map(lambda file: datasets.decode(file, images.image_size), workers).batch(
        batch_size, drop_remainder=True
    )
    if augment is not None:
        labels = np.resize(datasets.shares(images).labels, (batch_size, len(images.class_names)))
        change, key = augment.function(), views.key(0)
        data = data.map(lambda batch: change(batch, labels, key), workers)
    options = tf.data.Options()
    options.threading.private_threadpool_size, options.threading.max_intra_op_parallelism = workers, 1
    yield _taking(data.prefetch(2).with_options(options))


def _taking(data: tf.data.Dataset) -> Callable[[], int]:
    """Return the function that takes the next batch, without end, and returns how many images it holds."""
    batches = iter(data.repeat())

    def take() -> int:
        batch = next(batches)
        return len(batch[0] if isinstance(batch, tuple) else batch)

    return take

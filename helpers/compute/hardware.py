"""What a notebook computes on: which devices, in which precision, and the error when their memory runs out.

On a CPU, weights and all measurements stay float32. Where the CPU has instructions for bfloat16, training multiplies in
bfloat16, which takes little more than half the time. On a GPU, memory is allocated as needed, XLA compiles what Keras
can compile (Keras decides it, and never on a machine without a GPU), and the precision is one that the GPU computes
fast.
"""

import contextlib
import functools
import gc
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from helpers.compute import ranks
from helpers.core import machine
from helpers.core.mended import keras_saving, kerashub

# https://developer.nvidia.com/cuda-gpus: tensor cores take float16 from 7.0 (Volta) and bfloat16 from 8.0 (Ampere) on
FAST = {(8, 0): "mixed_bfloat16", (7, 0): "mixed_float16"}
MIXED = tuple(FAST.values())
ONE_DEVICE = "devices: gpu, which takes one GPU, without --hosts"  # the alternative where several devices cannot work
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|OOM when|out of memory|ALLOC_FAILED|failed to allocate", re.IGNORECASE)

_strategy: tf.distribute.Strategy | None = None
_rounds = False


def prepare(
    devices: str = "auto", *, trains: bool = False, precision: str = "auto", deterministic: bool = False
) -> str:
    """Choose the device and the precision of all models built from now on, and return the choice in words.

    Args:
        devices: "auto" uses the GPU when TensorFlow sees one, "cpu" never uses it, "gpu" requires it.
        trains: with "auto", what is built within `scope` trains on all devices of the kind together, each with an
            equal share of every batch. With "gpu" it is one device.
        precision: "float32"; "mixed_bfloat16" or "mixed_float16" (weights stay float32, `probabilities` too); "auto"
            takes the fastest that the GPU supports well. On a CPU it is float32, but training on one device may round
            products to bfloat16 where the CPU is fast in that: see `rounds`.
        deterministic: use only algorithms that give the same numbers every time, which on a GPU takes longer. A CPU
            always does so.

    Raises:
        RuntimeError: "gpu", and TensorFlow sees none; or "cpu", and the kernel uses the GPU already.
    """
    global _strategy, _rounds
    _strategy, _rounds = None, False
    keras_saving.correct()
    if keras.backend.backend() == "jax":
        return _prepare_jax(devices, trains, precision, deterministic)
    if devices == "cpu":
        # Not only `set_visible_devices`: Keras compiles with XLA where there is a GPU, visible or not.
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        if tf.config.list_logical_devices("GPU"):
            raise RuntimeError("devices: cpu came too late: this kernel uses the GPU already. Restart the kernel.")
    gpus = tf.config.list_physical_devices("GPU")
    if devices == "gpu" and not gpus:
        raise RuntimeError("devices: gpu needs a GPU, but TensorFlow sees none. `thaw doctor` shows what is missing.")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    facts = tf.config.experimental.get_device_details(gpus[0]) if gpus else {}
    policy = _fastest(facts.get("compute_capability")) if precision == "auto" else precision
    keras.config.set_dtype_policy(policy)
    name = facts.get("device_name", "GPU") if gpus else "the CPU"
    together = tf.config.list_logical_devices("GPU" if gpus else "CPU") if trains and devices == "auto" else []
    _rounds = trains and precision == "auto" and not gpus and len(together) < 2 and machine.multiplies_bfloat16()
    if len(together) > 1:
        _strategy = _mirrored(*(device.name for device in together))
        name, others = f"{len(together)} x {name}", " together (each takes a share of every batch)"
    else:
        others = f" (the first of {len(gpus)} GPUs)" if len(gpus) > 1 else ""
    rounded = ", products in training rounded to bfloat16" if _rounds else ""
    return f"Computes on {name}{others} in {policy}{', deterministically' if deterministic else ''}{rounded}"


@functools.cache  # a second one in a kernel would repeat the numbers of the first one's collective operations
def _mirrored(*devices: str) -> tf.distribute.Strategy:
    return tf.distribute.MirroredStrategy(devices)


def _prepare_jax(devices: str, trains: bool, precision: str, deterministic: bool) -> str:
    tf.config.set_visible_devices([], "GPU")  # TensorFlow only feeds the data
    count, name, capability = ranks.prepare(devices, trains=trains)
    if deterministic and capability:
        raise ValueError("deterministic is for TensorFlow; with JAX on a GPU, leave it out.")
    policy = _fastest(capability) if precision == "auto" else precision
    keras.config.set_dtype_policy(policy)
    hosts = f" on {ranks.count()} hosts" if ranks.count() > 1 else ""
    several = f"{count} x {name}{hosts} together" if count > 1 else name
    return f"Computes with JAX on {several} in {policy}"


def scope() -> contextlib.AbstractContextManager:
    """Return the context in which to build, load and compile a model that trains on the devices of `prepare`.

    With one device it does nothing.
    """
    return _strategy.scope() if _strategy else contextlib.nullcontext()


def on_cpu() -> bool:
    """Return whether TensorFlow is the backend and computes on the CPU."""
    return keras.backend.backend() == "tensorflow" and not tf.config.list_logical_devices("GPU")


def rounds() -> bool:
    """Return whether training may compute in bfloat16, where no measurement depends on it.

    This applies to the outputs of frozen layers for training images, and to the products of layers that train (see
    `fast_layers.faster`). Weights, losses, validation and test stay float32.
    """
    return _rounds


def replicas() -> int:
    """Return on how many devices together a model trains that is built within `scope`."""
    return _strategy.num_replicas_in_sync if _strategy else ranks.replicas()


def mirrors() -> bool:
    """Return whether these are TensorFlow's replicas, each with a copy of the weights and its own gradients."""
    return _strategy is not None


def steps(images: int, batch_size: int) -> int:
    """Return the training batches of an epoch; where several devices share them, an incomplete one is left out.

    Raises:
        ValueError: the devices cannot share a batch evenly, or there is no whole batch.
    """
    count = replicas()
    if count == 1:
        return -(-images // batch_size)
    if batch_size % count or images < batch_size:
        raise ValueError(
            f"{count} devices share each training batch evenly, so batch_size must be a multiple of {count} and at"
            f" most the {images} training images; got {batch_size}. Change it, or set {ONE_DEVICE}."
        )
    return images // batch_size


def even_batches(images: int, batch_size: int) -> int:
    """Return a size of validation batches, up to `batch_size` per device, that gives every device an image.

    TensorFlow gives each device the same number of a batch's images, rounded up, until none remain; Keras needs an
    equal number from the first batch.

    With JAX it is the part of each rank in such a batch, and every batch is even.

    Raises:
        ValueError: there is no such size.
    """
    count = replicas()
    if count == 1:
        return batch_size
    if not _strategy and images >= count:
        return batch_size * count // ranks.count()
    for size in range(min(images // count, batch_size) * count, 0, -count):
        last = images % size or size
        if last > -(-last // count) * (count - 1):
            return size
    raise ValueError(f"{count} devices cannot share {images} validation images. Add images, or set {ONE_DEVICE}.")


def share(model: keras.Model) -> None:
    """Make several devices train `model` as one device would; with one device nothing changes.

    Each BatchNormalization that trains sees the whole batch instead of its device's part, and dropout drops
    different values on each device.
    """
    for layer in model._flatten_layers() if _strategy else ():
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
            layer.synchronized = True
        for value in vars(layer).values():
            if isinstance(value, keras.random.SeedGenerator):
                value.next = functools.partial(_next_seed, value)


def _next_seed(generator: keras.random.SeedGenerator, ordered: bool = True) -> tf.Tensor:
    """Return a seed like `generator.next`, (2,), but a different one on each device."""
    context = tf.distribute.get_replica_context()
    device = context.replica_id_in_sync_group if context else 0
    return type(generator).next(generator, ordered) + tf.cast([device, 0], generator.state.dtype)


def _fastest(capability: tuple[int, int] | None) -> str:
    fitting = (policy for least, policy in FAST.items() if capability and tuple(capability) >= least)
    return next(fitting, "float32")


def load(path: str | Path) -> keras.Model:
    """Load a saved model without running code in it, in the precision in force now.

    A model keeps the precision it was trained in; mixed precision is fast on a GPU but slow on a CPU.

    Raises:
        ValueError: the file is not a Keras model, or holds code (a Lambda layer).
    """
    keras_saving.correct()
    model = keras.models.load_model(path, safe_mode=True)
    kerashub.correct()  # Keras has imported KerasHub where the model has its layers
    return in_precision(model, keras.config.dtype_policy().name)


def in_precision(model: keras.Model, policy: str, of: Sequence[str] = MIXED, keep: Collection[str] = ()) -> keras.Model:
    """Return the model with `policy` instead of each layer policy in `of`, or the model itself if none is.

    Args:
        model: a functional or sequential model.
        policy: name of a precision.
        of: the policies that it replaces.
        keep: names of layers that stay as they are.
    """
    config, changed = _with_policy(model.get_config(), policy, of, keep)
    if not changed:
        return model
    same = type(model).from_config(config)
    same.set_weights(model.get_weights())
    for layer in same._flatten_layers():
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()  # Normalization keeps derived tensors that set_weights does not refresh
    return same


def _with_policy(config: Any, policy: str, of: Sequence[str], keep: Collection[str]) -> tuple[Any, bool]:
    """Return a layer's configuration with `policy` instead of each in `of`, and whether that changed anything."""
    if isinstance(config, dict) and config.get("class_name") == "DTypePolicy":
        old = config["config"]["name"]
        return config | {"config": {"name": policy}}, old in of and old != policy
    if isinstance(config, dict) and "class_name" in config and config.get("name") in keep:
        return config, False
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    replaced = {key: _with_policy(value, policy, of, keep) for key, value in items}
    changed = {key: value for key, (value, is_changed) in replaced.items() if is_changed}
    if not changed:
        return config, False
    if isinstance(config, dict):
        return config | changed, True
    return [changed.get(index, value) for index, value in enumerate(config)], True


def tolerance() -> float:
    """Return by how much two computations of the same probabilities may differ here."""
    on_gpu = ranks.on_gpu() if keras.backend.backend() == "jax" else tf.config.list_logical_devices("GPU")
    is_exact = keras.config.dtype_policy().name == "float32" and not on_gpu
    return 1e-5 if is_exact else 2e-2  # a GPU rounds to 10 bits (TF32) or fewer, and chooses algorithms by their speed


@contextlib.contextmanager
def batch_that_fits(model: keras.Model, data: Iterable, batch_size: int) -> Iterator[None]:
    """Raise a MemoryError with the batch size that fits if memory runs out while `model` trains on `data`.

    Args:
        model: compiled.
        data: batches (inputs, labels) as `fit` takes them.
        batch_size: images in each.

    Raises:
        MemoryError: instead of the error of TensorFlow or CUDA; the size comes from halving.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return
    if replicas() > 1:
        raise MemoryError(
            f"The memory is too small for a batch of {batch_size} images on {replicas()} devices. Halve batch_size."
        )
    fitting = _fitting(model, data, batch_size)
    lack = f"The memory is too small for a batch of {batch_size} images"
    if not fitting:
        raise MemoryError(
            f"{lack}, and for a single one. Choose a smaller image_size or backbone, or unfreeze fewer layers."
        )
    raise MemoryError(
        f"{lack}; {fitting} fit. Set batch_size to {fitting}: here, or as --set STAGE.batch_size={fitting}."
    )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of TensorFlow, CUDA or Python means that memory ran out."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def _fitting(model: keras.Model, data: Iterable, batch_size: int) -> int:
    """Return the largest of batch_size/2, /4, /8 ... with which a training step works; 0 if none does."""
    first = [part.numpy() for part in next(iter(data))]
    size = batch_size // 2
    while size:
        gc.collect()
        try:
            model.train_on_batch(*(part[:size] for part in first))
            return size
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        size //= 2
    return 0

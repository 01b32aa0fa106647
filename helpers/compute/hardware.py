"""What a notebook computes on: which devices, in which precision, and what to say when their memory runs out.

On a CPU weights and all that is measured stay float32; where it has instructions for bfloat16, training multiplies in
that, which takes little more than half the time. On a GPU, memory is taken as it is needed, XLA
compiles what Keras can compile (Keras decides it, and never on a machine without a GPU), and the precision follows from
what the GPU can do fast.
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
from helpers.core.mended import kerashub

# https://developer.nvidia.com/cuda-gpus: tensor cores take float16 from 7.0 (Volta) and bfloat16 from 8.0 (Ampere) on
FAST = {(8, 0): "mixed_bfloat16", (7, 0): "mixed_float16"}
MIXED = tuple(FAST.values())
ONE_DEVICE = "devices: gpu, which takes one GPU, without --hosts"  # the way out of what several cannot do
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|OOM when|out of memory|ALLOC_FAILED|failed to allocate", re.IGNORECASE)

_strategy: tf.distribute.Strategy | None = None
_rounds = False


def prepare(
    devices: str = "auto", *, trains: bool = False, precision: str = "auto", deterministic: bool = False
) -> str:
    """Choose the device and the precision of every model that is built from now on, and say what was chosen.

    Args:
        devices: "auto" takes the GPU when TensorFlow sees one, "cpu" leaves it alone, "gpu" insists on it.
        trains: with "auto", what is built within `scope` trains on all devices of the kind at once, each of which takes
            an equal share of every batch. With "gpu" it is one.
        precision: "float32"; "mixed_bfloat16" or "mixed_float16" (weights stay float32, `probabilities` too); "auto"
            takes the fastest that the GPU can do well. On a CPU it is float32, but training on one device may round
            products to bfloat16 where the CPU is fast in that: see `rounds`.
        deterministic: take only algorithms that give the same numbers every time, which on a GPU takes longer. On a CPU
            it is so anyway.

    Raises:
        RuntimeError: "gpu", and TensorFlow sees none; or "cpu", and the kernel has begun to use the GPU.
    """
    global _strategy, _rounds
    _strategy, _rounds = None, False
    if keras.backend.backend() == "jax":
        return _prepare_jax(devices, trains, precision, deterministic)
    if devices == "cpu":
        # Not only `set_visible_devices`: Keras compiles with XLA where there is a GPU, visible or not.
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        if tf.config.list_logical_devices("GPU"):
            raise RuntimeError("devices: cpu came too late, this kernel uses the GPU already. Restart the kernel.")
    gpus = tf.config.list_physical_devices("GPU")
    if devices == "gpu" and not gpus:
        raise RuntimeError("devices: gpu was asked for, but TensorFlow sees none. `thaw doctor` says what is missing.")
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
        name, others = f"{len(together)} x {name}", " at once (each takes a share of every batch)"
    else:
        others = f" (the first of {len(gpus)} GPUs)" if len(gpus) > 1 else ""
    rounded = ", products in training rounded to bfloat16" if _rounds else ""
    return f"Computes on {name}{others} in {policy}{', deterministically' if deterministic else ''}{rounded}"


@functools.cache  # a second one in the same kernel would number its collective operations as the first one did
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
    several = f"{count} x {name}{hosts} at once" if count > 1 else name
    return f"Computes with JAX on {several} in {policy}"


def scope() -> contextlib.AbstractContextManager:
    """Return the context in which a model is built, loaded and compiled that is to train on what `prepare` chose.

    With one device it does nothing.
    """
    return _strategy.scope() if _strategy else contextlib.nullcontext()


def on_cpu() -> bool:
    """Return whether TensorFlow computes, and on the CPU."""
    return keras.backend.backend() == "tensorflow" and not tf.config.list_logical_devices("GPU")


def rounds() -> bool:
    """Return whether training may compute in bfloat16 what nothing is measured on.

    That is what frozen layers give for training images, and the products of layers that train (see
    `fast_layers.faster`). Weights, losses, validation and test are float32 as ever.
    """
    return _rounds


def replicas() -> int:
    """Return on how many devices at once a model trains that is built within `scope`."""
    return _strategy.num_replicas_in_sync if _strategy else ranks.replicas()


def mirrors() -> bool:
    """Return whether they are TensorFlow's replicas, each of which has a copy of the weights and its own gradients."""
    return _strategy is not None


def steps(images: int, batch_size: int) -> int:
    """Return the training batches of an epoch; where several devices share each, an incomplete one is left out.

    Raises:
        ValueError: the devices cannot share a batch evenly, or there is no whole one.
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
    """Return a size of validation batches, up to `batch_size` a device, that never leaves a device without an image.

    TensorFlow gives each device the same number of a batch's images, rounded up, until there are none left; Keras needs
    an equal number of the first batch's.

    With JAX it is what each rank takes of such a batch, and every batch is even.

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
    raise ValueError(f"{count} devices cannot share {images} validation images. Take more, or set {ONE_DEVICE}.")


def share(model: keras.Model) -> None:
    """Let several devices train `model` as one would; with one device nothing changes.

    Each BatchNormalization that trains sees the whole batch instead of its device's part, and dropout drops other
    values on each device instead of the same ones.
    """
    for layer in model._flatten_layers() if _strategy else ():
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
            layer.synchronized = True
        for value in vars(layer).values():
            if isinstance(value, keras.random.SeedGenerator):
                value.next = functools.partial(_next_seed, value)


def _next_seed(generator: keras.random.SeedGenerator, ordered: bool = True) -> tf.Tensor:
    """Return what `generator.next` does, (2,), but different on each device."""
    context = tf.distribute.get_replica_context()
    device = context.replica_id_in_sync_group if context else 0
    return type(generator).next(generator, ordered) + tf.cast([device, 0], generator.state.dtype)


def _fastest(capability: tuple[int, int] | None) -> str:
    fitting = (policy for least, policy in FAST.items() if capability and tuple(capability) >= least)
    return next(fitting, "float32")


def load(path: str | Path) -> keras.Model:
    """Load a saved model without running code that it may hold, in the precision in force now.

    A model keeps the precision it was trained in; mixed precision, which a GPU is fast in, would make a CPU slow.

    Raises:
        ValueError: the file is no Keras model, or holds code (a Lambda layer).
    """
    model = keras.models.load_model(path, safe_mode=True)
    kerashub.correct()  # Keras has imported KerasHub where the model has its layers
    return in_precision(model, keras.config.dtype_policy().name)


def in_precision(model: keras.Model, policy: str, of: Sequence[str] = MIXED, keep: Collection[str] = ()) -> keras.Model:
    """Return the model with `policy` in place of its layers' own where that is one of `of`, or itself if none is.

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
    """Return a layer's configuration with `policy` in place of each in `of`, and whether that changed anything."""
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
    return 1e-5 if is_exact else 2e-2  # a GPU rounds to 10 bits (TF32) or fewer, and chooses algorithms by timing them


@contextlib.contextmanager
def batch_that_fits(model: keras.Model, data: Iterable, batch_size: int) -> Iterator[None]:
    """Answer a lack of memory while `model` trains on `data` with the batch size that fits, found by halving.

    Args:
        model: compiled.
        data: batches (inputs, labels) as `fit` takes them.
        batch_size: images in each.

    Raises:
        MemoryError: in place of the error of TensorFlow or CUDA.
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
            f"{lack}, and for a single one. Take a smaller image_size or backbone, or unfreeze fewer layers."
        )
    raise MemoryError(
        f"{lack}; {fitting} fit. Set batch_size to {fitting}: here, or as --set STAGE.batch_size={fitting}."
    )


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error of TensorFlow, CUDA or Python says that memory ran out."""
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

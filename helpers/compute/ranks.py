"""Training on JAX, on all devices of one host or of several hosts together, with keras.distribution.

`thaw run --hosts` runs the same notebook on each host at the same time; each run is a rank. $THAW_RANK holds the
address of the first rank, the number of ranks, and the rank's own number: 10.0.0.1:4711/2/0 is the first of two. Every
rank holds all weights, trains on its part of each batch, and must change the weights in the same order as all others.
TensorFlow only feeds the data. With another backend, or in a single run, the functions here have no effect.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import keras
import numpy as np

from helpers.core import project


def prepare(devices: str, *, trains: bool) -> tuple[int, str, tuple[int, int] | None]:
    """Choose the devices of JAX; a rank that trains connects to the other ranks first.

    Args:
        devices: "auto", "cpu" or "gpu", as in `hardware.prepare`.
        trains: with "auto" or "cpu", models that are built from now on train on all devices of all ranks together.

    Returns:
        The number of devices that compute together, their name, and the first GPU's compute capability if it is one.

    Raises:
        ValueError: "gpu", which is one GPU, on several hosts.
        RuntimeError: "gpu", and JAX sees none.
    """
    import jax

    place = os.environ.get(project.RANK_VARIABLE) if trains else None
    if devices == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if devices == "gpu" and place:
        raise ValueError("devices: gpu is one GPU of one host. On several hosts set auto (all GPUs) or cpu.")
    if place and not jax.distributed.is_initialized():
        address, ranks, number = place.split("/")
        keras.distribution.initialize(address, int(ranks), int(number))
    if devices == "gpu" and jax.default_backend() != "gpu":
        raise RuntimeError("devices: gpu needs a GPU, but JAX sees none. Install jax[cuda12] for this JAX.")
    together = keras.distribution.list_devices() if place or (trains and devices == "auto") else []
    several = len(together) > 1
    layout = keras.distribution.DataParallel(devices=together, auto_shard_dataset=False) if several else None
    keras.distribution.set_distribution(layout)
    first = jax.local_devices()[0]
    if first.platform != "gpu":
        return max(len(together), 1), "the CPU", None
    major, _, minor = str(getattr(first, "compute_capability", "0.0")).partition(".")
    return max(len(together), 1), first.device_kind, (int(major), int(minor or 0))


def on_gpu() -> bool:
    """Return whether JAX computes on a GPU."""
    import jax

    return jax.default_backend() == "gpu"


def replicas() -> int:
    """Return the number of devices, of all ranks together, that train a model built now."""
    layout = keras.distribution.distribution()
    return 1 if layout is None else int(np.prod(layout.device_mesh.shape))


def count() -> int:
    """Return the number of ranks that train together, 1 for a notebook that trains alone."""
    return _jax().process_count() if _is_rank() else 1


def number() -> int:
    """Return the number of this rank, from 0."""
    return _jax().process_index() if _is_rank() else 0


def _is_rank() -> bool:
    return (
        project.RANK_VARIABLE in os.environ and keras.backend.backend() == "jax" and _jax().distributed.is_initialized()
    )


def _jax():
    import jax

    return jax


def of_batches(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Return this rank's part of each whole batch of `rows`, one after the other; alone, all of `rows`.

    Args:
        rows: (n,) the rows of an epoch, in order.
        batch_size: rows per step of all ranks together; each takes `batch_size // count()` of them.
    """
    if count() == 1:
        return rows
    whole = rows[: len(rows) // batch_size * batch_size]
    return whole.reshape(-1, count(), batch_size // count())[:, number()].ravel()


def of_all(images: int) -> np.ndarray:
    """Return the indices of this rank's part of `images`: the same number on every rank, and even for its devices.

    A remainder of fewer images than there are devices is left out; alone, nothing is.
    """
    if replicas() == 1:
        return np.arange(images)
    return np.arange(images // replicas() * replicas())[number() :: count()]


@contextmanager
def alone() -> Iterator[None]:
    """Make models built in this context compute on this rank alone, independent of the others."""
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(before)


def meet() -> None:
    """Wait until every rank reaches this point."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("thaw")


def agreed(value: int) -> int:
    """Return the value of the first rank on every rank, for values that may differ between ranks."""
    if count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def leave(model: keras.Model) -> None:
    """Make this rank's own copy of the weights that all have trained; from now on it computes alone."""
    if replicas() == 1:
        return
    meet()
    keras.distribution.set_distribution(None)
    for variable in model.variables:
        value = keras.ops.convert_to_numpy(variable)
        variable._layout = None  # Keras cannot remove a weight from a distribution
        variable.assign(value)


def part() -> None:
    """Wait for every rank and close the connection: without it, the first rank to exit would stop the others."""
    if _is_rank():
        _jax().distributed.shutdown()

"""Devices and precision: what is chosen for which hardware, that mixed precision trains, and what a full memory says.

No GPU is here: GPUs are made up where only the choice counts, and mixed precision runs on the CPU, which can do it.
"""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from helpers.compute import bank, frontier, hardware
from helpers.models import classifier, unfreezing
from helpers.training import datasets, feeds, saving

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(24, dtype=np.int32) % 3


@pytest.fixture(autouse=True)
def _policy_stays():
    yield
    hardware.prepare(precision="float32")


@pytest.fixture
def machine(monkeypatch):
    """A made-up machine: a function (compute capability of each GPU) and what it was told."""
    told = []

    def make(*capabilities):
        gpus = [SimpleNamespace(name=f"/physical_device:GPU:{n}", capability=c) for n, c in enumerate(capabilities)]
        details = lambda gpu: {"device_name": "NVIDIA Test", "compute_capability": gpu.capability}  # noqa: E731
        fake = SimpleNamespace(
            list_physical_devices=lambda kind: gpus,
            list_logical_devices=lambda kind: gpus,
            experimental=SimpleNamespace(
                set_memory_growth=lambda gpu, on: told.append((gpu.name[-1], on)),
                enable_op_determinism=lambda: told.append("deterministic"),
                get_device_details=details,
            ),
        )
        monkeypatch.setattr(hardware.tf, "config", fake)
        return told

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    return make


# The choice


def test_on_a_cpu_everything_stays_float32():
    assert hardware.prepare() == "Computes on the CPU in float32"
    assert keras.config.dtype_policy().name == "float32" and hardware.tolerance() == 1e-5


@pytest.mark.parametrize(
    ("flags", "settings", "rounds"),
    [
        ("fma avx512_bf16", {}, True),
        ("fma amx_bf16", {}, True),
        ("fma avx512f", {}, False),
        ("fma avx512_bf16", {"precision": "float32"}, False),
        ("fma avx512_bf16", {"trains": False}, False),
    ],
)
def test_training_rounds_products_where_the_cpu_is_fast_in_it(monkeypatch, flags, settings, rounds):
    monkeypatch.setattr(hardware.machine, "_read", lambda path: f"model name: Test\nflags : {flags}\n")
    said = hardware.prepare(**{"trains": True} | settings)
    assert hardware.rounds() is rounds and keras.config.dtype_policy().name == "float32"
    assert said == "Computes on the CPU in float32" + rounds * ", products in training rounded to bfloat16"
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")  # without oneDNN, bfloat16 is slow
    assert "rounded" not in hardware.prepare(trains=True)
    assert not hardware.rounds()


@pytest.mark.parametrize(
    ("capability", "policy"),
    [
        ((9, 0), "mixed_bfloat16"),
        ((8, 0), "mixed_bfloat16"),
        ((7, 5), "mixed_float16"),
        ((7, 0), "mixed_float16"),
        ((6, 1), "float32"),
        (None, "float32"),
    ],
)
def test_the_precision_follows_from_what_the_gpu_is_fast_in(machine, capability, policy):
    told = machine(capability)
    assert hardware.prepare() == f"Computes on NVIDIA Test in {policy}"
    assert keras.config.dtype_policy().name == policy and told == [("0", True)]
    assert hardware.tolerance() > 1e-3


def test_what_is_asked_for_is_done(machine):
    told = machine((9, 0), (9, 0))
    said = hardware.prepare("gpu", precision="float32", deterministic=True)
    assert said == "Computes on NVIDIA Test (the first of 2 GPUs) in float32, deterministically"
    assert told == [("0", True), ("1", True), "deterministic"]


def test_a_gpu_that_is_not_there_is_told(machine):
    machine()
    with pytest.raises(RuntimeError, match=r"TensorFlow sees none\. `thaw doctor` shows what is missing"):
        hardware.prepare("gpu")


def test_the_cpu_can_be_asked_for_only_before_the_gpu_is_used(machine, monkeypatch):
    machine((9, 0))
    with pytest.raises(RuntimeError, match="Restart the kernel"):
        hardware.prepare("cpu")
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert hardware.prepare("cpu") == "Computes on the CPU in float32"
    assert hardware.os.environ["CUDA_VISIBLE_DEVICES"] == "-1", (
        "or Keras would compile with XLA, which a CPU is slow in"
    )


# Mixed precision


def small_backbone(name, image_size, weights):
    layers = keras.layers
    inputs = keras.Input((image_size, image_size, 3), name="image")
    x = layers.Normalization(mean=[120.0] * 3, variance=[3600.0] * 3, name="preprocess_standardise")(inputs)
    for number in (1, 2):
        x = layers.Conv2D(8, 3, strides=2, name=f"block{number}_conv")(x)
        x = layers.BatchNormalization(name=f"block{number}_bn")(x)
        x = layers.ReLU(6.0, name=f"block{number}_out")(x)
    return keras.Model(inputs, x, name="backbone")


def test_mixed_precision_trains_and_opens_in_float32_elsewhere(tmp_path, monkeypatch):
    """The whole way: frontier, bank, fit, save, load; probabilities are float32 throughout."""
    monkeypatch.setattr(classifier.backbones, "build", small_backbone)
    hardware.prepare(precision="mixed_bfloat16")
    keras.utils.set_random_seed(1)
    model = classifier.build("small", 3, image_size=32, dense=[4])
    unfreezing.unfreeze(model, "block2")
    images = datasets.Folder(
        pixels=tf.data.Dataset.from_tensor_slices(PIXELS).batch(bank.GROUP),
        keys=[str(index) for index in range(len(PIXELS))],
        labels=LABELS,
        paths=[str(index) for index in range(len(PIXELS))],
        files=[""] * len(PIXELS),
        class_names=["a", "b", "c"],
        image_size=32,
    )
    cut = frontier.cut(model)
    banks = feeds.fill_banks(cut, images, images, folder=tmp_path / "cache", views=1, seed=1)
    feed = feeds.from_banks(cut, banks, batch_size=8, seed=1)
    feed.model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    with hardware.batch_that_fits(feed.model, feed.train, 8):
        history = feed.model.fit(feed.train, epochs=2, callbacks=[feed.clock], shuffle=False, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert model.get_layer("backbone").compute_dtype == "bfloat16" and model.output.dtype == "float32"
    saving.save(model, tmp_path, PIXELS[:4])
    expected = model.predict_on_batch(PIXELS)

    keras.config.set_dtype_policy("float32")
    loaded = hardware.load(tmp_path / "model.keras")
    assert {layer.compute_dtype for layer in loaded._flatten_layers()} == {"float32"}
    found = loaded.predict_on_batch(PIXELS)
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.05)
    assert [w.path for w in loaded.trainable_weights] == [w.path for w in model.trainable_weights]


def test_float16_scales_its_loss():
    hardware.prepare(precision="mixed_float16")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, activation="softmax", dtype="float32")])
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)


def test_a_model_in_float32_is_loaded_as_it_is(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.save(tmp_path / "m.keras")
    same = hardware.load(tmp_path / "m.keras")
    np.testing.assert_array_equal(same.get_weights()[0], model.get_weights()[0])
    assert same.layers[0].dtype_policy.name == "float32"


def test_caches_of_different_precision_are_not_mistaken_for_each_other():
    from helpers.compute import graphs

    signatures = []
    for policy in ("float32", "mixed_bfloat16"):
        keras.config.set_dtype_policy(policy)
        keras.utils.set_random_seed(1)
        signatures.append(graphs.signature(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])))
    assert signatures[0] != signatures[1]


# A memory that is full


class Hungry:
    """A model that takes so many images at a time."""

    def __init__(self, most: int, error: Exception):
        self.most, self.error, self.asked = most, error, []

    def train_on_batch(self, images, labels):
        assert len(images) == len(labels)
        self.asked.append(len(images))
        if len(images) > self.most:
            raise self.error

    def fit(self):
        raise self.error


FULL = [
    tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[512,32,112,112]"),
    tf.errors.InternalError(None, None, "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes."),
    tf.errors.InternalError(None, None, "Failed to create cuDNN handle: CUDNN_STATUS_ALLOC_FAILED"),
    MemoryError("Unable to allocate 12. GiB"),
]


def batches(size: int) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((np.zeros((size, 3)), np.zeros(size))).batch(size)


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_the_batch_size_that_fits_is_measured_and_told(error):
    model = Hungry(20, error)
    with (
        pytest.raises(MemoryError, match=r"too small for a batch of 128 images; 16 fit\. Set batch_size to 16"),
        hardware.batch_that_fits(model, batches(128), 128),
    ):
        model.fit()
    assert model.asked == [64, 32, 16]


def test_when_not_even_one_image_fits_other_ways_are_named():
    model = Hungry(0, FULL[0])
    with (
        pytest.raises(MemoryError, match=r"and for a single one\. Choose a smaller image_size or backbone"),
        hardware.batch_that_fits(model, batches(4), 4),
    ):
        model.fit()


def test_other_errors_are_left_alone():
    model = Hungry(0, ValueError("shapes differ"))
    with pytest.raises(ValueError, match="shapes differ"), hardware.batch_that_fits(model, batches(4), 4):
        model.fit()
    with hardware.batch_that_fits(model, batches(4), 4):
        pass
    assert model.asked == []

"""Two devices train a network of every new family as one does, and so do its adapters; two logical CPUs stand for GPUs.

JAX, which trains on several hosts, trains them too. Each has a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.core import disk, project

SIZE, CLASSES = 32, 3
THAWED = {  # name, or kind of KerasHub's -> the block from which it trains
    "resnet18": "layer4",
    "vgg11_bn": "block5",
    "hub:ViT": "block3",
    "hub:DINOV2": "block3",
    "hub:SigLIP": "block3",
}
ADAPTED = {"attentive": "block2", "hub:DeiT": "block3"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the process found: of each network how far two devices are from one, and what mixed precision gives."""
    return report_of(tmp_path_factory.mktemp("together"), "tensorflow")


@pytest.fixture(scope="module")
def by_jax(tmp_path_factory):
    """The same by JAX on one device: how far the model above the frontier is from the whole, and the losses."""
    pytest.importorskip("jax", reason="needs the extra: pip install -e '.[cluster]'")
    return report_of(tmp_path_factory.mktemp("jax"), "jax")


def report_of(folder: Path, backend: str) -> dict:
    pytest.importorskip("keras_hub", reason="needs the extra: pip install -e '.[hub]'")
    command = [sys.executable, "-m", "tests.test_together", str(folder)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "KERAS_BACKEND": backend}
    done = subprocess.run(command, cwd=project.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return disk.read_json(folder / "report.json")


@pytest.mark.parametrize("name", [*THAWED, *ADAPTED])
def test_two_devices_train_as_one_does(name, report):
    found = report[name]
    assert found["replicas"] == 2 and found["changed by training"] > 1e-4, "or equal weights would prove nothing"
    assert found["off by"] < 1e-4 * max(1, found["changed by training"])


@pytest.mark.parametrize("name", [*THAWED, *ADAPTED])
def test_mixed_precision_trains_and_answers_in_float32(name, report):
    found = report[name]["mixed"]
    assert found["answers"] == "float32" and found["computes"] == "bfloat16"
    assert np.isfinite(found["losses"]).all() and found["losses"][-1] < found["losses"][0]


@pytest.mark.parametrize("name", [*THAWED, *ADAPTED])
def test_jax_trains_them_above_the_frontier(name, by_jax):
    found = by_jax[name]
    assert found["off by"] < 1e-4 and found["losses"][-1] < found["losses"][0]
    assert found["merged off by"] < 1e-4


# In a process of its own


def build(name: str, folder: Path):
    import keras

    from helpers.models import classifier
    from tests import test_adapters, tiny_presets

    if name == "attentive":
        return test_adapters.attentive()
    if name.startswith("hub:"):
        place = folder / name.removeprefix("hub:")
        if not place.exists():
            tiny_presets.save(place.name, place)
        name = f"hub:{place}"
    keras.utils.set_random_seed(1)
    return classifier.build(name, CLASSES, image_size=SIZE, weights="none", dropout=0)


def ready(name: str, folder: Path):
    """Return a model whose thawed part is ready to train, with adapters where they are tried."""
    from helpers.models import adapters, unfreezing

    model = build(name, folder)
    unfreezing.unfreeze(model, (THAWED | ADAPTED)[name])
    adapters.add(model, {"lora": 2} if name in ADAPTED else {}, seed=5)
    return model


def compiled(model, name: str):
    import keras

    rate = 0.05 if name.startswith("hub:") or name == "attentive" else 1e-4
    model.compile(keras.optimizers.SGD(rate), "categorical_crossentropy", jit_compile=False)
    return model


def images() -> np.ndarray:
    noise = np.random.default_rng(0).uniform(0, 255, (8, SIZE, SIZE, 3))
    return (noise * np.linspace(0.2, 1, 8)[:, None, None, None]).astype("float32")


def fit(model, values: np.ndarray) -> list[float]:
    how = {"batch_size": 4, "epochs": 4, "shuffle": False, "verbose": 0}
    return model.fit(values, np.eye(CLASSES)[np.arange(8) % CLASSES], **how).history["loss"]


def trained(name: str, folder: Path, devices: str, precision: str):
    """Return the model after a few steps, the weights before, and the losses."""
    from helpers.compute import hardware

    hardware.prepare(devices, trains=True, precision=precision)
    with hardware.scope():
        model = ready(name, folder)
        before = [np.array(weight, "float32") for weight in model.weights]
        hardware.share(model)
        compiled(model, name)
    return model, before, fit(model, images())


def together(folder: Path) -> dict:
    import keras
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    from helpers.compute import hardware

    report = {}
    for name in THAWED | ADAPTED:
        one, before, _ = trained(name, folder, "cpu", "float32")
        two, *_ = trained(name, folder, "auto", "float32")
        pairs = zip(one.get_weights(), two.get_weights(), strict=True)
        found = {"replicas": hardware.replicas(), "off by": max(float(np.abs(a - b).max()) for a, b in pairs)}
        changes = zip(one.get_weights(), before, strict=True)
        found["changed by training"] = max(float(np.abs(a - b).max()) for a, b in changes)
        model, _, losses = trained(name, folder, "cpu", "mixed_bfloat16")
        inner = next(layer for layer in model.layers if isinstance(layer, keras.Model))
        answers = str(model.predict_on_batch(images()).dtype)
        found["mixed"] = {"answers": answers, "computes": inner.layers[-1].compute_dtype, "losses": losses}
        report[name] = found
    return report


def with_jax(folder: Path) -> dict:
    from helpers.compute import frontier, hardware, inference
    from helpers.models import adapters

    hardware.prepare("cpu", trains=True, precision="float32")
    report = {}
    for name in THAWED | ADAPTED:
        model = ready(name, folder)
        cut = frontier.cut(model)
        below = inference.fast(cut.prefix)(images())
        off = np.abs(np.array(cut.suffix(below)) - np.array(model(images()))).max()
        losses, adapted = fit(compiled(cut.suffix, name), below), np.array(model(images()))
        adapters.merge(model)
        merged = np.abs(np.array(model(images())) - adapted).max()
        report[name] = {"off by": float(off), "losses": losses, "merged off by": float(merged)}
    return report


if __name__ == "__main__":
    place = Path(sys.argv[1])
    made = (with_jax if os.environ["KERAS_BACKEND"] == "jax" else together)(place)
    (place / "report.json").write_text(json.dumps(made), encoding="utf-8")

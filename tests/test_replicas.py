"""Several devices at once: phases 3 and 4 give what one device gives. Two logical CPUs stand for two GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from helpers.compute import hardware
from helpers.core import disk, progress

HERE = Path(__file__)
COUNTS = {"train": {"cat": 8, "dog": 8, "owl": 8}, "val": {"cat": 11, "dog": 11, "owl": 11}}  # 33 = 30 and a tail of 3
ADAMW = {"name": "adamw", "weight_decay": 0.01}
STEPS = [  # the first from a map and a pooled level that were computed once, the second with the whole model
    {"unfreeze": "block2", "epochs": 2, "optimizer": ADAMW | {"use_ema": True, "ema_momentum": 0.5}},
    {"unfreeze": "all", "epochs": 1, "optimizer": ADAMW},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, image_folder):
    """A folder with a run on one device and one on two, and report.json; all made in a process of its own."""
    home = tmp_path_factory.mktemp("replicas")
    rows = []
    for seed, (part, counts) in enumerate(COUNTS.items()):
        image_folder(home / "images" / part, counts, size=32, seed=seed)
        files = sorted((home / "images" / part).rglob("*.png"))
        rows += [(f.name, f.parent.name, part, str(f.relative_to(home / "images")), f"{part}{f.name}") for f in files]
    table = pd.DataFrame(rows, columns=["path", "label", "part", "file", "sha256"])
    table.to_csv(home / "images" / "images.csv", index=False)
    disk.write_json(home / "images" / "class_names.json", ["dog", "cat", "owl"])
    disk.write_json(home / "images" / "resize.json", {"image_size": 32, "fit": "crop", "format": "png"})
    settings = {
        "MPLBACKEND": "agg",
        "CUDA_VISIBLE_DEVICES": "-1",
        progress.PROGRESS_VARIABLE: str(home / "progress.jsonl"),
    }
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE), str(home)],
        env=os.environ | settings | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return home


def history(home, *names):
    return pd.read_csv(home.joinpath(*names) / "history.csv")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["head", "fine_tune"])
def test_two_devices_train_as_one_does(trained, stage):
    one, two = (history(trained, devices, stage) for devices in ("cpu", "auto"))
    figures = one.columns.drop(["phase", "seconds"])
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} < set(figures)
    np.testing.assert_allclose(two[figures], one[figures], rtol=0, atol=1e-5)
    assert one["loss"].iloc[-1] < one["loss"].iloc[0] - 0.01, "or equal losses would prove nothing"
    assert two["phase"].tolist() == {"head": ["head"] * 2}.get(stage, ["fine_tune", "fine_tune", "fine-tune 2"])


@pytest.mark.slow
def test_what_two_devices_saved_is_an_ordinary_model(trained):
    report = disk.read_json(trained / "report.json")
    assert report["off by"] < 1e-5 and report["synchronized in the file"] is False
    assert report["said"] == "Computes on 2 x the CPU together (each takes a share of every batch) in float32"


@pytest.mark.slow
def test_dropout_drops_other_values_on_each_device(trained):
    assert disk.read_json(trained / "report.json")["same masks"] == {"as Keras has it": True, "shared": False}


@pytest.mark.slow
def test_what_several_devices_cannot_do_is_refused_with_the_reason(trained):
    said = disk.read_json(trained / "report.json")["refused"]
    for name in ("clipnorm", "global_clipnorm", "clipvalue"):
        assert f"optimizer: {name} does not work on 2 devices together: each would clip its own part" in said[name]
    assert "cannot accumulate" in said["gradient_accumulation_steps"]
    assert "batch_size must be a multiple of 2 and at most the 24 training images; got 7" in said["batch_size"]
    assert "at most the 24 training images; got 32. Change it, or set devices: gpu" in said["too large"]
    assert "measure_seconds measures one device, and 2 train together" in said["measure"]
    assert "a batch of 8 images on 2 devices. Halve batch_size" in said["memory"]


@pytest.mark.slow
def test_an_incomplete_batch_is_left_out_and_holds_others_in_each_epoch(trained):
    report = disk.read_json(trained / "report.json")
    for epochs in report["left out"]:
        assert [len(rest) for rest in epochs] == [4, 4, 4] and len({tuple(rest) for rest in epochs}) == 3


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_validation_batches_leave_no_device_without_an_image(monkeypatch, devices):
    monkeypatch.setattr(hardware, "_strategy", SimpleNamespace(num_replicas_in_sync=devices))
    for images in range(120, 1200):
        size = hardware.even_batches(images, 32)
        last = images % size or size
        assert size <= 32 * devices and size % devices == 0
        assert len(range(0, last, -(-last // devices))) == devices  # TensorFlow rounds up, till none is left
    with pytest.raises(ValueError, match=f"{devices} devices cannot share 1 validation images"):
        hardware.even_batches(1, 32)


# In the process with two logical CPUs


def backbone(name, image_size, weights):
    """A small network with random weights, whose statistics are those of noise, so that its losses respond."""
    import keras

    layers = keras.layers
    inputs = keras.Input((image_size, image_size, 3), name="image")
    x = layers.Normalization(mean=[120.0] * 3, variance=[3600.0] * 3, name="preprocess_standardise")(inputs)
    for number, width in enumerate((8, 16), 1):
        x = layers.Conv2D(width, 3, strides=2, use_bias=False, name=f"block{number}_conv")(x)
        x = layers.BatchNormalization(name=f"block{number}_bn", momentum=0.0)(x)
        x = layers.ReLU(6.0, name=f"block{number}_out")(x)
    model = keras.Model(inputs, x, name="backbone")
    noise = np.random.default_rng(3).integers(0, 256, (64, image_size, image_size, 3)).astype("float32")
    for layer in [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]:
        below = keras.Model(inputs, layer.input)(noise).numpy()
        layer.moving_mean.assign(below.mean(axis=(0, 1, 2)))
        layer.moving_variance.assign(below.var(axis=(0, 1, 2)))
    return model


def run_notebook(stage, first_cell, **parameters):
    """Run the cells of a notebook, but draw nothing."""
    from conftest import _by_hand

    mocks = {name: mock.MagicMock() for name in ("sheets", "curves", "charts", "tensorboard")}
    return _by_hand(stage, before={first_cell: lambda left: left.update(mocks)}, **parameters)


def both_phases(home, devices, fine_tune):
    same = {"images": str(home / "images"), "views": 2, "batch_size": 8, "devices": devices, "keep_cache": True}
    same["precision"] = "float32"  # alone, "auto" may round what two devices do not
    same |= {"patience": 5, "imbalance": "class_weight"}
    head = {
        "backbone": "small",
        "dropout": 0.0,
        "levels": "all",
        "pool": "mean_std",
        "output": {"batch_norm": True},
        "next_unfreeze": "block2",
    }
    head |= {"augmentation": "none", "flip": "horizontal", "epochs": 9, "learning_rate": 0.01}
    head |= {"monitor": "val_macro_f1", "stop_smoothed": {"alpha": 0.3, "gain": 0.9, "epochs": 1}}  # stops after two
    run_notebook("head", "03-03", **same, **head, out=str(home / devices / "head"))
    tune = {"head": str(home / devices / "head"), "steps": STEPS, "layer_decay": 0.7, "learning_rate": 0.001}
    tune |= {"monitor": "val_auc", "stop_smoothed": {"alpha": 0.3, "gain": 0.0, "epochs": 9}}
    return fine_tune(lambda: run_notebook("fine_tune", "04-03", **same, **tune, out=str(home / devices / "fine_tune")))


def message(work):
    try:
        work()
    except (ValueError, MemoryError) as error:
        return str(error)
    return "not refused"


def main(home):
    import keras
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    from helpers.compute import bank, hardware
    from helpers.models import classifier
    from helpers.training import compiling, datasets, feeds, fitting, throughput

    classifier.backbones.build = backbone
    both_phases(home, "cpu", lambda work: work())
    left = both_phases(home, "auto", lambda work: killed_and_resumed(fitting, work))
    images = np.concatenate(list(left["val"].pixels.as_numpy_iterator()))
    saved = keras.models.load_model(home / "auto" / "fine_tune" / "model.keras")
    found = left["feed"].model.predict(left["feed"].val, verbose=0)
    norm = next(layer for layer in saved.layers if isinstance(layer, keras.layers.BatchNormalization))
    report = {"off by": float(np.abs(saved.predict(images, verbose=0) - found).max())}
    report |= {"synchronized in the file": norm.synchronized, "said": hardware.prepare(trains=True)}
    report["same masks"] = {"as Keras has it": same_masks(hardware, False), "shared": same_masks(hardware, True)}

    train, val, model = left["train"], left["val"], left["model"]
    refused = {}
    for name in compiling.NOT_SHARED:
        spec = {"name": "adam", name: 2 if name.endswith("steps") else 1.0}
        refused[name] = message(lambda spec=spec: compiling.optimizer(spec, 0.1))
    refused["batch_size"] = message(lambda: feeds.whole_model(model, train, val, batch_size=7, seed=1))
    refused["too large"] = message(lambda: feeds.whole_model(model, train, val, batch_size=32, seed=1))
    measure = {"seconds": 1, "views": 2, "epochs": 1, "batch_size": 8}
    refused["measure"] = message(lambda: throughput.measure(model, train, **measure))
    refused["memory"] = message(lambda: full(hardware, model))
    report["refused"] = refused

    rows = np.arange(24, dtype="float32")
    kept = bank.Bank(rows.reshape(1, 24, 1), np.zeros(24, "int32"), home)
    pixels = train.pixels.map(lambda batch: batch * 0 + tf.reshape(tf.cast(tf.range(24), tf.uint8), (24, 1, 1, 1)))
    numbered = datasets.replace(train, pixels=pixels)
    sources = [kept.batches(10, seed=1), datasets.training(numbered, 10, seed=1)]
    report["left out"] = [[left_out(data, clock, epoch) for epoch in range(3)] for data, clock in sources]
    (home / "report.json").write_text(json.dumps(report), encoding="utf-8")


def left_out(data, clock, epoch):
    clock.on_epoch_begin(epoch)
    seen = {int(value) for batch, _ in data.as_numpy_iterator() for value in batch.reshape(len(batch), -1)[:, 0]}
    return sorted(set(range(24)) - seen)


def full(hardware, model):
    with hardware.batch_that_fits(model, [], 8):
        raise MemoryError


def same_masks(hardware, shared):
    import keras
    import tensorflow as tf

    with hardware.scope():
        model = keras.Sequential([keras.Input((64,)), keras.layers.Dropout(0.5)])
        if shared:
            hardware.share(model)
        drop = tf.function(lambda: model(tf.ones((1, 64)), training=True))
        one, two = tf.distribute.get_strategy().run(drop).values
    return bool(np.array_equal(one, two))


def killed_and_resumed(training, work):
    """Do `work`, killed at the end of its second epoch, and once more to its end."""
    whole = training.Recorder.on_epoch_end

    def stop(self, epoch, logs=None):
        if epoch == 3:
            raise InterruptedError
        whole(self, epoch, logs)

    with mock.patch.object(training.Recorder, "on_epoch_end", stop), pytest.raises(InterruptedError):
        work()
    return work()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

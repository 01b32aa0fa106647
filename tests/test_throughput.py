"""Throughput: every step is measured, the slowest is named, and nothing of it reaches the training."""

import keras
import numpy as np
import pandas as pd
import pytest

from helpers.core import disk
from helpers.reports import curves
from helpers.training import datasets, throughput, transforms

SIZE, COUNT = 32, 12


@pytest.fixture(scope="module")
def images(tmp_path_factory, image_folder):
    folder = tmp_path_factory.mktemp("resized")
    image_folder(folder / "train", {"cat": COUNT // 2, "dog": COUNT // 2}, size=SIZE)
    files = sorted(folder.rglob("*.png"))
    rows = [(f.name, f.parent.name, "train", str(f.relative_to(folder)), f.name) for f in files]
    table = pd.DataFrame(rows, columns=["path", "label", "part", "file", "sha256"])
    table.to_csv(folder / "images.csv", index=False)
    disk.write_json(folder / "class_names.json", ["cat", "dog"])
    disk.write_json(folder / "resize.json", {"image_size": SIZE, "fit": "crop", "format": "png"})
    return datasets.read(folder, "train")


@pytest.fixture
def model():
    """A frozen convolution under a head with dropout, whose seed is a variable too."""
    inputs = keras.Input((SIZE, SIZE, 3))
    frozen = keras.layers.Conv2D(4, 3, strides=2, trainable=False)(inputs)
    pooled = keras.layers.Dropout(0.5)(keras.layers.GlobalAveragePooling2D()(frozen))
    return keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(pooled))


def values(model):
    return [keras.ops.convert_to_numpy(variable).copy() for variable in model.variables]


def test_each_step_of_a_cached_training_is_measured_and_the_weights_stay(images, model):
    before, augment = values(model), transforms.make("none", flip="both", mix="mixup")
    settings = {"views": 5, "epochs": 100, "batch_size": 8, "augment": augment}
    table = throughput.measure(model, images, seconds=1.0, **settings)
    assert table["passes"].to_dict() == {"disk": 1, "decode": 1, "augment": 4, "prefix": 5, "suffix": 100}
    assert (table["images/s"] > 1).all()
    np.testing.assert_allclose(table["seconds"], COUNT * table["passes"] / table["images/s"])
    for old, new in zip(before, values(model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_training_of_the_whole_model_has_no_prefix_and_reads_again_what_memory_cannot_hold(
    images, model, monkeypatch
):
    settings = {"views": 0, "epochs": 7, "batch_size": 8, "seconds": 0}
    table = throughput.measure(model, images, **settings, augment=transforms.make("none", flip="both"))
    assert table["passes"].to_dict() == {"disk": 1, "decode": 1, "augment": 7, "suffix": 7}
    monkeypatch.setattr(throughput.bank, "free_memory", lambda: 0)
    table = throughput.measure(model, images, **settings)
    assert table["passes"].to_dict() == {"disk": 7, "decode": 7, "suffix": 7}


def test_the_step_that_takes_longest_is_named_with_what_would_help():
    table = pd.DataFrame({"images/s": [900.0, 50.0], "passes": [1, 4], "seconds": [10.0, 90.0]}, ["decode", "prefix"])
    assert throughput.bottleneck(table) == (
        "The bottleneck is prefix: 50 images/s, 90 s of this training and 90 % of all that was measured. To be faster,"
        " take fewer views, a smaller backbone or smaller images."
    )


def test_loader_workers_are_a_table_and_a_figure(images):
    augment = transforms.make("none", flip="both")
    table = throughput.loader_workers(images, seconds=0.4, workers=[1, 3], augment=augment, batch_size=8)
    assert list(table.index) == [1, 3] and (table["images/s"] > 1).all()
    np.testing.assert_allclose(table["seconds"], COUNT / table["images/s"])
    shown = curves.loader_workers(table)
    assert [text.get_text() for text in shown.get_xticklabels()] == ["1", "3"] and len(shown.patches) == 2
    with pytest.raises(ValueError, match="at least 1; got 0"):
        throughput.loader_workers(images, seconds=0.1, workers=[0])

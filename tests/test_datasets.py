"""Batches: what an epoch holds follows from the seed and the epoch alone; validation is never shuffled or dropped."""

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from helpers.compute import bank, frontier
from helpers.core import disk
from helpers.models import classifier, unfreezing
from helpers.training import datasets, feeds, transforms

SIZE = 32
COUNTS = {"train": {"cat": 7, "dog": 3, "owl": 1}, "val": {"cat": 2, "dog": 2, "owl": 1}, "test": {"cat": 1, "dog": 1}}


@pytest.fixture(scope="module")
def resized(tmp_path_factory, image_folder):
    """A folder as 02_resize writes it: 11 training, 5 validation and 2 test images of 32 px."""
    folder = tmp_path_factory.mktemp("resized")
    rows = []
    for seed, (part, counts) in enumerate(COUNTS.items()):
        image_folder(folder / part, counts, size=SIZE, seed=seed)
        files = sorted((folder / part).rglob("*.png"))
        rows += [(f"raw/{f.name}", f.parent.name, part, str(f.relative_to(folder)), f"{part}{f.name}") for f in files]
    table = pd.DataFrame(rows, columns=["path", "label", "part", "file", "sha256"])
    table.to_csv(folder / "images.csv", index=False)
    disk.write_json(folder / "class_names.json", ["dog", "cat", "owl"])
    disk.write_json(folder / "resize.json", {"image_size": SIZE, "fit": "crop", "format": "png"})
    return folder


@pytest.fixture(scope="module")
def train(resized):
    return datasets.read(resized, "train")


@pytest.fixture(scope="module")
def val(resized):
    return datasets.read(resized, "val")


@pytest.fixture(scope="module")
def pixels(train):
    """The training images as one array, in order."""
    return np.concatenate(list(train.pixels.as_numpy_iterator()))


def epochs(train, *numbers, **options):
    """What `fit` would see in the epochs `numbers`: for each a list of (images, labels)."""
    options = {"batch_size": 4, "seed": 7} | options
    data, clock = datasets.training(train, **options)
    seen = []
    for number in numbers:
        clock.on_epoch_begin(number)
        seen.append([(images.copy(), labels) for images, labels in data.as_numpy_iterator()])
    return seen


def whole(batches):
    return np.concatenate([images for images, _ in batches])


def equal(first, second):
    return len(first) == len(second) and all(
        np.array_equal(a, c) and np.array_equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


# Reading


def test_images_are_read_in_the_order_of_the_table(resized, train, pixels):
    table = pd.read_csv(resized / "images.csv").query("part == 'train'")
    assert train.files == [str(resized / file) for file in table["file"]] and len(train) == 11
    assert train.paths == table["path"].to_list()
    assert [train.class_names[label] for label in train.labels] == table["label"].to_list()
    assert train.class_names == ["dog", "cat", "owl"] and train.image_size == SIZE
    assert pixels.shape == (11, SIZE, SIZE, 3) and pixels.dtype == np.uint8
    assert len(set(train.keys)) == 11 and all(key.endswith(":32:crop:png") for key in train.keys)


def test_pixels_are_rgb(train, pixels):
    import cv2

    for file, image in zip(train.files, pixels, strict=True):
        np.testing.assert_array_equal(image, cv2.cvtColor(cv2.imread(file), cv2.COLOR_BGR2RGB))


def test_an_empty_part_is_an_error(resized):
    with pytest.raises(
        ValueError, match=r"has no holdout images, only test, train, val\. Check the ratios of 01_split"
    ):
        datasets.read(resized, "holdout")


def test_a_label_without_a_class_is_an_error(resized, tmp_path):
    for name in ("images.csv", "resize.json"):
        (tmp_path / name).write_bytes((resized / name).read_bytes())
    disk.write_json(tmp_path / "class_names.json", ["dog"])
    with pytest.raises(ValueError, match=r"labels that class_names\.json lacks: cat, owl"):
        datasets.read(tmp_path, "train")


def test_labels_that_look_like_numbers_or_nothing_stay_text(resized, tmp_path):
    table = pd.read_csv(resized / "images.csv").replace({"label": {"cat": "NA", "dog": "01", "owl": "1e5"}})
    table.to_csv(tmp_path / "images.csv", index=False)
    disk.write_json(tmp_path / "class_names.json", ["01", "1e5", "NA"])
    (tmp_path / "resize.json").write_bytes((resized / "resize.json").read_bytes())
    assert np.bincount(datasets.read(tmp_path, "train").labels).tolist() == [3, 1, 7]


# Validation and test


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_validation_is_in_order_and_whole(val, batch_size):
    for _ in range(2):
        batches = list(datasets.labelled(val, batch_size).as_numpy_iterator())
        assert [len(labels) for _, labels in batches][:-1] == [batch_size] * (len(batches) - 1)
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), val.labels)
        np.testing.assert_array_equal(whole(batches), np.concatenate(list(val.pixels.as_numpy_iterator())))


# Training


def test_an_epoch_holds_every_image_once(train, pixels):
    (batches,) = epochs(train, 0)
    assert [images.shape for images, _ in batches] == [(4, SIZE, SIZE, 3)] * 2 + [(3, SIZE, SIZE, 3)]
    assert batches[0][0].dtype == np.float32
    found = [int(np.flatnonzero((pixels == image).all(axis=(1, 2, 3)))[0]) for image in whole(batches)]
    assert sorted(found) == list(range(11)) and found != list(range(11))
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), train.labels[found])


def test_the_length_of_an_epoch_is_known(train):
    assert datasets.training(train, 4, seed=0)[0].cardinality() == 3


@pytest.mark.parametrize(("spec", "balanced"), [("default", False), ("none", True)])
def test_an_epoch_follows_from_seed_and_number_alone(train, spec, balanced):
    def options():  # new layers each time, as in a new process
        return {"augment": transforms.make(spec, "both"), "balanced": balanced}

    first, second, third = epochs(train, 0, 1, 2, **options())
    assert not equal(first, second) and not equal(second, third)
    resumed = epochs(train, 2, 1, 2, **options())
    assert equal(resumed[0], third) and equal(resumed[1], second) and equal(resumed[2], third)
    assert not equal(epochs(train, 2, seed=8, **options())[0], third)


def test_another_epoch_augments_the_same_image_otherwise(train):
    one, two = epochs(train, 0, 1, augment=transforms.make("default"), batch_size=11)
    order = [np.argsort(np.random.default_rng([7, epoch]).permutation(11)) for epoch in (0, 1)]
    assert not np.isclose(whole(one)[order[0]], whole(two)[order[1]], atol=0.5).all(axis=(1, 2, 3)).any()


def test_images_that_do_not_fit_in_memory_give_the_same_batches(train, monkeypatch):
    augment = transforms.make("default")
    kept = epochs(train, 0, 1, augment=augment)
    monkeypatch.setattr(bank, "SHARE_OF_RAM", 0)
    assert all(equal(a, b) for a, b in zip(kept, epochs(train, 0, 1, augment=augment), strict=True))


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1])
def test_every_seed_that_a_recipe_may_give_works(train, seed):
    augment = transforms.make("default")
    assert equal(*(epochs(train, 9_999, seed=seed, augment=augment)[0] for _ in range(2)))


# Balance


def test_balanced_draws_hold_every_class_equally_often(train):
    labels = [label for epoch in epochs(train, *range(40), balanced=True) for _, part in epoch for label in part]
    assert len(labels) == 40 * 11
    np.testing.assert_allclose(np.bincount(labels) / len(labels), 1 / 3, atol=0.06)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=50))
def test_chances_add_up_and_are_equal_for_every_class(labels):
    labels = np.array(labels)
    chances = datasets.probabilities(labels)
    by_class = [chances[labels == label].sum() for label in np.unique(labels)]
    np.testing.assert_allclose(by_class, 1 / len(by_class))


# Looking


def test_a_sample_shows_every_class_as_often_as_can_be(train):
    shown = datasets.sample(train, 6, seed=1)
    assert shown["label"].value_counts().to_dict() == {"cat": 3, "dog": 2, "owl": 1} or set(shown["label"]) == {
        "cat", "dog", "owl"
    }  # fmt: skip
    assert list(shown.columns) == ["file", "label"] and shown["file"].is_unique
    assert shown.equals(datasets.sample(train, 6, seed=1))
    assert len(datasets.sample(train, 100)) == 11


def test_examples_hold_every_class_as_often_as_asked_for(train, pixels):
    found = dict(datasets.examples(train, each=3, seed=1))
    assert {name: len(images) for name, images in found.items()} == {"dog": 3, "cat": 3, "owl": 1}
    held = {name: pixels[train.labels == number] for number, name in enumerate(train.class_names)}
    assert all((image == held[name]).all((1, 2, 3)).any() for name in found for image in found[name])
    assert list(dict(datasets.examples(train, classes=2))) == ["dog", "cat"]


# Feeds


@pytest.fixture(scope="module")
def model(small_backbone):
    keras.utils.set_random_seed(0)
    made = classifier.build("small", 3, image_size=SIZE, weights="none")
    unfreezing.unfreeze(made, "none")
    return made


def make_feed(model, train, val, folder, views, *, augment=None, balanced=False):
    """Choose as 03 does: from banks where there is a frontier and a view, else the whole model."""
    cut = frontier.cut(model)
    banks = feeds.fill_banks(cut, train, val, folder=folder, views=views, seed=7, augment=augment)
    how = {"batch_size": 4, "seed": 7, "balanced": balanced}
    return (
        feeds.from_banks(cut, banks, **how) if banks else feeds.whole_model(model, train, val, augment=augment, **how)
    )


@pytest.fixture
def feed(model, train, val, tmp_path):
    return lambda views, **options: make_feed(model, train, val, tmp_path / "cache", views, **options)


def test_a_feed_without_views_computes_the_whole_model(feed, model, pixels, val, capsys):
    fed = feed(0, augment=transforms.make("none", "both"))
    assert {id(one) for one in fed.model.variables} == {id(one) for one in model.variables} and fed.folders == []
    assert fed.steps == 3 and "Nothing is computed beforehand: views is 0" in capsys.readouterr().out
    assert next(iter(fed.train))[0].shape == (4, SIZE, SIZE, 3)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in fed.val]), val.labels)


def test_a_feed_with_views_starts_at_the_frontier(feed, model, val):
    fed = feed(3, augment=transforms.make("none", "both"))
    activations = next(iter(fed.train))[0]
    assert fed.model is not model and activations.shape[1:] == fed.model.input_shape[1:] and fed.steps == 3
    np.testing.assert_allclose(
        fed.model.predict(fed.val, verbose=0), model.predict(datasets.labelled(val), verbose=0), atol=2e-3
    )
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in fed.val]), val.labels)
    assert all(folder.is_dir() for folder in fed.folders) and len(fed.folders) == 2
    fed.remove_cache()
    assert not any(folder.exists() for folder in fed.folders)


def test_banks_say_what_they_hold_and_what_they_save(model, train, val, tmp_path, capsys):
    cut, how = frontier.cut(model), {"folder": tmp_path, "views": 2, "seed": 7}
    augment = transforms.make("none", "horizontal")
    banks = feeds.fill_banks(cut, train, val, augment=augment, **how)
    assert str(banks).startswith("2 views of 11 training images and 5 validation images: ") and "images/s" in str(banks)
    history = pd.DataFrame({"seconds": [0.5, 0.5]})
    assert "Above the frontier: 22 images/s, 0.5 s an epoch. Below it: " in feeds.gain(banks, history)
    again = feeds.fill_banks(cut, train, val, augment=augment, **how)
    assert str(again).endswith("found in the cache.") and "found in the cache" in feeds.gain(again, history)
    assert feeds.gain(None, history) == "No cache was used."
    assert feeds.fill_banks(cut, train, val, augment=augment, **how, epochs=0) is None
    assert "nothing is trained" in capsys.readouterr().out


def test_what_the_next_phase_needs_is_computed_first_and_kept(model, train, val, tmp_path):
    cut, how = frontier.cut(model), {"views": 2, "seed": 7, "augment": transforms.make("none", "horizontal")}
    lifted = feeds.fill_banks(cut, train, val, folder=tmp_path / "both", next_unfreeze="block3", **how)
    assert not model.get_layer("backbone").trainable_weights, "the model is frozen as before"
    direct = feeds.fill_banks(cut, train, val, folder=tmp_path / "one", **how)
    np.testing.assert_allclose(lifted.train.activations, direct.train.activations, atol=2e-2)
    assert len(list((tmp_path / "both").glob("*/bank.json"))) == 4
    unfreezing.unfreeze(model, "block3")
    feeds.fill_banks(frontier.cut(model), train, val, folder=tmp_path / "both", **how)
    unfreezing.unfreeze(model, "none")
    assert len(list((tmp_path / "both").glob("*/bank.json"))) == 4, "found again"


@pytest.mark.parametrize("views", [0, 3])
def test_a_feed_draws_the_same_when_it_goes_on(feed, views):
    def seen(*numbers):
        fed = feed(views, augment=transforms.make("none", "both"), balanced=True)
        return [
            fed.clock.on_epoch_begin(number) or [(images.numpy(), labels.numpy()) for images, labels in fed.train]
            for number in numbers
        ]

    begun, resumed = seen(4, 5), seen(5)
    assert equal(begun[1], resumed[0]) and not equal(begun[0], begun[1])


def seen(fed, *numbers):
    """The images or activations, and the labels, of the epochs `numbers`."""
    epochs = [fed.clock.on_epoch_begin(number) or list(fed.train.as_numpy_iterator()) for number in numbers]
    return [tuple(np.concatenate(part) for part in zip(*epoch, strict=True)) for epoch in epochs]


@pytest.mark.parametrize("views", [0, 2])
def test_mixed_images_have_shares_of_the_classes_as_labels(feed, views):
    def mixing():
        return feed(views, augment=transforms.make("none", mix="mixup"))

    fed = mixing()
    (_, labels), (_, more) = seen(fed, 0, 1)
    both = np.concatenate([labels, more])
    assert both.dtype == np.float32 and both.shape == (22, 3) and 1 < both.max(1).sum() < 22
    np.testing.assert_allclose(both.sum(1), 1, atol=1e-5)
    assert equal(seen(mixing(), 1), [(_, more)])  # whatever was before, and from the bank as it is found again
    val = np.concatenate([labels for _, labels in fed.val])
    np.testing.assert_array_equal(val, np.eye(3)[[1, 1, 0, 0, 2]])
    if views:
        plain = np.concatenate([labels for labels in both if labels.max() == 1]).reshape(-1, 3)
        assert len(plain) >= 11 and plain.sum(0).min() >= 1  # the first view of each image is not mixed


def test_blends_and_balance_go_together_only_in_fresh_batches(feed, train):
    mixing = transforms.make("none", mix="cutmix")
    with pytest.raises(ValueError, match=r"balanced_batches cannot balance .* Take views: 0, imbalance: class_weight"):
        feed(2, augment=mixing, balanced=True)
    fed = feed(0, augment=mixing, balanced=True)
    shares = np.mean([labels.mean(0) for _, labels in seen(fed, *range(12))], axis=0)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.1)  # of the images, 7, 3 and 1


def test_a_blend_has_the_weight_of_its_larger_class():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, activation="softmax")])
    model.compile(keras.optimizers.SGD(0.0), "categorical_crossentropy")
    images, labels = np.ones((2, 2)), np.array([[0.6, 0.4, 0.0], [0.1, 0.2, 0.7]], "float32")
    expected = model.evaluate(images, labels, sample_weight=np.array([2.0, 5.0]), verbose=0)
    data = tf.data.Dataset.from_tensor_slices((images, labels)).batch(2)
    found = model.fit(data, class_weight={0: 2.0, 1: 3.0, 2: 5.0}, verbose=0).history["loss"][0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_training_the_suffix_trains_the_model(feed, model):
    keras.utils.set_random_seed(1)
    before = [value.numpy() for value in model.trainable_variables]
    fed = feed(2, augment=transforms.make("none", "horizontal"))
    fed.model.compile("adam", "sparse_categorical_crossentropy")
    fed.model.fit(fed.train, epochs=1, shuffle=False, callbacks=[fed.clock], verbose=0)
    assert any((old != new.numpy()).any() for old, new in zip(before, model.trainable_variables, strict=True))


def test_a_thawed_model_has_nothing_to_compute_beforehand(small_backbone, train, val, tmp_path, capsys):
    whole_model = classifier.build("small", 3, image_size=SIZE, weights="none")
    unfreezing.unfreeze(whole_model, "all")
    fed = make_feed(whole_model, train, val, tmp_path, 2)
    assert "nothing below" in capsys.readouterr().out and isinstance(fed.train, tf.data.Dataset)
    assert fed.model.input_shape == whole_model.input_shape
    assert {id(one) for one in fed.model.variables} == {id(one) for one in whole_model.variables}

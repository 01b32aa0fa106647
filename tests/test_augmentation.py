"""Augmentation: symmetries are exact, draws follow from the key and are each image's own, blends keep their shares."""

import random

import cv2
import keras
import numpy as np
import pytest
import tensorflow as tf

from helpers.compute import views
from helpers.reports import sheets
from helpers.training import transforms

SIZE = 32


@pytest.fixture(scope="module")
def pixels(tmp_path_factory, image_folder):
    """Smooth images, float32 (6, SIZE, SIZE, 3)."""
    folder = image_folder(tmp_path_factory.mktemp("pictures"), {"cat": 3, "dog": 3}, size=SIZE)
    return np.stack([cv2.imread(str(path)) for path in sorted(folder.rglob("*.png"))]).astype("float32")


def changed(augment, images, *, key=(1, 2), labels=0):
    """Images, and labels, after new layers have changed them in a TensorFlow graph, as in training."""
    found = tf.function(augment.function())(images, labels, views.key(*key))
    return found[0].numpy() if isinstance(labels, int) else tuple(part.numpy() for part in found)


def repeated(image, count):
    return np.repeat(image[None], count, axis=0)


# Presets and layers


@pytest.mark.parametrize("name", ["default", "enhanced"])
def test_presets_change_every_image_in_its_own_way_and_keep_its_range(name, pixels):
    found = changed(transforms.make(name), repeated(pixels[0], 8))
    assert found.shape == (8, SIZE, SIZE, 3) and found.dtype == np.float32
    assert found.min() >= 0 and found.max() <= 255
    assert len(np.unique(found.reshape(8, -1), axis=0)) == 8 and np.abs(found - pixels[0]).mean((1, 2, 3)).min() > 0.5


def test_enhanced_is_default_with_shear_noise_and_erasing():
    default, enhanced = ({name for name, _ in transforms.make(spec).layers} for spec in ("default", "enhanced"))
    assert enhanced >= default | {"RandomShear", "GaussianNoise", "RandomErasing"}


def test_every_layer_draws_by_the_key_alone(pixels):
    arguments = {"RandomRotation": {"factor": 0.1}, "RandomTranslation": {"height_factor": 0.1, "width_factor": 0.1}}
    arguments |= {"RandomZoom": {"height_factor": 0.1}, "GaussianNoise": {"stddev": 0.05}}
    arguments |= {name: {"factor": 0.2} for name in ("RandomBrightness", "RandomContrast", "RandomHue")}
    arguments |= {"RandomColorDegeneration": {"factor": 0.2}, "RandomErasing": {"factor": 1.0}}
    arguments |= {"RandomSaturation": {"factor": 0.6}, "RandomPosterization": {"factor": 6}}
    arguments |= {"RandomColorJitter": {"brightness_factor": 0.1}, "RandomSharpness": {"factor": 0.5}}
    with pytest.raises(ValueError) as refusal:
        transforms.make([{"Dense": {}}])
    names = str(refusal.value).split("There are: ")[1].removesuffix(".").split(", ")
    assert len(names) > 20
    state = random.getstate()
    every = transforms.make([{name: arguments.get(name, {})} for name in names if name != "RandAugment"])
    change = tf.function(every.function())
    first, other = (change(pixels[:2], 0, views.key(1, step))[0].numpy() for step in (2, 3))
    again = changed(every, pixels[:2], key=(1, 2))  # with new layers, as in a new process
    assert np.isfinite(first).all() and np.array_equal(first, again) and not np.isclose(first, other, atol=1).all()
    assert random.getstate() == state  # or the weights of a head would depend on whether views were made


def test_rand_augment_and_blur_draw_for_each_image():
    augment, images = transforms.make([{"RandAugment": {"num_ops": 1}}]), np.full((32, 8, 8, 3), [60, 120, 200])
    flat = changed(augment, images)
    assert np.array_equal(flat, changed(augment, images))
    is_plain = (flat == [60, 120, 200]).all((1, 2, 3))  # what moves pixels leaves a flat image as it is
    assert 0 < is_plain.sum() < 32
    point = np.zeros((8, 9, 9, 3), "float32")
    point[:, 4, 4] = 255
    blurred = changed(transforms.make([{"RandomGaussianBlur": {"factor": [1.0, 1.0], "sigma": [0.3, 2.0]}}]), point)
    assert len(np.unique(blurred[:, 4, 4, 0])) == 8


@pytest.mark.parametrize(
    "layer",
    [
        {"RandomRotation": {"factor": [0.1, 0.1], "fill_mode": "constant", "fill_value": 9.0}},
        {"RandomTranslation": {"height_factor": [0.11, 0.11], "width_factor": [-0.2, -0.2], "fill_mode": "nearest"}},
        {"RandomZoom": {"height_factor": [-0.3, -0.3], "width_factor": [0.2, 0.2]}},
        {"RandomShear": {"x_factor": [0.2, 0.2], "y_factor": [0.1, 0.1], "fill_mode": "reflect"}},
    ],
    ids=lambda layer: next(iter(layer)),
)
def test_a_warp_does_what_the_layer_of_keras_does(layer, pixels):
    ((name, arguments),) = layer.items()
    found = changed(transforms.make([layer]), repeated(pixels[0], 4))
    expected = getattr(keras.layers, name)(**arguments, seed=1)(repeated(pixels[0], 8), training=True).numpy()
    for image in found:  # a shear goes either way
        assert min(np.abs(image - other).max() for other in expected) < 0.6  # OpenCV before 5 rounds coordinates


def test_warps_in_a_row_are_made_at_once_in_their_order(pixels):
    turn, zoom = {"RandomRotation": {"factor": [0.1, 0.1]}}, {"RandomZoom": {"height_factor": [0.3, 0.3]}}
    shift = {"RandomTranslation": {"height_factor": [0.2, 0.2], "width_factor": [0.1, 0.1]}}
    smooth = cv2.GaussianBlur(pixels[0], (0, 0), 3)[None]
    expected = smooth
    for layer in (turn, shift, zoom):
        ((name, arguments),) = layer.items()
        expected = getattr(keras.layers, name)(**arguments, seed=1)(expected, training=True)
    together = changed(transforms.make([turn, shift, zoom]), smooth)
    assert np.abs(together - expected)[0, 12:20, 12:20].max() < 5  # interpolated once instead of three times
    assert np.abs(changed(transforms.make([zoom, shift, turn]), smooth) - expected)[0, 12:20, 12:20].max() > 50


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("defualt", "'defualt' is not a preset. Take one of none, default, enhanced, or list layers"),
        ([{"RandomZom": {}}], "keras.layers has no augmentation 'RandomZom'. There are: .*RandomZoom"),
        ([{"RandomCrop": {"height": 8, "width": 8}}], "keras.layers has no augmentation 'RandomCrop'"),
        ([{"AugMix": {}}], "keras.layers has no augmentation 'AugMix'"),
        ([{"MixUp": {}}], "MixUp blends images and labels. Ask for it by mix: mixup"),
        ([{"RandomFlip": {"axis": "x"}}], "RandomFlip refused its arguments: .*axis"),
        ([{"RandomRotation": {"factor": "much"}}], "RandomRotation refused its arguments"),
        ([{"GaussianNoise": {"stddev": 10}}], "GaussianNoise refused its arguments"),
        ([{"RandomZoom": 0.2}], "RandomZoom refused its arguments"),
        (["RandomZoom"], "expected {layer name: {argument: value}}, got 'RandomZoom'"),
        ([{"RandomZoom": {}, "RandomFlip": {}}], "expected {layer name"),
    ],
)
def test_a_wrong_augmentation_says_what_is_wrong(spec, expected):
    with pytest.raises(ValueError, match=f"augmentation: {expected}"):
        transforms.make(spec)


def test_nothing_is_no_augmentation_and_what_is_misspelt_is_refused():
    assert transforms.make([]) is None and transforms.make("none", "none", "none") is None
    with pytest.raises(ValueError, match="flip: 'dihedra' is not one of none, horizontal, vertical, both, dihedral"):
        transforms.make("none", "dihedra")
    with pytest.raises(ValueError, match="mix: 'mixer' is not one of none, mixup"):
        transforms.make("none", mix="mixer")


# Symmetries


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "both", "dihedral"])
def test_flips_are_the_asked_for_symmetries_and_nothing_else(flip, pixels):
    found = changed(transforms.make("none", flip), repeated(pixels[0], 160))
    mirrored = pixels[0, :, ::-1]
    symmetries = {"horizontal": [pixels[0], mirrored], "vertical": [pixels[0], pixels[0, ::-1]]}
    symmetries["dihedral"] = [np.rot90(image, turns) for image in (pixels[0], mirrored) for turns in range(4)]
    symmetries["both"] = symmetries["dihedral"][0::2]  # no turn or half a turn
    kinds = np.array([(found == image).all((1, 2, 3)) for image in symmetries[flip]])
    assert (kinds.sum(0) == 1).all()
    expected = 160 / len(kinds)
    assert np.abs(kinds.sum(1) - expected).max() < 4 * expected**0.5


# Blends

COLOURS = 255 * np.eye(3, dtype="float32")


def blends(mix, key=(1, 2)):
    """48 flat images, whose colour says their class, and the shares of their classes after mixing."""
    labels = transforms.one_hot(np.arange(48) % 3, 3)
    images = np.broadcast_to((labels @ COLOURS)[:, None, None], (48, SIZE, SIZE, 3))
    return changed(transforms.make("none", mix=mix), images, labels=labels, key=key)


@pytest.mark.parametrize(("mix", "tolerance"), [("mixup", 1e-4), ("cutmix", 0.06), ("both", 0.06)])
def test_labels_are_blended_as_much_as_images(mix, tolerance):
    images, labels = blends(mix)
    assert labels.dtype == np.float32 and labels.shape == (48, 3)
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(images.mean((1, 2)) / 255, labels, atol=tolerance)  # CutMix counts whole pixels
    is_pure = (images % 255 == 0).all((1, 2, 3))
    is_blend = labels.max(1) < 0.99
    assert is_blend.sum() > 8
    assert {"mixup": not is_pure[is_blend].any(), "cutmix": is_pure.all()}.get(mix, 0 < is_pure[is_blend].mean() < 1)
    again, other = blends(mix), blends(mix, key=(1, 3))
    assert np.array_equal(images, again[0]) and np.array_equal(labels, again[1]) and (labels != other[1]).any()


# Looking


def test_copies_begin_with_the_plain_image(pixels):
    examples = {"cat": pixels[:2].astype("uint8"), "dog": pixels[3:4].astype("uint8")}
    found = transforms.copies(examples, transforms.make("default"), count=3)
    assert list(found) == ["cat", "dog"] and [len(images) for images in found.values()] == [4, 4]
    assert all(image.dtype == np.uint8 and image.shape == (SIZE, SIZE, 3) for image in found["dog"])
    np.testing.assert_array_equal(found["cat"][0], examples["cat"][0])
    assert (found["dog"][1] != found["dog"][0]).any() and (found["dog"][1] != found["dog"][2]).any()
    assert all((image == examples["cat"][0]).all() for image in transforms.copies(examples, None)["cat"])


def test_contact_sheets_show_each_class_plain_and_augmented(tmp_path, pixels):
    examples = [("a/b", pixels[:3].astype("uint8")), ("dog", pixels[3:].astype("uint8"))]
    pairs = transforms.pairs(examples, transforms.make("default", mix="mixup"))
    files = sheets.write_before_and_after(tmp_path / "sheets", pairs)
    assert [file.name for file in files] == ["000_a_b.png", "001_dog.png"]
    sheet = cv2.imread(str(files[1]))
    plain, augmented = sheet[:, : sheet.shape[1] // 2 - 20], sheet[:, -(sheet.shape[1] // 2 - 20) :]
    assert plain.std() > 10 and np.abs(plain.astype(float) - augmented).mean() > 2

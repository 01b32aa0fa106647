"""Which family which format of a bundle carries, by the certificate; networks with random weights.

They get the statistics of the images and a head that is scaled: as drawn, all answers are alike and no comparison can
fail. `make families` tries them all, ten minutes and more, and prints a row of docs/export.md for each.
"""

import cv2
import keras
import numpy as np
import pytest

from helpers.core import disk
from helpers.data import images
from helpers.evaluation import prediction
from helpers.evaluation.trust import distances, novelty
from helpers.export import bundle, certificate, formats
from helpers.models import classifier

FAMILIES = ["efficientnet_lite0", "efficientnet_b0", "efficientnet_v2_b0", "resnet50", "mobilenet_v3_small", "xception"]
FAMILIES += ["densenet121", "convnext_tiny", "vgg16"]
EXACT = ["litert", "onnx", "openvino"]  # must be within 1e-4
ROUNDED = ["litert_fp16", "litert_int8"]  # may miss: weights that are drawn reach farther than trained ones
REFUSED = {("convnext_tiny", "onnx")}
CLASSES, SIZE, IMAGES, SAMPLES = ["a", "b", "c"], 96, 12, 24


@pytest.fixture(scope="module")
def pixels():
    drawn = np.random.default_rng(0).integers(0, 256, (IMAGES + SAMPLES, 4, 4, 3), np.uint8)
    return np.stack([cv2.resize(one, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for one in drawn])


@pytest.fixture
def proved(tmp_path, pixels):
    """A function (family, levels, formats) that returns the parity of each format and why it misses, or its error."""

    def proved(name, levels, kinds):
        keras.backend.clear_session()
        model = classifier.build(name, len(CLASSES), image_size=SIZE, weights="none", levels=levels, standardised=True)
        model = spread(model, pixels.astype(np.float32))
        found, folder = {}, tmp_path / "bundle"
        model.save(tmp_path / "model.keras")
        known = distances.unit(novelty.features_of(model)(pixels[IMAGES:])).astype(np.float16)
        distances.Novelty(known, 0.5, 0.05).write(tmp_path)
        disk.write_json(tmp_path / "class_names.json", CLASSES)
        disk.write_json(tmp_path / "model.json", {"image_size": SIZE, "fit": "squash"})
        files = [tmp_path / f"{number}.png" for number in range(IMAGES)]
        for file, image in zip(files, pixels, strict=False):
            images.write(file, image)
        model = prediction.load(tmp_path)
        given = bundle.expected(prediction.asking(model, tmp_path), files, bundle.begin(folder, tmp_path))
        assert np.ptp(given[:, :3], axis=0).max() > 0.1
        for kind in kinds:
            try:
                formats.write(model, kind, folder, pixels[IMAGES:].astype(np.float32))
                bundle._describe(folder, name, [kind])
                labels = [CLASSES[row] for row in given[:, :3].argmax(axis=1)]
                parity, said = certificate.compare(folder, kind, files, given, labels, CLASSES)
                found[kind] = parity, certificate.judge(parity, said, given, files, 0.02, len(CLASSES))
            except ValueError as error:
                found[kind] = None, str(error)
        return found

    return proved


@pytest.mark.slow
def test_a_real_network_of_several_levels_is_carried(proved):
    parity, why = proved("efficientnet_lite0", "all", ["litert"])["litert"]
    assert not why and 0 < parity.largest < 1e-4 and 0 < parity.distance < 1e-4


@pytest.mark.families
@pytest.mark.parametrize("levels", ["top", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_format_carries_the_family_or_says_why_not(proved, name, levels):
    found = proved(name, levels, [*EXACT, *ROUNDED])
    print(f"\n| {name} | {levels} |", " | ".join(_cell(*found[kind]) for kind in [*EXACT, *ROUNDED]), "|", flush=True)
    for kind in EXACT:
        parity, why = found[kind]
        if (name, kind) in REFUSED:
            assert parity is None and "cannot carry this model" in why
        else:
            assert not why and parity.same_answers == 1
    for kind in ROUNDED:
        parity, why = found[kind]
        assert not why or f"{kind} is not written: " in why
    assert found["litert_fp16"][0].largest < 0.1 and found["litert_fp16"][0].megabytes < found["litert"][0].megabytes


def _cell(parity, why):
    if parity is None:
        return "refused"
    same = "" if parity.same_answers == 1 else f", {100 * parity.same_answers:.0f} % the same"
    return f"{parity.largest:.1e}{same}{', missed' if why else ''}"


def spread(model, pixels):
    """Give the normalising layers of a classifier the statistics of these images, and scale its head."""
    keras.utils.set_random_seed(0)
    body, norm, last = model.get_layer("backbone"), model.get_layer(classifier.SCALE), model.layers[-1]
    body.trainable = True
    for layer in body._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    body(pixels, training=True)
    body.trainable = False
    features = keras.Model(model.input, norm.input).predict(pixels, verbose=0)
    norm.moving_mean.assign(features.mean(axis=0))
    norm.moving_variance.assign(features.var(axis=0))
    logits = keras.Model(model.input, last.input).predict(pixels, verbose=0) @ last.kernel.numpy()
    last.kernel.assign(last.kernel / logits.std())
    last.bias.assign(-logits.mean(axis=0) / logits.std())
    return model

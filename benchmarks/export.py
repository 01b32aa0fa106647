"""How exact, small and fast each format of a bundle is.

    python benchmarks/export.py runs/elpv            # of a run's trained model, on its validation images
    python benchmarks/export.py --families           # which family which format carries, with random weights

The first asks every format as `thaw export` does. The second gives the networks the statistics of its images and scales
their heads, so that answers differ from image to image: as drawn, all are alike and no comparison could fail.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cv2
import keras
import numpy as np
import setting

from helpers.compute import inference
from helpers.core import disk, project
from helpers.export import bundle, certificate, formats
from helpers.export.carried import networks
from helpers.models import classifier

FAMILIES = ["efficientnet_lite0", "efficientnet_b0", "efficientnet_v2_b0", "resnet50", "mobilenet_v3_small", "xception"]
FAMILIES += ["densenet121", "convnext_tiny", "vgg16"]
SIZE, IMAGES, SAMPLES = 96, 12, 24


def main() -> None:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run with a measured model")
    parser.add_argument("--families", nargs="*", help="these, or all")
    parser.add_argument("--formats", nargs="+", default=list(formats.FORMATS))
    parser.add_argument("--checked", type=int, default=0, help="images of the proof; 0: all")
    given = parser.parse_args()
    print(setting.machine())
    if given.families is not None:
        of_families(given.families or FAMILIES, [kind for kind in given.formats if kind != "keras"])
    else:
        of_run(project.run_folder(given.run), given.formats, given.checked)


def of_run(run: Path, kinds: list[str], checked: int) -> None:
    """Print the certificate of every format, also of those that would not be written."""
    model = keras.saving.load_model(run / "evaluate" / "model.keras")
    proof = bundle.asked(run / "resize", run / "explore", "val", limit=checked)
    few, found, said = bundle.samples(run / "resize"), [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "bundle")
        given = bundle.expected(inference.fast(model), proof.files, bundle.begin(folder, run / "evaluate"))
        classes = disk.read_json(folder / "classes.json")
        for kind in kinds:
            formats.write(model, kind, folder, few)
            bundle._describe(folder, run.name, [kind])
            parity, answers = certificate.compare(folder, kind, proof.files, given, proof.labels, classes)
            found.append(parity)
            said.append(certificate.judge(parity, answers, given, proof.files, 0.02))
    print(certificate.table(found).to_string())
    print("\n".join(filter(None, said)))


def of_families(names: list[str], kinds: list[str]) -> None:
    """Print a line for each family and level: the largest difference of each format, or why there is none."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 256, (IMAGES + SAMPLES, 4, 4, 3), np.uint8)
    pixels = np.stack([cv2.resize(one, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for one in drawn])
    pixels = pixels.astype(np.float32)
    print("| family | levels | spread |", " | ".join(kinds), "|", flush=True)
    for levels in ("top", "all"):
        for name in names:
            model = spread(classifier.build(name, 3, image_size=SIZE, weights="none", levels=levels, standardised=True),
                           pixels)  # fmt: skip
            expected = model.predict(pixels[:IMAGES], verbose=0)
            found = [_difference(model, kind, pixels, expected) for kind in kinds]
            print(f"| {name} | {levels} | {np.ptp(expected, axis=0).max():.2f} |", " | ".join(found), "|", flush=True)
            keras.backend.clear_session()


def spread(model: keras.Model, pixels: np.ndarray) -> keras.Model:
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


def _difference(model: keras.Model, kind: str, pixels: np.ndarray, expected: np.ndarray) -> str:
    with tempfile.TemporaryDirectory() as place:
        try:
            run = networks.load(formats.write(model, kind, Path(place), pixels[IMAGES:]))
            begin = time.perf_counter()
            given = np.concatenate([run(one[None]) for one in pixels[:IMAGES]])
        except Exception as error:  # runtimes fail in any way
            return f"refused: {str(error.__cause__ or error).splitlines()[0][:80]}"
        milliseconds = 1000 * (time.perf_counter() - begin) / IMAGES
        same = (given.argmax(axis=1) == expected.argmax(axis=1)).mean()
        return f"{np.abs(given - expected).max():.1e}, {100 * same:.0f} % same, {milliseconds:.0f} ms"


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # TensorFlow and OpenVINO in one process may never take leave

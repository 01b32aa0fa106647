"""The formats that a model is delivered in: how each is written, what it needs to run, how exact it must be.

The certificate, not this module, checks that a file is correct.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from helpers.core import words

OPSET = 18  # of ONNX
OUTPUTS = ("probabilities", "features")  # the names of the outputs of an ONNX file


class FormatError(ValueError):
    """A model that a format cannot carry, or a format whose packages are missing."""


@dataclass(frozen=True)
class Format:
    """One format of a bundle.

    Attributes:
        file: its name in the bundle; its suffix decides how it runs.
        tolerance: the largest difference of a probability from the Keras model; None for a quantised format, whose
            answers and accuracy are judged.
        again: the same between two machines that run this file, which `verify.py` allows.
        write: (model, file, sample images float32 (n, H, W, 3)) -> None.
        needs: packages that write or run it, besides those of Thaw.
        requirements: the list of packages that a bundle with it needs.
    """

    file: str
    tolerance: float | None
    again: float
    write: Callable[[keras.Model, Path, np.ndarray], None]
    needs: tuple[str, ...] = ()
    requirements: str = "litert"

    @property
    def weights(self) -> str:
        """Return the file that holds the weights: for OpenVINO, one beside the network's."""
        return str(Path(self.file).with_suffix(".bin")) if self.file.endswith(".xml") else self.file

    def parts(self, folder: Path) -> list[Path]:
        """Return the files of the network in a bundle."""
        return [folder / name for name in dict.fromkeys([self.file, self.weights])]


def write(model: keras.Model, kind: str, folder: Path, samples: np.ndarray) -> Path:
    """Write a model in one format and return its file.

    Args:
        model: images (batch, H, W, 3) float32, RGB 0-255 -> probabilities (batch, classes), or these and features.
        kind: a name of `FORMATS`.
        folder: of the bundle.
        samples: training images, float32 (n, H, W, 3), from which int8 chooses its ranges.

    Raises:
        FormatError: a package is missing, or the conversion fails; the message says which and why.
    """
    check([kind])
    format_of, file = FORMATS[kind], folder / FORMATS[kind].file
    try:
        with _quiet():
            format_of.write(model, file, samples)
    except Exception as error:  # converters fail in any way
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise FormatError(
            f"{kind} cannot carry this model: {words.shorten(lines[0], 300)}. Take another format"
            f" ({', '.join(FORMATS)}); docs/export.md says which families each one carries."
        ) from error
    return file


def check(kinds: list[str]) -> None:
    """Raise FormatError unless every format exists, is named once, and has its packages here."""
    if not kinds or len(set(kinds)) < len(kinds):
        raise FormatError(f"formats: name at least one, and each once; got {kinds}.")
    for kind in kinds:
        if kind not in FORMATS:
            raise FormatError(f"formats: there is no {kind!r}.{words.did_you_mean(kind, FORMATS)}")
        if missing := [package for package in FORMATS[kind].needs if not _installed(package)]:
            raise FormatError(f"{kind} needs {', '.join(missing)}: pip install -e '.[formats]'")


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def _frozen(model: keras.Model, batch: int | None) -> Any:
    """Return the model as one graph whose weights are constants, float32 images -> the model's outputs."""
    signature = [tf.TensorSpec((batch, *model.input_shape[1:]), tf.float32, name="image")]

    @tf.function(input_signature=signature, autograph=False, jit_compile=False)
    def predict(image):
        return model(image, training=False)

    return convert_variables_to_constants_v2(predict.get_concrete_function())


def _converter(model: keras.Model) -> Any:
    logging.getLogger("absl").setLevel(
        logging.ERROR
    )  # it warns that the model is missing; with the model this takes 14 s, not 6
    return tf.lite.TFLiteConverter.from_concrete_functions([_frozen(model, 1)])


def _litert(model: keras.Model, file: Path, samples: np.ndarray) -> None:
    file.write_bytes(_converter(model).convert())


def _litert_fp16(model: keras.Model, file: Path, samples: np.ndarray) -> None:
    converter = _converter(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    file.write_bytes(converter.convert())


def _litert_int8(model: keras.Model, file: Path, samples: np.ndarray) -> None:
    """Write weights, by channel, and activations in 8 bits; images and probabilities stay float32."""
    low, high = float(samples.min()), float(samples.max())
    if not 0 <= low < high <= 255 or high <= 1:
        raise ValueError(f"the representative images hold {low:g} to {high:g}; expected RGB of 0 to 255")

    def representative() -> Iterator[list[np.ndarray]]:
        for image in samples:
            yield [image[None]]

    converter = _converter(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = representative
    file.write_bytes(converter.convert())


def _onnx(model: keras.Model, file: Path, samples: np.ndarray) -> None:
    import onnxruntime
    import tf2onnx

    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)  # its optimiser prints tracebacks, and continues
    graph = _frozen(model, None)
    (image,) = graph.inputs
    # Not from_function: it turns constants of a model, such as those of Normalization, into inputs.
    tf2onnx.convert.from_graph_def(
        graph.graph.as_graph_def(),
        input_names=[image.name],
        output_names=[tensor.name for tensor in graph.outputs],
        tensors_to_rename={image.name: "image"} | {t.name: OUTPUTS[n] for n, t in enumerate(graph.outputs)},
        opset=OPSET,
        output_path=str(file),
    )
    onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def _openvino(model: keras.Model, file: Path, samples: np.ndarray) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as place:
        model.export(place, format="tf_saved_model", verbose=False)
        openvino.save_model(openvino.convert_model(place), file, compress_to_fp16=False)


def _keras(model: keras.Model, file: Path, samples: np.ndarray) -> None:
    model.save(file)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what native code writes to standard output and standard error; Python's errors still rise."""
    saved = [os.dup(1), os.dup(2)]
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            for number, descriptor in enumerate(saved, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)


FORMATS = {
    "litert": Format("model.tflite", 1e-4, 1e-3, _litert),
    "litert_fp16": Format("model_fp16.tflite", 1e-2, 1e-2, _litert_fp16),
    "litert_int8": Format("model_int8.tflite", None, 5e-2, _litert_int8),
    "onnx": Format("model.onnx", 1e-4, 1e-3, _onnx, ("tf2onnx", "onnxruntime"), "onnx"),
    "openvino": Format("model.xml", 1e-4, 1e-3, _openvino, ("openvino",), "openvino"),
    "keras": Format("model.keras", 1e-4, 1e-3, _keras, (), "keras"),
}

"""A network in any format of a bundle: from a float32 image to probabilities, and features if it has them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

# (1, height, width, 3) float32, RGB 0-255 -> probabilities (1, classes), and if the bundle looks for novel images,
# features (1, n)
Network = Callable[[np.ndarray], list[np.ndarray]]


def load(file: Path, threads: int = 1) -> Network:
    """Return the network of a file by its suffix; two threads must not call it at the same time.

    Raises:
        ValueError: no format has this suffix.
    """
    if file.suffix not in LOADERS:
        raise ValueError(f"{file.name} has none of the suffixes that a bundle can read: {', '.join(LOADERS)}.")
    return LOADERS[file.suffix](str(file), threads)


def _litert(file: str, threads: int) -> Network:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(file, num_threads=threads)
    interpreter.allocate_tensors()
    (image,), answers = interpreter.get_input_details(), interpreter.get_output_details()

    def run(batch: np.ndarray) -> list[np.ndarray]:
        interpreter.set_tensor(image["index"], batch)
        interpreter.invoke()
        return [interpreter.get_tensor(answer["index"]) for answer in answers]

    return run


def _onnx(file: str, threads: int) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch})


def _openvino(file: str, threads: int) -> Network:
    import openvino

    # Some CPUs would round products to bfloat16.
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(file, "CPU", options)
    return lambda batch: list(compiled(batch).to_tuple())


def _keras(file: str, threads: int) -> Network:
    import keras

    model = keras.saving.load_model(file)
    return lambda batch: keras.tree.flatten(model.predict_on_batch(batch))


LOADERS = {".tflite": _litert, ".onnx": _onnx, ".xml": _openvino, ".keras": _keras}

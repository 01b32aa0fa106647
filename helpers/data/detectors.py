"""Object detectors as plain functions: an image in, boxes with a class and a score out.

OpenCV runs an ONNX file on one square image at a time. The outputs that are read, with n boxes and c classes:

- yolov8 (also v9, v11): (1, 4 + c, n), centre x, centre y, width, height in pixels, then a score for each class;
- yolov5 (also v7): (1, n, 5 + c), the same with the score of any object before the classes, which multiplies theirs;
- yolov10 (also others with "nms" inside): (1, n, 6), left, top, right, bottom in pixels, score, class;
- ssd: (1, 1, n, 7), image, class, score, left, top, right, bottom as shares of the image.

Classes are numbers. A YOLO gets the whole image with grey borders, an SSD the image stretched to a square; in RGB.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from helpers.core import project

LAYOUTS = {  # the shape of an output in words, and the test of a shape
    "yolov8": ("(1, 4 + classes, boxes)", lambda shape: len(shape) == 3 and 5 <= shape[1] < shape[2]),
    "yolov5": ("(1, boxes, 5 + classes)", lambda shape: len(shape) == 3 and 6 <= shape[2] < shape[1]),
    "yolov10": ("(1, boxes, 6)", lambda shape: len(shape) == 3 and shape[2] == 6),
    "ssd": ("(1, 1, boxes, 7)", lambda shape: len(shape) == 4 and shape[3] == 7),
}
OVERLAP = 0.45  # two boxes of a class that overlap more (intersection over union): the lower score is dropped
GREY = 114  # the border of an image in the training of YOLO detectors
HUB = "hub:"


class Detection(NamedTuple):
    """A box in an image: corners in pixels, the class, and the score (0-1)."""

    left: float
    top: float
    right: float
    bottom: float
    kind: str = ""
    score: float = 1.0


Detect = Callable[[np.ndarray], list[Detection]]  # uint8 RGB (height, width, 3) -> boxes in its pixels


def load(
    name: str,
    *,
    layout: str = "yolov8",
    input_size: int = 640,
    mean: float = 0.0,
    scale: float = 255.0,
    score: float = 0.5,
) -> Detect:
    """Return a detector as a function: uint8 RGB (height, width, 3) -> the boxes that score at least `score`.

    Args:
        name: an ONNX file, or hub:<preset>, e.g. hub:dfine_nano_coco, which sets size, mean and scale itself.
        layout: what an ONNX detector returns, see the docstring of this module.
        input_size: side of its square input, in pixels.
        mean, scale: its input is (value - mean) / scale of values 0-255.
        score: the lowest score of a box.

    Raises:
        ValueError: OpenCV cannot read the file.
        ImportError: hub: without KerasHub.
    """
    if name.startswith(HUB):
        return _hub_detector(name.removeprefix(HUB), score)
    return _OnnxDetector(project.resolve(name), layout, input_size, mean, scale, score)


class _OnnxDetector:
    """An ONNX file run by OpenCV, with a network for each thread, since a network runs in one thread at a time."""

    def __init__(self, file: Path, layout: str, input_size: int, mean: float, scale: float, score: float):
        self.file, self.layout, self.input_size, self.mean, self.scale = file, layout, input_size, mean, scale
        self.score, self.threads = score, threading.local()
        self._network()

    def _network(self) -> Any:
        if not hasattr(self.threads, "network"):
            try:
                self.threads.network = cv2.dnn.readNetFromONNX(str(self.file))
            except cv2.error as error:
                reason = f"OpenCV {cv2.__version__} cannot read {self.file.name}: {error.err}"
                raise ValueError(f"detector: {reason}") from None
        return self.threads.network

    def __call__(self, pixels: np.ndarray) -> list[Detection]:
        square, scale, offset = _square(pixels, (self.input_size, self.input_size), self.layout == "ssd")
        network = self._network()
        network.setInput(((square.astype(np.float32) - self.mean) / self.scale).transpose(2, 0, 1)[None])
        try:
            outputs = network.forward(network.getUnconnectedOutLayersNames())
        except cv2.error as error:
            raise ValueError(
                f"detector: {self.file.name} does not run on an input of (1, 3, {self.input_size}, {self.input_size}):"
                f" {error.err} Check input_size."
            ) from None
        corners, kinds, scores = read_output(outputs, self.layout, self.input_size)
        good = scores >= self.score
        corners, kinds, scores = corners[good], kinds[good], scores[good]
        if self.layout in ("yolov5", "yolov8") and len(corners):
            sides = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
            good = cv2.dnn.NMSBoxesBatched(sides.tolist(), scores.tolist(), kinds.tolist(), 0.0, OVERLAP)
            corners, kinds, scores = corners[good], kinds[good], scores[good]
        corners = (corners - [*offset, *offset]) / [*scale, *scale]
        rows = zip(corners.tolist(), kinds.tolist(), scores.tolist(), strict=True)
        return [Detection(*four, str(kind), score) for four, kind, score in rows]


def _square(
    pixels: np.ndarray, size: tuple[int, int], stretch: bool = False
) -> tuple[np.ndarray, tuple[float, float], tuple[int, int]]:
    """Fit an image into `size` (width, height); return it with the scale and the offset of x and y."""
    height, width = pixels.shape[:2]
    scale = (size[0] / width, size[1] / height)
    inner = size if stretch else tuple(max(1, round(side * min(scale))) for side in (width, height))
    shrinks = inner[0] < width
    fitted = cv2.resize(pixels, inner, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    left, top = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    square = np.full((size[1], size[0], 3), GREY, np.uint8)
    square[top : top + inner[1], left : left + inner[0]] = fitted
    return square, (inner[0] / width, inner[1] / height), (left, top)


def read_output(
    outputs: Sequence[np.ndarray], layout: str, input_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return corners (n, 4) in pixels of the detector's input, class numbers (n,) and scores (n,).

    Raises:
        ValueError: no output has the form of `layout`; the message names the shapes that came and the expected one.
    """
    form, fits = LAYOUTS[layout]
    boxes = next((output for output in outputs if fits(output.shape)), None)
    if boxes is None:
        shapes = ", ".join(str(output.shape) for output in outputs)
        raise ValueError(f"detector: layout {layout} is {form}, the output is {shapes}. Choose the layout that fits.")
    if layout == "ssd":
        rows = boxes.reshape(-1, 7)
        return rows[:, 3:] * input_size, rows[:, 1].astype(int), rows[:, 2]
    if layout == "yolov10":
        return boxes[0, :, :4], boxes[0, :, 5].astype(int), boxes[0, :, 4]
    rows = boxes[0].T if layout == "yolov8" else boxes[0]
    centre, half = rows[:, :2], rows[:, 2:4] / 2
    scores = rows[:, 4:] if layout == "yolov8" else rows[:, 4:5] * rows[:, 5:]
    return np.concatenate([centre - half, centre + half], axis=1), scores.argmax(axis=1), scores.max(axis=1)


def _hub_detector(preset: str, score: float) -> Detect:
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(f'detector: {HUB}{preset} needs KerasHub: pip install -e ".[hub]".') from error
    from keras.utils import bounding_boxes

    model = keras_hub.models.ObjectDetector.from_preset(preset)
    model.prediction_decoder.confidence_threshold = score
    height, width = model.preprocessor.image_converter.image_size
    lock = threading.Lock()

    def detect(pixels: np.ndarray) -> list[Detection]:
        square, scale, offset = _square(pixels, (width, height))
        with lock:
            predictions = model.predict(square[None].astype("float32"), verbose=0)
        corners = bounding_boxes.convert_format(
            predictions["boxes"], source=model.bounding_box_format, target="xyxy", height=height, width=width
        )
        count = int(predictions["num_detections"][0])
        corners = (np.asarray(corners)[0, :count] - [*offset, *offset]) / [*scale, *scale]
        rows = zip(
            corners.tolist(), predictions["labels"][0].tolist(), predictions["confidence"][0].tolist(), strict=False
        )
        return [Detection(*four, str(int(kind)), one) for four, kind, one in rows if one >= score]

    return detect

"""A bundle to try by hand: the user chooses an image in Jupyter, and sees its answer and a map of the reasons."""

import base64
import html
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from helpers.core import progress
from helpers.evaluation.trust import explanation
from helpers.export import loading

MOST_CLASSES = 5  # shown of an answer
SHOWN = 3  # golden images before one is chosen
SIDE = 150  # of an image, in pixels of the page


def show(bundle: Path, model: Any, over: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Any:
    """Return a button to choose and classify images; in a run of `thaw`, the answers for golden images.

    Args:
        bundle: the folder.
        model: the Keras model of the bundle, which makes the maps.
        over: image uint8 (H, W, 3), map (H, W) -> the map drawn over the image.
    """
    classifier, golden = loading.load(bundle).Model(bundle), sorted(bundle.glob("golden/*"))[:SHOWN]

    def shown(files: Iterable[tuple[str, bytes]]) -> list[str]:
        texts, read = {}, {}
        for place, (name, data) in enumerate(files):
            try:
                texts[place], read[place] = name, classifier.pixels(data)
            except ValueError as error:
                texts[place] = f"<p><b>{html.escape(name)}</b>: {html.escape(str(error))}</p>"
        maps = explanation.heat(model, np.stack([*read.values()])) if read else ()
        for (place, pixels), heat in zip(read.items(), maps, strict=True):
            texts[place] = _row(texts[place], classifier.answer(pixels), pixels, over(pixels, heat))
        return [*texts.values()]

    first = shown((path.name, path.read_bytes()) for path in golden)
    if os.environ.get(progress.PROGRESS_VARIABLE):  # headless: no user can choose
        from IPython.display import HTML

        return HTML("".join(first))
    import ipywidgets as widgets

    button = widgets.FileUpload(accept="image/*", multiple=True, description="Choose images")
    answers = widgets.VBox([widgets.HTML(text) for text in first])

    def classify(change: Mapping[str, Any]) -> None:
        files = [(file["name"], bytes(file["content"])) for file in change["new"]]
        answers.children = [widgets.HTML(text) for text in shown(files)]

    button.observe(classify, names="value")
    return widgets.VBox([button, answers])


def _row(name: str, answer: Mapping[str, Any], pixels: np.ndarray, overlay: np.ndarray) -> str:
    """Return an image, its map and its answer side by side: the most probable classes with a bar each."""
    best = sorted(answer["probabilities"].items(), key=lambda item: -item[1])[:MOST_CLASSES]
    bars = "".join(
        f"<div><meter value='{chance:.4f}'></meter> {html.escape(label)} {100 * chance:.1f} %</div>"
        for label, chance in best
    )
    novel = "<div>looks like none of the classes</div>" if answer.get("novel") else ""
    words = f"<div><b>{html.escape(answer['predicted'])}</b> ({html.escape(name)}){novel}{bars}</div>"
    return f"<div style='display: flex; gap: 8px; margin: 8px 0'>{_image(pixels)}{_image(overlay)}{words}</div>"


def _image(pixels: np.ndarray) -> str:
    data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()
    return f"<img width='{SIDE}' height='{SIDE}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"

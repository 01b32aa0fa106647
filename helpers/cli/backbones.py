"""The list of backbones: name, size of image, and whether the weights are on this machine."""

from helpers.models import backbones
from helpers.models.families import kerashub

LOCAL = "all-local"  # instead of names: every backbone whose ImageNet weights are on this machine
ABOUT_HUB = """
Size in pixels where KerasHub states it; what the backbone gives. A preset scales RGB 0-255 by its own image converter.
Weights are downloaded when a preset is first used; docs/backbones.md says how to install them by hand."""


def lines() -> list[str]:
    """Return a line for each backbone: name, pixels of the images that its ImageNet weights were trained on."""
    installed = {*backbones.weights_here()}
    rows = [f"{'backbone':<32} {'pixels':>6}  ImageNet weights"]
    for name in backbones.names():
        where = "here" if name in installed else ""
        rows.append(f"{name:<32} {backbones.spec(name).size or '':>6}  {where}".rstrip())
    return rows


def hub_lines() -> list[str]:
    """Return a line for each preset of the installed KerasHub that can be a backbone.

    Raises:
        ImportError: KerasHub is not installed.
    """
    rows = [f"{'preset':<52} {'million weights':>15} {'pixels':>6}  gives"]
    for preset in kerashub.presets():
        weights = f"{preset.weights / 1e6:,.1f}" if preset.weights else ""
        rows.append(f"{preset.name:<52} {weights:>15} {preset.size or '':>6}  {preset.gives}")
    return [*rows, *ABOUT_HUB.splitlines()]


def parse(text: str) -> list[str]:
    """Return the backbones of a list ``A,B,...``; LOCAL in it stands for those whose ImageNet weights are here."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if LOCAL not in names:
        return names
    others = [name for name in names if name != LOCAL]
    return [*others, *(name for name in backbones.weights_here() if name not in others)]

"""Make tests/fixtures/torchvision.npz and the weights files beside it: what torch and torchvision compute.

    pip install torch torchvision safetensors    # in an environment of its own
    python tests/torchvision_logits.py           # half a minute

torch 2.14.1 and torchvision 0.29.1 made the files that are kept.

Weights are drawn by `draw`, from the tensor's name alone, so the test draws the same ones without torch.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = {"vgg": 224}  # its classifier takes 7x7 maps; the others take 64 px here
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return random weights of a tensor, float32, such that what passes keeps its size and images differ."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) > 1:  # uniform with the variance 2 / inputs
        bound = np.float32(np.sqrt(6 / np.prod(shape[1:])))
        return (rng.random(shape, dtype=np.float32) * 2 - 1) * bound
    low, high = (0.5, 1.5) if name.endswith("running_var") else (0.4, 0.9) if name.endswith("weight") else (-0.3, 0.3)
    return rng.uniform(low, high, shape).astype("float32")


def images(size: int) -> np.ndarray:
    """Return two unlike images, uint8 (2, size, size, 3)."""
    rng = np.random.default_rng(size)
    noise = rng.integers(0, 256, (2, size, size, 3))
    slope = np.linspace(0, 255, size)[None, :, None, None] * [[[[1.0, 0.5, 0.2]]]]
    return np.stack([noise[0], (0.3 * noise[1:] + 0.7 * slope)[0]]).astype(np.uint8)


def main() -> None:
    """Write the fixtures."""
    import safetensors.torch
    import torch
    import torchvision

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from helpers.models.families.torchvision import SPECS

    kept = {}
    for name, spec in SPECS.items():
        network = torchvision.models.get_model(name.removeprefix("tv_"), weights=None).eval()
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items() if value.ndim}
        state = {key: torch.from_numpy(draw(key, shape)) for key, shape in shapes.items()}
        network.load_state_dict(state, strict=False)
        pixels = torch.from_numpy(images(SIZES.get(spec.kind, 64))).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
        with torch.no_grad():
            logits = network((pixels - mean) / std).numpy()
        print(
            f"{name}: logits from {logits.min():.2f} to {logits.max():.2f},"
            f" images differ by {np.ptp(logits, 0).max():.2f}"
        )
        kept |= {f"{name} shapes": np.array(json.dumps(shapes)), f"{name} logits": logits}
    np.savez_compressed(FIXTURES / "torchvision.npz", **kept)

    tensors = {"conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2), "count": torch.tensor(7)}
    tensors |= {"half": torch.tensor([0.5, 2.0]).half(), "double": torch.tensor([0.25], dtype=torch.float64)}
    tensors["turned"] = torch.arange(12.0).reshape(2, 3, 2).permute(2, 1, 0)  # strides that are not its own
    parameters = {"weight": torch.nn.Parameter(torch.arange(3.0))}
    torch.save(tensors, FIXTURES / "archive.pth")
    torch.save(tensors, FIXTURES / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(parameters, FIXTURES / "parameters.pth")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(whole, FIXTURES / "tensors.safetensors")


if __name__ == "__main__":
    main()

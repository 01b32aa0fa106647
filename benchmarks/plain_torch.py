"""The same recipe in plain PyTorch on the same weights, as an expert would write it for a CPU.

Started by recipe_speed.py and time_to_accuracy.py with a Python that has torch, efficientnet-lite-pytorch, pillow and
numpy; it uses nothing of Thaw. Tuned: images are decoded once and stay in memory, augmentation is one affine warp of a
whole batch, frozen layers run without gradients, validation runs in inference mode, memory is channels-last, every core
has a thread, and training multiplies in bfloat16 where the processor is fast in that, as Thaw does.

    python benchmarks/plain_torch.py '{"images": "runs/x/resize", "epochs": 50, ...}'

It prints and writes what plain_keras.py does.
"""

import copy
import csv
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

BATCH = 32
BLOCK7 = 15  # the last of the 16 blocks of EfficientNet-Lite0


class Classifier(torch.nn.Module):
    """EfficientNet-Lite0 and S1's head; the backbone is always in inference mode, so BatchNormalization is frozen."""

    def __init__(self, weights: str, classes: int, dropout: float):
        super().__init__()
        self.body = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
        self.head = torch.nn.Sequential(torch.nn.Dropout(dropout), torch.nn.Linear(1280, classes))
        self.body.requires_grad_(False)
        self.thawed = False

    def thaw(self) -> None:
        """Let block 7 and what follows it train, but not their BatchNormalization."""
        self.thawed = True
        for part in (*self.body._blocks[BLOCK7:], self.body._conv_head):
            for layer in part.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    layer.requires_grad_(True)

    def train(self, mode: bool = True):
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits; images are float RGB 0-255, (n, 3, H, W)."""
        with torch.no_grad():
            x = (images - 127) / 128
            x = self.body._swish(self.body._bn0(self.body._conv_stem(x)))
            for block in self.body._blocks[:BLOCK7]:
                x = block(x)
        with torch.set_grad_enabled(self.thawed and torch.is_grad_enabled()):
            for block in self.body._blocks[BLOCK7:]:
                x = block(x)
            x = self.body._swish(self.body._bn1(self.body._conv_head(x)))
        return self.head(x.mean(dim=(2, 3)))


def main(task: dict) -> dict:
    """Train both phases, predict the test part, and return what was measured."""
    torch.manual_seed(task["seed"])
    torch.set_num_threads(os.cpu_count())
    train, val = read(task["images"], "train"), read(task["images"], "val")
    model = Classifier(task["weights"], int(train[1].max()) + 1, task["dropout"])
    model = model.to(memory_format=torch.channels_last)
    began, epochs, phases = time.time() - task["begin"], [], []
    for rate, thaw in zip(task["rates"], (False, True), strict=True):
        if thaw:
            model.thaw()
        phases.append(fit(model, train, val, rate, task, epochs))
        model.load_state_dict(phases[-1][1])
    model.load_state_dict(min(phases, key=lambda phase: phase[0])[1])
    ended, processor = time.time() - task["begin"], time.process_time()
    if task.get("predictions"):
        write_predictions(model, task["images"], task["predictions"])
    return {"began": began, "ended": ended, "processor": processor, "epochs": epochs}


def fit(model: Classifier, train: tuple, val: tuple, rate: float, task: dict, epochs: list) -> tuple[float, dict]:
    """Train one phase, note each epoch, and return the lowest validation loss and the weights that had it."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate, eps=1e-7)  # as in Keras
    best, lowest = copy.deepcopy(model.state_dict()), math.inf
    for _ in range(task["epochs"]):
        model.train()
        for rows in torch.randperm(len(train[0])).split(BATCH):
            images = augmented(train[0][rows], task["flip"])
            with torch.autocast("cpu", torch.bfloat16, enabled=task["bfloat16"]):
                outputs = model(images)
            loss = F.cross_entropy(outputs.float(), train[1][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy, loss = judge(model, val)
        epochs.append([time.time() - task["begin"], accuracy, loss])
        if loss < lowest:
            best, lowest = copy.deepcopy(model.state_dict()), loss
    return lowest, best


def read(folder: str, part: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Return the images of one part of a folder of 02_resize, uint8 (n, 3, H, W), their labels and their paths."""
    with open(Path(folder) / "images.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["part"] == part]
    names = json.loads((Path(folder) / "class_names.json").read_text())
    images = np.stack([np.asarray(Image.open(Path(folder) / row["file"]).convert("RGB")) for row in rows])
    labels = torch.tensor([names.index(row["label"]) for row in rows])
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels, [row["path"] for row in rows]


def augmented(images: torch.Tensor, flip: str) -> torch.Tensor:
    """Return a batch turned, shifted, flipped and changed in contrast as Thaw's preset "default" does it."""
    count = len(images)
    angle = (2 * torch.rand(count) - 1) * 0.03 * 2 * math.pi
    shift = (2 * torch.rand(count, 2) - 1) * 0.05 * 2  # of a width of 2 in the grid's units
    mirror = torch.ones(count, 2)
    for axis, name in enumerate(("horizontal", "vertical")):
        if flip in (name, "both"):
            mirror[:, axis] = torch.randint(0, 2, (count,)) * 2.0 - 1
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [torch.stack([cos * mirror[:, 0], -sin * mirror[:, 1], shift[:, 0]], 1)]
    rows += [torch.stack([sin * mirror[:, 0], cos * mirror[:, 1], shift[:, 1]], 1)]
    pixels = images.float().contiguous(memory_format=torch.channels_last)
    grid = F.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    factor, mean = 1 + (2 * torch.rand(count, 1, 1, 1) - 1) * 0.1, pixels.mean(dim=(2, 3), keepdim=True)
    return ((pixels - mean) * factor + mean).clamp(0, 255).contiguous(memory_format=torch.channels_last)


def judge(model: Classifier, part: tuple) -> tuple[float, float]:
    """Return accuracy and loss."""
    outputs = logits(model, part[0])
    return float((outputs.argmax(1) == part[1]).float().mean()), float(F.cross_entropy(outputs, part[1]))


@torch.inference_mode()
def logits(model: Classifier, images: torch.Tensor) -> torch.Tensor:
    """Return the model's logits of images, uint8 (n, 3, H, W)."""
    model.eval()
    batches = [batch.float().contiguous(memory_format=torch.channels_last) for batch in images.split(2 * BATCH)]
    return torch.cat([model(batch) for batch in batches])


def write_predictions(model: Classifier, folder: str, path: str) -> None:
    """Write path, label and predicted (class indices) of the test images."""
    images, labels, paths = read(folder, "test")
    predicted = logits(model, images).argmax(1)
    with open(path, "w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["path", "label", "predicted"])
        rows.writerows(zip(paths, labels.tolist(), predicted.tolist(), strict=True))


def imagenet_logits(task: dict) -> None:
    """Write the logits of ImageNet's classes that the network that is timed gives the validation images."""
    model = Classifier(task["weights"], 2, task["dropout"]).to(memory_format=torch.channels_last)
    model.head = model.body._fc
    np.save(task["logits"], logits(model, read(task["images"], "val")[0]).numpy())


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps(imagenet_logits(task) if task.get("logits") else main(task)))

"""torchvision's networks: the numbers of torch, the files of torch, and that they train."""

import gc
import json
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import dear

from helpers.compute import fast_layers, frontier
from helpers.models import backbones, classifier, torch_weights, unfreezing
from helpers.models.families import torchvision
from tests.torchvision_logits import FIXTURES, SIZES, draw, images

SPECS = torchvision.SPECS
QUICK = ["resnet18", "resnext50_32x4d", "vgg11_bn"]  # the others are marked slow
STUDY = """resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d wide_resnet50_2
wide_resnet101_2 vgg11_bn vgg13_bn vgg16_bn vgg19_bn densenet121 densenet161 densenet169 densenet201 efficientnet_b0
efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7"""


@pytest.fixture(autouse=True)
def _forget_models():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def kept():
    return np.load(FIXTURES / "torchvision.npz")


def _tensors(kept, name: str) -> dict[str, np.ndarray]:
    return {key: draw(key, tuple(shape)) for key, shape in json.loads(str(kept[f"{name} shapes"])).items()}


def _logits(spec: torchvision.Spec, features: np.ndarray, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """What torchvision's classifier makes of a feature map (batch, height, width, channels)."""
    if spec.kind != "vgg":
        part = "fc" if spec.kind == "resnet" else "classifier"
        return features.mean((1, 2)) @ tensors[f"{part}.weight"].T + tensors[f"{part}.bias"]
    x = features.transpose(0, 3, 1, 2).reshape(len(features), -1)
    for index in (0, 3, 6):
        x = x @ tensors[f"classifier.{index}.weight"].T + tensors[f"classifier.{index}.bias"]
        x = np.maximum(x, 0) if index < 6 else x
    return x


def test_all_25_backbones_of_the_study_resolve():
    assert len(STUDY.split()) == 25
    assert all(backbones.spec(name).size for name in STUDY.split())


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in SPECS])
def test_logits_are_those_of_torch(name, kept):
    spec, size, tensors = SPECS[name], SIZES.get(SPECS[name].kind, 64), _tensors(kept, name)
    model = backbones.build(name, size, "none")
    torchvision.give(model, spec, tensors)
    features = np.asarray(model(images(size), training=False))
    logits, expected = _logits(spec, features, tensors), kept[f"{name} logits"]
    print(f"{name}: {np.abs(logits - expected).max():.1e}, of {np.abs(expected).max():.1f}")
    assert np.abs(logits - expected).max() < 1e-4 * max(1, np.abs(expected).max() / 10)
    assert np.ptp(expected, axis=0).max() > 100 * 1e-4  # another image, other logits


# The files


def test_files_of_torch_are_read_in_all_their_formats():
    kernel = np.arange(24, dtype="float32").reshape(2, 3, 2, 2)
    expected = {"conv.weight": kernel, "count": 7, "half": [0.5, 2.0], "double": [0.25]}
    expected["turned"] = np.arange(12).reshape(2, 3, 2).transpose(2, 1, 0)
    for file in ("archive.pth", "legacy.pth", "tensors.safetensors"):
        tensors = torch_weights.read(FIXTURES / file)
        assert tensors.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(tensors[name], values)
        assert {str(array.dtype) for array in tensors.values()} == {"float32", "int64"}
    np.testing.assert_array_equal(torch_weights.read(FIXTURES / "parameters.pth")["weight"], [0, 1, 2])


def _changed(path: Path, replace: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(FIXTURES / "archive.pth") as old, zipfile.ZipFile(path, "w", how) as new:
        for name in old.namelist():
            new.writestr(name, replace.get(name.partition("/")[2], old.read(name)))
    return path


@pytest.mark.parametrize(
    ("replace", "how", "said"),
    [
        ({"data.pkl": b"cos\nsystem\n(S'touch harm'\ntR."}, zipfile.ZIP_STORED, "no weights file needs"),
        ({"data.pkl": b"\x80\x02cos\nsystem\nq\x00."}, zipfile.ZIP_STORED, "only tensors are admitted"),
        ({"data/0": b"1234"}, zipfile.ZIP_STORED, "another size"),
        ({"byteorder": b"big"}, zipfile.ZIP_STORED, "highest byte"),
        ({}, zipfile.ZIP_DEFLATED, "compressed"),
    ],
)
def test_archives_that_are_damaged_or_ask_for_more_are_refused(replace, how, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"is not a PyTorch weights file \(.pth\): .*{said}"):
        torch_weights.read(_changed(tmp_path / "bad.pth", replace, how))
    assert not Path("harm").exists()


def test_a_safetensors_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a safetensors file that can be read"):
        torch_weights.read(tmp_path / "bad.safetensors")


def test_a_backbone_takes_its_weights_from_a_safetensors_file(kept, tmp_path):
    from safetensors.numpy import save_file

    tensors = _tensors(kept, "resnet18")
    save_file(tensors, tmp_path / "resnet18.safetensors")
    by_file = backbones.build("resnet18", 64, str(tmp_path / "resnet18.safetensors"))
    given = backbones.build("resnet18", 64, "none")
    torchvision.give(given, SPECS["resnet18"], tensors)
    for one, other in zip(by_file.get_weights(), given.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"does not hold the weights of resnet34: layer1\.2\.conv1 holds \[\] in it"):
        backbones.build("resnet34", 64, str(tmp_path / "resnet18.safetensors"))


def test_every_tensor_must_find_its_layer(kept):
    model, tensors = backbones.build("resnet18", 64, "none"), _tensors(kept, "resnet18")
    before = model.get_weights()
    for change, said in (
        ({"layer9.0.conv1.weight": np.zeros(3)}, r"1 arrays in it belong to no layer, layer9\.0\.conv1\.weight"),
        ({"conv1.weight": np.zeros((64, 3, 3, 3))}, r"conv1 holds \[\(3, 3, 3, 64\)\] in it, expected \[\(7, 7, 3, 64"),
    ):
        with pytest.raises(ValueError, match=said):
            torchvision.give(model, SPECS["resnet18"], tensors | change)
    assert all((one == two).all() for one, two in zip(before, model.get_weights(), strict=True))


def test_old_densenet_files_have_other_names(kept):
    tensors = _tensors(kept, "densenet161")
    old = {name.replace("norm1", "norm.1").replace("conv2", "conv.2"): array for name, array in tensors.items()}
    assert old.keys() != tensors.keys()
    model = backbones.build("densenet161", 32, "none")
    torchvision.give(model, SPECS["densenet161"], old)
    given = model.get_layer("block1_layer2_norm1").gamma
    np.testing.assert_array_equal(given, tensors["features.denseblock1.denselayer2.norm1.weight"])


def test_imagenet_weights_come_from_where_torch_or_keras_keeps_them(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    asked = []

    def get_file(name, origin, cache_subdir):
        asked.append(origin)
        path = tmp_path / "keras" / cache_subdir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not what was asked for")
        return str(path)

    monkeypatch.setattr(keras.utils, "get_file", get_file)
    with pytest.raises(FileNotFoundError, match="is damaged"):
        backbones.build("resnet18", 32)
    assert asked == ["https://download.pytorch.org/models/resnet18-f37072fd.pth"]
    assert not list((tmp_path / "keras" / "models").iterdir())  # nobody takes it for the weights later

    place = tmp_path / "torch" / "hub" / "checkpoints"
    place.mkdir(parents=True)
    (place / "resnet18-f37072fd.pth").write_bytes((FIXTURES / "archive.pth").read_bytes())
    with pytest.raises(ValueError, match="conv1 holds"):  # it is read there, and holds something else
        backbones.build("resnet18", 32)
    assert torchvision.FAMILY.here() == ["resnet18"]


# Training

THAWED = {"resnet18": "layer4", "resnext50_32x4d": "layer4", "vgg11_bn": "block5"}


@pytest.mark.parametrize("name", dear(THAWED, ["resnext50_32x4d"]))
def test_both_phases_train_what_was_said_and_the_frontier_is_the_model(name, tmp_path):
    model = classifier.build(name, 3, image_size=32, weights="none", dropout=0, levels="all", pool="mean_std")
    model.get_layer("head_scale").trainable = False
    pictures, labels = np.resize(images(64), (3, 32, 32, 3)).astype("float32"), np.eye(3)
    for what in ("none", THAWED[name]):
        unfreezing.unfreeze(model, what)
        cut = frontier.cut(model)
        before = {weight.path: np.array(weight) for weight in model.weights}
        suffix, below = fast_layers.faster(cut.suffix), cut.prefix(pictures)
        np.testing.assert_allclose(suffix(below), model(pictures), atol=1e-4)
        suffix.compile(loss="categorical_crossentropy", optimizer=keras.optimizers.SGD(1e-2))
        suffix.train_on_batch(below, labels)
        changed = {weight.path for weight in model.weights if (np.array(weight) != before[weight.path]).any()}
        trained = {weight.path for weight in model.trainable_weights}
        assert changed <= trained and len(changed) > 0.8 * len(trained)
        assert ({path.split("/")[0] for path in trained} == {"probabilities"}) == (what == "none")
        assert not any("norm" in path or "/bn" in path or "_bn" in path for path in trained)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_allclose(loaded(pictures), model(pictures), atol=1e-6)

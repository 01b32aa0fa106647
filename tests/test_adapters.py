"""Adapters: what they train, that they change nothing by themselves, and that nothing of them is left in the end."""

import keras
import numpy as np
import pytest

from helpers.compute import fast_layers, frontier, graphs
from helpers.models import adapters, classifier, unfreezing
from helpers.training import checks, saving

LORA = {"lora": 2}


def attentive() -> keras.Model:
    """A classifier of 32 px on a backbone of two blocks, each with attention, a norm and convolutions."""
    keras.utils.set_random_seed(1)
    image = keras.Input((32, 32, 3), name="image")
    x = keras.layers.Conv2D(16, 8, 8, name="stem_conv")(image)
    for block in ("block1", "block2"):
        tokens = keras.layers.Reshape((16, 16), name=f"{block}_tokens")(x)
        tokens = keras.layers.LayerNormalization(name=f"{block}_norm")(tokens)
        attention = keras.layers.MultiHeadAttention(2, 8, name=f"{block}_attention")
        tokens = keras.layers.Dense(16, "relu", name=f"{block}_dense")(attention(tokens, tokens))
        x = keras.layers.Reshape((4, 4, 16), name=f"{block}_map")(tokens)
        x = keras.layers.DepthwiseConv2D(3, padding="same", name=f"{block}_depthwise")(x)
        x = keras.layers.Conv2D(16, 1, name=f"{block}_conv")(x)
        x = keras.layers.BatchNormalization(name=f"{block}_bn")(x)
    body = keras.Model(image, x, name="backbone")
    outer = keras.Input((32, 32, 3))
    pooled = keras.layers.GlobalAveragePooling2D(name="head_pool")(body(outer, training=False))
    outputs = keras.layers.Dense(3, activation="softmax", dtype="float32", name="probabilities")(pooled)
    return keras.Model(outer, outputs, name="classifier")


def thawed(what="block2", adapter=LORA) -> keras.Model:
    model = attentive()
    unfreezing.unfreeze(model, what)
    adapters.add(model, adapter, seed=5)
    return model


def compiled(model: keras.Model) -> keras.Model:
    model.compile(keras.optimizers.Adam(0.05), "categorical_crossentropy", jit_compile=False)
    model.optimizer.build(model.trainable_variables)  # else TensorFlow traces the first step twice
    return model


def step(model: keras.Model, values=None) -> None:
    model.train_on_batch(images() if values is None else values, np.eye(3))


def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 4, (3, 32, 32, 3)).astype("float32")


def test_only_small_matrices_and_the_head_train_and_at_first_nothing_changes():
    plain, model = attentive(), thawed()
    table = adapters.add(thawed(), LORA)
    np.testing.assert_array_equal(model(images()), plain(images()))
    # attention: 16 -> 2 heads of 8, three times, and back; dense 16 -> 16; convolution 16 -> 16, of one pixel
    expected = 3 * (16 * 2 * 2 + 2 * 8) + (2 * 8 * 2 + 2 * 16) + 2 * (16 * 2 + 2 * 16)
    assert table.loc["backbone, thawed", "trainable"] == expected < table.loc["backbone, thawed", "weights"]
    assert table.loc["backbone, frozen", "trainable"] == 0 and table.loc["head", "trainable"] == 51
    before = {weight.path: np.array(weight) for weight in model.weights}
    compiled(model)
    for _ in range(2):  # A moves from the second step on, when B is no longer zero
        step(model)
    changed = {weight.path for weight in model.weights if (np.array(weight) != before[weight.path]).any()}
    assert changed == {weight.path for weight in model.trainable_weights}
    assert all("lora_kernel" in path or path.startswith("probabilities") for path in changed)


def test_what_is_not_thawed_gets_none_and_an_empty_adapter_does_nothing():
    model = thawed()
    below = [layer for layer in unfreezing.layers_of(unfreezing.backbone_of(model)) if layer.name.startswith("block1")]
    assert not any(getattr(part, "lora_enabled", False) for layer in below for part in unfreezing.parts_of(layer))
    plain = thawed(adapter={})
    unfreezing.unfreeze(other := attentive(), "block2")
    assert adapters.add(plain, {}).equals(unfreezing.trainable_table(other))


def test_merged_it_gives_the_same_and_has_the_layers_it_had(tmp_path):
    model, plain = compiled(thawed()), attentive()
    for _ in range(3):
        step(model)
    expected, frozen = np.array(model(images())), np.array(plain.get_layer("backbone").get_layer("block1_dense").kernel)
    adapters.merge(model)
    saving.save(model, tmp_path, images())
    np.testing.assert_allclose(model(images()), expected, atol=1e-6)
    assert np.abs(expected - plain(images())).max() > 0.01
    assert graphs.structure(model) == graphs.structure(plain) and model.count_params() == plain.count_params()
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_allclose(loaded(images()), expected, atol=1e-6)
    np.testing.assert_array_equal(loaded.get_layer("backbone").get_layer("block1_dense").kernel, frozen)
    assert unfreezing.trainable_table(model).equals(unfreezing.unfreeze(plain, "block2"))
    assert unfreezing.unfreeze(model, "all").equals(unfreezing.unfreeze(plain, "all"))


def test_a_model_whose_adapters_were_forgotten_is_not_kept_in_silence(tmp_path):
    model = compiled(thawed())
    for _ in range(3):
        step(model)
    with pytest.raises((ValueError, RuntimeError), match=r"could not be loaded|does not predict what was trained"):
        saving.save(model, tmp_path, images())


def test_a_graph_compiled_before_the_merge_gives_the_same_after_it():
    model = compiled(thawed())
    step(model)
    expected = model.predict(images(), verbose=0)
    adapters.merge(model)
    np.testing.assert_allclose(model.predict(images(), verbose=0), expected, atol=1e-6)


def test_the_merge_rounds_nothing_where_the_model_computes_in_half_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = thawed()
    finally:
        keras.config.set_dtype_policy("float32")
    layer = unfreezing.backbone_of(model).get_layer("block2_dense")
    layer.lora_kernel_b.assign(np.full((2, 16), 1e-3))
    expected = np.array(layer._kernel) + np.array(layer.lora_kernel_a) @ np.array(layer.lora_kernel_b)
    adapters.merge(model)
    np.testing.assert_allclose(layer.kernel, expected, rtol=1e-6)


def test_a_file_of_weights_holds_both_so_that_training_resumes_where_it_was(tmp_path):
    whole, first = compiled(thawed()), compiled(thawed())
    for model in (whole, whole, first):
        step(model)
    first.save_weights(tmp_path / "one.weights.h5")
    again = compiled(thawed(adapter=LORA))
    unfreezing.backbone_of(again).get_layer("block2_dense").lora_kernel_a.assign(np.ones((16, 2)))  # the file's counts
    again.load_weights(tmp_path / "one.weights.h5")
    step(again)
    for one, other in zip(whole.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_without_adapters_are_read_and_training_goes_on_from_them(tmp_path):
    plain, model = attentive(), compiled(thawed())
    plain.get_layer("probabilities").kernel.assign(np.ones((16, 3)))
    plain.save_weights(tmp_path / "plain.weights.h5")
    step(model)
    model.load_weights(tmp_path / "plain.weights.h5", skip_mismatch=False)
    np.testing.assert_array_equal(model(images()), plain(images()))
    before = np.array(model.trainable_weights[1])
    step(model)
    assert (np.array(model.trainable_weights[1]) != before).any()


def test_training_above_the_frontier_is_training_the_model():
    whole, cached = (compiled(thawed()) for _ in range(2))
    cut = frontier.cut(cached)
    suffix = compiled(fast_layers.faster(cut.suffix))
    assert cut.prefix.count_params() > 0 and not cut.prefix.trainable_variables
    below = np.array(cut.prefix(images()))
    for _ in range(2):
        step(whole)
        step(suffix, below)
    for one, other in zip(whole.get_weights(), cached.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["efficientnet_lite0", pytest.param("resnext50_32x4d", marks=pytest.mark.slow), "convnext_tiny"]
)
def test_convolutions_take_them_too(name):
    model = classifier.build(name, 3, image_size=32, weights="none", dropout=0)
    what = {"efficientnet_lite0": "block7", "resnext50_32x4d": "layer4", "convnext_tiny": "stage_3"}[name]
    full = unfreezing.unfreeze(model, what)["trainable"]["backbone, thawed"]
    few = adapters.add(model, {"lora": 4})["trainable"]["backbone, thawed"]
    assert 0 < few < full / 10
    values = np.random.default_rng(1).uniform(0, 255, (3, 32, 32, 3)).astype("float32")
    before = np.array(model(values))
    for part in unfreezing.parts_of(unfreezing.backbone_of(model)):
        if getattr(part, "lora_enabled", False):
            part.lora_kernel_b.assign(np.full(part.lora_kernel_b.shape, 1e-3))
    changed = np.array(unfreezing.backbone_of(model)(values))
    adapters.merge(model)
    merged = np.array(unfreezing.backbone_of(model)(values))
    np.testing.assert_allclose(merged, changed, atol=1e-4 * np.abs(changed).max())
    assert before.shape == (3, 3) and np.abs(merged).max() > 0


@pytest.mark.parametrize(
    ("adapter", "what", "said"),
    [
        ({"lorra": 8}, "block2", "adapter has no 'lorra'. Did you mean lora"),
        ({"lora": 0}, "block2", "the rank, must be a whole number from 1"),
        ({"lora": True}, "block2", "the rank, must be a whole number from 1"),
        ({"lora": 64}, "block2", "no layer of the thawed part takes {'lora': 64}"),
        (LORA, "none", "no layer of the thawed part takes"),
    ],
)
def test_an_adapter_that_cannot_be_is_told_before_a_run(adapter, what, said):
    with pytest.raises(ValueError, match=said):
        thawed(what, adapter)


def test_a_recipe_is_checked_for_layers_that_take_the_adapter(monkeypatch):
    monkeypatch.setattr(checks.backbones, "build", lambda *_: unfreezing.backbone_of(attentive()))
    choices = {"head.next_unfreeze": "none", "fine_tune.unfreeze": "block2"}
    assert checks.check_layers("x", 32, choices, adapter=LORA) == []
    (problem,) = checks.check_layers("x", 32, choices, adapter={"lora": 99})
    assert problem.startswith("fine_tune.unfreeze: adapter: no layer of the thawed part")


# The notebook


class Stop(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise KeyboardInterrupt


@pytest.mark.parametrize("views", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_04_trains_with_adapters_resumes_exactly_and_leaves_none(views, by_hand, small_backbone, resized, tmp_path):
    at = {"images": str(resized), "out": str(tmp_path / "head")}
    how = {"views": views, "batch_size": 8}
    by_hand("head", **at, **how, epochs=1, next_unfreeze="block3")
    steps = [{"unfreeze": "block3", "epochs": 1}, {"unfreeze": "block2", "epochs": 3}]
    at = {"images": str(resized), "head": str(tmp_path / "head")}
    how |= {"adapter": {"lora": 2}, "steps": steps, "learning_rate": 1e-2}
    left = by_hand("fine_tune", **at, **how, out=str(tmp_path / "whole"))
    assert left["trains"].loc["backbone, thawed", "trainable"] == 2 * (3 * 3 * 8 * 2 + 2 * 8)
    with pytest.raises(KeyboardInterrupt):
        stop = {"04-12": lambda left: left["callbacks"].append(Stop())}
        by_hand("fine_tune", **at, **how, out=str(tmp_path / "cut"), before=stop)
    by_hand("fine_tune", **at, **how, out=str(tmp_path / "cut"))
    whole, cut = (keras.models.load_model(tmp_path / name / "model.keras") for name in ("whole", "cut"))
    plain = keras.models.load_model(tmp_path / "head" / "model.keras")
    for one, other, first in zip(whole.weights, cut.weights, plain.weights, strict=True):
        np.testing.assert_array_equal(one, other)
        trained = any(name in one.path for name in ("block2_conv/kernel", "block3_conv/kernel", "probabilities"))
        assert trained == (np.array(one) != np.array(first)).any()
    histories = [saving.read_history(tmp_path / name) for name in ("whole", "cut")]
    assert histories[0]["val_loss"].equals(histories[1]["val_loss"]) and len(histories[0]) == 4

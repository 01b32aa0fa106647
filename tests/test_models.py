"""Classifiers and thawing: the head, exactly which weights train, BatchNormalization, saving."""

import functools
import gc

import keras
import numpy as np
import pytest

from helpers.models import backbones, classifier, unfreezing


@pytest.fixture(autouse=True)
def _forget_models():
    yield
    gc.collect()


@pytest.fixture
def small():
    """A quick classifier: MobileNetV3-Small, random weights, 32 px, three classes."""
    keras.utils.set_random_seed(0)
    return classifier.build("mobilenet_v3_small", 3, image_size=32, weights="none")


@pytest.fixture(scope="module")
def untouched():
    return classifier.build("mobilenet_v3_small", 3, image_size=32, weights="none")


def _images(n, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def _trained_weights(model):
    return sum(int(np.prod(w.shape)) for w in model.trainable_weights)


def _statistics(model):
    """Moving means and variances by path."""
    return {w.path: np.array(w) for w in model.variables if "/moving_" in w.path}


# The classifier


def test_layers_of_the_plain_head(small):
    assert [layer.name for layer in small.layers] == ["image", "backbone", "head_pool", "head_dropout", "probabilities"]
    assert small.get_layer("head_dropout").rate == 0.2
    assert [w.path.split("/")[-2] for w in small.trainable_weights] == ["probabilities", "probabilities"]


def test_probabilities_for_bytes_and_floats(small):
    images = _images(4)
    from_bytes, from_floats = small.predict(images, verbose=0), small.predict(images.astype("float32"), verbose=0)
    np.testing.assert_array_equal(from_bytes, from_floats)
    assert from_bytes.dtype == np.float32
    np.testing.assert_allclose(from_bytes.sum(axis=1), 1, atol=1e-6)


def test_height_and_width_may_differ():
    model = classifier.build("mobilenet_v3_small", 2, image_size=(32, 64), weights="none")
    assert model.input_shape == (None, 32, 64, 3)


def test_head_of_stanford_cars():
    """S4: GAP, Dropout, BatchNorm, [Dense 1024, Dropout, BatchNorm], [Dense 516, Dropout, BatchNorm], softmax."""
    dense = [{"units": units, "dropout": 0.5, "batch_norm": True} for units in (1024, 516)]
    output = classifier.output_settings({"batch_norm": True, "l2": 1e-3})
    model = classifier.build("resnet50", 196, image_size=32, weights="none", dropout=0.3, dense=dense, **output)
    head = [type(layer).__name__ for layer in model.layers[2:]]
    block = ["Dense", "Dropout", "BatchNormalization"]
    assert head == ["GlobalAveragePooling2D", "Dropout", "BatchNormalization", *block, *block, "Dense"]
    assert [model.get_layer(f"head_dense_{i}").units for i in (1, 2)] == [1024, 516]
    assert model.get_layer("head_dense_1").activation is keras.activations.relu
    assert float(model.get_layer("probabilities").kernel_regularizer.l2) == pytest.approx(1e-3)
    dense_weights = 2048 * 1024 + 1024 + 1024 * 516 + 516 + 516 * 196 + 196
    assert _trained_weights(model) == dense_weights + 2 * (2048 + 1024 + 516)


def test_dense_layers_as_numbers_and_without_dropout():
    model = classifier.build("mobilenet_v3_small", 2, image_size=32, weights="none", dropout=0, dense=[16, 8])
    assert [layer.name for layer in model.layers[2:]] == ["head_pool", "head_dense_1", "head_dense_2", "probabilities"]


def test_mixed_precision_keeps_float32_probabilities():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = classifier.build("mobilenet_v3_small", 2, image_size=32, weights="none")
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("backbone").output.dtype == "bfloat16"
    assert model(_images(1)).dtype == "float32"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_classes": 1}, "n_classes must be a whole number from 2"),
        ({"dropout": 1.0}, r"dropout must be a share in \[0, 1\); got 1.0"),
        ({"dense": [0]}, "units of a dense layer must be a whole number from 1"),
        ({"dense": [{"activation": "relu"}]}, "units of a dense layer .* got None"),
        ({"dense": [{"units": 8, "droput": 0.5}]}, r"no \['droput'\]; it takes units, activation, dropout"),
        ({"dense": [{"units": 8, "activation": "rellu"}]}, "activation must be one of Keras, such as relu; got"),
        ({"dense": [{"units": 8, "l2": "1"}]}, "l2 of a dense layer must be a number of at least 0; got '1'"),
        ({"backbone": "mobilenetv3_small"}, "Did you mean mobilenet_v3_small"),
    ],
)
def test_wrong_heads(wrong, message):
    values = {"backbone": "mobilenet_v3_small", "n_classes": 2, "image_size": 32, "weights": "none"} | wrong
    with pytest.raises(ValueError, match=message):
        classifier.build(values.pop("backbone"), values.pop("n_classes"), **values)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"batchnorm": True}, "output has no 'batchnorm'. Did you mean batch_norm"),
        ({"l1": -1.0}, "l1 of output must be a number of at least 0; got -1.0"),
        ({"batch_norm": 1}, "batch_norm of output must be true or false; got 1"),
    ],
)
def test_wrong_outputs(output, message):
    with pytest.raises(ValueError, match=message):
        classifier.output_settings(output)


# Which weights train, counted from the papers' layer tables


def _conv(kernel, inputs, outputs, bias=False):
    return kernel * kernel * inputs * outputs + bias * outputs


def _separable(inputs, outputs):
    return 9 * inputs + inputs * outputs


def _inverted_bottleneck(kernel, inputs, outputs, squeeze):
    """Expansion by 6, one filter per channel, squeeze-and-excite to a quarter of the inputs, projection."""
    wide, narrow = 6 * inputs, inputs // 4
    excite = _conv(1, wide, narrow, bias=True) + _conv(1, narrow, wide, bias=True) if squeeze else 0
    return _conv(1, inputs, wide) + kernel * kernel * wide + excite + _conv(1, wide, outputs)


def _resnet_block(inputs, width, shortcut):
    main = _conv(1, inputs, width, True) + _conv(3, width, width, True) + _conv(1, width, 4 * width, True)
    return main + (_conv(1, inputs, 4 * width, True) if shortcut else 0)


@functools.cache
def _backbone(name):
    return backbones.build(name, 75, "none")


XCEPTION_14 = _separable(1024, 1536) + _separable(1536, 2048)
XCEPTION_13 = _separable(728, 728) + _separable(728, 1024) + _conv(1, 728, 1024)
RESNET_CONV5 = _resnet_block(1024, 512, True) + 2 * _resnet_block(2048, 512, False)
B0_BLOCK7 = _inverted_bottleneck(3, 192, 320, squeeze=True)
B5_BLOCK7 = _inverted_bottleneck(3, 304, 512, squeeze=True) + 2 * _inverted_bottleneck(3, 512, 512, squeeze=True)


@pytest.mark.parametrize(
    ("backbone", "what", "expected"),
    [
        ("efficientnet_lite0", "block7", _inverted_bottleneck(3, 192, 320, squeeze=False) + 320 * 1280),
        ("efficientnet_b0", "block7", B0_BLOCK7 + 320 * 1280),
        ("efficientnet_b0", "block7a_project_conv", 1152 * 320 + 320 * 1280),
        ("efficientnet_b0", "top_conv", 320 * 1280),
        ("efficientnet_b5", "block7", B5_BLOCK7 + 512 * 2048),
        ("efficientnet_b5", "block7a", B5_BLOCK7 + 512 * 2048),
        ("efficientnet_b5", "block7c", _inverted_bottleneck(3, 512, 512, squeeze=True) + 512 * 2048),
        ("resnet50", "conv5", RESNET_CONV5),
        ("resnet50", "conv5_block3", _resnet_block(2048, 512, False)),
        ("resnet50", "conv5_block2_out", _resnet_block(2048, 512, False)),
        ("xception", "block14", XCEPTION_14),
        ("xception", "block14_sepconv2", _separable(1536, 2048)),
        ("xception", "block13", XCEPTION_13 + XCEPTION_14),
        ("convnext_tiny", "stage_3", 3 * (50 * 768 + 2 * 768 + (768 + 1) * 3072 + (3072 + 1) * 768 + 768) + 2 * 768),
    ],
)
def test_block_names_thaw_exactly_these_weights(backbone, what, expected):
    model = _backbone(backbone)
    table = unfreezing.unfreeze(model, what)
    assert _trained_weights(model) == expected
    assert table.loc["backbone, thawed", "trainable"] == expected
    assert table["weights"].sum() == model.count_params()


def test_names_of_the_trained_weights_in_resnet50():
    model = _backbone("resnet50")
    unfreezing.unfreeze(model, "conv5_block3")
    convolutions = [f"conv5_block3_{i}_conv" for i in (1, 2, 3)]
    assert {w.path for w in model.trainable_weights} == {
        f"{c}/{part}" for c in convolutions for part in ("kernel", "bias")
    }


def test_block1_is_not_block10():
    body = _backbone("xception")
    found = [body.layers[unfreezing.first_trainable(body, name)].name for name in ("block1", "block10", "block2")]
    assert found == ["block1_conv1", "block10_sepconv1_act", "block2_sepconv1"]


def test_from_index_counts_as_keras_applications_does():
    """S4 keeps the layers of keras.applications.ResNet50 before index 19 frozen; ours begin with preprocessing."""
    bare = keras.applications.ResNet50(include_top=False, weights=None, input_shape=(32, 32, 3))
    model = _backbone("resnet50")
    assert unfreezing.unfreeze(model, {"from_index": 19}).loc["backbone, thawed", "from"] == bare.layers[19].name
    for layer in bare.layers:
        layer.trainable = bare.layers.index(layer) >= 19 and not isinstance(layer, keras.layers.BatchNormalization)
    assert _trained_weights(model) == _trained_weights(bare)


def test_none_and_all(small):
    head = _trained_weights(small)
    body = small.get_layer("backbone")
    table = unfreezing.unfreeze(small, "all")
    norms = [layer for layer in body.layers if isinstance(layer, keras.layers.BatchNormalization)]
    in_norms = sum(layer.count_params() for layer in norms)
    assert _trained_weights(small) == head + body.count_params() - in_norms
    assert not any(layer.trainable for layer in norms)
    assert table.loc["head", "trainable"] == head
    table = unfreezing.unfreeze(small, "none")
    assert _trained_weights(small) == head
    assert "backbone, thawed" not in table.index


def test_one_layer_and_the_whole_share_differ():
    model = backbones.build("vgg16", 32, "none")
    assert unfreezing.unfreeze(model, 2).loc["backbone, thawed", "from"] == "block5_conv3"
    assert _trained_weights(model) == _conv(3, 512, 512, True)
    unfreezing.unfreeze(model, 1.0)
    assert _trained_weights(model) == model.count_params()


@pytest.mark.parametrize("share", [0.05, 0.4, 0.75])
def test_a_share_is_the_shortest_tail_that_holds_it(share):
    model = _backbone("efficientnet_b0")
    table = unfreezing.unfreeze(model, share)
    weights = table.loc["backbone, thawed", "weights"]
    first = model.get_layer(table.loc["backbone, thawed", "from"])
    assert weights >= share * model.count_params() > weights - first.count_params()


def test_thawing_again_forgets_the_earlier_choice(small):
    unfreezing.unfreeze(small, "all")
    unfreezing.unfreeze(small, "conv_1")
    wide = small.get_layer("backbone").output_shape[-1]
    assert _trained_weights(small) == 96 * wide + wide * 3 + 3


def test_batch_normalization_inside_a_composite_layer_stays_frozen():
    inputs = keras.Input((32, 32, 3))
    inner = keras.Sequential([keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization()], name="block1")
    model = keras.Model(inputs, inner(inputs), name="backbone")
    unfreezing.unfreeze(model, "block1")
    assert _trained_weights(model) == 3 * 3 * 3 * 4 + 4


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("conv_11", r"no block or layer 'conv_11'.* Did you mean .*conv_1\b.* Its blocks: .*expanded_conv_10"),
        ("", "no block or layer ''"),
        ("expande", "no block or layer 'expande'. Did you mean"),
        (0, "a number of layers, must be a whole number from 1 to"),
        (-3, "must be a whole number from 1 to"),
        (10_000, "must be a whole number from 1 to"),
        (0.0, "a fraction in"),
        (1.5, "a fraction in"),
        (float("nan"), "a fraction in"),
        (True, "unfreeze takes"),
        (None, "unfreeze takes"),
        ({"from_index": 10_000}, "from_index must be a whole number from 0 to"),
        ({"from_index": "19"}, "from_index must be a whole number"),
        ({"index": 19}, "unfreeze takes"),
        (1, "no weight would train"),
    ],
)
def test_wrong_choices_leave_the_model_as_it_was(untouched, what, message):
    before = [w.path for w in untouched.trainable_weights]
    with pytest.raises(ValueError, match=message):
        unfreezing.unfreeze(untouched, what)
    assert [w.path for w in untouched.trainable_weights] == before


def test_a_model_without_backbone():
    plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match='has no sub-model named "backbone"'):
        unfreezing.unfreeze(plain, "all")


# Training and saving


def _phase_2(model, what):
    unfreezing.unfreeze(model, what)
    model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)  # else TensorFlow traces the first step twice
    model.fit(_images(16), np.arange(16) % 3, batch_size=8, epochs=2, verbose=0)


def test_a_real_phase_2_moves_what_it_should_and_no_statistics():
    keras.utils.set_random_seed(0)
    model = classifier.build("resnet50", 3, image_size=32, weights="none", batch_norm=True)
    _phase_2(model, "none")
    body = model.get_layer("backbone")
    statistics, head_statistics = _statistics(body), _statistics(model.get_layer("head_norm"))
    weights = {w.path: np.array(w) for w in body.weights}
    _phase_2(model, "conv5")
    assert len(statistics) == 2 * 53
    for path, values in _statistics(body).items():
        np.testing.assert_array_equal(values, statistics[path], err_msg=path)
    changed = {w.path for w in body.weights if not np.array_equal(w, weights[w.path])}
    assert changed <= {w.path for w in body.trainable_weights}
    assert {path for path in changed if path.endswith("kernel")} == {
        w.path for w in body.trainable_weights if w.path.endswith("kernel")
    }
    for path, values in _statistics(model.get_layer("head_norm")).items():
        assert not np.array_equal(values, head_statistics[path])  # the head's own statistics do follow the data


def test_saved_models_predict_the_same_and_remember_what_trains(small, tmp_path):
    _phase_2(small, "expanded_conv_9")
    small.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(_images(4), verbose=0), small.predict(_images(4), verbose=0))
    assert unfreezing.trainable_table(loaded).equals(unfreezing.trainable_table(small))
    for what in ("all", 0.3, "none"):
        assert unfreezing.unfreeze(loaded, what).equals(unfreezing.unfreeze(small, what))

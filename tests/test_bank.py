"""The bank: the same activations however it was made, within its bounds, and the same draws for the same seed."""

import dataclasses
from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf

from helpers.compute import bank, inference
from helpers.core import disk
from helpers.training import transforms

COUNT = 70  # two whole groups and a smaller one


def model(seed: int = 1) -> keras.Model:
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(4, 3, strides=2), keras.layers.ReLU()]
    return keras.Sequential([keras.Input((8, 8, 3)), *layers])


def images(count: int = COUNT) -> bank.Images:
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (COUNT, 8, 8, 3), dtype="uint8")[:count]
    return bank.Images(pixels, [f"image {i}" for i in range(count)], np.arange(count, dtype="int32") % 3)


AUGMENTATION = transforms.make("default", flip="both")


def make(folder, **changes) -> bank.Bank:
    given = {"prefix": model(), "images": images(), "views": 3, "augment": AUGMENTATION, "seed": 5} | changes
    return bank.make(given.pop("prefix"), given.pop("images"), folder, **given)


def held(data) -> list[np.ndarray]:
    return [batch[0].numpy() for batch in data]


def test_view_0_is_the_plain_image_and_the_others_are_not(tmp_path):
    made = make(tmp_path)
    plain = keras.ops.convert_to_numpy(model()(images().pixels))
    assert made.activations.shape == (3, COUNT, 3, 3, 4)
    assert made.activations.dtype == np.float16
    np.testing.assert_allclose(made.activations[0], plain, atol=1e-3)
    for view in (1, 2):
        assert np.abs(made.activations[view] - made.activations[0]).max((1, 2, 3)).min() > 0
    assert np.abs(made.activations[1] - made.activations[2]).max() > 0.1


def test_several_groups_at_a_time_give_what_one_gives(tmp_path, monkeypatch):
    one = make(tmp_path / "one")
    monkeypatch.setattr(inference, "quickest_batch", lambda run, images: 4 * len(images))
    several = make(tmp_path / "several")
    np.testing.assert_allclose(several.activations, one.activations, atol=1e-3)


def test_a_dataset_of_any_batch_size_gives_what_an_array_gives(tmp_path):
    stream = dataclasses.replace(images(), pixels=tf.data.Dataset.from_tensor_slices(images().pixels).batch(11))
    one, other = make(tmp_path / "array"), make(tmp_path / "dataset", images=stream)
    np.testing.assert_array_equal(one.activations, other.activations)


def test_training_images_may_be_rounded_and_validation_images_are_not(tmp_path):
    train, val = (images(count) for count in (COUNT, 40))
    exact, rounded = (
        bank.fill(model(), train, val, tmp_path / str(flag), views=2, augment=AUGMENTATION, rounded=flag)
        for flag in (False, True)
    )
    np.testing.assert_array_equal(rounded[1].activations, exact[1].activations)
    off = np.abs(rounded[0].activations.astype("float32") - exact[0].activations).max()
    assert 1e-3 < off < 0.02 * np.abs(exact[0].activations).max()


def test_the_same_seed_gives_the_same_views(tmp_path):
    first, again, other = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", seed=6)
    np.testing.assert_array_equal(first.activations, again.activations)
    np.testing.assert_array_equal(first.activations[0], other.activations[0])
    assert np.abs(first.activations[1] - other.activations[1]).max() > 0.1


@pytest.mark.parametrize("killed_at", [1, 4, 8])
def test_an_interrupted_bank_goes_on_where_it_was(tmp_path, monkeypatch, killed_at):
    monkeypatch.setattr(bank, "SECONDS_BETWEEN_MARKS", -1)
    whole = make(tmp_path / "undisturbed")
    calls = Counter()
    real = inference.fast

    def fast(prefix, limit):
        predict = real(prefix)

        def counted(batch):
            calls[limit] += 1
            if calls[limit] == limit:
                raise KeyboardInterrupt
            return predict(batch)

        return counted

    monkeypatch.setattr(inference, "fast", lambda prefix, **how: fast(prefix, killed_at))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed")
    monkeypatch.setattr(inference, "fast", lambda prefix, **how: fast(prefix, 99))
    resumed = make(tmp_path / "killed")
    np.testing.assert_array_equal(resumed.activations, whole.activations)
    finished_groups = (killed_at - 1) // 3
    assert calls[99] == 9 - 3 * finished_groups


def test_a_bank_is_found_again_whatever_the_layers_are_called(tmp_path, monkeypatch, capsys):
    first = make(tmp_path)
    monkeypatch.setattr(inference, "fast", lambda prefix, **how: pytest.fail("computed again"))
    assert make(tmp_path).folder == first.folder  # model() makes new layers, with other automatic names
    assert make(tmp_path, augment=transforms.make("default", flip="both")).folder == first.folder
    assert "are there already" in capsys.readouterr().out


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The folder of the bank that is changed in one thing after the other."""
    return make(tmp_path_factory.mktemp("usual")).folder


@pytest.mark.parametrize(
    "change",
    [
        {"prefix": model(seed=2)},
        {"prefix": keras.Sequential([keras.Input((8, 8, 3)), *model().layers, keras.layers.ReLU()])},
        {"images": dataclasses.replace(images(), keys=[f"other {i}" for i in range(COUNT)])},
        {"views": 2},
        {"seed": 6},
        {"augment": transforms.make("default", flip="dihedral")},
        {"augment": transforms.make([*transforms.DEFAULT[:2], {"RandomContrast": {"factor": 0.2}}], flip="both")},
        {"dtype": "float32"},
        {"rounded": True},
    ],
    ids=["weights", "architecture", "images", "views", "seed", "flip", "layer", "dtype", "rounded"],
)
def test_another_bank_is_made_when_anything_that_matters_changes(tmp_path, usual, change):
    assert make(tmp_path, **change).folder.name != usual.name


def test_labels_and_trainable_flags_do_not_matter(tmp_path):
    frozen = model()
    frozen.trainable = False
    relabelled = dataclasses.replace(images(), labels=np.zeros(COUNT, "int32"))
    again = make(tmp_path, prefix=frozen, images=relabelled)
    assert again.folder == make(tmp_path).folder
    assert not again.labels.any()


def test_float32_where_float16_would_clip(tmp_path, capsys):
    large = keras.Sequential([model(), keras.layers.Rescaling(1e6)])
    train, val = bank.fill(large, images(), images(20), tmp_path, views=2, augment=AUGMENTATION)
    assert train.activations.dtype == val.activations.dtype == np.float32
    assert "float16 cannot hold the activations of the validation images" in capsys.readouterr().out
    np.testing.assert_allclose(train.activations[0], keras.ops.convert_to_numpy(large(images().pixels)), rtol=1e-3)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    broken = keras.Sequential([model(), keras.layers.Rescaling(np.nan)])
    with pytest.raises(ValueError, match=r"no finite number for one of .*image 0"):
        make(tmp_path, prefix=broken)


def test_the_bound_takes_views_away_and_then_the_cache(tmp_path, capsys):
    one_view = COUNT * 3 * 3 * 4 * 2 / 1e9
    val = images(20)
    val_size = one_view * 20 / COUNT

    def fill(cache_gb, **changes):
        given = {"views": 8, "augment": AUGMENTATION} | changes
        return bank.fill(model(), images(), val, tmp_path, cache_gb=cache_gb, **given)

    assert fill(val_size + 8.01 * one_view)[0].views == 8
    capsys.readouterr()
    assert fill(val_size + 3.5 * one_view)[0].views == 3
    assert "3 views are kept" in capsys.readouterr().out
    assert fill(val_size + 1.5 * one_view) is None
    assert "nothing is cached" in capsys.readouterr().out
    assert fill(val_size + 1.5 * one_view, augment=None)[0].views == 1


def test_an_epoch_holds_every_image_once_and_the_epochs_hold_every_view(tmp_path):
    made = make(tmp_path)
    rows = [bank.draw(made, seed=1, epoch=epoch) for epoch in range(3)]
    for drawn in rows:
        assert sorted(drawn % COUNT) == list(range(COUNT))
        assert len(set(drawn // COUNT)) == 3
    assert sorted(np.concatenate(rows)) == list(range(3 * COUNT))
    assert not np.array_equal(rows[0] % COUNT, rows[1] % COUNT)
    np.testing.assert_array_equal(rows[1], bank.draw(made, seed=1, epoch=1))


@pytest.mark.parametrize("memory", [0, 1 << 40], ids=["from disk", "from memory"])
def test_batches_hold_what_was_drawn(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(bank, "free_memory", lambda: memory)
    made = make(tmp_path)
    data, clock = made.batches(32, seed=1, weights=np.arange(COUNT))
    clock.on_epoch_begin(4)
    parts = list(data.as_numpy_iterator())
    assert [len(part[0]) for part in parts] == [32, 32, 6] and len(data) == 3
    values, labels, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    rows = bank.draw(made, seed=1, epoch=4)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, made.activations.reshape(-1, 3, 3, 4)[rows])
    np.testing.assert_array_equal(labels, made.labels[rows % COUNT])
    np.testing.assert_array_equal(weights, rows % COUNT)


def test_validation_is_plain_and_in_order(tmp_path):
    made = make(tmp_path)
    values, labels = (np.concatenate(part) for part in zip(*made.in_order(32).as_numpy_iterator(), strict=True))
    np.testing.assert_array_equal(values, made.activations[0])
    np.testing.assert_array_equal(labels, made.labels)


def test_nothing_tunes_the_data_while_they_are_read(tmp_path):
    """tf.data's tuner is a thread that takes up to half a second to end, which would stop every few epochs."""
    made = make(tmp_path)
    for data in (made.in_order(32), made.batches(32, seed=1)[0]):
        assert data.options().autotune.enabled is False


def test_balanced_draws_follow_the_probabilities(tmp_path):
    made = make(tmp_path)
    probabilities = np.zeros(COUNT)
    probabilities[[4, 9]] = 0.75, 0.25
    rows = np.concatenate([bank.draw(made, 1, epoch, probabilities) for epoch in range(20)])
    assert set(rows % COUNT) == {4, 9}
    assert 0.7 < np.mean(rows % COUNT == 4) < 0.8
    assert set(rows // COUNT) == {0, 1, 2}


def test_probabilities_of_the_wrong_length_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`probabilities` must have one value for each of 70 images"):
        make(tmp_path).batches(32, seed=1, probabilities=np.ones(3) / 3)


def test_a_resumed_training_sees_what_an_undisturbed_one_sees(tmp_path):
    def train(until: int, initial_epoch: int = 0, weights: list | None = None) -> list[np.ndarray]:
        keras.utils.set_random_seed(0)
        made = make(tmp_path)
        suffix = keras.Sequential([keras.Input((3, 3, 4)), keras.layers.Flatten(), keras.layers.Dense(3)])
        if weights:
            suffix.set_weights(weights)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        suffix.compile(keras.optimizers.SGD(0.1), loss, jit_compile=False)
        data, clock = made.batches(16, seed=2)
        suffix.fit(data, epochs=until, initial_epoch=initial_epoch, callbacks=[clock], shuffle=False, verbose=0)
        return suffix.get_weights()

    half = train(2)
    for one, other in zip(train(4), train(4, initial_epoch=2, weights=half), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_mixed_images_bring_mixed_labels(tmp_path):
    shares = np.eye(3, dtype="float32")[images().labels]
    mixing = transforms.make("none", mix="mixup")
    made = make(tmp_path, images=dataclasses.replace(images(), labels=shares), augment=mixing, views=2)
    assert made.labels.shape == (2, COUNT, 3)
    np.testing.assert_array_equal(made.labels[0], shares)
    np.testing.assert_allclose(made.labels.sum(-1), 1, atol=1e-5)
    assert ((made.labels[1] > 0.05) & (made.labels[1] < 0.95)).any()
    _, labels = next(iter(made.batches(8, seed=1)[0]))
    rows = bank.draw(made, 1, 0)[:8]
    np.testing.assert_array_equal(labels, made.labels.reshape(-1, 3)[rows])


def test_mixing_needs_shares_as_labels(tmp_path):
    with pytest.raises(ValueError, match="one-hot; got shape"):
        make(tmp_path, augment=transforms.make("none", mix="cutmix"))


@pytest.mark.parametrize("count", [COUNT - 1, 64, COUNT + 1, 200])
def test_images_and_keys_must_be_as_many(tmp_path, count):
    pixels = np.zeros((count, 8, 8, 3), "uint8")
    with pytest.raises(ValueError, match="for each of 70 keys"):
        make(tmp_path, images=dataclasses.replace(images(), pixels=pixels))


def test_images_without_a_label_are_refused():
    with pytest.raises(ValueError, match="2 keys and 1 labels"):
        bank.Images(np.zeros((2, 8, 8, 3), "uint8"), ["a", "b"], np.zeros(1))


def test_activations_of_no_fixed_shape_are_refused(tmp_path):
    anysize = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(4, 3)])
    with pytest.raises(ValueError, match="of one shape"):
        bank.fill(anysize, images(), images(), tmp_path, views=1)


def test_a_finished_bank_is_marked_done(tmp_path):
    made = make(tmp_path)
    assert disk.read_json(made.folder / "bank.json")["done"] == COUNT

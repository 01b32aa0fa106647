"""What to check before a user trusts a model, each against theory, a planted fault or a computation by hand."""

import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.special import softmax
from sklearn import metrics as sklearn_metrics

from helpers.core import promise as asked_for
from helpers.evaluation import details, subgroups, tables
from helpers.evaluation.trust import calibration, cheats, distances, explanation, novelty, promises
from helpers.models import classifier


def honest(n, classes=3, seed=0, sharpness=2.0):
    """Labels drawn from probabilities, which are therefore calibrated."""
    rng = np.random.default_rng(seed)
    probabilities = softmax(sharpness * rng.normal(size=(n, classes)), axis=1)
    labels = (probabilities.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1).clip(0, classes - 1)
    return probabilities, labels


def table_of(probabilities, labels):
    names = [f"c{number}" for number in range(probabilities.shape[1])]
    return tables.predictions_table(
        [f"{number}.png" for number in range(len(labels))], labels, probabilities, names
    ), names


# Calibration


def test_the_temperature_that_was_hidden_is_found_and_mends_the_error():
    true, labels = honest(4000)
    too_sure = softmax(2.5 * np.log(true), axis=1)
    found = calibration.fit("temperature", too_sure, labels)
    assert 1 / found.scale[0] == pytest.approx(2.5, rel=0.06)
    before, after = (
        calibration.error(*table_of(p, labels), n_bootstrap=50)["value"] for p in (too_sure, found(too_sure))
    )
    assert before > 0.1 and after < 0.02
    assert (found(too_sure).argmax(axis=1) == too_sure.argmax(axis=1)).all()
    assert "less sure" in str(found)


def test_vector_scaling_mends_a_class_that_is_always_shifted():
    true, labels = honest(4000)
    shifted = softmax(np.log(true) + np.array([1.0, 0.0, 0.0]), axis=1)
    found = calibration.fit("vector", shifted, labels)
    loss = {
        name: sklearn_metrics.log_loss(labels, p) for name, p in {"shifted": shifted, "found": found(shifted)}.items()
    }
    assert loss["found"] < loss["shifted"] - 0.05
    verdicts = calibration.by_class(*table_of(shifted, labels)).set_index("label")["verdict"]
    assert verdicts["c0"] == "too sure"


def test_the_calibration_within_the_model_is_the_one_that_was_fitted(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(inputs))
    x = np.random.default_rng(0).normal(size=(50, 4)).astype("float32") * 3
    given = model.predict(x, verbose=0)
    for method in ("temperature", "vector"):
        found = calibration.fit(method, given, np.arange(50) % 3)
        calibration.within(model, found).save(tmp_path / "m.keras")
        kept = keras.models.load_model(tmp_path / "m.keras").predict(x, verbose=0)
        np.testing.assert_allclose(kept, found(given), atol=2e-6)
    none = calibration.fit("none", given, np.arange(50) % 3)
    assert calibration.within(model, none) is model and none(given) is given


def test_calibration_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="choose one of none, temperature, vector"):
        calibration.fit("platt", np.ones((2, 2)) / 2, np.zeros(2, int))
    with pytest.raises(ValueError, match="expected one for each"):
        calibration.fit("temperature", np.ones((2, 2)) / 2, np.zeros(3, int))


# Promises


@pytest.mark.parametrize("by", ["all", "class"])
def test_a_promised_precision_holds_in_at_least_95_of_100_draws(by):
    held = 0
    for seed in range(100):
        probabilities, labels = honest(900, classes=2, seed=seed, sharpness=1.5)
        kept = promises.make({"precision": 0.9, "by": by}, probabilities[:300], labels[:300])
        many, truth = honest(20_000, classes=2, seed=1000 + seed, sharpness=1.5)  # what is true of all images
        answered = promises.answered(kept, many)
        correct = many.argmax(axis=1) == truth
        per_class = [answered & (many.argmax(axis=1) == index) for index in (0, 1)] if by == "class" else [answered]
        held += np.mean([not own.any() or correct[own].mean() >= 0.9 for own in per_class])
    assert held >= 95


def test_a_promise_answers_many_images_where_it_can():
    probabilities, labels = honest(2000, classes=2, sharpness=4.0)
    outcome = promises.outcome(promises.make({"risk": 0.05}, probabilities, labels), *table_of(probabilities, labels))
    assert outcome["answered"] > 0.5 and outcome["value"] >= 0.95
    assert "of the images are answered" in outcome["sentence"]


def test_noise_among_the_surest_images_does_not_end_the_search():
    probabilities, labels = honest(2000, classes=2, sharpness=6.0)
    surest = np.argsort(-probabilities.max(axis=1))[:40]
    labels[surest[::10]] = 1 - probabilities.argmax(axis=1)[surest[::10]]  # four wrong labels
    kept = promises.make({"precision": 0.95}, probabilities, labels)
    assert promises.answered(kept, probabilities).mean() > 0.3


def test_a_class_of_which_nothing_can_be_promised_is_never_answered():
    probabilities, labels = honest(2000, classes=2, sharpness=4.0)
    picked = probabilities.argmax(axis=1)
    labels = np.where(picked == 1, np.arange(2000) % 2, labels)  # class 1 is predicted at random
    kept = promises.make({"precision": 0.95, "by": "class"}, probabilities, labels)
    assert kept["thresholds"][1] is None and kept["thresholds"][0] is not None
    outcome = promises.outcome(kept, *table_of(probabilities, labels))
    assert outcome["never_answered"] == ["c1"] and "c1" in outcome["sentence"]
    assert not promises.answered(kept, probabilities)[picked == 1].any()


def test_so_few_images_promise_nothing_and_say_so():
    probabilities, labels = honest(20, classes=2)
    outcome = promises.outcome(
        promises.make({"precision": 0.95}, probabilities, labels), *table_of(probabilities, labels)
    )
    assert outcome["answered"] == 0 and outcome["value"] is None and "no answer" in outcome["sentence"]


def test_a_promised_coverage_holds_on_average():
    covered = []
    for seed in range(60):
        probabilities, labels = honest(400, classes=5, seed=seed)
        kept = promises.make({"coverage": 0.9}, probabilities[:200], labels[:200])
        outcome = promises.outcome(kept, *table_of(probabilities[200:], labels[200:]))
        covered.append(outcome["value"])
    assert 0.89 <= np.mean(covered) <= 0.93
    assert 1 < outcome["mean_set"] < 5


def test_risk_and_coverage_ends_at_the_error_of_all_and_ties_are_answered_together():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    table = promises.risk_and_coverage(*table_of(probabilities, np.array([0, 1, 1])))
    assert table["coverage"].tolist() == [2 / 3, 1] and table["risk"].tolist() == [1 / 2, 1 / 3]


@pytest.mark.parametrize(
    ("promise", "said"),
    [
        ({"precison": 0.9}, "Did you mean precision"),
        ({"precision": 0.9, "risk": 0.1}, "exactly one"),
        ({"precision": 95}, "between 0 and 1"),
        ({"precision": True}, "between 0 and 1"),
        ({"coverage": 0.9, "by": "class"}, "for precision and risk"),
        ({"by": "class"}, "exactly one"),
    ],
)
def test_a_promise_that_means_nothing_is_refused(promise, said):
    with pytest.raises(ValueError, match=said):
        asked_for.check(promise)


# Novelty and explanation, on a real classifier


@pytest.fixture(scope="module", params=["top", "all"])
def model(request):
    keras.utils.set_random_seed(1)
    built = classifier.build(
        "efficientnet_lite0", 3, image_size=64, weights="none", levels=request.param, pool="mean_std"
    )  # fmt: skip
    return spread(built)


def spread(built):
    """Give the last layer weights by which answers differ: a network drawn at random sees all images alike."""
    head = built.get_layer("probabilities")
    features = np.asarray(keras.Model(built.input, head.input)(images(8).astype("float32"), training=False))
    kernel = np.random.default_rng(0).normal(size=head.kernel.shape) / np.ptp(features, axis=0).max()
    head.set_weights([kernel, -(features.mean(axis=0) @ kernel)])
    assert np.ptp(np.asarray(built(images(8).astype("float32"), training=False)), axis=0).max() > 0.01
    return built


def images(n=4, seed=0):
    rng = np.random.default_rng(seed)
    bright = rng.integers(30, 256, n)
    return np.stack([rng.integers(0, most, (64, 64, 3)) for most in bright]).astype("uint8")


def logits(model, x):
    below = keras.Model(model.input, model.get_layer("probabilities").input)
    features = np.asarray(below(x.astype("float32"), training=False))
    kernel, bias = model.get_layer("probabilities").get_weights()
    return features @ kernel + bias


def test_novelty_takes_what_the_last_layer_is_given_whatever_is_around_the_classifier(model):
    from helpers.evaluation import prediction

    plain = novelty.features_of(model)(images())
    around = calibration.within(
        prediction.mirrored(model, "horizontal"), calibration.Calibration("temperature", (0.5,), (0.0,), 9)
    )
    np.testing.assert_allclose(novelty.features_of(around)(images()), plain, rtol=1e-4, atol=1e-4)
    kernel, bias = model.get_layer("probabilities").get_weights()
    np.testing.assert_allclose(plain @ kernel + bias, logits(model, images()), rtol=1e-3, atol=1e-3)


def test_far_images_are_flagged_and_the_file_keeps_what_was_found(tmp_path):
    rng = np.random.default_rng(0)
    known = rng.normal(size=(200, 8)) + 4
    unit = known / np.linalg.norm(known, axis=1, keepdims=True)
    found = distances.Novelty(unit.astype("float32"), 0.5, 0.05)
    near, far = rng.normal(size=(100, 8)) + 4, rng.normal(size=(100, 8)) - 4
    assert found.flags(near).mean() < 0.2 and found.flags(far).all()
    expected = np.sort(np.linalg.norm(near[0] / np.linalg.norm(near[0]) - unit, axis=1))[distances.NEIGHBOUR - 1]
    assert found.distance(near)[0] == pytest.approx(expected, abs=1e-5)
    assert found.write(tmp_path) == [distances.FILE]
    assert (distances.read(tmp_path).flags(far) == found.flags(far)).all()
    assert distances.read(tmp_path / "none") is None


def test_the_map_is_the_class_activation_map_where_the_head_reads_means():
    keras.utils.set_random_seed(0)
    built = spread(classifier.build("efficientnet_lite0", 3, image_size=64, weights="none"))
    kernel = built.get_layer("probabilities").get_weights()[0]
    x = images(2)
    maps = np.asarray(built.get_layer("backbone")(x.astype("float32"), training=False))
    weights = kernel[:, 0] - kernel[:, 1:].mean(axis=1)
    expected = (maps @ weights).mean(axis=(1, 2))
    found = explanation.heat(built, x, [0, 0])
    assert found.shape == (2, 64, 64)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found.sum(axis=(1, 2)), expected, rtol=1e-3)


def test_the_maps_of_all_levels_sum_to_what_they_add_to_the_score(model):
    """From the maps on, the two parts give the scores of the whole."""
    x = images(3)
    parts = explanation._Parts(model)
    maps = parts.below(x.astype("float32"))
    again = np.asarray(parts.above(maps)) @ parts.kernel + parts.bias
    np.testing.assert_allclose(again, logits(model, x), rtol=1e-3, atol=1e-3)
    assert np.abs(explanation.heat(model, x)).max() > 0


def test_the_map_changes_when_the_weights_are_drawn_at_random(model):
    """The sanity check of Adebayo et al., 2018: a map that does not depend on the weights explains nothing."""
    x, before = images(2), explanation.heat(model, images(2), [0, 0])
    kept = model.get_weights()
    rng = np.random.default_rng(9)
    model.set_weights([rng.permutation(weight.ravel()).reshape(weight.shape) for weight in kept])
    after = explanation.heat(model, x, [0, 0])
    model.set_weights(kept)
    assert abs(np.corrcoef(before.ravel(), after.ravel())[0, 1]) < 0.9
    np.testing.assert_allclose(explanation.heat(model, x, [0, 0]), before, rtol=1e-4, atol=1e-6)


def test_a_saved_model_is_explained_like_the_one_that_was_trained(model, tmp_path):
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(
        explanation.heat(loaded, images(2)), explanation.heat(model, images(2)), rtol=1e-3, atol=1e-4
    )


# The cheat test


def photos(folder, n, quality=lambda label: 90, mark=lambda label: False, seed=0):
    """Noise in two classes, as JPEG; `quality` and a white corner may give the class away."""
    rng, rows = np.random.default_rng(seed), []
    folder.mkdir()
    for number in range(n):
        label = "ab"[number % 2]
        pixels = rng.integers(60, 200, (32, 32, 3)).astype("uint8")
        if mark(label):
            pixels[:4, :4] = 255
        path = folder / f"{number}.jpg"
        Image.fromarray(pixels).save(path, quality=quality(label))
        rows.append({"path": path, "label": label})
    return pd.DataFrame(rows)


def verdicts_on(rows):
    groups = [str(number) for number in range(len(rows))]
    known = {"facts": cheats.facts(rows["path"], rows["path"]), "border": cheats.border(rows["path"])}
    return {what: cheats.judge(what, numbers, rows["label"], groups) for what, numbers in known.items()}


def test_another_jpeg_quality_of_one_class_is_found_and_named(tmp_path):
    found = verdicts_on(photos(tmp_path / "p", 160, quality=lambda label: 90 if label == "a" else 80))["facts"]
    assert found.is_suspicious and found.value > 0.95
    assert found.fields[0][1] > 0.95 and "JPEG compression" in str(found)


def test_a_watermark_in_a_corner_is_found_by_the_border(tmp_path):
    found = verdicts_on(photos(tmp_path / "p", 160, mark=lambda label: label == "a"))["border"]
    assert found.is_suspicious and found.value > 0.9 and "border" in str(found)


def test_a_folder_that_goes_with_a_class_is_found_and_a_folder_of_the_class_is_not(tmp_path):
    rows = photos(tmp_path / "p", 160)
    raw, labels = cheats.facts(rows["path"], rows["path"]), rows["label"]
    groups = [str(number) for number in range(len(rows))]
    sites = [f"site {number % 4 // 2 * 2 + (label == 'a')}/{number}.jpg" for number, label in enumerate(labels)]
    found = cheats.judge("facts", raw.assign(folder=cheats.folders_of(sites, labels)), labels, groups)
    assert found.is_suspicious and found.fields[0] == ("folder", 1.0) and "folder (100" in str(found)
    below = [f"train/{label}/{number}.jpg" for number, label in enumerate(labels)]
    assert set(cheats.folders_of(below, labels)) == {"train"}
    renamed = [f"n{label == 'a'}/{number}.jpg" for number, label in enumerate(labels)]
    assert set(cheats.folders_of(renamed, labels)) == {""}, "the classes by another name"
    assert cheats.folders_of(["a/b/1.jpg", "a/c/x/2.jpg", "a/c/3.jpg"], ["a/b", "a/c", "a/c"]) == ["", "x", ""]


def test_a_clean_set_gives_no_alarm(tmp_path):
    for what, found in verdicts_on(photos(tmp_path / "p", 240, seed=3)).items():
        assert not found.is_suspicious, what
        assert "does not beat chance" in str(found)


def test_copies_of_an_image_do_not_vouch_for_each_other():
    rng = np.random.default_rng(0)
    numbers, labels = np.repeat(rng.normal(size=(30, 5)), 6, axis=0), np.repeat(rng.integers(0, 2, 30), 6)
    found = cheats.judge("border", numbers, labels, np.repeat(np.arange(30), 6))
    assert not found.is_suspicious


def test_one_group_a_class_cannot_be_judged():
    with pytest.raises(ValueError, match="two groups"):
        cheats.judge("border", np.zeros((4, 2)), ["a", "a", "b", "b"], ["1", "1", "2", "3"])


@pytest.mark.parametrize("classes", [3, 196])
def test_of_many_classes_some_are_examined_and_each_has_two_groups(classes):
    names = np.repeat([f"class {number}" for number in range(classes)], 12)
    rows = pd.DataFrame({"label": names, "group": np.arange(len(names)).astype(str), "number": range(len(names))})
    rows.loc[rows["label"] == "class 1", "group"] = "one video"
    drawn = cheats.sample(rows, seed=3)
    counts = drawn.groupby("label")["group"].nunique()
    assert "class 1" not in counts and counts.min() >= 2
    assert len(counts) == (2 if classes == 3 else 50) and len(drawn) == (24 if classes == 3 else 500)
    assert drawn["number"].is_unique and drawn.equals(cheats.sample(rows, seed=3))


def test_a_verdict_on_some_of_the_classes_says_so():
    some = cheats.Verdict("facts", 0.3, 0.2, 0.4, 0.02, classes=50, all_classes=196)
    assert "only facts about the files, of 50 of the 196 classes, reaches" in str(some)
    assert "classes" not in str(cheats.Verdict("facts", 0.3, 0.2, 0.4, 0.02, classes=50, all_classes=50))


# Subgroups, curves, order


def test_the_largest_gap_between_subgroups_is_told_with_its_interval():
    probabilities, labels = honest(600, classes=2, sharpness=4.0)
    poor = np.arange(600) % 2 == 0
    probabilities[poor] = 0.5 + 0.01 * (probabilities[poor] - 0.5) * np.random.default_rng(0).choice([-1, 1], (300, 1))
    table, names = table_of(probabilities, labels)
    values = pd.DataFrame({"camera": np.where(poor, "old", "new"), "brightness": np.arange(600) / 7.0})
    by, sentences = subgroups.measure(table, names, values)
    assert list(by["value"][:2]) == ["new", "old"] and by["accuracy"][0] > by["accuracy"][1] + 0.2
    assert "new is classified best" in sentences[0] and "chance" not in sentences[0]
    assert len(by) == 6 and "which may be chance" in sentences[1]  # four quarters of brightness
    with pytest.raises(ValueError, match="Did you mean camera"):
        subgroups.check(["camra"], values)


def test_the_areas_of_the_curves_are_scikit_learns():
    probabilities, labels = honest(300, classes=4)
    table, names = table_of(probabilities, labels)
    curves = details.rank_curves(table, names)
    for index, name in enumerate(names):
        own = curves[curves["label"] == name].groupby("kind")["area"].first()
        assert own["roc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels == index, probabilities[:, index]))
    assert set(details.rank_curves(*table_of(*honest(50, classes=2)))["label"]) == {"c1"}


def test_classes_that_are_confused_stand_side_by_side():
    matrix = 20 * np.eye(10, dtype=int)
    for one, other in ((0, 7), (3, 9), (2, 5)):
        matrix[one, other] = matrix[other, one] = 15
    order = list(details.alike_first(matrix))
    assert sorted(order) == list(range(10))
    assert all(abs(order.index(one) - order.index(other)) == 1 for one, other in ((0, 7), (3, 9), (2, 5)))
    assert list(details.alike_first(matrix[:5, :5])) == [0, 1, 2, 3, 4]


def test_the_images_worth_a_look_are_each_named_once_and_say_why():
    table, names = table_of(*honest(200))
    shown = details.telling(table, names, n=24)
    assert len(shown) <= 24 and shown["path"].is_unique
    assert set(shown["why"]) == {"sure, and wrong", "least sure", "worst of its class", "best of its class"}

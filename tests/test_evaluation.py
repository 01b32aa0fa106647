"""Metrics against scikit-learn, intervals against theory, and clear refusals of bad predictions."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sklearn_metrics

from helpers.evaluation import comparison, details, metrics, selection, tables


def draw(n, k, seed=0, sharpness=1.5):
    """Honest predictions: each truth is drawn from its own probabilities."""
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(k, 1 / sharpness), n)
    truth = (probabilities.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1).clip(0, k - 1)
    return truth, probabilities


def table_of(truth, probabilities, names=None):
    names = names or [f"c{i}" for i in range(probabilities.shape[1])]
    paths = [f"test/{i:05d}.png" for i in range(len(truth))]
    return tables.predictions_table(paths, [names[i] for i in truth], probabilities, names), names


def of_hits(hits):
    """Two-class predictions, right where `hits` is true; the classes take turns."""
    truth = np.arange(len(hits)) % 2
    picked = np.where(hits, truth, 1 - truth)
    return table_of(truth, np.where(np.eye(2)[picked] == 1, 0.8, 0.2))


def test_confidences_are_the_highest_probabilities():
    table, names = of_hits([True, False, True])
    result = details.confidences(table, names)
    assert list(result["prediction"]) == ["correct", "wrong", "correct"]
    np.testing.assert_allclose(result["confidence"], 0.8)


@pytest.mark.parametrize("k", [2, 3, 12])
def test_point_values_are_those_of_scikit_learn(k):
    truth, probabilities = draw(500, k)
    table, names = table_of(truth, probabilities)
    result, picked = metrics.metrics(table, names, n_bootstrap=20, beta=2.0), probabilities.argmax(axis=1)
    one_hot = np.eye(k)[truth]
    positive = (truth, probabilities[:, 1]) if k == 2 else (one_hot, probabilities)
    auc = {"y_score": probabilities[:, 1]} if k == 2 else {"y_score": probabilities, "multi_class": "ovr"}
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(truth, picked),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(truth, picked),
        "macro_f1": sklearn_metrics.f1_score(truth, picked, average="macro"),
        "log_loss": sklearn_metrics.log_loss(truth, probabilities, labels=range(k)),
        "auc": sklearn_metrics.roc_auc_score(truth, **auc),
        "average_precision": sklearn_metrics.average_precision_score(*positive),
        "macro_fbeta": sklearn_metrics.fbeta_score(truth, picked, beta=2.0, average="macro"),
        "brier": sklearn_metrics.brier_score_loss(truth, positive[1], labels=range(k)),
        "kappa": sklearn_metrics.cohen_kappa_score(truth, picked),
        "matthews": sklearn_metrics.matthews_corrcoef(truth, picked),
    }
    for count in (3, 5):
        if k > count:
            expected[f"top{count}_accuracy"] = sklearn_metrics.top_k_accuracy_score(truth, probabilities, k=count)
    assert {name: result[name]["value"] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert ("top3_accuracy" in result) == (k >= 4)
    matrix = sklearn_metrics.confusion_matrix(truth, picked, labels=range(k))
    assert result["confusion_matrix"] == matrix.tolist()
    report = sklearn_metrics.precision_recall_fscore_support(truth, picked, zero_division=0)
    columns = [[row[key] for row in result["per_class"]] for key in ("precision", "recall", "f1", "support")]
    assert np.allclose(columns, report)


def test_every_interval_holds_its_value_and_is_the_same_for_the_same_seed():
    table, names = table_of(*draw(300, 5))
    result = metrics.metrics(table, names, seed=3, n_bootstrap=300)
    for name in metrics.NAMES.keys() - {"top5_accuracy", "macro_fbeta"}:  # of more classes, of another beta
        assert result[name]["low"] <= result[name]["value"] <= result[name]["high"], name
    assert metrics.metrics(table, names, seed=3, n_bootstrap=300) == result
    assert metrics.metrics(table, names, seed=4, n_bootstrap=300)["accuracy"] != result["accuracy"]


def test_the_accuracy_interval_is_as_wide_as_theory_says():
    rng = np.random.default_rng(0)
    table, names = of_hits(rng.random(1000) < 0.85)
    accuracy = metrics.metrics(table, names, n_bootstrap=4000)["accuracy"]
    expected = 2 * 1.96 * np.sqrt(accuracy["value"] * (1 - accuracy["value"]) / 1000)
    assert accuracy["high"] - accuracy["low"] == pytest.approx(expected, rel=0.08)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, held = np.random.default_rng(1), 0
    for _ in range(100):
        table, names = of_hits(rng.random(200) < 0.8)
        accuracy = metrics.metrics(table, names, n_bootstrap=200)["accuracy"]
        held += accuracy["low"] <= 0.8 <= accuracy["high"]
    assert 0.88 <= held / 100 <= 0.99


def test_resampled_auc_is_that_of_the_resample():
    truth, probabilities = draw(60, 3)
    probabilities = probabilities.round(1) + 1e-3  # many ties
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    scores = metrics.Scores(truth, probabilities.argmax(axis=1), probabilities)
    weights = next(metrics.resamples(truth, seed=0, n_bootstrap=5))
    for row, value in zip(weights.astype(int), scores.areas(weights)["auc"], strict=True):
        copies = np.repeat(np.arange(60), row)
        expected = sklearn_metrics.roc_auc_score(truth[copies], probabilities[copies], multi_class="ovr")
        assert value == pytest.approx(expected, abs=1e-12)


def test_images_of_one_group_are_drawn_together_and_widen_the_interval():
    truth, hits = np.repeat([0, 1], 100), np.tile(np.repeat([True, True, True, False], 10), 5)
    groups = np.repeat(np.arange(20), 10)  # ten images each, all right or all wrong
    weights = np.concatenate(list(metrics.resamples(truth, seed=0, n_bootstrap=50, groups=groups)))
    assert (weights.reshape(50, 20, 10) == weights.reshape(50, 20, 10)[:, :, :1]).all()
    assert (weights.sum(axis=1) == 200).all()
    table, names = table_of(truth, np.where(np.eye(2)[np.where(hits, truth, 1 - truth)] == 1, 0.8, 0.2))
    alone, together = (metrics.metrics(table, names, groups=given) for given in (None, groups))
    widths = [result["accuracy"]["high"] - result["accuracy"]["low"] for result in (alone, together)]
    assert widths[1] > 2.5 * widths[0]
    assert together["interval"]["method"].endswith("by group")
    with pytest.raises(ValueError, match="expected one for each"):
        metrics.metrics(table, names, groups=groups[1:])


def test_a_resample_by_group_that_loses_a_class_leaves_every_metric_defined():
    truth = np.array([0, 0, 1, 0, 0, 1])
    table, names = table_of(truth, np.where(np.eye(2)[truth] == 1, 0.7, 0.3))
    result = metrics.metrics(table, names, groups=["a", "a", "a", "b", "c", "d"], n_bootstrap=200)
    assert result["balanced_accuracy"]["value"] == 1
    assert np.isfinite(result["brier"]["value"])


def test_resamples_keep_the_class_counts():
    truth = np.repeat([0, 1, 2], [50, 9, 1])
    weights = np.concatenate(list(metrics.resamples(truth, seed=0, n_bootstrap=40)))
    assert (weights @ np.eye(3)[truth] == [50, 9, 1]).all()


def test_without_mistakes_accuracy_has_the_exact_interval_and_nothing_is_made_up():
    table, names = of_hits(np.ones(50, bool))
    result = metrics.metrics(table, names, n_bootstrap=50)
    assert result["accuracy"]["low"] == pytest.approx(binomtest(50, 50).proportion_ci().low)
    assert result["accuracy"]["high"] == 1.0
    assert result["macro_f1"] == {"value": 1.0, "low": None, "high": None}
    assert metrics.metrics_table(result).loc["macro F1"].isna().tolist() == [False, True, True]


def test_calibration_error_by_hand():
    # 10 images called with 80 %, 6 of them right: 20 points off. 10 called with 60 %, 6 right: none off.
    truth = np.array([0] * 6 + [1] * 4 + [0] * 6 + [1] * 4)
    first = np.array([0.8] * 10 + [0.6] * 10)
    table, names = table_of(truth, np.stack([first, 1 - first], axis=1))
    assert metrics.metrics(table, names, n_bootstrap=10)["ece"]["value"] == pytest.approx(0.1)
    reliability = details.reliability(table, names)
    assert reliability["count"].tolist() == [10, 10]
    assert reliability["accuracy"].tolist() == pytest.approx([0.6, 0.6])


def test_classes_without_test_pictures_and_never_predicted_ones():
    truth, probabilities = draw(40, 2)
    spread = np.zeros((40, 4))
    spread[:, :2] = probabilities
    table, names = table_of(truth, spread)
    result = metrics.metrics(table, names, n_bootstrap=20)
    assert result["per_class"][3] == {"label": "c3", "precision": 0.0, "recall": None, "f1": None, "support": 0}
    assert result["balanced_accuracy"]["value"] == pytest.approx(
        sklearn_metrics.balanced_accuracy_score(truth, probabilities.argmax(axis=1))
    )
    json.dumps(result, allow_nan=False)
    assert metrics.metrics_table(result)["value"]["log loss"] == pytest.approx(result["log_loss"]["value"], abs=1e-4)


def test_a_single_class_in_the_test_part_has_no_auc():
    table, names = table_of(np.zeros(6, int), np.tile([0.7, 0.3], (6, 1)))
    result = metrics.metrics(table, names, n_bootstrap=10)
    assert "auc" not in result
    assert result["accuracy"]["value"] == 1.0


def test_files_keep_class_names_as_text(tmp_path):
    truth, probabilities = draw(30, 3)
    table, names = table_of(truth, probabilities, ["007", "NA", "true"])
    table.to_csv(tmp_path / "predictions.csv", index=False)
    again = tables.read_predictions(tmp_path / "predictions.csv")
    pd.testing.assert_frame_equal(again, table, check_dtype=False)
    assert metrics.metrics(again, names, n_bootstrap=5) == metrics.metrics(table, names, n_bootstrap=5)


def test_labels_may_be_names_or_indices():
    by_name = tables.predictions_table(["x", "y"], ["1", "0"], GOOD, ["0", "1"])
    by_index = tables.predictions_table(["x", "y"], np.array([1, 0], np.int32), GOOD, ["0", "1"])
    pd.testing.assert_frame_equal(by_name, by_index)


def test_confident_mistakes_come_surest_first():
    table, names = table_of(np.array([0, 0, 1, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.95, 0.05], [0.4, 0.6]]))
    mistakes = details.confident_mistakes(table, names, n=5)
    assert mistakes["path"].tolist() == ["test/00002.png", "test/00001.png"]
    assert mistakes["confidence"].tolist() == [0.95, 0.8]


def test_confused_pairs_are_sorted_by_count_and_leave_out_the_diagonal():
    pairs = details.confused_pairs(np.array([[5, 2, 0], [4, 6, 0], [0, 2, 1]]), ["a", "b", "c"])
    assert pairs[["label", "predicted", "count"]].to_numpy().tolist() == [["b", "a", 4], ["c", "b", 2], ["a", "b", 2]]


def test_compare_counts_only_disagreements():
    first, names = of_hits(np.r_[np.ones(70, bool), np.zeros(30, bool)])
    second, _ = of_hits(np.r_[np.zeros(5, bool), np.ones(90, bool), np.zeros(5, bool)])
    result = comparison.compare(first, second.sample(frac=1, random_state=0), names)
    assert (result["only_first_right"], result["only_second_right"]) == (5, 25)
    assert result["p_value"] == pytest.approx(binomtest(25, 30).pvalue)
    assert result["difference"]["value"] == pytest.approx(0.2)
    assert 0 < result["difference"]["low"] < 0.2 < result["difference"]["high"]
    assert "more than chance" in result["sentence"]
    same = comparison.compare(first, first, names)
    assert same["p_value"] == 1.0 and same["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_compare_refuses_other_pictures_and_other_labels():
    first, names = of_hits(np.ones(10, bool))
    with pytest.raises(ValueError, match="same images"):
        comparison.compare(first, first.head(9), names)
    with pytest.raises(ValueError, match="different labels"):
        comparison.compare(first, first.assign(label=first["label"].to_numpy()[::-1]), names)


@pytest.mark.parametrize(
    ("monitor", "head", "fine", "phase"),
    [
        ("val_loss", [0.5, 0.4], [0.45, 0.35, 0.6], "fine_tune"),
        ("val_loss", [0.5, 0.4], [0.45], "head"),
        ("val_loss", [0.4], [0.4], "head"),
        ("val_accuracy", [0.8], [0.9], "fine_tune"),
        ("val_accuracy", [0.9], [0.8, np.nan], "head"),
        ("val_accuracy", [184 / 210], [float(np.float32(184 / 210))], "head"),  # equal, but for float32
    ],
)
def test_the_better_phase_is_chosen_on_validation(monitor, head, fine, phase):
    result = selection.better_phase(pd.DataFrame({monitor: head}), pd.DataFrame({monitor: fine}), monitor)
    assert result["phase"] == phase
    assert f"phase {1 if phase == 'head' else 2} is the run's model" in result["sentence"]


def test_without_phase_2_the_head_is_the_model():
    assert selection.better_phase(pd.DataFrame({"val_loss": [0.5]}), None)["phase"] == "head"
    with pytest.raises(ValueError, match="val_auc"):
        selection.better_phase(pd.DataFrame({"val_loss": [0.5]}), None, "val_auc")


def test_headline_names_the_published_figures():
    table, names = table_of(*draw(200, 2))
    text = metrics.headline(metrics.metrics(table, names, n_bootstrap=50), {"CNN": 88.42, "SVM": 0.8244})
    assert "95 % interval" in text and "200 test images" in text
    assert text.endswith("published: CNN 88.42 %, SVM 82.44 %")


GOOD = np.array([[0.7, 0.3], [0.2, 0.8]])


@pytest.mark.parametrize(
    ("paths", "labels", "probabilities", "names", "message"),
    [
        ([], [], np.zeros((0, 2)), ["a", "b"], "no image"),
        (["x", "y"], [0, 2], GOOD, ["a", "b"], "labels go from 0 to 2"),
        (["x", "y"], ["a", "z"], GOOD, ["a", "b"], "'z' is a label but not one of the class names"),
        (["x", "y"], ["a", "b"], GOOD * np.nan, ["a", "b"], "NaN or infinite, first 'x'"),
        (["x", "y"], ["a", "b"], GOOD * 2, ["a", "b"], "softmax"),
        (["x", "y"], ["a", "b"], np.array([[1.5, -0.5], [0.5, 0.5]]), ["a", "b"], "not probabilities"),
        (["x", "y"], ["a", "b"], GOOD, ["a", "b", "c"], "do not fit"),
        (["x", "y"], ["a"], GOOD, ["a", "b"], "1 labels"),
        (["x", "y"], ["a", "a"], np.ones((2, 1)), ["a"], "at least two different class names"),
        (["x", "y"], ["a", "label"], GOOD, ["a", "label"], "cannot be called 'label'"),
    ],
)
def test_bad_predictions_are_refused(paths, labels, probabilities, names, message):
    with pytest.raises(ValueError, match=message):
        tables.predictions_table(paths, labels, probabilities, names)


def test_other_tables_are_refused(tmp_path):
    table, names = of_hits(np.ones(4, bool))
    with pytest.raises(ValueError, match="lack the columns c2"):
        metrics.metrics(table, [*names, "c2"])
    with pytest.raises(ValueError, match="was predicted but is not"):
        metrics.metrics(table.assign(predicted="zebra"), names)
    with pytest.raises(ValueError, match="at least 1"):
        metrics.metrics(table, names, n_bootstrap=0)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected path, label, predicted"):
        tables.read_predictions(tmp_path / "other.csv")

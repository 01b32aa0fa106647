"""Every figure draws without a warning for few and many classes, and nothing in it overlaps or is empty."""

import itertools
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from helpers.core import project, words
from helpers.reports import charts, curves, sheets

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def quiet():
    """No warnings, no figure left open, and `show` is never called."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    plt.close("all")


def drawn(axes):
    """Draw the figure of the Axes (layout and text sizes are only known then) and return its renderer."""
    figure = np.ravel(axes)[0].figure
    figure.draw_without_rendering()
    return figure.canvas.get_renderer()


def names_of(n):
    return [f"kind {i}" if i % 5 else f"a long class name with $ and _ number {i}" for i in range(n)]


def history(epochs, phase="head", first=1):
    loss = np.linspace(1.0, 0.5, epochs)
    table = pd.DataFrame(
        {"epoch": np.arange(first, first + epochs), "phase": phase, "loss": loss, "accuracy": 1 - loss / 2}
    )
    return table.assign(val_loss=loss + 0.1, val_accuracy=0.9 - loss / 2, learning_rate=1e-2 / table["epoch"])


def overlapping(labels, renderer, axis):
    boxes = [label.get_window_extent(renderer) for label in labels if label.get_text() and label.get_visible()]
    spans = sorted((box.y0, box.y1) if axis == "y" else (box.x0, box.x1) for box in boxes)
    return sum(after[0] < before[1] - 1 for before, after in itertools.pairwise(spans))


@pytest.mark.parametrize("n", [2, 12, 120])
def test_names_of_classes_never_overlap(n):
    names = names_of(n)
    counts = pd.DataFrame({"label": np.repeat(names, 10), "part": np.resize(["train", "val", "test"], 10 * n)})
    scores = pd.DataFrame(RNG.random((n, 3)), columns=["precision", "recall", "f1"]).assign(label=names, support=10)
    matrix = RNG.integers(0, 9, (n, n)) + 20 * np.eye(n, dtype=int)
    for axes in (charts.class_counts(counts), charts.per_class(scores), charts.confusion_matrix(matrix, names)):
        renderer = drawn(axes)
        assert overlapping(axes.get_yticklabels(), renderer, "y") == 0
        if n > 12:
            assert overlapping(axes.get_xticklabels(), renderer, "x") == 0
        assert not any("$" in label.get_text() and label.get_parse_math() for label in axes.get_yticklabels())


def test_names_are_thinned_out_when_the_axes_are_small():
    _, ax = plt.subplots(figsize=(4, 2))
    charts.class_counts(pd.DataFrame({"label": names_of(120)}), ax=ax)
    assert 5 < len(ax.get_yticks()) < 60
    assert overlapping(ax.get_yticklabels(), drawn(ax), "y") == 0


def test_before_and_after_stand_side_by_side():
    before, after = ([np.full((9, 9, 3), value, np.uint8)] * 8 for value in (40, 200))
    axes = sheets.before_and_after(before, after, columns=6, heading="kind")
    drawn(axes)
    canvas = axes.images[0].get_array()
    middle = canvas.shape[1] // 2
    assert (canvas[:160, :160] == 40).all() and (canvas[:160, -160:] == 200).all() and (canvas[:, middle] == 255).all()
    assert not (canvas[:, :middle] == 200).any() and (canvas[170:, 330:400] == 255).all()
    with pytest.raises(ValueError, match="as many images before as after, at least one; got 8, 7"):
        sheets.before_and_after(before, after[:7])


@pytest.mark.parametrize("n", [2, 12, 13])
def test_confusion_cells_carry_numbers_only_when_they_can_be_read(n):
    axes = charts.confusion_matrix(5 * np.eye(n, dtype=int), names_of(n))
    assert len(axes.texts) == (n * n if n <= 12 else 0)


def test_confusion_matrix_of_a_class_without_pictures_and_as_counts():
    drawn(charts.confusion_matrix(np.array([[3, 1], [0, 0]]), ["a", "b"]))
    drawn(charts.confusion_matrix(np.zeros((2, 2), int), ["a", "b"], normalised=False))
    with pytest.raises(ValueError, match=r"expected a \(3, 3\) matrix"):
        charts.confusion_matrix(np.eye(2), ["a", "b", "c"])


def test_curves_mark_the_moment_of_thawing_between_the_phases():
    axes = curves.training_curves([history(5), history(4, "fine_tune", first=6)])
    drawn(axes)
    lines = [
        line for line in axes[0].lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1]
    ]
    assert [line.get_xdata()[0] for line in lines] == [5.5]
    assert [text.get_text() for text in axes[0].texts] == ["thaw · fine-tune"]
    dots = [line.get_xdata()[0] for line in axes[1].lines if line.get_marker() == "o" and line.get_markersize() == 6.5]
    assert dots == [5, 9]  # the lowest validation loss of each phase


def test_a_phase_that_counts_from_one_again_is_put_after_the_one_before():
    axes = curves.training_curves([history(5), history(4, "fine_tune")])
    assert list(axes[0].lines[0].get_xdata()) == list(range(1, 10))


@pytest.mark.parametrize("epochs", [1, 2, 300])
def test_curves_of_one_epoch_and_of_many_can_be_seen(epochs):
    axes = curves.training_curves(history(epochs))
    drawn(axes)
    assert axes[0].lines[0].get_marker() == ("o" if epochs < 4 else "None")
    low, high = axes[1].get_xlim()
    assert 0 < low < 1 and high > epochs
    drawn(curves.learning_rates(history(epochs)))


def test_curves_without_validation_and_on_given_axes():
    figure, pair = plt.subplots(2, 1)
    table = history(6).drop(columns=["val_loss", "val_accuracy"])
    assert list(curves.training_curves(table, ax=pair)) == list(pair)
    assert [text.get_text() for text in pair[0].get_legend().get_texts()] == ["train"]
    with pytest.raises(ValueError, match="two Axes"):
        curves.training_curves(table, ax=[pair[0]])
    assert len(figure.axes) == 2


def test_confidence_counts_every_image_and_ends_at_the_edges():
    right = pd.DataFrame({"confidence": [0.52, 0.97, 1.0, 1.0], "prediction": ["wrong", "correct", "correct", "wrong"]})
    ax = charts.confidence(right)
    drawn(ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["correct (2)", "wrong (2)"]
    assert ax.get_xlim() == (0.5, 1.0)
    assert sum(bar.get_height() for bar in ax.patches) == 4
    drawn(charts.confidence(right.assign(prediction="wrong")))
    sure = charts.confidence(right.assign(confidence=1.0, prediction="correct"))
    drawn(sure)
    assert sure.get_xlim() == (0.95, 1.0) and sum(bar.get_height() for bar in sure.patches) == 4
    with pytest.raises(ValueError, match="prediction"):
        charts.confidence(right[["confidence"]])


def test_given_axes_are_drawn_on_and_returned():
    for draw in (
        lambda ax: charts.confidence(pd.DataFrame({"confidence": [0.9], "prediction": ["wrong"]}), ax=ax),
        lambda ax: charts.class_counts(pd.DataFrame({"label": ["a", "b"]}), ax=ax),
        lambda ax: charts.image_sizes([3, 4], [5, 6], ax=ax),
        lambda ax: curves.learning_rates(history(3), ax=ax),
        lambda ax: charts.reliability(pd.DataFrame({"confidence": [0.9], "accuracy": [0.8], "count": [3]}), ax=ax),
        lambda ax: sheets.contact_sheet([np.zeros((8, 8), np.uint8)], ax=ax),
    ):
        figure, ax = plt.subplots()
        assert draw(ax) is ax
        assert plt.get_fignums() == [figure.number]
        plt.close(figure)


def test_contact_sheet_takes_arrays_and_files_of_every_kind(tmp_path):
    Image.fromarray(RNG.integers(0, 65535, (30, 50), dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (20, 40), (255, 0, 0, 128)).save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    pictures = [np.zeros((9, 9, 3), np.uint8), np.full((9, 20), 300.0), np.zeros((4, 4, 1)), tmp_path / "deep.png"]
    pictures += [str(tmp_path / "clear.png"), tmp_path / "turned.jpg"]
    axes = sheets.contact_sheet(pictures, [f"$ {i}\nsecond line" for i in range(6)], columns=4, heading="Six")
    drawn(axes)
    assert len(axes.texts) == 6 and len(axes.images) == 1
    assert sheets.thumbnail(tmp_path / "turned.jpg").shape == (160, 80, 3)  # upright
    Image.fromarray(np.full((30, 50), 25_700, np.uint16)).save(tmp_path / "flat.png")
    assert set(np.unique(sheets.thumbnail(tmp_path / "flat.png"))) == {200}  # of 15 bits, which hold its largest value
    assert np.ptp(sheets.thumbnail(tmp_path / "deep.png")) > 100  # not clipped to white


def test_contact_sheet_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="at least one image"):
        sheets.contact_sheet([])
    with pytest.raises(ValueError, match="one caption for each"):
        sheets.contact_sheet([np.zeros((4, 4))], ["a", "b"])
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5\)"):
        sheets.contact_sheet([np.zeros((2, 3, 4, 5))])
    with pytest.raises(ValueError, match="at least one image"):
        sheets.class_sheet({"a": []})


def test_class_sheet_names_stay_inside_the_figure():
    axes = sheets.class_sheet(
        {"a very long name of a class, far too long": [np.zeros((8, 8))] * 6, "b": [np.ones((8, 8))]}
    )
    renderer = drawn(axes)
    assert all(text.get_window_extent(renderer).x0 >= 0 for text in axes.texts)


def test_captions_stay_below_their_picture():
    axes = sheets.contact_sheet([np.zeros((8, 8))] * 12, ["a very long caption for such a small picture"] * 12)
    renderer = drawn(axes)
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes[:6]))


def test_mistakes_name_both_classes(tmp_path):
    Image.new("L", (30, 30)).save(tmp_path / "a.png")
    rows = [{"file": "a.png", "label": "cat", "predicted": "dog", "confidence": 0.987}]
    axes = sheets.mistakes(pd.DataFrame(rows), tmp_path)
    assert [text.get_text() for text in axes.texts] == ["is cat", "model: dog 99 %"]
    none = sheets.mistakes(pd.DataFrame(rows).head(0), tmp_path)
    assert "No mistakes" in none.texts[0].get_text()


def test_sizes_of_one_and_of_many_kinds():
    drawn(charts.image_sizes([300] * 5, [300] * 5))
    drawn(charts.image_sizes(RNG.integers(10, 900, 300), RNG.integers(10, 900, 300)))
    with pytest.raises(ValueError, match="no image sizes"):
        charts.image_sizes([], [])


def test_tables_that_lack_a_column_are_refused():
    with pytest.raises(ValueError, match="lacks label; it has class"):
        charts.class_counts(pd.DataFrame({"class": ["a"]}))
    with pytest.raises(ValueError, match="no rows"):
        charts.class_counts(pd.DataFrame({"label": []}))
    assert len(curves.training_curves(history(0))) == 0 and curves.learning_rates(history(0)) is None, "epochs: 0"


def test_learning_rates_turn_logarithmic_only_over_a_wide_range():
    assert curves.learning_rates(history(100)).get_yscale() == "log"
    assert curves.learning_rates(history(5)).get_yscale() == "linear"


@pytest.mark.parametrize(
    ("text", "limit", "short"), [("abc", 5, "abc"), ("abcdefghij", 7, "abcd…ij"), ("a\nb", 9, "a b")]
)
def test_shorten_keeps_both_ends(text, limit, short):
    assert words.shorten(text, limit) == short


def test_a_class_in_a_script_without_a_font_floods_nobody():
    code = """
import io, matplotlib
matplotlib.use("Agg")
import pandas as pd
from helpers.reports import charts
charts.class_counts(pd.DataFrame({"label": ["猫", "قط", "cat"]})).figure.savefig(io.BytesIO())
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=project.ROOT, capture_output=True, text=True, check=True)
    assert found.stderr == ""

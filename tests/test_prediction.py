"""The run's model on new images: which model it is, which files are read, and prediction over mirror images."""

import cv2
import keras
import numpy as np
import pytest

from helpers.core import disk
from helpers.data.formats import listing
from helpers.evaluation import prediction
from helpers.evaluation.trust import calibration, distances, novelty
from helpers.models import classifier, joined

SIZE = 64


def noise():
    rng = np.random.default_rng(1)
    return np.stack([rng.integers(0, most, (SIZE, SIZE, 3), dtype=np.uint8) for most in (256, 180, 90, 30)])


@pytest.fixture(scope="module")
def model(small_backbone):
    keras.utils.set_random_seed(3)
    built = classifier.build("any", 3, image_size=SIZE, weights="none")
    head, rng = built.get_layer("probabilities"), np.random.default_rng(0)
    features = keras.Model(built.input, head.input).predict(noise(), verbose=0)
    kernel = rng.normal(size=head.kernel.shape) / np.ptp(features, axis=0).max()
    head.set_weights([kernel, -(features.mean(axis=0) @ kernel)])  # answers that differ from image to image
    return built


@pytest.fixture(scope="module")
def pixels():
    return noise()


@pytest.fixture
def run(tmp_path, model):
    for stage in ("head", "evaluate"):
        folder = tmp_path / "run" / stage
        folder.mkdir(parents=True)
        model.save(folder / "model.keras")
        disk.write_json(folder / "class_names.json", ["a", "b", "c"])
        disk.write_json(folder / "model.json", {"image_size": SIZE, "fit": "crop"})
    return tmp_path / "run"


SYMMETRIES = {
    "horizontal": [lambda x: x, lambda x: x[:, :, ::-1]],
    "vertical": [lambda x: x, lambda x: x[:, ::-1]],
    "both": [lambda x: x, lambda x: x[:, ::-1], lambda x: x[:, :, ::-1], lambda x: x[:, ::-1, ::-1]],
    "dihedral": [lambda x, k=k, s=s: np.rot90(x, k, (1, 2))[:, ::s] for k in range(4) for s in (1, -1)],
}


@pytest.mark.parametrize("mirror", SYMMETRIES)
def test_mirrored_is_the_mean_over_the_symmetries(pixels, mirror, tmp_path):
    images = pixels[:, :8, :8].astype("float32") / 255
    layers = [keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(3, "softmax")]
    model = keras.Sequential([keras.Input((8, 8, 3)), *layers])
    expected = np.mean([model.predict_on_batch(change(images)) for change in SYMMETRIES[mirror]], axis=0)
    mean = prediction.mirrored(model, mirror)
    np.testing.assert_allclose(mean.predict_on_batch(images), expected, atol=1e-6)
    mean.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras", safe_mode=True)
    np.testing.assert_allclose(loaded.predict_on_batch(images), expected, atol=1e-6)


def test_only_square_images_are_turned():
    wide = keras.Sequential([keras.Input((4, 6, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"dihedral turns images and needs square ones; the model takes \(4, 6, 3\)"):
        prediction.mirrored(wide, "dihedral")


def test_without_mirroring_the_model_is_itself(model):
    assert prediction.mirrored(model, "none") is model


def test_the_tested_model_comes_before_the_trained_ones(run):
    assert prediction.model_folder(run).name == "evaluate"
    (run / "evaluate" / "model.keras").unlink()
    assert prediction.model_folder(run).name == "head"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run with a trained model"):
        prediction.model_folder(tmp_path)


def test_files_and_folders_are_predicted_and_what_cannot_be_read_is_named(run, model, pixels, tmp_path):
    folder = tmp_path / "new"
    (folder / "deep").mkdir(parents=True)
    for name, image in zip(("b.png", "deep/a.png"), pixels, strict=False):
        cv2.imwrite(str(folder / name), image[..., ::-1])
    (folder / "broken.jpg").write_bytes(b"no image")
    table, unreadable = prediction.predict(run, [folder])
    assert [path.removeprefix(f"{folder}/") for path in table["path"]] == ["b.png", "deep/a.png"]
    assert list(unreadable) == [str(folder / "broken.jpg")]
    np.testing.assert_allclose(table[["a", "b", "c"]].to_numpy(), model.predict_on_batch(pixels[:2]), atol=1e-5)
    assert list(table["predicted"]) == ["abc"[k] for k in model.predict_on_batch(pixels[:2]).argmax(axis=1)]


def test_a_path_that_does_not_exist_is_an_error(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        prediction.predict(run, [tmp_path / "nothing.png"])


def test_nothing_readable_is_an_empty_table(run, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    table, unreadable = prediction.predict(run, [tmp_path / "broken.png"])
    assert list(table.columns) == ["path", "predicted", "confidence", "a", "b", "c"] and table.empty
    assert len(unreadable) == 1


def test_many_images_come_back_in_order(run, tmp_path, image_folder):
    folder = image_folder(tmp_path / "many", {"cat": prediction.BATCH + 3}, size=32)
    table, _ = prediction.predict(run, [folder])
    assert table["path"].to_list() == [str(path) for path in sorted(folder.rglob("*.png"))]
    np.testing.assert_allclose(table[["a", "b", "c"]].max(axis=1), table["confidence"])


def test_rows_come_as_images_are_read_and_a_broken_one_keeps_its_place(run, model, pixels, tmp_path):
    """Of a million images only two batches are under way; what cannot be read shifts nothing."""
    for number, image in enumerate(pixels):
        cv2.imwrite(str(tmp_path / f"{number}.png"), image[..., ::-1])
    (tmp_path / "4.png").write_bytes(b"no image")
    begun = []

    def files():
        for number in range(10 * prediction.BATCH):
            begun.append(number)
            yield tmp_path / f"{number % 5}.png"

    rows = prediction.Classifier(run).rows(files())
    first = [next(rows) for _ in range(5)]
    assert len(begun) == 2 * prediction.BATCH
    assert [bool(row[3]) for row in first] == [False] * 4 + [True]
    expected = model.predict_on_batch(pixels)
    np.testing.assert_allclose([row[4:] for row in first[:4]], expected, atol=1e-5)
    later = [*rows][-5:]
    np.testing.assert_allclose([row[4:] for row in later[:4]], expected, atol=1e-5)
    assert later[4] == [str(tmp_path / "4.png"), "", "", first[4][3], "", "", ""]


def test_what_is_novel_is_told_in_the_same_pass(model, pixels, tmp_path):
    """For a classifier within others too: mirrored, calibrated, one of several."""
    images, other = pixels.astype("float32"), classifier.build("any", 3, image_size=SIZE, weights="none")
    kept = calibration.Calibration("temperature", (0.5,), (0.0,), 9)
    ensemble = joined.mean([model, other], [0.5, 0.5])
    for whole in (
        model,
        calibration.within(prediction.mirrored(model, "dihedral"), kept),
        calibration.within(ensemble, kept),
        prediction.mirrored(ensemble, "horizontal"),
    ):
        said, features = novelty.with_features(whole).predict_on_batch(images)
        np.testing.assert_allclose(said, whole.predict_on_batch(images), atol=1e-6)
        np.testing.assert_allclose(features, novelty.features_of(whole)(images), rtol=1e-4, atol=1e-4)
        assert np.ptp(features, axis=0).max() > 1
        whole.save(tmp_path / "model.keras")
        distances.Novelty(distances.unit(features), 0.5, 0.05).write(tmp_path)
        keras.backend.clear_session()  # as in another process, which makes up the names that are in the file again
        again = prediction.asking(prediction.load(tmp_path), tmp_path)(images)
        np.testing.assert_allclose(again[:, :3], said, atol=1e-6)
        np.testing.assert_allclose(again[:, 3], distances.read(tmp_path).beyond(features), atol=1e-4)


def test_images_are_found_in_order_and_a_link_to_a_folder_above_is_passed_over(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a.png", "c/deep/3.webp", "notes.txt", ".hidden.png", "@eaDir/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "c" / "loop").symlink_to(tmp_path)
    (tmp_path / "c" / "self").symlink_to("self")
    found = [str(path.relative_to(tmp_path)) for path in listing.find([tmp_path, tmp_path / "notes.txt"])]
    assert found == ["a.png", "b/1.png", "b/2.JPG", "c/deep/3.webp", "notes.txt"]


def test_an_empty_folder_is_an_error(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no images"):
        prediction.predict(run, [tmp_path / "empty"])


def test_a_promise_and_what_is_novel_are_told_beside_the_prediction(run, model, pixels, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate([*pixels, np.zeros_like(pixels[0])]):
        cv2.imwrite(str(folder / f"{number}.png"), image[:, :, ::-1])
    plain, _ = prediction.predict(run, [folder])
    assert not {"answer", "second", "novel"} & set(plain)

    least = float(plain["confidence"].median())
    promise = {"kind": "precision", "wanted": 0.9, "by": "all", "thresholds": [least] * 3}
    disk.write_json(run / "evaluate" / "decision.json", {"promise": promise})
    known = novelty.features_of(model)(pixels)
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    near = distances.Novelty(known, 1.0, 0.05).distance(novelty.features_of(model)(pixels)).max()
    distances.Novelty(known, float(near) + 1e-3, 0.05).write(run / "evaluate")
    table, _ = prediction.predict(run, [folder])
    is_sure = table["confidence"] >= least - 1e-6
    assert (table["answer"][is_sure] == table["predicted"][is_sure]).all() and 0 < is_sure.sum() < 5
    assert (table["answer"][~is_sure] == "unsure").all() and (table["second"] != table["predicted"]).all()
    assert (table["novel"][:4] == "").all()
    np.testing.assert_allclose(table[["a", "b", "c"]], plain[["a", "b", "c"]], atol=1e-6)
    assert list(prediction.submission(table, ["id", "*"])) == ["id", "a", "b", "c"]


def test_a_class_called_like_a_note_keeps_its_column(run, pixels, tmp_path):
    cv2.imwrite(str(tmp_path / "one.png"), pixels[0])
    disk.write_json(run / "evaluate" / "class_names.json", ["novel", "answer", "c"])
    promise = {"kind": "coverage", "wanted": 0.9, "level": 0.2}
    disk.write_json(run / "evaluate" / "decision.json", {"promise": promise})
    table, _ = prediction.predict(run, [tmp_path / "one.png"])
    assert table[["novel", "answer", "c"]].sum(axis=1)[0] == pytest.approx(1, abs=1e-4)
    chosen = [name for name in ("novel", "answer", "c") if table[name][0] >= 0.2]
    assert table["set"][0] == "|".join(chosen) and table["answer_"][0] in ("novel", "answer", "c", "unsure")
    assert list(prediction.submission(table, ["id", "*"])) == ["id", "novel", "answer", "c"]

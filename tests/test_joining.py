"""Several runs as one model: ensembles, soups, two stages; groups of confused classes; what is refused."""

import shutil
from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest

from helpers.cli import two_stage
from helpers.core import disk, notebooks, stages
from helpers.data import resizing
from helpers.evaluation import entries, selection
from helpers.evaluation.joining import confused, ways
from helpers.evaluation.joining import runs as runs_of
from helpers.evaluation.trust import calibration
from helpers.models import joined

SIZE = 8
NAMES = ["ant", "bee", "cat", "dog"]


def network(outputs: int, seed: int) -> keras.Model:
    """A small classifier whose answers differ from image to image."""
    keras.utils.set_random_seed(seed)
    image = keras.Input((SIZE, SIZE, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(image))
    start = keras.initializers.RandomNormal(stddev=8.0, seed=seed)
    answer = keras.layers.Dense(outputs, activation="softmax", kernel_initializer=start, name="probabilities")(pooled)
    return keras.Model(image, answer, name="classifier")


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 1, 1, 3)).repeat(SIZE, 1).repeat(SIZE, 2).astype(np.float32)


def say(model: keras.Model, pixels: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(model(pixels, training=False))


# Models


@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_an_ensemble_gives_the_weighted_mean_of_what_its_runs_give(of, pixels, tmp_path):
    parts, shares = [network(3, seed) for seed in range(3)], (0.5, 0.3, 0.2)
    expected = ways.mean([say(part, pixels) for part in parts], shares, of)
    model = joined.mean(parts, shares, of)
    assert np.ptp(expected, axis=0).max() > 0.2
    np.testing.assert_allclose(say(model, pixels), expected, atol=1e-6)
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(say(keras.saving.load_model(tmp_path / "model.keras"), pixels), expected, atol=1e-6)


def test_a_soup_has_the_mean_weights(pixels):
    parts = [network(3, seed) for seed in range(2)]
    expected = [(one + two) / 2 for one, two in zip(*(part.get_weights() for part in parts), strict=True)]
    for got, wanted in zip(joined.soup(parts).get_weights(), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("hard", [False, True])
def test_two_stages_give_the_group_times_the_class_within_it(hard, pixels, tmp_path):
    first, second = network(3, 0), network(2, 1)  # outputs: pets, bee, ant / dog, cat
    outer, inner = say(first, pixels), say(second, pixels)
    if hard:
        outer = np.eye(3)[outer.argmax(axis=1)]
    expected = np.stack([outer[:, 2], outer[:, 1], outer[:, 0] * inner[:, 1], outer[:, 0] * inner[:, 0]], axis=1)
    names = ["pets", "bee", "ant"]
    model = joined.two_stage(first, names, {"pets": second}, {"pets": ["dog", "cat"]}, NAMES, hard=hard)
    np.testing.assert_allclose(say(model, pixels), expected, atol=1e-6)
    np.testing.assert_allclose(say(model, pixels).sum(axis=1), 1, atol=1e-5)
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(say(keras.saving.load_model(tmp_path / "model.keras"), pixels), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["logits", "soft"])
def test_a_joined_model_takes_a_calibration_in_another_process(kind, pixels, tmp_path):
    """There, the names of operations are counted from the beginning, and none may stand twice."""
    if kind == "logits":
        model = joined.mean([network(3, 0), network(3, 1)], (0.5, 0.5), "logits")
    else:
        names = ["pets", "bee", "ant"]
        model = joined.two_stage(network(3, 0), names, {"pets": network(2, 1)}, {"pets": ["dog", "cat"]}, NAMES)
    model.save(tmp_path / "model.keras")
    keras.backend.clear_session()
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    warm = calibration.Calibration("temperature", (0.5,), (0.0,), 10)
    np.testing.assert_allclose(say(calibration.within(loaded, warm), pixels), warm(say(loaded, pixels)), atol=1e-5)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="probabilities of the shapes"):
        joined.mean([network(3, 0), network(2, 0)], (0.5, 0.5))
    with pytest.raises(ValueError, match="1 in all"):
        joined.mean([network(3, 0), network(3, 1)], (0.5, 0.6))
    with pytest.raises(ValueError, match="other weights"):
        joined.soup([network(3, 0), network(2, 0)])
    with pytest.raises(ValueError, match="stands for bee"):
        joined.two_stage(network(2, 0), ["ant", "pets"], {"pets": network(2, 1)}, {"pets": ["cat", "dog"]}, NAMES)


# Shares


def test_greedy_shares_leave_out_the_run_that_only_harms():
    labels = np.array([0, 1] * 20)
    right, noise = np.eye(2)[labels] * 0.8 + 0.1, np.random.default_rng(0).dirichlet([1, 1], 40)
    shares = ways.greedy([right, 1 - right, noise], labels)
    assert shares[1] == 0 and shares[0] > 0.8 and sum(shares) == pytest.approx(1)


def test_greedy_shares_are_never_worse_than_the_best_run_alone():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 60)
    for of in ("probabilities", "logits"):
        scores = [rng.dirichlet(np.ones(3) + 2 * np.eye(3)[label], 1)[0] for label in [*labels, *labels]]
        scores = [np.stack(scores[:60]), np.stack(scores[60:])]
        best = min(ways.loss(one, labels) for one in scores)
        assert ways.loss(ways.mean(scores, ways.greedy(scores, labels, of), of), labels) <= best + 1e-9


# Groups


def counts(**pairs: int) -> np.ndarray:
    """A confusion matrix of the four classes, 20 images each, with the pairs confused in both directions."""
    matrix = 20 * np.eye(4, dtype=int)
    for pair, many in pairs.items():
        one, two = (NAMES.index(name) for name in pair.split("_"))
        matrix[[one, two], [two, one]] += many
        matrix[[one, two], [one, two]] -= many
    return matrix


def test_classes_that_are_confused_form_a_group_and_the_others_stay_single():
    assert [sorted(group) for group in confused.groups(counts(ant_dog=6), NAMES)] == [["ant", "dog"]]
    found = confused.groups(counts(ant_dog=6, bee_cat=4), NAMES)
    assert sorted(sorted(group) for group in found) == [["ant", "dog"], ["bee", "cat"]]
    assert confused.groups(counts(ant_dog=1), NAMES) == []


def test_a_group_never_holds_more_than_half_of_the_classes():
    found = confused.groups(counts(ant_bee=6, bee_cat=5, cat_dog=7), NAMES)
    assert sorted(sorted(group) for group in found) == [["ant", "bee"], ["cat", "dog"]]


def test_confused_classes_stand_side_by_side():
    places = confused.order(counts(ant_dog=6, bee_cat=4))
    assert sorted(places) == [0, 1, 2, 3]
    assert abs(places.index(0) - places.index(3)) == 1 and abs(places.index(1) - places.index(2)) == 1
    arranged = confused.arranged(counts(), NAMES, [["ant", "cat"]])
    assert abs(arranged.index(0) - arranged.index(2)) == 1


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([["ant", "fox"]], "no class 'fox'"),
        ([["ant", "bee"], ["bee", "cat"]], "'bee' is in two groups"),
        ([["ant"]], "fewer than two"),
        ([NAMES], "needs two things"),
        ([], "needs two things"),
    ],
)
def test_groups_that_make_no_two_stages_are_refused(groups, said):
    with pytest.raises(ValueError, match=said):
        confused.check(groups, NAMES)


# Classes that are merged or kept


def test_classes_are_merged_and_kept_in_their_order():
    assert resizing.classes(NAMES, {"pets": ["dog", "cat"]}) == {
        "ant": "ant", "bee": "bee", "cat": "pets", "dog": "pets"
    }  # fmt: skip
    assert resizing.classes(NAMES, {}, ["dog", "ant"]) == {"ant": "ant", "dog": "dog"}
    assert resizing.classes(NAMES, {"pets": ["cat", "dog"]}, ["pets", "ant"]) == {
        "ant": "ant", "cat": "pets", "dog": "pets"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("merge", "keep", "said"),
    [
        ({"pets": ["cat", "dgo"]}, [], "no class 'dgo'"),
        ({"pets": ["cat"], "all": ["cat", "dog"]}, [], "'cat' is listed twice"),
        ({"ant": ["cat", "dog"]}, [], "'ant' is a class already"),
        ({}, ["ant", "fox"], "no class 'fox'"),
        ({"pets": ["cat", "dog"]}, ["ant", "cat"], "keep: there is no class 'cat'"),
        ({}, ["ant"], "needs two"),
        ({"all": NAMES}, [], "needs two"),
    ],
)
def test_a_merge_that_cannot_be_is_refused(merge, keep, said):
    with pytest.raises(ValueError, match=said):
        resizing.classes(NAMES, merge, keep)


# Through the notebooks, with a small network


@pytest.fixture(scope="module")
def place(tmp_path_factory, image_folder, by_hand, small_backbone):
    """The split of four classes, resized whole, merged and kept, with both phases trained on each."""
    folder = tmp_path_factory.mktemp("joining")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THAW_RUNS", str(folder / "runs"))
        image_folder(folder / "images", dict.fromkeys(NAMES, 12), size=40)
        run = folder / "runs" / "plain"
        by_hand("explore", source=str(folder / "images"), out=str(run / "explore"))
        by_hand("split", explore=str(run / "explore"), ratio=[0.5, 0.25, 0.25], out=str(run / "split"))
        parts = {"first": {"merge": {"pets": ["cat", "dog"]}}, "pets": {"keep": ["dog", "cat"]}}
        for name, more in ({"plain": {}, "seed": {}} | parts).items():
            train(by_hand, folder / "runs" / name, run / "split", seed=len(name), **more)
        yield folder / "runs"


def train(by_hand, run, split, seed: int, **more) -> None:
    by_hand("resize", split=str(split), image_size=32, out=str(run / "resize"), **more)
    given = {"images": str(run / "resize"), "epochs": 2, "views": 0, "seed": seed}
    by_hand("head", **given, next_unfreeze="block3", weights="none", out=str(run / "head"))
    by_hand("fine_tune", **given, head=str(run / "head"), unfreeze="block3", out=str(run / "fine_tune"))


def join(by_hand, place, name: str, runs: list[str], **more) -> dict:
    """Run 04b of the plain run."""
    plain = place / "plain"
    given = {stage: str(plain / folder) for stage, folder in zip(("images", "head"), ("resize", "head"), strict=True)}
    more = {"fine_tune": str(plain / "fine_tune")} | more
    return by_hand("join", **given, **more, runs=[str(place / run) for run in runs], out=str(place / name / "join"))


def test_merged_classes_are_the_labels_of_the_same_images(place):
    whole, first, pets = (
        disk.read_table(place / name / "resize" / "images.csv") for name in ("plain", "first", "pets")
    )
    assert disk.read_json(place / "first" / "resize" / "class_names.json") == ["ant", "bee", "pets"]
    assert list(first["path"]) == list(whole["path"]) and list(first["part"]) == list(whole["part"])
    assert set(first.loc[whole["label"].isin(["cat", "dog"]), "label"]) == {"pets"}
    assert set(pets["label"]) == {"cat", "dog"} and len(pets) == len(whole) / 2
    assert disk.read_json(place / "first" / "fine_tune" / "model.json")["merge"] == {"pets": ["cat", "dog"]}


def test_an_ensemble_goes_through_05_and_is_measured_as_it_is(place, by_hand, pixels):
    left = join(by_hand, place, "both", ["seed"], how="probabilities", weigh="equal")
    assert left["choice"].shares == (0.5, 0.5)
    parts = [one.load() for one in left["members"]]
    images = np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 3)).astype(np.float32)
    whole = keras.saving.load_model(place / "both" / "join" / "model.keras")
    np.testing.assert_allclose(say(whole, images), sum(say(part, images) for part in parts) / 2, atol=1e-5)
    out = place / "both" / "evaluate"
    plain = {stage: str(place / "plain" / stage) for stage in ("explore", "head")}
    by_hand(
        "evaluate",
        images=str(place / "plain" / "resize"),
        fine_tune=str(place / "both" / "join"),
        phase="fine_tune",
        cheat_test=False,
        gallery=2,
        out=str(out),
        **plain,
    )
    table = pd.read_csv(out / "predictions.csv")
    assert len(table) == 12 and set(NAMES) < set(table.columns)
    assert "Joining" in selection.better_phase(*(pd.read_csv(place / part / "history.csv") for part in (
        "plain/head", "both/join")))["sentence"]  # fmt: skip


def test_a_joined_run_is_compared_as_what_it_is(place, by_hand):
    given = {"images": str(place / "plain" / "resize"), "explore": str(place / "plain" / "explore"), "seed": 1}
    given |= {"head": str(place / "plain" / "head"), "phase": "fine_tune", "cheat_test": False, "gallery": 2}
    by_hand("evaluate", **given, fine_tune=str(place / "plain" / "fine_tune"), out=str(place / "plain" / "evaluate"))
    one, both = entries.read([str(place / "plain"), str(place / "both")])
    assert both.seconds > one.seconds > 0 and list(both.history["phase"])[-1] == "join"
    table = entries.differing(entries.grouped([one, both]))
    assert table.loc["join.how"].tolist() == ["–", "probabilities"]


def test_two_stages_are_found_by_the_merged_classes_and_the_better_way_is_kept(place, by_hand):
    left = join(by_hand, place, "two", ["first", "pets"])
    assert {way.how for way in left["candidates"]} == {"alone", "soft", "hard"}
    assert left["choice"].val_loss == min(way.val_loss for way in left["candidates"] if way.how != "alone")
    assert left["groups"] == [["cat", "dog"]]
    assert disk.read_json(place / "two" / "join" / "class_names.json") == NAMES
    record = disk.read_json(place / "two" / "join" / stages.STAGE_FILE)
    assert "Two stages (" in record["headline"]


def test_the_command_plans_both_stages_and_the_whole(place, monkeypatch):
    """What it runs, and on what; that it runs to its page is a part of `make systems`."""
    monkeypatch.setenv("THAW_RUNS", str(place))
    plain = place / "plain"
    recipe = {"name": "plain", "description": "x", "resize": {"image_size": 32}, "evaluate": {"promise": {"risk": 0.1}}}
    disk.write_json(plain / "manifest.json", {"recipe": recipe | {"export": {"title": "x"}}})
    groups = two_stage.named(two_stage.parsed("[[cat, dog]]", plain))
    made = two_stage.members(plain, groups, ["head.epochs=3"])
    assert {name: one.name for name, one in made.items()} == {
        "first": "plain-two-stage/first", "group_1": "plain-two-stage/group_1", "whole": "plain-two-stage/whole"
    }  # fmt: skip
    assert made["first"].resolved("resize")["merge"] == {"group_1": ["cat", "dog"]}
    assert made["group_1"].resolved("resize")["keep"] == ["cat", "dog"]
    assert made["whole"].resolved("join")["runs"] == ["plain-two-stage/first", "plain-two-stage/group_1"]
    assert [made[name].resolved("head")["epochs"] for name in made] == [3, 3, 30]
    assert made["whole"].resolved("evaluate")["promise"] == {"risk": 0.1} and "export" not in made["whole"].chain()
    with pytest.raises(ValueError, match="no class 'fox'"):
        two_stage.parsed("[[ant, fox]]", plain)
    with pytest.raises(ValueError, match="expected auto or lists of classes"):
        two_stage.parsed("ant", plain)


def test_a_soup_wants_the_same_head(place, by_hand):
    with pytest.raises(ValueError, match="same head"):
        join(by_hand, place, "soup", ["seed"], how="weights")
    given = {"images": str(place / "plain" / "resize"), "head": str(place / "plain" / "head"), "views": 0}
    by_hand("fine_tune", **given, epochs=2, unfreeze="block3", seed=9, out=str(place / "again" / "fine_tune"))
    (place / "again" / "head").symlink_to(place / "plain" / "head")
    left = join(by_hand, place, "soup", ["again"], how="weights")
    assert left["choice"].how == "weights" and runs_of.share_a_start(left["members"])
    assert left["choice"].val_loss <= min(way.val_loss for way in left["candidates"] if way.how == "alone")


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_run_that_has_chosen_or_learned_by_a_test_image_is_refused(place, tmp_path, part):
    members = runs_of.members(runs_of.phases(str(place / "plain")), [str(place / "seed")])
    table = disk.read_table(place / "seed" / "resize" / "images.csv")
    table.loc[table.index[table["part"] == part][0], "sha256"] = table.loc[table["part"] == "test", "sha256"].iloc[0]
    shutil.copytree(place / "seed" / "resize", tmp_path / "resize", symlinks=True)
    table.to_csv(tmp_path / "resize" / "images.csv", index=False)
    runs_of.check(members, place / "plain" / "resize")
    with pytest.raises(ValueError, match="has seen 1 images"):
        runs_of.check([members[0], replace(members[1], images=tmp_path / "resize")], place / "plain" / "resize")


def test_a_run_with_another_split_is_refused(place, by_hand):
    other = place / "other"
    given = {"explore": str(place / "plain" / "explore"), "ratio": [0.5, 0.25, 0.25]}
    by_hand("split", **given, seed=99, out=str(other / "split"))
    train(by_hand, other, other / "split", seed=1)
    with pytest.raises(ValueError, match="that this run measures on"):
        join(by_hand, place, "leak", ["other"])


@pytest.mark.parametrize(
    ("runs", "more", "said"),
    [
        ([], {}, "at least one other run"),
        (["seed", "seed"], {}, "each once"),
        (["nowhere"], {}, "neither a run"),
        (["pets"], {}, "merges none"),
        (["first", "seed"], {}, "no run keeps the classes of pets"),
        (["first", "pets"], {"how": "logits"}, "joins runs of the same classes"),
        (["seed"], {"how": "soft"}, "joins two stages"),
    ],
)
def test_runs_that_cannot_be_joined_are_refused(place, by_hand, runs, more, said):
    with pytest.raises((ValueError, FileNotFoundError, notebooks.RecipeError), match=said):
        join(by_hand, place, "refused", runs, **more)

"""The split: a partition that no group straddles, with bounded shares, whatever the order, and stable as data grow."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.core import notebooks
from helpers.data import leaks, links, resizing, sampling, splits

RATIOS = st.sampled_from([(0.6, 0.15, 0.25), (0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (1 / 3, 1 / 3, 1 / 3), (0.8, 0.2, 0)])
SEEDS = st.integers(0, 2**32 - 1)


def inventory_of(labels, groups=None, **columns) -> pd.DataFrame:
    """An inventory with these labels; group None means alone."""
    shas = [hashlib.sha256(f"{row}{label}".encode()).hexdigest() for row, label in enumerate(labels)]
    groups = [
        sha[:16] if group is None else f"g{group}"
        for sha, group in zip(shas, groups or [None] * len(shas), strict=True)
    ]
    paths = [f"{label}/{row}.png" for row, label in enumerate(labels)]
    facts = {"path": paths, "label": labels, "split": "", "sha256": shas, "group": groups}
    return pd.DataFrame(facts | columns)


@st.composite
def inventories(draw, grouped: bool = True) -> pd.DataFrame:
    """Two to four classes of 2 to 40 images with a stratum each; groups may hold images of several classes."""
    labels = [name for name in "abcd"[: draw(st.integers(2, 4))] for _ in range(draw(st.integers(2, 40)))]
    group = st.one_of(st.none(), st.integers(0, 12)) if grouped else st.none()
    groups = draw(st.lists(group, min_size=len(labels), max_size=len(labels)))
    strata = draw(st.lists(st.sampled_from(["x", "y", "z"]), min_size=len(labels), max_size=len(labels)))
    table = inventory_of(labels, groups, stratum=strata)
    if (table.groupby("label")["group"].nunique() < 2).any():
        table = pd.concat([table, inventory_of([f"{name}" for name in "abcd" for _ in range(2)], stratum="x")])
        table = table.drop_duplicates("sha256")
        alone = table.groupby("label")["group"].transform("nunique") < 2
        table.loc[alone, "group"] = table.loc[alone, "sha256"]
    return table.reset_index(drop=True)


def deal(table, ratio=(0.6, 0.15, 0.25), **options) -> pd.Series:
    return splits.assign(table, options.pop("method", "ratio"), ratio=ratio, **options)


# -- Properties --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(inventories(), RATIOS, SEEDS, st.sampled_from(["ratio", "hash", "kfold"]))
def test_every_image_has_one_part_and_no_group_straddles(table, ratio, seed, method):
    try:
        parts = deal(table, ratio, seed=seed, method=method)
    except ValueError as error:
        assert "is in train" in str(error)
        return
    assert parts.index.equals(table.index) and set(parts) <= set(splits.PARTS)
    assert parts.groupby(table["group"]).nunique().max() == 1


@settings(max_examples=30, deadline=None)
@given(inventories(), RATIOS, SEEDS, st.sampled_from(["ratio", "hash", "kfold"]), st.randoms())
def test_the_order_of_the_files_plays_no_role(table, ratio, seed, method, random):
    order = list(table.index)
    random.shuffle(order)
    shuffled = table.loc[order]
    try:
        parts = deal(table, ratio, seed=seed, method=method)
    except ValueError:
        with pytest.raises(ValueError):
            deal(shuffled, ratio, seed=seed, method=method)
        return
    again = deal(shuffled, ratio, seed=seed, method=method)
    assert dict(zip(table["path"], parts, strict=True)) == dict(zip(shuffled["path"], again, strict=True))


@settings(max_examples=30, deadline=None)
@given(inventories(grouped=False), RATIOS, SEEDS)
def test_shares_are_bounded_for_every_class_and_stratum(table, ratio, seed):
    parts = deal(table, ratio, seed=seed, stratify=["stratum"])
    sizes = table["label"].value_counts()
    filled = sum((sizes * share < 4 / 3).astype(int) for share in ratio if share)  # parts that may have taken one more
    for columns, bound in ((["label"], 4 / 3), (["label", "stratum"], 2)):
        counts = splits.counts(table.assign(part=parts), columns).iloc[:-1]
        for part, share in zip(splits.PARTS, ratio, strict=True):
            found = counts[part] if part in counts else 0 * counts["all"]
            off = (found - share * counts["all"]).abs()
            assert (off <= bound + filled.reindex(off.index.get_level_values(0)).to_numpy() + 1e-9).all()


@settings(max_examples=30, deadline=None)
@given(inventories(), RATIOS, SEEDS, st.data())
def test_no_image_changes_its_part_when_data_grow_from_an_earlier_split(table, ratio, seed, data):
    new = table["group"].isin(data.draw(st.sets(st.sampled_from(sorted(table["group"].unique())))))
    old = table[~new]
    if old["label"].nunique() < 2 or (old.groupby("label")["group"].nunique() < 2).any():
        return
    try:
        earlier = old.assign(part=deal(old, ratio, seed=seed))
        parts = deal(table, ratio, seed=seed + 1, previous=earlier)
    except ValueError as error:
        assert "is in train" in str(error)
        return
    assert (parts[~new] == earlier["part"]).all()
    assert parts.groupby(table["group"]).nunique().max() == 1


@settings(max_examples=30, deadline=None)
@given(inventories(), RATIOS, SEEDS, st.data())
def test_with_hash_no_image_changes_its_part_even_without_a_memory(table, ratio, seed, data):
    kept = table["group"].isin(data.draw(st.sets(st.sampled_from(sorted(table["group"].unique())), min_size=1)))
    parts = splits.by_hash(table, ratio, seed=seed)
    assert (splits.by_hash(table[kept], ratio, seed=seed) == parts[kept]).all()


@settings(max_examples=40, deadline=None)
@given(inventories(), st.integers(3, 6), SEEDS)
def test_folds_share_the_images_out(table, folds, seed):
    parts = [splits.by_fold(table, folds, fold, seed=seed) for fold in range(1, folds + 1)]
    for own, after in zip(parts, [*parts[1:], parts[0]], strict=True):
        assert ((own == "val") == (after == "test")).all()
    assert (sum((own == "test").astype(int) for own in parts) == 1).all()


# -- Shares ------------------------------------------------------------------------------------------------------------


def test_shares_of_many_images_are_met_and_seeds_differ():
    table = inventory_of(["a"] * 1000 + ["b"] * 400)
    first, second = deal(table, seed=1), deal(table, seed=2)
    for parts in (first, second):
        assert parts[table["label"] == "a"].value_counts().to_dict() == {"train": 600, "val": 150, "test": 250}
        assert parts[table["label"] == "b"].value_counts().to_dict() == {"train": 240, "val": 60, "test": 100}
    assert 0.3 < (first == second).mean() < 0.6
    assert (deal(table, seed=1) == first).all()


def test_counts_are_in_natural_order_whatever_a_class_is_called():
    table = inventory_of(["10"] * 6 + ["9"] * 8 + ["all"] * 4, kind=["x", "y"] * 9)
    counts = splits.counts(table.assign(part=deal(table)))
    assert list(counts.index) == ["9", "10", "all", "all classes"] and list(counts["all"]) == [8, 6, 4, 18]
    both = splits.counts(table.assign(part=deal(table)), ["label", "kind"])
    assert [label for label, _ in both.index] == ["9", "9", "10", "10", "all", "all", "all classes"]
    assert both["all"].iloc[-1] == 18 and both.loc[("10", "x"), "all"] == 3


@pytest.mark.parametrize(("size", "expected"), [(2, [1, 0, 1]), (3, [1, 1, 1]), (4, [2, 1, 1]), (5, [3, 1, 1])])
def test_the_stated_rule_for_rare_classes(size, expected):
    table = inventory_of(["rare"] * size + ["common"] * 100)
    counts = splits.counts(table.assign(part=deal(table)))
    assert list(counts.loc["rare", list(splits.PARTS)]) == expected


def test_many_rare_classes_do_not_all_favour_one_part():
    table = inventory_of([f"c{row // 4}" for row in range(400)])
    sizes = splits.by_fold(table, 5, 1).value_counts()
    assert sizes["test"] == sizes["val"] == 80


def test_a_class_in_a_single_group_is_refused_and_named():
    with pytest.raises(ValueError, match=r"rare \(1 in one group\)"):
        deal(inventory_of(["rare"] + ["common"] * 9))
    with pytest.raises(ValueError, match=r"patient \(3 in one group\)"):
        deal(inventory_of(["patient"] * 3 + ["common"] * 9, [1, 1, 1] + [None] * 9))


@pytest.mark.parametrize(("rare", "part"), [("drop", "unused"), ("train_only", "train")])
@pytest.mark.parametrize("method", ["ratio", "hash", "fixed", "kfold"])
def test_what_becomes_of_rare_classes_is_the_users_choice(method, rare, part):
    table = inventory_of(["rare"] + ["patient"] * 3 + ["a"] * 60 + ["b"] * 60, [None, 1, 1, 1] + [None] * 120)
    options = {"method": method, "counts": [0, 5, 5], "rare": rare}
    parts = deal(table, **options)
    assert (parts[:4] == part).all() and {*parts[4:]} == {"train", "val", "test"}
    assert splits.dropped(table.assign(part=parts)) == (["patient", "rare"] if rare == "drop" else [])
    tied = table.assign(group=table["group"].where(table.index != 10, "g1"))  # a look-alike of another class
    assert deal(tied, **options)[10] in (("train",) if rare == "train_only" else splits.PARTS)


def test_a_class_that_no_part_teaches_can_be_dropped():
    table = inventory_of(["a", "b"] * 5 + ["c"])
    table["split"] = ["train"] * 7 + ["test"] * 4
    parts = deal(table, (0.7, 0, 0.3), method="predefined", rare="drop")
    assert splits.dropped(table.assign(part=parts)) == ["c"] and (parts[:10] == table["split"][:10]).all()


def test_nothing_but_rare_classes_is_refused():
    for rare in ("drop", "train_only"):
        with pytest.raises(ValueError, match="No classes remain to learn"):
            deal(inventory_of(["a", "b", "c"]), rare=rare)


def test_every_part_gets_an_image_of_a_class_that_has_enough():
    table = inventory_of([f"c{row % 120}" for row in range(360)])
    counts = splits.counts(table.assign(part=deal(table))).iloc[:-1]
    assert (counts[[*splits.PARTS]] == 1).all().all()
    grouped = inventory_of(["rare"] * 30 + ["common"] * 90, [0] * 10 + [1] * 10 + [2] * 10 + [None] * 90)
    assert (splits.counts(grouped.assign(part=deal(grouped))).loc["rare", [*splits.PARTS]] == 10).all()
    assert not splits.check_parts(grouped.assign(part=deal(grouped)), "ratio", (0.6, 0.15, 0.25), ())


def test_filling_moves_no_settled_image():
    table = inventory_of(["rare"] * 3 + ["common"] * 40)
    earlier = table[:3].assign(part="train")
    parts = deal(table, previous=earlier)
    assert (parts[:3] == "train").all()
    said = splits.check_parts(table.assign(part=parts), "ratio", (0.6, 0.15, 0.25), ())
    assert said == "val lacks 1 of 2 classes: rare; test lacks 1 of 2 classes: rare"


def test_an_empty_part_is_refused():
    table = inventory_of(["a", "a", "b", "b"])
    with pytest.raises(ValueError, match="val got no image"):
        splits.check_parts(table.assign(part=deal(table)), "ratio", (0.6, 0.15, 0.25), ())


@pytest.mark.parametrize(
    ("labels", "given", "said"),
    [
        (["a"] * 9 + ["b"] * 9 + ["c"], {}, r"1 of 3 classes have too few .* c \(1 in one group\)"),
        (
            ["a"] * 9 + ["b"] * 9,
            {"method": "fixed", "counts": [0, 5, 5]},
            "2 of 2 classes have too few .* for counts",
        ),
        ([f"c{row % 9}" for row in range(18)], {}, "No class has the 3 images or groups that train, val, test need"),
    ],
)
def test_what_labels_alone_forbid_is_known_before_an_image_is_opened(labels, given, said):
    settings = {name: p.default for name, p in notebooks.find_stage("split").settings.items()} | given
    table = inventory_of(labels).drop(columns="sha256").assign(group="")
    with pytest.raises(ValueError, match=said):
        splits.rehearse(table, settings)
    assert splits.rehearse(table[table["label"] != "c"], settings | {"method": "kfold"}) is None
    if "c" in labels:
        assert splits.rehearse(table, settings | {"rare": "drop"}) is None


def test_a_ready_made_split_that_teaches_nothing_of_a_class_is_known_before_too():
    settings = {name: p.default for name, p in notebooks.find_stage("split").settings.items()}
    table = inventory_of(["a", "b", "c"] * 3).assign(group="", split=["train", "train", "test"] * 3)
    with pytest.raises(ValueError, match="No image of c is in train"):
        splits.rehearse(table, settings | {"method": "predefined"})


def test_single_images_make_up_for_large_groups():
    groups = [0] * 30 + [1] * 10 + [None] * 60
    table = inventory_of(["a"] * 100 + ["b"] * 20, groups + [None] * 20, kind=["x", "y"] * 60)
    parts = deal(table, stratify=["kind"])
    assert parts[table["label"] == "a"].value_counts().to_dict() == {"train": 60, "val": 15, "test": 25}
    single = splits.counts(table.assign(part=parts)[40:100], ["kind"])
    assert (single.loc["x"] - single.loc["y"]).abs().max() <= 4, "both strata bear the correction alike"


def test_new_images_restore_the_shares():
    table = inventory_of(["a"] * 400 + ["b"] * 400)
    old = table[::2]
    lopsided = old.assign(part=deal(old, (0.9, 0.05, 0.05)))
    parts = deal(table, previous=lopsided)
    assert parts.value_counts().to_dict() == {"train": 480, "val": 120, "test": 200}


def test_new_images_that_tie_train_to_test_are_named():
    table = inventory_of(["a"] * 10 + ["b"] * 10)
    earlier = table[1:].assign(part=deal(table[1:]))
    train, test = (
        earlier[(earlier["part"] == part) & (earlier["label"] == "a")].index[0] for part in ("train", "test")
    )
    table.loc[[0, train, test], "group"] = "bridge"
    with pytest.raises(ValueError, match=r"a/0\.png"):
        deal(table, previous=earlier)


def test_what_became_of_an_earlier_split_is_counted():
    table = inventory_of(["a"] * 40 + ["b"] * 40)
    earlier = table[:-20].assign(part=deal(table[:-20]))
    kept = splits.compare(table.assign(part=deal(table, previous=earlier)), earlier)
    assert list(kept.index) == ["train", "val", "test", "new"] and kept.loc["new"].sum() == 20
    assert all(kept.loc[part, part] == kept.loc[part].sum() for part in splits.PARTS)
    anew = splits.compare(table.assign(part=deal(table)), earlier)
    assert any(anew.loc[part, part] < anew.loc[part].sum() for part in splits.PARTS)


# -- Other methods -----------------------------------------------------------------------------------------------------


def test_fixed_counts_take_whole_groups_and_leave_the_rest_to_train():
    table = inventory_of(["a"] * 50 + ["b"] * 30, [0] * 7 + [None] * 73)
    parts = deal(table, method="fixed", counts=[0, 5, 8])
    counts = splits.counts(table.assign(part=parts))
    assert counts.loc["a"].to_dict() == {"train": 37, "val": 5, "test": 8, "all": 50}
    assert counts.loc["b"].to_dict() == {"train": 17, "val": 5, "test": 8, "all": 30}
    assert parts[:7].nunique() == 1


def test_fixed_counts_of_train_leave_the_others_unused():
    parts = deal(inventory_of(["a"] * 50 + ["b"] * 30), method="fixed", counts=[10, 5, 5])
    assert parts.value_counts().to_dict() == {"unused": 40, "train": 20, "val": 10, "test": 10}


@pytest.mark.parametrize("counts", [[], [1, 2], [0, 0, 0], [-1, 2, 2], [0, 20, 20]])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="counts"):
        deal(inventory_of(["a"] * 50 + ["b"] * 30), method="fixed", counts=counts)


def test_predefined_cuts_what_is_missing_and_nothing_else():
    table = inventory_of(["a", "b"] * 50)
    table["split"] = ["train"] * 80 + ["val"] * 20
    parts = deal(table, method="predefined")
    assert (parts[80:] == "val").all() and parts[:80].value_counts().to_dict() == {"train": 56, "test": 24}
    assert (deal(table, (0.8, 0.2, 0), method="predefined") == table["split"]).all()


@pytest.mark.parametrize("given", [["train"] * 9 + [""], [""] * 10])
def test_predefined_needs_every_part(given):
    table = inventory_of(["a", "b"] * 5)
    table["split"] = given
    with pytest.raises(ValueError, match="predefined"):
        deal(table, method="predefined")


def test_a_class_that_is_only_tested_is_refused():
    table = inventory_of(["a", "b"] * 5 + ["c"])
    table["split"] = ["train"] * 7 + ["test"] * 4
    with pytest.raises(ValueError, match="No image of c is in train"):
        deal(table, (0.7, 0, 0.3), method="predefined")


@pytest.mark.parametrize("ratio", [[0.6, 0.2, 0.3], [0.5, 0.5], [1, 0, 0], [0, 0.5, 0.5], [1.2, -0.1, -0.1], []])
def test_impossible_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="ratio"):
        deal(inventory_of(["a", "b"] * 9), ratio)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stratify": ["sort"]}, "no column sort"),
        ({"method": "kfold", "folds": 2}, "folds"),
        ({"method": "kfold", "fold": 6}, "folds"),
        ({"method": "hash", "previous": pd.DataFrame()}, "previous"),
    ],
)
def test_impossible_requests_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        deal(inventory_of(["a", "b"] * 9), **options)


# -- The balance of train ----------------------------------------------------------------------------------------------


@pytest.fixture
def unequal() -> pd.DataFrame:
    table = inventory_of(["a"] * 200 + ["b"] * 40 + ["c"] * 20)
    return table.assign(part=deal(table, (0.5, 0.25, 0.25)))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("smallest", [10, 10, 10]), ("2x", [20, 20, 10]), (15, [15, 15, 10]), ("1.5x", [15, 15, 10])],
)
def test_undersampling_thins_train_alone(unequal, limit, expected):
    thinned = sampling.undersample(unequal, limit, seed=1)
    counts = splits.counts(thinned)
    assert list(counts["train"].iloc[:-1]) == expected
    assert counts[["val", "test"]].equals(splits.counts(unequal)[["val", "test"]])
    assert len(thinned) == len(unequal)


@pytest.mark.parametrize(
    ("limit", "expected"), [("largest", [100, 100, 100]), ("0.5x", [100, 50, 50]), (25, [100, 25, 25])]
)
def test_oversampling_repeats_train_alone_and_evenly(unequal, limit, expected):
    repeated = sampling.oversample(unequal, limit, seed=1)
    counts = splits.counts(repeated)
    assert list(counts["train"].iloc[:-1]) == expected
    assert counts[["val", "test"]].equals(splits.counts(unequal)[["val", "test"]])
    times = repeated[repeated["part"] == "train"].groupby("label")["path"].value_counts()
    assert (times.groupby("label").max() - times.groupby("label").min()).max() <= 1


@pytest.mark.parametrize("limit", ["half", 0, "x", "-2x", "largest"])
def test_an_impossible_limit_is_refused(unequal, limit):
    with pytest.raises(ValueError, match="undersample"):
        sampling.undersample(unequal, limit)


# -- On disk -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def laid(tmp_path: Path):
    """A split of 40 small images laid out on disk: folder, split, table."""
    rng = np.random.default_rng(0)
    table = inventory_of(["a"] * 20 + ["b"] * 20)
    table["phash"] = [rng.bytes(32).hex() for _ in range(40)]
    for path in table["path"]:
        (tmp_path / "raw" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "raw" / path)
    table["part"] = deal(table)
    (tmp_path / "out").mkdir()
    return tmp_path / "out", links.write_split(tmp_path / "out", table, tmp_path / "raw"), table


def test_links_lead_to_the_raw_files(laid):
    folder, split, _ = laid
    for row in split.itertuples():
        link = folder / row.file
        assert link.is_symlink() and link.resolve() == (folder.parent / "raw" / row.path).resolve()
        assert row.file.startswith(f"{row.part}/{row.label}/")
    assert links.read_split(folder).equals(split)
    assert sorted(path.name for path in folder.iterdir()) == ["split.csv", "test", "train", "val"]


def test_writing_again_leaves_nothing_of_the_split_before(laid):
    folder, _, table = laid
    again = links.write_split(folder, table.assign(part=table["part"].replace("val", "unused")), folder.parent / "raw")
    assert not (folder / "val").exists() and (again["file"] == "").sum() == (table["part"] == "val").sum()
    leaks.check_split(folder, again, table, distance=8)


def test_oversampled_images_get_links_of_their_own(laid):
    folder, _, table = laid
    split = links.write_split(folder, sampling.oversample(table, 30), folder.parent / "raw")
    leaks.check_split(folder, split, table, distance=8)
    assert split["file"].is_unique and (split["part"] == "train").sum() == 60


def test_an_earlier_split_is_read_from_its_folder_or_a_copy(laid, tmp_path):
    folder, split, table = laid
    copy = tmp_path / "kept under another name.csv"
    copy.write_bytes((folder / "split.csv").read_bytes())
    for place in (folder, folder / "split.csv", copy):
        earlier = links.read_earlier(str(place))
        assert earlier.equals(split) and (deal(table, seed=9, previous=earlier) == table["part"]).all()
    assert links.read_earlier("") is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no file"),
        (b"path,label\n1,2\n", "no column sha256, part"),
        (b"", "read as"),
        (b"\xff", "read as"),
    ],
)
def test_what_is_no_earlier_split_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "split.csv").write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=rf"previous: .*{said}"):
        links.read_earlier(str(tmp_path / "split.csv"))


@pytest.mark.parametrize("format", ["png", "jpg"])
def test_resized_images_lie_in_the_same_folders(laid, format):
    folder, split, _ = laid
    out = folder.parent / "resized"
    written, quarantine = resizing.write_images(out, folder, image_size=32, fit="crop", format=format)
    assert quarantine.empty and list(written.columns) == ["path", "label", "part", "file", "sha256"]
    assert set(written["path"]) == set(split["path"]) and written["file"].str.endswith(f".{format}").all()
    for row in written.itertuples():
        assert row.file.startswith(f"{row.part}/{row.label}/") and Image.open(out / row.file).size == (32, 32)
    found = pd.read_csv(out / "images.csv", dtype=str)
    assert (found["path"] == written["path"]).all() and (out / "resize.json").is_file()


def test_interrupted_resizing_goes_on_where_it_stopped(laid):
    folder, _, _ = laid
    out = folder.parent / "resized"
    written, _ = resizing.write_images(out, folder, image_size=32, fit="crop")
    gone, kept = out / written["file"][0], out / written["file"][1]
    gone.unlink()
    before = kept.stat().st_mtime_ns
    again, _ = resizing.write_images(out, folder, image_size=32, fit="crop")
    assert gone.is_file() and kept.stat().st_mtime_ns == before and again.equals(written)


def test_an_image_lost_after_the_split_is_quarantined(laid):
    folder, split, _ = laid
    (folder.parent / "raw" / split["path"][0]).unlink()
    written, quarantine = resizing.write_images(folder.parent / "resized", folder, image_size=32, fit="crop")
    assert len(written) == 39 and quarantine.to_dict("records")[0]["path"] == split["path"][0]
    assert quarantine["reason"][0] == "broken link"


def test_the_gate_lets_an_honest_split_pass(laid):
    leaks.check_split(laid[0], laid[1], laid[2], distance=8)


@pytest.mark.parametrize("column", ["sha256", "group", "phash"])
def test_the_gate_stops_each_kind_of_leak(laid, column):
    folder, split, table = laid
    frame = table if column == "phash" else split
    chosen = [frame.index[frame["part"] == part][0] for part in ("train", "test")]
    if column == "phash":
        bits = bytearray.fromhex(frame["phash"][chosen[0]])
        bits[0] ^= 0b111
        frame.loc[chosen[1], "phash"] = bits.hex()
    else:
        frame.loc[chosen, column] = "same"
    with pytest.raises(ValueError, match="The split leaks") as error:
        leaks.check_split(folder, split, table, distance=8)
    assert all(path in str(error.value) for path in frame["path"][chosen])


def test_the_gate_stops_links_that_do_not_agree(laid):
    folder, split, table = laid
    (folder / split["file"].iloc[0]).unlink()
    with pytest.raises(ValueError, match="do not agree"):
        leaks.check_split(folder, split, table, distance=8)


def test_settling_takes_images_out_of_the_earlier_part():
    table = inventory_of(["a", "b"] * 4, [0, 0, 1, 1, None, None, 2, 2])
    table["part"] = ["train", "test", "val", "val", "train", "test", "train", "val"]
    settled = leaks.settle(table)
    assert list(settled["part"]) == ["unused", "test", "val", "val", "train", "test", "unused", "val"]


def test_the_honest_gap_shows_what_copies_flatter(tmp_path):
    rng = np.random.default_rng(0)
    labels, groups = [], []
    for group in range(30):
        base = rng.integers(0, 255, (8, 8, 3))
        for copy in range(4):
            labels.append("ab"[group % 2])
            groups.append(group)
            path = tmp_path / f"{labels[-1]}/{len(labels) - 1}.png"
            path.parent.mkdir(exist_ok=True)
            noisy = np.clip(base + rng.normal(0, 4, base.shape) + copy, 0, 255).astype(np.uint8)
            Image.fromarray(noisy).resize((64, 64), Image.Resampling.BICUBIC).save(path)
    gap = leaks.honest_gap(inventory_of(labels, groups), tmp_path, (0.7, 0.0, 0.3))
    scores = gap.groupby("split")["balanced_accuracy"].mean()
    assert scores["naive"] > 0.95 and scores["honest"] < scores["naive"] - 0.15

"""The inventory: facts about files, the quarantine, groups of what belongs together, and the source's fingerprint."""

import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers.core import disk, notebooks, words
from helpers.data import grouping, images, inventory, sources
from helpers.evaluation import prediction


def clouds(seed: int, size: tuple[int, int] = (120, 90)) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), np.uint8)
    return cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed in range(12):
        path = tmp_path / "raw" / ("cat", "dog")[seed % 2] / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(clouds(seed)).save(path)
    return tmp_path / "raw"


def parameters(root: Path | str, **given) -> dict:
    return (
        {name: p.default for name, p in notebooks.find_stage("explore").settings.items()}
        | {"source": str(root)}
        | given
    )


def take(root: Path, **limits) -> tuple[pd.DataFrame, pd.DataFrame]:
    return inventory.take(sources.read(parameters(root)), **limits)


# -- Facts -------------------------------------------------------------------------------------------------------------


def test_the_facts_about_each_file(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x9003] = "2024:05:01 12:00:00"
    Image.fromarray(clouds(50)).save(root / "cat" / "photo.PNG", format="JPEG", exif=exif)
    table, quarantine = take(root)
    row = table.set_index("path").loc["cat/photo.PNG"]
    assert (row["format"], row["mode"], row["width"], row["height"], row["orientation"]) == ("JPEG", "RGB", 120, 90, 6)
    assert row["taken"] == "2024:05:01 12:00:00" and row["bytes"] == (root / "cat" / "photo.PNG").stat().st_size
    assert len(row["sha256"]) == 64 and len(row["phash"]) == 64
    assert quarantine.empty and list(quarantine.columns) == ["path", "label", "reason", "detail"]


def test_images_of_which_none_can_be_read(root):
    for path in root.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"No usable image is left of cat, dog \(12 truncated\)"):
        take(root)


def test_the_facts_about_a_heic_file(root):
    pytest.importorskip("pillow_heif", reason="the extra heic is not installed: pip install -e '.[heic]'")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x9003] = "2024:05:01 12:00:00"
    lying = Image.fromarray(clouds(50)).transpose(Image.Transpose.ROTATE_90)
    lying.save(root / "cat" / "photo.heic", exif=exif.tobytes(), quality=90)
    Image.fromarray(clouds(50)).save(root / "cat" / "photo.png")
    table, quarantine = take(root)
    row = table.set_index("path").loc["cat/photo.heic"]
    assert (row["format"], row["mode"], row["width"], row["height"]) == ("HEIF", "RGB", 120, 90) and quarantine.empty
    assert row["taken"] == "2024:05:01 12:00:00" and row["orientation"] == 1, "libheif has turned it already"
    groups = grouping.group(table).set_index("path")["group"]
    assert groups["cat/photo.heic"] == groups["cat/photo.png"], "turned, it looks like the upright one"


def test_it_is_written_and_read_back_alike(root, tmp_path):
    data = sources.read(parameters(root))
    table, quarantine = inventory.take(data)
    table = grouping.group(table)
    (tmp_path / "out").mkdir()
    files = inventory.write(tmp_path / "out", data, table, quarantine)
    assert all((tmp_path / "out" / name).is_file() for name in files)
    pd.testing.assert_frame_equal(inventory.read(tmp_path / "out"), table, check_dtype=False)
    assert (tmp_path / "out" / "source").resolve() == root.resolve()
    assert disk.read_json(tmp_path / "out" / "class_names.json") == ["cat", "dog"]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"min_size": 100}, "too small"), ({"max_aspect": 1.2}, "odd shape"), ({"max_pixels": 9000}, "too many pixels")],
)
def test_limits_are_the_users(root, limits, reason):
    for seed in range(2):
        Image.fromarray(clouds(seed + 50, (110, 105) if reason != "too many pixels" else (60, 60))).save(
            root / ("cat", "dog")[seed] / "fits.png"
        )
    table, quarantine = take(root, **limits)
    assert set(quarantine["reason"]) == {reason} and len(table) == 2


# -- Groups ------------------------------------------------------------------------------------------------------------


def grouped(root: Path, **options) -> pd.Series:
    table, _ = take(root)
    return grouping.group(table, **options).set_index("path")["group"]


def altered(kind: str) -> bytes:
    pixels = clouds(0, (480, 360))
    changes = {
        "jpeg of low quality": lambda: cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 40])[1],
        "half the size": lambda: cv2.imencode(".png", cv2.resize(pixels, (240, 180), interpolation=cv2.INTER_AREA))[1],
        "brighter": lambda: cv2.imencode(".png", cv2.convertScaleAbs(pixels, alpha=0.8, beta=40))[1],
        "a little noise": lambda: cv2.imencode(
            ".png", np.clip(pixels + np.random.default_rng(0).normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
        )[1],
        "grey": lambda: cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[1],
    }
    return changes[kind]().tobytes()


@pytest.mark.parametrize("kind", ["jpeg of low quality", "half the size", "brighter", "a little noise"])
def test_an_altered_copy_joins_its_original(root, kind):
    Image.fromarray(clouds(0, (480, 360))[..., ::-1]).save(root / "cat" / "original.png")
    (root / "cat" / "copy.img.png").write_bytes(altered(kind))
    groups = grouped(root)
    assert groups["cat/original.png"] == groups["cat/copy.img.png"]
    assert groups.drop(["cat/original.png", "cat/copy.img.png"]).isin([groups["cat/original.png"]]).sum() <= 1
    apart = grouped(root, distance=-1)
    assert apart["cat/original.png"] != apart["cat/copy.img.png"]


def test_different_pictures_stay_apart(root):
    assert grouped(root).is_unique


def test_the_users_groups_hold_and_give_their_names(root):
    table, _ = take(root)
    table["group"] = ["p1", "p2", "p1"] + [""] * 9
    groups = grouping.group(table)["group"]
    assert list(groups[:3]) == ["p1", "p2", "p1"] and groups[3:].is_unique


def test_belonging_together_is_passed_on(root):
    """A shares the patient with B, B is the same file as C."""
    (root / "cat" / "c.png").write_bytes((root / "cat" / "2.png").read_bytes())
    table, _ = take(root)
    table.loc[table["path"].isin(["cat/0.png", "cat/2.png"]), "group"] = "patient"
    groups = grouping.group(table).set_index("path")["group"]
    assert set(groups[["cat/0.png", "cat/2.png", "cat/c.png"]]) == {"patient"} and (groups == "patient").sum() == 3


def test_bursts_by_name(root):
    for number in range(3):
        for clip in ("clip1", "clip22"):
            Image.fromarray(clouds(60 + number + len(clip) * 10)).save(root / "dog" / f"{clip}_{number}.png")
    groups = grouped(root, burst_pattern=r"^(clip\d+)_")
    assert groups.nunique() == 12 + 2
    assert groups["dog/clip1_0.png"] == groups["dog/clip1_2.png"] != groups["dog/clip22_0.png"]
    with pytest.raises(ValueError, match="burst_pattern"):
        grouped(root, burst_pattern="(")


def test_bursts_by_time(root):
    for number, second in enumerate((0, 2, 4, 30)):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9003] = f"2024:05:01 12:00:{second:02d}"
        Image.fromarray(clouds(60 + number)).save(root / "dog" / f"t{second}.jpg", exif=exif)
    groups = grouped(root, burst_seconds=2)
    assert groups["dog/t0.jpg"] == groups["dog/t2.jpg"] == groups["dog/t4.jpg"] != groups["dog/t30.jpg"]
    assert grouped(root).is_unique


def test_the_order_of_the_files_does_not_change_the_groups(root):
    (root / "cat" / "copy.png").write_bytes((root / "cat" / "0.png").read_bytes())
    table, _ = take(root)
    there = grouping.group(table).set_index("path")["group"]
    back = grouping.group(table[::-1].reset_index(drop=True)).set_index("path")["group"]
    assert there.sort_index().equals(back.sort_index())


def test_near_duplicates_are_exactly_the_pairs_within_the_distance():
    rng = np.random.default_rng(0)
    hashes = [rng.integers(0, 256, 32, np.uint8) for _ in range(300)]
    hashes += [hashes[7] ^ np.packbits(np.arange(256) < flipped) for flipped in (0, 5, 8, 9)]
    bits = np.unpackbits(np.array(hashes), axis=1).astype(bool)
    differ = (bits[:, None] != bits[None]).sum(axis=2)
    texts = pd.Series([found.tobytes().hex() for found in hashes])
    for distance in (0, 8, 110):
        expected = np.argwhere(np.triu(differ <= distance, 1))
        assert np.array_equal(grouping.near_duplicates(texts, distance), expected)
    assert grouping.near_duplicates(texts[:0], 8).shape == (0, 2)


def test_the_summary_counts_groups_and_disagreements(root):
    table, _ = take(root)
    table["group"] = ["x", "x", "x"] + [f"g{n}" for n in range(9)]
    table.loc[1, "label"] = "dog"
    assert grouping.summary(table) == {
        "images": 12,
        "groups": 10,
        "groups_of_several": 1,
        "images_in_them": 3,
        "largest_group": 3,
        "groups_with_several_labels": 1,
    }
    assert list(grouping.disagreements(table)["label"]) == ["cat", "dog", "cat"]
    assert grouping.largest_groups(table, root)["x: 3"][0].shape == (160, 160, 3)
    assert list(inventory.examples(table, root, per_class=2)) == ["cat", "dog"]


# -- The fingerprint ---------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_content_and_labels_not_times_or_place(root, tmp_path):
    cache = tmp_path / "cache.json"
    first = inventory.source_fingerprint(parameters(root), cache)
    assert inventory.source_fingerprint(parameters(root)) == first
    (root / "cat" / "0.png").touch()
    assert inventory.source_fingerprint(parameters(root), cache) == first
    moved = root.rename(tmp_path / "moved")
    assert inventory.source_fingerprint(parameters(moved), cache) == first
    (moved / "cat" / "0.png").rename(moved / "dog" / "00.png")
    second = inventory.source_fingerprint(parameters(moved), cache)
    (moved / "dog" / "1.png").write_bytes(b"changed")
    third = inventory.source_fingerprint(parameters(moved), cache)
    assert len({first, second, third}) == 3


def test_the_cache_saves_reading(root, tmp_path, monkeypatch):
    cache = tmp_path / "cache.json"
    first = inventory.source_fingerprint(parameters(root), cache)
    monkeypatch.setattr(inventory.hashlib, "file_digest", lambda *_: pytest.fail("an unchanged file was read again"))
    assert inventory.source_fingerprint(parameters(root), cache) == first
    assert len(json.loads(cache.read_text())) == 12


def test_a_damaged_cache_is_made_anew(root, tmp_path):
    (tmp_path / "cache.json").write_text("{")
    assert inventory.source_fingerprint(parameters(root), tmp_path / "cache.json")
    assert len(json.loads((tmp_path / "cache.json").read_text())) == 12


@pytest.mark.parametrize("source", ["nowhere", ""])
def test_a_missing_source_is_told_early(source):
    with pytest.raises(FileNotFoundError, match="source"):
        inventory.source_fingerprint(parameters(source))


def test_the_built_in_sets(monkeypatch):
    pytest.importorskip("elpv_dataset")
    for module, name in ((cv2, "imread"), (cv2, "imdecode"), (Image, "open")):
        monkeypatch.setattr(module, name, None)  # nothing is opened yet
    elpv = sources.read(parameters("elpv"))
    assert elpv.table["label"].value_counts().to_dict() == {"functional": 1803, "defective": 821}
    assert {"probability", "type"} <= set(elpv.table)
    with pytest.raises(ValueError, match="brings its own labels"):
        sources.read(parameters("elpv", labels="x.csv"))


def test_the_built_in_folders():
    pytest.importorskip("conformal_clip_data")
    assert words.natural_order(sources.read(parameters("textile")).table["label"]) == ["global", "local", "nominal"]


# -- Words and columns -------------------------------------------------------------------------------------------------


def test_natural_order():
    assert words.natural_order(["10", "9", "b2", "b10", "a", "B1", "", "9"]) == [
        "",
        "9",
        "10",
        "a",
        "B1",
        "b2",
        "b10",
    ]


def test_a_submission_has_the_columns_asked_for():
    predictions = pd.DataFrame(
        {"path": ["t/a.jpg", "t/b.c.jpg"], "predicted": ["x", "y"], "x": [0.9, 0.2], "y": [0.1, 0.8]}
    )
    simple = prediction.submission(predictions, ["id", "breed"])
    assert simple.to_dict("list") == {"id": ["a", "b.c"], "breed": ["x", "y"]}
    assert prediction.submission(predictions, ["path", "y", "x"]).to_dict("list") == {
        "path": ["t/a.jpg", "t/b.c.jpg"],
        "y": [0.1, 0.8],
        "x": [0.9, 0.2],
    }
    assert prediction.submission(predictions, ["id", "*"]).to_dict("list") == {
        "id": ["a", "b.c"],
        "x": [0.9, 0.2],
        "y": [0.1, 0.8],
    }
    with pytest.raises(ValueError, match="columns"):
        prediction.submission(predictions, ["id"])


def test_heic_is_named_with_its_extra():
    if "HEIF" in images.FORMATS:
        pytest.skip("the extra is installed")
    with pytest.raises(images.ImageError, match=r"\[heic\]"):
        images.open_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))

"""The label review: planted errors are found, the page is safe and whole, and what it saves corrects the labels."""

import base64
import csv
import hashlib
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
from PIL import Image

from helpers.core import disk, notebooks, project, words
from helpers.data import grouping, inventory, sources
from helpers.data.labelling import fixes
from helpers.evaluation import label_errors
from helpers.reports import report, review

NASTY = "<script>alert('x')</script> \"&, é"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def parameters(root: Path, **given) -> dict:
    defaults = {name: p.default for name, p in notebooks.find_stage("explore").settings.items()}
    return defaults | {"source": str(root)} | given


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state(root: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, sha256(path)) for path in sorted(root.rglob("*")) if path.is_file()}


def write_fixes(file: Path, root: Path, *rows: tuple[str, str]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([fixes.COLUMNS, *([path, label, sha256(root / path)] for path, label in rows)])
    return file


# A run of 60 images, of which five lie in the wrong folder, without TensorFlow


@pytest.fixture(scope="session")
def raw(tmp_path_factory, image_folder) -> tuple[Path, dict[str, str]]:
    """A folder per class with five images in the wrong one, and the right label of each path."""
    root = image_folder(tmp_path_factory.mktemp("raw") / "photos", {"cat": 30, "dog": 30})
    truth = {f"{name}/{name}-{index:02}.png": name for name in ("cat", "dog") for index in range(30)}
    for name, other, index in [
        ("cat", "dog", 3),
        ("cat", "dog", 17),
        ("dog", "cat", 0),
        ("dog", "cat", 8),
        ("dog", "cat", 29),
    ]:
        wrong = f"{other}/{name}-{index:02}.png"
        (root / f"{name}/{name}-{index:02}.png").rename(root / wrong)
        truth[wrong] = truth.pop(f"{name}/{name}-{index:02}.png")
    return root, truth


@pytest.fixture
def run(raw, tmp_path, monkeypatch) -> Path:
    """The folder of a run whose phase 1 is done; its features are told instead of computed."""
    root, truth = raw
    folder = make_run(tmp_path / "runs" / "pets", root, parameters(root))
    listed = pd.read_csv(folder / "resize/images.csv")
    rng = np.random.default_rng(0)
    features = rng.normal(0, 0.5, (len(listed), 4)).astype(np.float32)
    features[:, 0] += [3 if truth[path] == "dog" else -3 for path in listed["path"]]
    monkeypatch.setattr(label_errors, "embed", lambda head, resized: (listed, features))
    return folder


def make_run(folder: Path, root: Path, settings: dict) -> Path:
    for stage in ("explore", "resize", "head"):
        (folder / stage).mkdir(parents=True)
    source = sources.read(settings)
    table, quarantine = inventory.take(source)
    table = grouping.group(table)
    inventory.write(folder / "explore", source, table, quarantine)
    disk.write_json(folder / "explore/groups.json", {"near_duplicates": 8})
    part = ["train", "val", "train", "test", "train"]
    images = table.assign(part=[part[row % 5] for row in range(len(table))])
    images["file"] = images["part"] + "/" + images["path"]
    images[["path", "label", "part", "file", "sha256"]].to_csv(folder / "resize/images.csv", index=False)
    for name in ("resize", "head"):
        disk.write_json(folder / name / "class_names.json", words.natural_order(table["label"]))
    (folder / "head/model.keras").write_bytes(b"not needed")
    disk.write_json(folder / "head/model.json", {"backbone": "efficientnet_lite0"})
    return folder


class Page(HTMLParser):
    """The tags and attributes of a page, and the images that its cards tell the script about."""

    def __init__(self, path: Path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tags, self.addresses, self.images = [], [], []
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "action", "poster", "data"):
                self.addresses.append(value)
            if name == "data-image":
                self.images.append(json.loads(value))


def test_planted_errors_are_what_the_page_shows(raw, run):
    truth = raw[1]
    path, said = review.build(run)
    assert path == run / "review.html"
    assert re.fullmatch(r"suspected label errors: \d(, other confident mistakes: \d)? \(\d\.\d MB\)", said), said
    cards = Page(path).images
    assert {card["path"] for card in cards} == {path for path, name in truth.items() if path.split("/")[0] != name}
    assert all(card["suggested"] == truth[card["path"]] != card["label"] for card in cards)
    assert all(card["sha256"] == sha256(raw[0] / card["path"]) for card in cards)


@pytest.mark.parametrize("seed", range(3))
def test_most_planted_errors_are_suspected_and_little_else(seed):
    rng = np.random.default_rng(seed)
    truth, wrong = np.arange(300) % 3, rng.choice(300, 24, replace=False)
    features = rng.normal(0, 1, (300, 40)) + 4 * np.eye(40)[truth]
    labels = truth.copy()
    labels[wrong] = (labels[wrong] + 1) % 3
    probabilities = label_errors.out_of_sample(features, labels, pd.Series(["train"] * 300), pd.Series(range(300)), 3)
    found = label_errors.suspects(labels, probabilities)
    assert len(set(found) & set(wrong)) >= 20 and len(set(found) - set(wrong)) <= 6
    assert len(set(found[:10]) & set(wrong)) >= 9, "the most suspicious come first"


def test_a_label_does_not_vouch_for_itself():
    """A classifier that has learned an image believes even its wrong label; one that has not does not."""
    rng = np.random.default_rng(1)
    truth = np.arange(80) % 2
    features = rng.normal(0, 1, (80, 200)) + 1.5 * truth[:, None] * (np.arange(200) < 5)
    labels = truth.copy()
    labels[:4] = 1 - labels[:4]
    parts, groups = pd.Series(["train"] * 80), pd.Series(range(80))
    probabilities = label_errors.out_of_sample(features, labels, parts, groups, 2)
    assert (probabilities[:4].argmax(axis=1) == truth[:4]).sum() >= 3
    # A copy of each image in the same group: still nothing learns an image's own copy.
    twice = label_errors.out_of_sample(
        np.tile(features, (2, 1)), np.tile(labels, 2), pd.concat([parts] * 2), pd.concat([groups] * 2), 2
    )
    assert (twice[:4].argmax(axis=1) == truth[:4]).sum() >= 3


def test_test_images_are_never_learned_from():
    rng = np.random.default_rng(2)
    labels = np.arange(60) % 3
    features = rng.normal(0, 0.5, (60, 4)) + np.eye(4)[labels] * 3
    parts, groups = pd.Series(["train", "train", "val", "test"] * 15), pd.Series(range(60))
    before = label_errors.out_of_sample(features, labels, parts, groups, 3)
    test = (parts == "test").to_numpy()
    wrecked = np.where(test, (labels + 1) % 3, labels)
    np.testing.assert_array_equal(before, label_errors.out_of_sample(features, wrecked, parts, groups, 3))


def test_an_image_whose_class_nothing_else_has_is_not_judged():
    rng = np.random.default_rng(3)
    labels = np.r_[np.arange(40) % 2, 2]
    features = rng.normal(0, 0.5, (41, 4)) + np.eye(4)[labels] * 3
    probabilities = label_errors.out_of_sample(features, labels, pd.Series(["train"] * 41), pd.Series(range(41)), 3)
    assert np.isnan(probabilities[-1]).all() and not np.isnan(probabilities[:-1]).any()
    assert len(label_errors.suspects(labels, probabilities)) == 0
    assert len(label_errors.suspects(labels, np.full((41, 3), np.nan))) == 0


def test_more_folds_than_images_are_refused():
    features, labels = np.zeros((8, 2)), np.arange(8) % 2
    with pytest.raises(ValueError, match="--folds 5: expected 2 to 4"):
        label_errors.out_of_sample(features, labels, pd.Series(["train"] * 8), pd.Series(range(8)), 2, folds=5)


def test_copies_under_two_labels_are_shown_together(raw, tmp_path, monkeypatch):
    """A near-duplicate is in the inventory, an identical file in the quarantine; both are label conflicts."""
    root = shutil.copytree(raw[0], tmp_path / "photos")
    shutil.copy(root / "cat/cat-05.png", root / "dog/same.png")
    Image.open(root / "cat/cat-06.png").save(root / "dog/near.bmp")
    folder = make_run(tmp_path / "runs/pets", root, parameters(root))
    listed = inventory.read(folder / "explore")
    (alike,) = label_errors.look_alikes(listed, 8)
    (same,) = label_errors.identical(folder / "explore")
    assert set(alike["path"]) == {"cat/cat-06.png", "dog/near.bmp"}
    assert set(same["path"]) == {"cat/cat-05.png", "dog/same.png"} and same["sha256"].nunique() == 1
    # A group that the user gave, such as a patient, may well have several labels.
    assert len(label_errors.look_alikes(listed.assign(group="patient 7"), 8)) == 1

    table = listed[["path", "label", "sha256"]].assign(part="train")
    features = np.random.default_rng(0).normal(0, 1, (len(table), 3))
    monkeypatch.setattr(label_errors, "embed", lambda head, resized: (table, features))
    page = Page(review.build(folder)[0])
    assert [card["path"] for card in page.images][:2] == sorted(alike["path"])
    assert len({card["path"] for card in page.images}) == len(page.images), "an image is shown once"
    # The fix brings the set-aside pair back: one of two identical files is removed.
    file = write_fixes(tmp_path / "fixes.csv", root, ("dog/same.png", ""), ("dog/near.bmp", "cat"))
    mended, quarantine = inventory.take(sources.read(parameters(root, fixes=str(file))))
    assert quarantine.empty and "cat/cat-05.png" in set(mended["path"])
    assert grouping.disagreements(grouping.group(mended)).empty


def test_the_page_is_whole_and_safe(tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    table = pd.DataFrame({"path": [f"{NASTY}.png", "b\r\nc.png", "gone.png"], "label": [NASTY, "b", "b"]})
    table["part"], table["sha256"], table["group"] = ["test", "train", "val"], "0" * 64, "g"
    probabilities = np.array([[0.1, 0.9], [0.8, 0.2], [0.7, 0.3]])
    names = [NASTY, "b"]
    evidence = review.Evidence(table, probabilities, names, [])
    found = review.sections(evidence)
    about = {"backbone": NASTY, "folds": 5, "earlier": [[NASTY, NASTY, "0"]]}
    page = tmp_path / "review.html"
    page.write_text(review.render(tmp_path / NASTY.replace("/", ""), root, evidence, found, about), encoding="utf-8")
    parsed = Page(page)
    assert parsed.tags.count("script") == 2 and "<script>alert" not in parsed.text
    assert all(address.startswith(("data:", "#")) for address in parsed.addresses)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", parsed.text)
    assert {card["path"] for card in parsed.images} == set(table["path"]), "names come back as they are, line ends too"
    script = re.search(r"<script>(.*)</script>\s*</body>", parsed.text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in parsed.text


def test_a_page_without_doubts_says_so(tmp_path):
    table = pd.DataFrame({"path": ["a", "b"], "label": ["a", "b"], "part": "train", "sha256": "", "group": "g"})
    evidence = review.Evidence(table, np.array([[0.9, 0.1], [0.2, 0.8]]), ["a", "b"], [])
    found = review.sections(evidence)
    about = {"backbone": "x", "folds": 5, "earlier": []}
    assert found == [] and "no label looks wrong" in review.render(tmp_path, tmp_path, evidence, found, about)


def test_what_is_missing_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    with pytest.raises(ImportError, match=r"needs cleanlab: pip install -e '\.\[review\]'"):
        review.build(run)
    monkeypatch.undo()
    shutil.rmtree(run / "head")
    with pytest.raises(FileNotFoundError, match=r"head does not exist. Run notebooks/03_train_head.ipynb first"):
        review.build(run)


# The fixes file


def test_fixes_are_laid_over_the_labels(raw, tmp_path):
    root, truth = raw
    before, wrong = state(root), [path for path, name in truth.items() if path.split("/")[0] != name]
    file = write_fixes(tmp_path / "fixes.csv", root, *((path, truth[path]) for path in wrong), ("cat/cat-00.png", ""))
    source = sources.read(parameters(root, fixes=str(file)))
    assert dict(zip(source.table["path"], source.table["label"], strict=True)) == {
        path: name for path, name in truth.items() if path != "cat/cat-00.png"
    }
    assert len(source.fixes) == 6 and list(source.fixes.columns) == fixes.CHANGES
    assert fixes.sentence(source.fixes) == "5 labels corrected, 1 image removed by fixes.csv."
    assert state(root) == before, "the raw data is never changed"


def test_fixes_are_part_of_the_fingerprint(raw, tmp_path):
    root, _ = raw
    file = write_fixes(tmp_path / "fixes.csv", root, ("cat/cat-00.png", "dog"))
    found = [inventory.source_fingerprint(parameters(root, **given)) for given in ({}, {"fixes": str(file)})]
    write_fixes(file, root, ("cat/cat-00.png", ""))
    found.append(inventory.source_fingerprint(parameters(root, fixes=str(file))))
    assert len(set(found)) == 3
    assert found[2] == inventory.source_fingerprint(parameters(root, fixes=str(shutil.copy(file, tmp_path / "b.csv"))))


def test_a_fix_of_an_image_that_is_gone_is_counted(raw, tmp_path):
    root, _ = raw
    file = write_fixes(tmp_path / "fixes.csv", root, ("cat/cat-00.png", "dog"))
    file.write_text(file.read_text() + "cat/lost.png,dog,00\n../../etc/passwd,dog,00\n")
    source = sources.read(parameters(root, fixes=str(file)))
    assert source.ignored["fixes of images that are no longer there"] == 2 and len(source.fixes) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "fixes: there is no file"),
        ("", "fixes: fixes.csv cannot be read as a table"),
        ("path,label\na,b\n", "has no column sha256. It has: path, label. Expected path, label, sha256"),
        ("path,label,sha256\na,cat,0\na,dog,0\n", "1 images in fixes.csv are listed more than once, differently: 'a'"),
        (
            "path,label,sha256\ncat/cat-00.png,bird,{0}\n",
            r"labels in fixes.csv are not among the classes \(cat, dog\): 'b",
        ),
        (
            "path,label,sha256\ncat/cat-00.png,dog,{1}\n",
            "are not the reviewed ones: .* again: 'cat/cat-00.png'",
        ),
        ("path,label,sha256\ncat/cat-00.png,dog,\n", "are not the reviewed ones"),
        ("path,label,sha256\nx/1.png,dog,0\n", "has none of the 1 images in fixes.csv, such as 'x/1.png'"),
    ],
)
def test_a_fixes_file_that_does_not_fit_is_refused(raw, tmp_path, text, says):
    root, _ = raw
    file = tmp_path / "fixes.csv"
    if text is not None:
        file.write_text(text.format(sha256(root / "cat/cat-00.png"), sha256(root / "cat/cat-01.png")))
    with pytest.raises((FileNotFoundError, ValueError), match=says):
        sources.read(parameters(root, fixes=str(file)))


def test_fixes_that_leave_one_class_are_refused(tmp_path, image_folder):
    root = image_folder(tmp_path / "photos", {"cat": 2, "dog": 1}, size=32)
    file = write_fixes(tmp_path / "fixes.csv", root, ("dog/dog-00.png", "cat"))
    with pytest.raises(ValueError, match="Only one class is left"):
        sources.read(parameters(root, fixes=str(file)))


def test_a_file_from_a_spreadsheet_is_read(raw, tmp_path):
    root, _ = raw
    file = write_fixes(tmp_path / "fixes.csv", root, ("cat/cat-00.png", " dog "))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert sources.read(parameters(root, fixes=str(file))).fixes["to"].tolist() == ["dog"]


def test_the_notebook_applies_the_fixes_and_the_report_credits_them(raw, tmp_path):
    root, _ = raw
    file = write_fixes(tmp_path / "fixes.csv", root, ("dog/cat-03.png", "cat"), ("cat/cat-00.png", ""))
    out = tmp_path / "runs/pets/explore"
    notebook = notebooks.find_stage("explore").notebook
    given = {"source": str(root), "fixes": str(file), "out": str(out)}
    papermill.execute_notebook(notebook, tmp_path / "out.ipynb", given, cwd=str(project.ROOT), progress_bar=False)
    listed = inventory.read(out).set_index("path")["label"]
    assert listed["dog/cat-03.png"] == "cat" and "cat/cat-00.png" not in listed
    kept = pd.read_csv(out / "fixes.csv", keep_default_na=False)
    assert kept[["path", "from", "to"]].to_numpy().tolist() == [
        ["cat/cat-00.png", "cat", ""],
        ["dog/cat-03.png", "dog", "cat"],
    ]
    page = report.build_report(out.parent).read_text(encoding="utf-8")
    assert "1 label corrected, 1 image removed by fixes.csv." in page


# In a real browser


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def page(browser, run):
    """The review page of the run, opened; nothing may be asked of a network, and no script may fail."""
    context = browser.new_context(accept_downloads=True, offline=True)
    page, asked, failed = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("console", lambda message: failed.append(message.text))
    path, _ = review.build(run)
    page.goto(path.as_uri())
    yield page
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == [] and failed == []


def save(page, target: Path) -> Path:
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "fixes.csv"
    download.value.save_as(target)
    return target


def card(page, path: str):
    return page.locator(f'.card:has(.path[title="{path}"])')


@pytest.mark.browser
def test_ticks_and_menus_become_fixes_that_correct_the_labels(page, raw, tmp_path):
    root, _ = raw
    before = state(root)
    assert page.locator("#save").is_disabled() and page.locator(".card").count() == 5
    card(page, "dog/cat-03.png").locator("input").check()
    card(page, "cat/dog-00.png").locator("input").check()
    card(page, "cat/dog-00.png").locator("select").select_option(label="remove the image")
    card(page, "dog/cat-17.png").locator("input").check()
    card(page, "dog/cat-17.png").locator("select").select_option(label="choose the correct label")
    assert page.inner_text("#count") == "1 label to correct, 1 image to remove, 1 still without a label"
    assert not page.locator("#next").is_visible()
    file = save(page, tmp_path / "saved.csv")
    assert page.locator("#next").is_visible()
    with file.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    assert header == fixes.COLUMNS and sorted(rows) == [
        ["cat/dog-00.png", "", sha256(root / "cat/dog-00.png")],
        ["dog/cat-03.png", "cat", sha256(root / "dog/cat-03.png")],
    ]
    labels = sources.read(parameters(root, fixes=str(file))).table.set_index("path")["label"]
    assert labels["dog/cat-03.png"] == "cat" and "cat/dog-00.png" not in labels and labels["dog/cat-17.png"] == "dog"
    assert state(root) == before


@pytest.mark.browser
def test_the_keyboard_is_enough(page, tmp_path):
    first, second, third = [page.locator(".card").nth(number) for number in range(3)]
    first.locator("input").focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Delete")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.locator("#large").is_visible() and third.locator(".path").get_attribute("title") in page.inner_text(
        "#large"
    )
    page.keyboard.press("1" if "dog" in third.locator(".given").inner_text() else "2")
    page.keyboard.press("Escape")
    assert page.inner_text("#count") == "2 labels to correct, 1 image to remove"
    assert "removed" in second.get_attribute("class")
    page.check("#only-marked")
    assert page.locator(".card:visible").count() == 3
    with page.expect_download() as download:
        page.keyboard.press("Control+s")
    download.value.save_as(tmp_path / "saved.csv")
    assert len(fixes.read(tmp_path / "saved.csv")) == 3
    third.locator("input").focus()
    page.keyboard.press("2" if "dog" in third.locator(".given").inner_text() else "1")
    assert page.inner_text("#count") == "1 label to correct, 1 image to remove", "the given label is right after all"


@pytest.mark.browser
def test_earlier_fixes_stay_and_names_come_back_as_they_are(browser, tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    path = 'a, "b"\r\n<script>;=1+1.png'
    table = pd.DataFrame({"path": [path, "b.png"], "label": ["b", "b"], "part": "train", "sha256": "ab", "group": "g"})
    evidence = review.Evidence(table, np.array([[0.9, 0.1], [0.1, 0.9]]), [NASTY, "b"], [])
    about = {"backbone": "x", "folds": 5, "earlier": [["old.png", "", "cd"], [path, "b", "ab"]]}
    html = tmp_path / "review.html"
    html.write_text(review.render(tmp_path, root, evidence, review.sections(evidence), about), encoding="utf-8")
    page = browser.new_page()
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    page.goto(html.as_uri())
    page.locator(".card input").check()
    found = fixes.read(save(page, tmp_path / "saved.csv")).to_numpy().tolist()
    assert found == [["old.png", "", "cd"], [path, NASTY, "ab"]]


# With a real model


def test_the_command_writes_the_page(tmp_path, image_folder, capsys, monkeypatch):
    keras = pytest.importorskip("keras")
    from helpers.cli import main

    root = image_folder(tmp_path / "photos", {"cat": 12, "dog": 12}, size=32)
    folder = make_run(tmp_path / "runs/pets", root, parameters(root))
    listed = pd.read_csv(folder / "resize/images.csv")
    for row in listed.itertuples():
        (folder / "resize" / row.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / row.path, folder / "resize" / row.file)
    disk.write_json(folder / "resize/resize.json", {"image_size": 32, "fit": "crop", "format": "png"})
    keras.utils.set_random_seed(0)
    pixels = keras.Input((32, 32, 3))
    backbone = keras.Model(pixels, keras.layers.Conv2D(8, 3)(pixels), name="backbone")
    image = keras.Input((32, 32, 3), name="image")
    pooled = keras.layers.GlobalAveragePooling2D()(backbone(image, training=False))
    head = keras.layers.Dense(2, activation="softmax")(keras.layers.Dropout(0.2)(pooled))
    keras.Model(image, head).save(folder / "head/model.keras")
    monkeypatch.setattr(
        sys, "argv", ["thaw", "review", str(folder), "--folds", "3", "--out", str(tmp_path / "page.html")]
    )
    with pytest.raises(SystemExit) as end:
        main.entry()
    shown = capsys.readouterr().out
    assert not end.value.code and "page.html" in shown and "explore.fixes" in shown
    table, features = label_errors.embed(folder / "head", folder / "resize")
    assert features.shape == (24, 8) and set(table["path"]) == set(listed["path"])
    assert f"{len(table)} images were judged" in Page(tmp_path / "page.html").text

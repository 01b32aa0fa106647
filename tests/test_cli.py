"""The command: what it says, what it exits with, and that a mistake is one clear message before any work is done."""

import errno
import io
import os
import re
import sys
import tarfile
import tracemalloc
import zipfile
from collections import deque
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from typer.main import get_command

from helpers.cli import classify, main
from helpers.core import notebooks, project
from helpers.data import sources
from helpers.data.formats import listing
from helpers.data.labelling import archives
from helpers.evaluation import prediction
from helpers.pipeline import checks, planning, recipes

ROOT = project.ROOT
COMMANDS = get_command(main.app).commands


@pytest.fixture
def thaw(monkeypatch, capsys):
    """Call `thaw` with arguments; return its exit code and what it printed."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["thaw", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main.entry()
        shown = capsys.readouterr()
        return end.value.code or 0, shown.out + shown.err

    monkeypatch.setenv("COLUMNS", "200")
    return call


@pytest.fixture
def photos(tmp_path, image_folder):
    return image_folder(tmp_path / "photos", {"cat": 6, "dog": 6}, size=32)


@pytest.fixture
def recipe(tmp_path, photos, runs_folder):
    path = tmp_path / "job.yaml"
    path.write_text(f"explore: {{source: {photos}}}\nhead: {{epochs: 3}}\n")
    return path


# Help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_explains_itself(thaw, command):
    code, shown = thaw(*filter(None, [command, "--help"]))
    assert code == 0 and "Usage" in shown
    if command:
        assert re.sub(r"\s+", " ", COMMANDS[command].help.split(".")[0])[:40] in re.sub(r"\s+", " ", shown)


def test_every_option_is_explained():
    for name, command in COMMANDS.items():
        for parameter in command.params:
            assert parameter.help, f"thaw {name}: {parameter.name} has no help"


def test_without_a_command_the_help_is_shown(thaw):
    assert "transfer learning for image classification" in thaw()[1]


@pytest.mark.parametrize("arguments", [["rnu"], ["run"], ["run", "a.yaml", "--nonsense"]])
def test_wrong_usage_is_exit_code_two(thaw, arguments):
    assert thaw(*arguments)[0] == 2


@pytest.mark.parametrize("stage", ["head", "03", "3", "03_train_head"])
def test_parameters_are_explained_from_the_notebook(thaw, stage):
    code, shown = thaw("params", stage)
    assert code == 0 and "head (notebooks/03_train_head.ipynb)" in shown
    for p in notebooks.find_stage("head").parameters.values():
        assert p.name in shown and p.meaning.split("`")[0] in shown and p.allowed in shown
    assert "list[Union[int, dict]]" in shown


def test_an_unknown_stage_is_told(thaw):
    assert thaw("params", "haed") == (1, "There is no stage 'haed'. Did you mean head?\n")


# Show


def test_show_resolves_every_parameter_and_says_what_is_to_do(thaw, recipe):
    code, shown = thaw("show", recipe, "--set", "fine_tune.epochs=4")
    assert code == 0
    rows = {tuple(line.split()[:2]) for line in shown.splitlines()}
    assert {("epochs", "3"), ("epochs", "4"), ("resize", "image_size")} <= rows
    assert shown.count("to do: not made yet") == len(recipes.load(recipe).chain())


def test_dry_run_writes_no_run(thaw, recipe, runs_folder):
    code, shown = thaw("run", recipe, "--dry-run", "--to", "resize")
    assert code == 0 and shown.count("would run") == 3 and not (runs_folder / "job").exists()


# Mistakes: one message, nothing done


def mistake(thaw, runs_folder, *arguments):
    code, shown = thaw(*arguments)
    assert code == 1 and "Traceback" not in shown
    made = [path.name for path in (runs_folder / ".store").glob("*-*[!k]")] if runs_folder.exists() else []
    assert made == [], "a mistake that can be seen beforehand must be told beforehand"
    return re.sub(r"\s+", " ", shown)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "haed.epochs=5"], "haed: there is no such stage. Did you mean head?"),
        (["--set", "head.epoch=5"], "head.epoch: there is no such parameter. Did you mean epochs?"),
        (["--set", "head.epochs=many"], "head.epochs: expected int in [0, 10000], got 'many'"),
        (["--set", "resize.image_size=16"], "resize.image_size: expected int in [32, 4096], got 16"),
        (["--set", "resize.fit=stretch"], "resize.fit: expected"),
        (["--set", "split.ratio=[0.9, 0.9, 0.1]"], "1"),
        (["--set", "split.ratio=[0.5, 0.5]"], "ratio"),
        (["--name", "a/b/c"], "'a/b/c' cannot name a run"),
        (["--name", "a.b"], "'a.b' cannot name a run"),
        (["--from", "haed"], "There is no stage 'haed'. Did you mean head?"),
        (["--rebuild", "haed"], "There is no stage 'haed'"),
        (["--from", "head"], "--from head needs explore, split, resize to be done"),
        (["--from", "head", "--to", "split"], "--from head comes after --to split"),
        (["--set", "explore.source=nowhere"], "source: 'nowhere' is neither a folder"),
        (["--set", "head.backbone=resnet5"], "resnet50"),
        (["--set", "head.weights=lost.weights.h5"], "head.weights: there is no file lost.weights.h5"),
        (["--set", "evaluate.monitor=val_auc"], "but head does not measure it. Set head.monitor to val_auc too"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(thaw, recipe, runs_folder, arguments, expected):
    assert expected in mistake(thaw, runs_folder, "run", recipe, *arguments)


def test_a_recipe_that_is_not_there(thaw, runs_folder):
    assert "There is no recipe recipes/elvp.yaml. Did you mean recipes/elpv.yaml" in mistake(
        thaw, runs_folder, "run", "recipes/elvp.yaml"
    )


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({}, "holds no labelled image. It is empty. Expected: a folder per class"),
        ({"cat": 3}, "Only one class is left, ['cat']: a classifier needs at least two"),
        ({"cat": 3, "Cat": 3}, "These classes differ only in case: Cat, cat"),
        ({"cat": 3, "predicted": 3}, "A class cannot be called predicted"),
        (
            {"cat": 3, "dog": 3, "bird": 1},
            "1 of 3 classes have too few images to be both learned and tested: bird (1 in one",
        ),
    ],
)
def test_a_source_that_nothing_can_be_learned_from(thaw, recipe, runs_folder, tmp_path, image_folder, counts, expected):
    (tmp_path / "other").mkdir()
    image_folder(tmp_path / "other", counts)
    shown = mistake(thaw, runs_folder, "run", recipe, "--set", f"explore.source={tmp_path / 'other'}")
    assert expected in shown


@pytest.mark.parametrize(
    "given",
    [
        ["split.ratio=[0.7, 0, 0.3]"],
        ["split.method=hash", "split.ratio=[0.7, 0, 0.3]"],
        ["split.method=fixed", "split.counts=[0, 0, 2]"],
    ],
)
def test_no_validation_part_is_told_before_anything_runs(thaw, recipe, runs_folder, given):
    pairs = [part for setting in given for part in ("--set", setting)]
    assert "there would be no validation part" in mistake(thaw, runs_folder, "run", recipe, *pairs)


def test_a_layer_that_the_backbone_lacks(thaw, recipe, runs_folder):
    shown = mistake(thaw, runs_folder, "run", recipe, "--set", "fine_tune.unfreeze=blok7")
    assert "fine_tune.unfreeze: " in shown and "block7" in shown


def test_a_backbone_is_checked_whatever_is_unfrozen(thaw, recipe, runs_folder):
    arguments = ["--set", "head.backbone=efficientnet_lite9", "--set", "fine_tune.unfreeze=all"]
    assert "efficientnet_lite0" in mistake(thaw, runs_folder, "run", recipe, *arguments)


def test_no_space(thaw, recipe, runs_folder, monkeypatch):
    import shutil

    monkeypatch.setattr(checks, "check", lambda *_: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    assert "Only 0 MB are free on the disk of" in mistake(thaw, runs_folder, "run", recipe)


def test_a_disk_that_is_full_between_two_stages_is_told_with_what_could_go(thaw, recipe, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "manifest.json.tmp")

    monkeypatch.setattr(planning, "plan", full)
    code, shown = thaw("show", recipe)
    assert code == 1 and "manifest.json.tmp" in shown and "is full. `thaw clean` lists what can be deleted" in shown


def test_a_programming_error_keeps_its_traceback(thaw, recipe, monkeypatch):
    monkeypatch.setattr(planning, "plan", lambda *_: {}["missing"])
    with pytest.raises(KeyError):
        thaw("show", recipe)


def test_thaw_debug_shows_where_an_expected_error_came_from(monkeypatch):
    monkeypatch.setenv("THAW_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["thaw", "params", "haed"])
    with pytest.raises(notebooks.RecipeError):
        main.entry()


# New


@pytest.fixture
def project(tmp_path, monkeypatch, runs_folder):
    """Recipes are written to a project of the test's own."""
    root = tmp_path / "project"
    (root / "recipes").mkdir(parents=True)
    monkeypatch.setattr("helpers.core.project.ROOT", root)
    return root


def test_new_writes_a_recipe_that_can_be_run_as_it_is(thaw, project, photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    code, shown = thaw("new", "my_photos", "photos")
    assert (
        code == 0 and "12 images in 2 classes, 6 to 6 a class" in shown and "thaw run recipes/my_photos.yaml" in shown
    )
    recipe = recipes.load(project / "recipes/my_photos.yaml")
    assert recipe.name == "my_photos" and recipe.resolved("explore")["source"] == str(photos)
    monkeypatch.setattr("helpers.core.project.ROOT", ROOT)
    assert thaw("run", project / "recipes/my_photos.yaml", "--dry-run")[0] == 0


def test_new_explains_every_parameter_with_its_own_value(thaw, project, photos):
    thaw("new", "all", photos)
    path = project / "recipes/all.yaml"
    text = path.read_text()
    for stage in notebooks.stages().values():
        for p in stage.settings.values():
            assert f"{p.name}: " in text and f"# {p.meaning}" in text
    body = text.split("\nname: ")[1]
    path.write_text("name: " + re.sub(r"^# ( *)", r"\1", body, flags=re.M))
    given = recipes.load(path)
    assert set(given.stages) == set(notebooks.stages())
    for name, stage in notebooks.stages().items():
        expected = {p.name: p.default for p in stage.settings.values()}
        expected |= {"source": str(photos)} if name == "explore" else {}
        changed = {key for key, value in given.stages[name].items() if value != expected[key]}
        assert set(given.stages[name]) == set(expected) and not changed - {
            "image_size",
            "imbalance",
            "batch_size",
            "levels",
            "pool",
            "solver",
        }


def test_new_says_what_must_be_mended_before_it_can_run(thaw, project, tmp_path, image_folder):
    image_folder(tmp_path / "few", {"cat": 9, "dog": 9, "bird": 1}, size=32)
    code, shown = thaw("new", "few", tmp_path / "few")
    assert code == 0 and "Before it can run: 1 of 3 classes have too few images" in " ".join(shown.split())
    assert "bird (1 in one group)" in shown and "split.rare" in shown


def test_new_weighs_unequal_classes(thaw, project, tmp_path, image_folder):
    image_folder(tmp_path / "odd", {"cat": 10, "dog": 2}, size=32)
    assert "unequal" in thaw("new", "odd", tmp_path / "odd")[1]
    assert recipes.load(project / "recipes/odd.yaml").resolved("head")["imbalance"] == "class_weight"


@pytest.mark.parametrize("train, val, test", [("train", "val", "test"), ("Training", "validation", "TESTING")])
def test_new_keeps_a_ready_made_split(thaw, project, tmp_path, image_folder, train, val, test):
    image_folder(tmp_path / "set" / train, {"cat": 4, "dog": 4}, size=32)
    image_folder(tmp_path / "set" / val, {"cat": 2, "dog": 1}, size=32)
    image_folder(tmp_path / "set" / test, {"cat": 2}, size=32)
    code, shown = thaw("new", "parts", tmp_path / "set")
    assert code == 0 and "in 2 classes" in shown and "train 8, val 3, test 2" in shown
    assert "test lacks 1 of the classes: dog" in shown
    assert recipes.load(project / "recipes/parts.yaml").resolved("split")["method"] == "predefined"


FORMS = {  # folders -> images, what the terminal says, the parts that come of it
    "other spellings": (
        {"x_train/cat": 4, "x_train/dog": 4, "x_test/cat": 2, "x_test/dog": 2},
        "train 8, test 4",
    ),
    "words around": ({"train_images/cat": 4, "train_images/dog": 4, "val_images/cat": 2}, "train 8, val 2"),
    "years": ({"train2017/cat": 4, "train2017/dog": 4, "val2017/cat": 2}, "train 8, val 2"),
    "camels": ({"TrainSet/cat": 4, "TrainSet/dog": 4, "TestSet/cat": 2}, "train 8, test 2"),
    "doubled": (
        {"x_train/x_train/cat": 4, "x_train/x_train/dog": 4, "x_test/x_test/cat": 2},
        "train 8, test 2",
    ),
    "wrapped": ({"set/photos/train/cat": 4, "set/photos/train/dog": 4, "set/photos/test/dog": 2}, "are in set/photos/"),
    "images within": ({"train/images/cat": 4, "train/images/dog": 4, "test/images/cat": 2}, "train 8, test 2"),
    "unlabelled beside": (
        {"seg_train/cat": 4, "seg_train/dog": 4, "seg_test/cat": 2, "seg_pred": 3},
        "seg_pred/, beside the parts, holds 3 images without folders of classes",
    ),
    "a test without labels": (
        {"train/cat": 4, "train/dog": 4, "test": 2, "predict": 2},
        "test/ holds 2 images without folders of classes",
    ),
    "train alone beside new ones": (
        {"train/cat": 4, "train/dog": 4, "predict": 2},
        "predict/, beside the parts, holds 2",
    ),
    "a copy beside": (
        {"train/cat": 4, "train/dog": 4, "test/cat": 2, "copy/train/cat": 4, "copy/test/cat": 2},
        "copy/, beside the parts, holds 6 images in parts of its own",
    ),
    "parts in classes": (
        {"cat/train": 4, "cat/test": 2, "dog/train": 4, "dog/test": 2},
        "test, train are in the folder of each class",
    ),
    "images in classes": (
        {"train/cat/images": 4, "train/dog/images": 4, "test/cat/images": 2},
        "train 8, test 2",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_new_takes_no_folder_of_a_part_for_a_class(thaw, project, tmp_path, image_folder, form):
    folders, said = FORMS[form]
    image_folder(tmp_path / "set", folders, size=32)
    code, shown = thaw("new", "parts", tmp_path / "set")
    assert code == 0 and "images in 2 classes" in shown and said in " ".join(shown.split())
    recipe = recipes.load(project / "recipes/parts.yaml")
    assert recipe.resolved("split")["method"] == "predefined"
    source = sources.read(recipe.resolved("explore"))
    assert {*source.table["label"]} == {"cat", "dog"} and "train" in {*source.table["split"]}


@pytest.mark.parametrize(
    "folders, said",
    [
        ({"plant/rose": 3, "animal/cat": 3}, "as upper (2 classes: animal, plant) or as lower (2 classes: cat, rose)"),
        (
            {"plant/rose": 3, "plant/fern": 3, "animal/cat": 3},
            "as upper (2 classes: animal, plant) or as lower (3 classes: cat, fern, rose)",
        ),
        (
            {"train/plant/rose": 3, "train/animal/cat": 3, "test/plant/rose": 3},
            "as upper (2 classes: animal, plant) or as lower",
        ),
        ({"train/cat": 4, "train/dog": 4, "test/cat": 2, "extra/cat": 2}, "extra with 2 images in folders is beside"),
        ({"train": 4, "test": 4}, "train holds no folder for each class"),
        ({"val/cat": 4, "test/cat": 4}, "there is no train"),
        ({"train/cat": 4, "train/dog": 4, "car": 4}, "can be read in two ways: train is a part"),
        ({"train/cat": 4, "test/cat": 4, "x_train/cat": 4, "x_test/cat": 4}, "look like 2 ready-made splits"),
    ],
)
def test_new_guesses_nothing_where_folders_have_two_readings(thaw, project, tmp_path, image_folder, folders, said):
    image_folder(tmp_path / "set", folders, size=32)
    code, shown = thaw("new", "parts", tmp_path / "set")
    assert code == 1 and said in " ".join(shown.split())
    assert not (project / "recipes/parts.yaml").exists()


@pytest.mark.parametrize(
    "choice, classes",
    [
        ("upper", {"plant", "animal"}),
        ("lower", {"rose", "cat", "dog"}),
        ("path", {"plant/rose", "animal/cat", "animal/dog"}),
    ],
)
def test_the_level_of_the_classes_can_be_chosen(thaw, project, tmp_path, image_folder, choice, classes):
    image_folder(tmp_path / "set", {"plant/rose": 3, "animal/cat": 3, "animal/dog": 3}, size=32)
    assert thaw("new", "levels", tmp_path / "set", "--classes", choice)[0] == 0
    recipe = recipes.load(project / "recipes/levels.yaml")
    assert recipe.resolved("explore")["class_folders"] == choice
    assert {*sources.read(recipe.resolved("explore")).table["label"]} == classes


# Tables of labels


@pytest.fixture
def table(thaw, project, tmp_path, image_folder):
    """A function that writes a table beside twelve images and returns what `thaw new` says and reads of it."""
    image_folder(tmp_path / "set", {"images": 12}, size=32)
    names = [f"images-{number:02}" for number in range(12)]

    def new(text: str | bytes, name: str = "labels.csv", *options: str):
        file = tmp_path / "set" / name
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        code, shown = thaw("new", "table", file, *options)
        path = project / "recipes/table.yaml"
        found = sources.read(recipes.load(path).resolved("explore")) if path.exists() else None
        return code, " ".join(shown.split()), found

    return names, new


def lines(names, form="images/{}.png,{}", head="path,label", labels=("cat", "dog"), end="\n"):
    rows = [form.format(name, labels[number % len(labels)]) for number, name in enumerate(names)]
    return end.join([head, *rows]) + end


TABLES = {
    "plain": {},
    "backslashes": {"form": "images\\{}.png,{}"},
    "blanks after commas, quoted": {"head": '"path", "label"', "form": '"images/{}.png", "{}"'},
    "a semicolon in a quoted header": {"head": '"path","label;of the expert"', "form": '"images/{}.png","{}"'},
    "semicolons": {"head": "path;label", "form": "images/{}.png;{}"},
    "bars": {"head": "path|label", "form": "images/{}.png|{}"},
    "a comma behind every line": {"form": "images/{}.png,{},"},
    "other names": {"head": "image_id,dx", "form": "{},{}"},
    "another column first": {"head": "number,file,breed", "form": "7,{}.png,{}"},
    "another case": {"form": "images/{}.PNG,{}"},
    "crlf": {"end": "\r\n"},
}


@pytest.mark.parametrize("form", TABLES)
def test_new_takes_a_table_of_labels(table, form):
    names, new = table
    code, shown, found = new(lines(names, **TABLES[form]))
    assert code == 0 and "12 images in 2 classes" in shown, shown
    assert "Columns of labels.csv: path" in shown
    assert [*found.table["label"]] == ["cat", "dog"] * 6 and not found.rejected
    assert all((found.root / path).is_file() for path in found.table["path"])


def test_new_takes_a_table_in_utf_16_with_parts_and_patients(table):
    names, new = table
    rows = [f"{name}.png\t{'ab'[number % 2]}\t{'train' if number < 8 else 'test'}\tp{number // 2}"
            for number, name in enumerate(names)]  # fmt: skip
    code, shown, found = new("\n".join(["image\tclass\tusage\tpatient_id", *rows]).encode("utf-16"), "all.tsv")
    assert code == 0 and "split 'usage', group 'patient_id'" in shown and "train 8, test 4" in shown
    assert found.table["group"].nunique() == 6


@pytest.mark.parametrize(
    "labels, classes, rejected, said",
    [
        (("0", "1", "0.0", "1.0"), {"0", "1"}, 0, "0.0 is 0, 1.0 is 1"),
        (("0.0", "1.0"), {"0.0", "1.0"}, 0, ""),
        (("01", "1", "1.0"), {"01", "1"}, 0, "1.0 is 1"),
        (("a", "b", "nan", "NaN"), {"a", "b"}, 6, ""),
        (("None", "NA"), {"None", "NA"}, 0, ""),
        (("cat", "dog", "cat|dog"), {"cat", "dog", "cat|dog"}, 0, "'cat|dog' looks like several labels of one image"),
        (("red", "green", "dark, blue"), {"red", "green", "dark, blue"}, 0, ""),
    ],
)
def test_labels_are_taken_for_what_they_mean(table, labels, classes, rejected, said):
    names, new = table
    code, shown, found = new(lines(names, form='images/{}.png,"{}"', labels=labels))
    assert code == 0 and said in shown and {*found.table["label"]} == classes
    assert len(found.rejected) == rejected and {row["reason"] for row in found.rejected} <= {"no label"}
    assert said or "looks like" not in shown


@pytest.mark.parametrize(
    "text, said",
    [
        (
            lambda names: lines(names) + "images/x.png,a,b\n",
            "line 14 of labels.csv has 3 values, but the first line names 2",
        ),
        (lambda names: lines(names) + '"images/x.png,a\n', "line 14 of labels.csv cannot be read"),
        (
            lambda names: lines(names).partition("\n")[2],
            "first line of labels.csv is a row (images/images-00.png, cat)",
        ),
        (lambda names: lines(names, form="no/{}.png,{}"), "no column of labels.csv names a file"),
        (
            lambda names: lines(names, head="path,x,y1", form="images/{0}.png,{1},{1}"),
            "Several columns could hold the labels",
        ),
        (lambda names: lines(names, head="path,size", form="images/{0}.png,{0}"), "No column could hold the labels"),
        (lambda names: lines(names, head="path,path"), "two columns named 'path'"),
        (lambda names: "", "labels.csv is empty"),
    ],
)
def test_a_table_with_no_sensible_reading_is_refused_with_its_line(table, text, said):
    names, new = table
    code, shown, _ = new(text(names))
    assert code == 1 and said in shown, shown


def test_the_columns_of_a_table_can_be_told(table):
    names, new = table
    text = lines(names, head="path,kind,roll", form="images/{0}.png,{1},{1}")
    code, shown, _ = new(text, "labels.csv", "--label", "kynd")
    assert code == 1 and "no column 'kynd'. Did you mean kind?" in shown
    code, shown, found = new(text, "labels.csv", "--label", "kind", "--group", "roll")
    assert code == 0 and "label 'kind', group 'roll'" in shown
    assert set(found.table["label"]) == {"cat", "dog"} == set(found.table["group"])


def test_a_table_has_no_levels_of_folders(thaw, project, tmp_path):
    (tmp_path / "labels.csv").write_text("path,label\n")
    assert "--classes is for folders" in thaw("new", "x", tmp_path / "labels.csv", "--classes", "lower")[1]


def test_a_folder_without_classes_names_the_table_in_it(thaw, project, tmp_path, image_folder):
    image_folder(tmp_path / "set", {"images": 4}, size=32)
    (tmp_path / "set/labels.csv").write_text("path,label\n")
    code, shown = thaw("new", "x", tmp_path / "set")
    assert code == 1 and f"thaw new x {tmp_path}/set/labels.csv" in " ".join(shown.split())


# Archives


def packed(folder, path, wrap="photos"):
    """Pack a folder as `path` says, with what macOS adds."""
    files = {f"{wrap}/{file.relative_to(folder).as_posix()}": file.read_bytes() for file in folder.rglob("*.png")}
    files |= {f"__MACOSX/{wrap}/._x.png": b"x", f"{wrap}/.DS_Store": b"x"}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if path.suffix != ".tar" else "w") as archive:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", ["set.zip", "set.tar.gz", "set.tgz", "set.tar"])
def test_new_unpacks_an_archive_into_data(thaw, project, photos, tmp_path, name):
    archive = packed(photos, tmp_path / name)
    code, shown = thaw("new", "mine", *(["--from", archive] if name == "set.zip" else [archive]))
    assert code == 0 and f"{name} is unpacked into data/mine" in shown and "12 images in 2 classes" in shown
    assert sorted(path.name for path in (project / "data/mine").iterdir()) == ["photos"]
    assert recipes.load(project / "recipes/mine.yaml").resolved("explore")["source"] == "data/mine"
    (project / "recipes/mine.yaml").unlink()
    code, shown = thaw("new", "mine", archive)
    assert code == 1 and "data/mine exists already" in shown


def tar_with(member):
    def write(path):
        with tarfile.open(path, "w") as archive:
            archive.addfile(member, io.BytesIO(b""))

    return write


def tar_member(name, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def zip_with(name, mode=0):
    def write(path):
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(info, b"/etc/passwd")

    return write


UNSAFE = {
    "above.tar": (tar_with(tar_member("../../x.png")), "leads out of the folder"),
    "root.tar": (tar_with(tar_member("/tmp/x.png")), "leads out of the folder"),
    "link.tar": (tar_with(tar_member("x.png", tarfile.SYMTYPE)), "a link or a device"),
    "hard.tar": (tar_with(tar_member("x.png", tarfile.LNKTYPE)), "a link or a device"),
    "device.tar": (tar_with(tar_member("x.png", tarfile.CHRTYPE)), "a link or a device"),
    "pipe.tar": (tar_with(tar_member("x.png", tarfile.FIFOTYPE)), "a link or a device"),
    "above.zip": (zip_with("../x.png"), "leads out of the folder"),
    "windows.zip": (zip_with("a\\..\\..\\x.png"), "leads out of the folder"),
    "drive.zip": (zip_with("C:/x.png"), "leads out of the folder"),
    "link.zip": (zip_with("x.png", 0o120777), "a link or a device"),
    "damaged.zip": (lambda path: path.write_bytes(b"PK no more"), "is damaged or not an archive"),
    "damaged.tgz": (lambda path: path.write_bytes(b"\x1f\x8b no more"), "is damaged or not an archive"),
    "other.7z": (lambda path: path.write_bytes(b"7z"), "unpack it yourself"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_or_damaged_archive_leaves_nothing_behind(thaw, project, tmp_path, name):
    write, said = UNSAFE[name]
    write(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    code, shown = thaw("new", "mine", "--from", tmp_path / name)
    assert code == 1 and said in " ".join(shown.split()), shown
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before] in ([], [project / "data"])


def test_an_archive_that_grows_beyond_its_limit_is_stopped(thaw, project, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "LEAST", 10_000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/x.png", bytes(3_000_000))
    code, shown = thaw("new", "mine", tmp_path / "bomb.zip")
    assert code == 1 and "holds more than" in shown and not [*(project / "data").iterdir()]


def test_new_wants_one_source(thaw, project, photos):
    for arguments in ((), (photos, "--from", photos)):
        assert "Name one source" in thaw("new", "mine", *arguments)[1]


def test_classes_whose_names_hold_words_of_parts_stay_classes(thaw, project, tmp_path, image_folder):
    image_folder(tmp_path / "set", {"train_station": 4, "test_tube": 4, "valley": 4}, size=32)
    code, shown = thaw("new", "places", tmp_path / "set")
    assert code == 0 and "12 images in 3 classes" in shown and "ready-made" not in shown


def test_new_overwrites_nothing_and_refuses_bad_names(thaw, project, photos):
    assert thaw("new", "mine", photos)[0] == 0
    code, shown = thaw("new", "mine", photos)
    assert code == 1 and "recipes/mine.yaml exists already" in shown
    code, shown = thaw("new", "a/b", photos)
    assert code == 1 and "cannot name a run" in shown
    code, shown = thaw("new", "other", "nowhere")
    assert code == 1 and "nowhere" in shown and not (project / "recipes/other.yaml").exists()


# Predict


@pytest.fixture
def classifier(monkeypatch):
    """A classifier that calls "a" a cat and all else a dog, and cannot read what is called broken."""

    class Fake:
        class_names, version, seen = ["cat", "dog"], "0123456789ab", []
        header = "path predicted confidence not_read answer second novel cat dog".split()

        def __init__(self, run, hosts):
            self.hosts = hosts

        def rows(self, files, reads):
            for file in files:
                Fake.seen.append(file.name)
                if "broken" in file.name:
                    yield [str(file), "", "", "truncated: the file ends early", "", "", "", "", ""]
                elif file.name.startswith("a"):
                    yield [str(file), "cat", 0.9, "", "cat", "dog", "", 0.9, 0.1]
                else:
                    yield [str(file), "dog", 0.6, "", "unsure", "cat", "yes", 0.4, 0.6]

        def caution(self):
            return "Be careful."

    monkeypatch.setattr(prediction, "Classifier", Fake)
    return Fake


@pytest.fixture
def three(tmp_path):
    folder = tmp_path / "three"
    folder.mkdir()
    for name in ("a[1].png", "b.png", "broken.png"):
        (folder / name).touch()
    return folder


def test_predict_prints_a_line_an_image(thaw, classifier, three):
    code, shown = thaw("predict", "runs/x", three)
    assert code == 1 and shown.splitlines() == [
        f"{three}/a[1].png  cat  0.900",
        f"{three}/b.png  dog  0.600  unsure, or cat  looks like none of the classes",
        f"{three}/broken.png  not read: truncated: the file ends early",
        "Be careful.",
    ]


def test_predict_writes_a_row_for_each_image_and_says_why_one_was_not_read(thaw, classifier, three, tmp_path):
    code, shown = thaw("predict", "runs/x", three, "--csv", tmp_path / "out.csv")
    assert code == 1 and "broken.png  not read: truncated" in shown and "Be careful." in shown
    table = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
    assert list(table.columns) == classifier.header and list(table["predicted"]) == ["cat", "dog", ""]
    assert list(table["novel"]) == ["", "yes", ""] and list(table["cat"]) == ["0.9", "0.4", ""]
    assert table["not_read"][2] == "truncated: the file ends early"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "three"]


def test_an_interrupted_prediction_goes_on_after_the_last_image_in_its_file(thaw, classifier, three, tmp_path):
    out = tmp_path / "out.csv"
    thaw("predict", "runs/x", three, "--csv", out)
    whole = out.read_bytes()
    unfinished = tmp_path / "out.csv.0123456789ab.unfinished"
    unfinished.write_bytes(whole[: whole.index(b"broken") + 3])
    classifier.seen.clear()
    code, shown = thaw("predict", "runs/x", three, "--csv", out)
    assert "2 images are in out.csv.0123456789ab.unfinished already" in shown and code == 1
    assert classifier.seen == ["broken.png"] and out.read_bytes() == whole and not unfinished.exists()
    unfinished.write_bytes(whole)
    classifier.seen.clear()
    code, shown = thaw("predict", "runs/x", three, "--csv", out)
    assert code == 1 and not classifier.seen, "what could not be read then counts now too"
    unfinished.write_bytes(whole)
    code, shown = thaw("predict", "runs/x", three / "b.png", "--csv", out)
    assert code == 1 and "was begun with other images" in shown


def test_the_unfinished_file_of_another_model_is_not_continued(thaw, classifier, three, tmp_path):
    (tmp_path / "out.csv.ffffffffffff.unfinished").touch()
    code, shown = thaw("predict", "runs/x", three, "--csv", tmp_path / "out.csv")
    assert code == 1 and "was begun with another model. Remove it to begin again" in shown
    assert not classifier.seen


def test_predict_writes_a_submission_in_the_columns_asked_for(thaw, classifier, three, tmp_path):
    code, shown = thaw("predict", "runs/x", three, "--csv", tmp_path / "out.csv", "--columns", "id,animal,cat")
    assert (tmp_path / "out.csv").read_text().splitlines() == ["id,animal,cat", "a[1],cat,0.9", "b,dog,0.4"], shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "three"]
    for more in ([], ["--csv", tmp_path / "out.parquet"]):
        code, shown = thaw("predict", "runs/x", three, "--columns", "id,animal", *more)
        assert code == 1 and "give --csv FILE too, a CSV" in shown


def test_predict_writes_parquet(thaw, classifier, three, tmp_path):
    pytest.importorskip("pyarrow", reason="the extra parquet is not installed: pip install -e '.[parquet]'")
    thaw("predict", "runs/x", three, "--csv", tmp_path / "out.parquet")
    table = pd.read_parquet(tmp_path / "out.parquet")
    assert list(table.columns) == classifier.header and list(table["predicted"]) == ["cat", "dog", ""]
    assert table["cat"].dtype == "float32" and table["cat"].isna().to_list() == [False, False, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "three"]


def test_what_cannot_be_written_is_said_before_any_work(thaw, classifier, three, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, shown = thaw("predict", "runs/x", three, "--csv", tmp_path / "out.parquet")
    assert code == 1 and "pip install -e '.[parquet]'" in shown
    code, shown = thaw("predict", "runs/x", three, "--csv", tmp_path / "no/out.csv")
    assert code == 1 and "no/ " not in shown and "to write out.csv into. Make it first" in shown
    assert not classifier.seen


def test_a_name_that_is_no_utf8_is_written_with_its_bytes(thaw, classifier, tmp_path):
    file = os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.png")
    try:
        open(file, "w").close()
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    out = tmp_path / "out.csv"
    assert thaw("predict", "runs/x", file, "--csv", out)[0] == 0 and "/a\\xff.png,cat" in out.read_text()
    out.rename(tmp_path / "out.csv.0123456789ab.unfinished")
    assert thaw("predict", "runs/x", file, "--csv", out)[0] == 0


def test_memory_does_not_grow_with_the_number_of_images(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "find", lambda paths: (Path(f"a{number}.png") for number in range(paths[0])))
    monkeypatch.setattr(classifier, "seen", deque(maxlen=1))
    classify.by_run("x", [1], tmp_path / "first.csv", "", "", Console(quiet=True))  # loads the modules
    tracemalloc.start()
    try:
        classify.by_run("x", [30_000], tmp_path / "out.csv", "", "", Console(quiet=True))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out.csv").read_text().count("\n") == 30_001


def test_nothing_is_left_behind_where_there_is_no_image(thaw, classifier, tmp_path):
    (tmp_path / "empty").mkdir()
    code, shown = thaw("predict", "runs/x", tmp_path / "empty", "--csv", tmp_path / "out.csv")
    assert code == 1 and "holds no images" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_predict_without_a_run(thaw, tmp_path):
    code, shown = thaw("predict", tmp_path / "nothing", tmp_path)
    assert code == 1 and "is not a run with a trained model. Make one with `thaw run`" in shown


# Board


def test_board_without_logs(thaw, runs_folder):
    runs_folder.mkdir()
    code, shown = thaw("board")
    assert code == 1 and "No run has TensorBoard logs yet" in shown


def test_board_opens_all_runs(thaw, runs_folder, monkeypatch):
    for name in ("one/head", "two/fine_tune"):
        (runs_folder / name / "logs").mkdir(parents=True)
    started = []
    monkeypatch.setattr(main.subprocess, "run", lambda command, **_: started.append(command))
    assert thaw("board", "--port", "7007")[0] == 0
    (command,) = started
    assert "--port=7007" in command and "one/head:" in command[3] and "two/fine_tune:" in command[3]

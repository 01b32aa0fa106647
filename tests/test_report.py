"""The report, from made-up artefacts: whole, safe, self-contained, and useful for a run that stopped early."""

import re
from html.parser import HTMLParser

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers.core import disk, project, words
from helpers.evaluation import metrics, tables
from helpers.reports import report

NASTY = '<script>alert("x")</script>'
NAMES = ["functional", NASTY, "50 $ & more"]
MADE = {"status": "done", "made": "thaw run", "seconds": 75.2, "created": "2026-01-02T03:04:05+00:00"}


class Links(HTMLParser):
    """Every address that the page would load or jump to, and every tag."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded, self.ids, self.anchors, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "srcset", "data", "poster") or (key == "href" and tag != "a"):
                self.loaded.append(value)
            elif key == "href" and value.startswith("#"):
                self.anchors.append(value[1:])
            elif key == "id":
                self.ids.append(value)


def stage(run, name, **extra):
    folder = run / name
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {"seed": 7, "out": "runs/x", "note": NASTY, "images": "runs/.store/resize-1"}
    record = MADE | {"stage": name, "parameters": parameters, "versions": {"keras": "3.15"}} | extra
    disk.write_json(folder / "stage.json", record)
    return folder


def add_data(run):
    explore, split = stage(run, "explore"), stage(run, "split")
    rows = [(f"{name}/{i}.png", name) for name in ("functional", NASTY, "50 $ & more") for i in range(20)]
    table = pd.DataFrame(rows, columns=["path", "label"]).assign(width=300, height=200)
    table.to_csv(explore / "inventory.csv", index=False)
    bad = {"path": ["bad.png"], "label": ["functional"], "reason": ["unreadable"], "detail": ["<b>truncated</b>"]}
    pd.DataFrame(bad).to_csv(explore / "quarantine.csv", index=False)
    disk.write_json(explore / "ignored.json", {".txt": 3})
    table["part"] = np.resize(["train", "train", "val", "test"], len(table))
    table["sha256"], table["group"] = table.index.astype(str), ""
    table.to_csv(split / "split.csv", index=False)


def add_training(run, phase, first, epochs):
    loss = np.linspace(0.9, 0.3, epochs)
    history = pd.DataFrame({"epoch": np.arange(first, first + epochs), "phase": phase, "loss": loss})
    history = history.assign(accuracy=1 - loss / 2, val_loss=loss + 0.1, val_accuracy=0.9 - loss / 2, seconds=2.0)
    history.assign(learning_rate=1e-2).to_csv(stage(run, phase) / "history.csv", index=False)


def add_evaluation(run, names=NAMES, n=60, perfect=False):
    rng, folder = np.random.default_rng(0), stage(run, "evaluate")
    truth = np.arange(n) % len(names)
    probabilities = rng.dirichlet(np.ones(len(names)), n) + np.eye(len(names))[truth] * (5 if perfect else 0.4)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    paths = [f"test/{i}.png" for i in range(n)]
    table = tables.predictions_table(paths, [names[i] for i in truth], probabilities, names, files=paths)
    table.to_csv(folder / "predictions.csv", index=False)
    (run / "resize" / "test").mkdir(parents=True, exist_ok=True)
    for path in paths[: n // 2]:
        Image.fromarray(rng.integers(0, 255, (30, 40), dtype=np.uint8)).save(run / "resize" / path)
    result = metrics.metrics(table, names, n_bootstrap=100)
    disk.write_json(folder / "metrics.json", result | {"phase": "head", "phase_sentence": "Phase 1 it is."})


def add_notebook(run, name="03_train_head"):
    cells = [nbformat.v4.new_markdown_cell("# 03 · Train <script>alert(1)</script>")]
    html = "<style>td {color: red}</style><table><tr><td>cell</td></tr></table><script src='https://x.y/z.js'></script>"
    data = {"text/html": html, "text/plain": "cell"}
    noise = "WARNING: All log messages before absl::InitializeLog()\nI0000 00:00:17 cudart_stub.cc:31] no GPU\n"
    outputs = [nbformat.v4.new_output("display_data", data=data)]
    outputs += [
        nbformat.v4.new_output("stream", name="stderr", text=text) for text in (noise, noise + "a real warning\n")
    ]
    cells.append(nbformat.v4.new_code_cell("x = 1 < 2", outputs=outputs))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), run / f"{name}.ipynb")


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "demo"
    add_data(run)
    stage(run, "resize")
    add_training(run, "head", 1, 5)
    add_training(run, "fine_tune", 6, 4)
    add_evaluation(run)
    add_notebook(run)
    disk.write_text(
        run / "recipe.yaml", f"name: demo\ndescription: '{NASTY}'\npublished: {{CNN: 88.42, SVM: 0.8244}}\n"
    )
    return report.build_report(run).read_text(encoding="utf-8")


def test_everything_is_inside_the_file(complete):
    links = Links(complete)
    assert links.loaded and all(address.startswith("data:") for address in links.loaded)
    assert "@import" not in complete
    assert not re.search(r"url\(\s*['\"]?(?!data:)", complete)
    assert set(links.anchors) <= set(links.ids)


def test_text_from_data_and_notebooks_cannot_run(complete):
    assert Links(complete).tags.count("script") == 1  # the report's own, which opens everything for printing
    assert 'alert("x")</script>' not in complete
    assert "alert(1)</script>" not in complete
    assert "&lt;script&gt;" in complete
    assert "x.y/z.js" not in complete
    assert "td {color: red}" not in complete


def test_the_answer_comes_first(complete):
    accuracy = complete.index('class="card first"')
    assert complete.index("Accuracy beside published") > accuracy
    assert "88.42\N{NO-BREAK SPACE}%" in complete and "82.44\N{NO-BREAK SPACE}%" in complete
    assert "Phase 1 it is." in complete
    assert complete.index('id="thaw-results"') < complete.index('id="thaw-notebooks"')


def test_data_settings_and_times_are_told(complete):
    assert "No identical files in more than one of train, val and test." in complete
    assert "unreadable" in complete and "3 × .txt" in complete
    assert "1 min 15 s" in complete and "7 min 31 s" in complete
    assert "3.15" in complete
    assert "runs/.store" not in complete and "runs/x" not in complete


def test_notebooks_are_folded_in_with_their_tables(complete):
    assert "<td>cell</td>" in complete
    assert complete.count('<details class="notebook">') == 1
    assert "a real warning" in complete and "absl" not in complete and "cudart" not in complete


def test_a_leak_is_called_out(tmp_path):
    add_data(tmp_path)
    split = pd.read_csv(tmp_path / "split" / "split.csv", dtype=str).assign(sha256="same")
    split.to_csv(tmp_path / "split" / "split.csv", index=False)
    text = report.build_report(tmp_path).read_text()
    assert "1 identical files" in text and "too good to be true" in text


def test_images_that_are_not_used_are_counted_and_are_no_leak(tmp_path):
    add_data(tmp_path)
    split = pd.read_csv(tmp_path / "split" / "split.csv", dtype=str)
    split.loc[:1, ["sha256", "group"]], split.loc[0, "part"] = "same", "unused"
    split.to_csv(tmp_path / "split" / "split.csv", index=False)
    text = report.build_report(tmp_path).read_text()
    assert "No identical files and no groups in more than one" in text and "too good to be true" not in text
    assert '<th class="n">unused</th>' in text and "60 images of 3 classes" in text


def test_what_a_naive_split_would_have_flattered_is_told_when_it_was_measured(tmp_path):
    add_data(tmp_path)
    groups = {"groups_of_several": 3, "images_in_them": 9, "largest_group": 4, "groups_with_several_labels": 0}
    disk.write_json(tmp_path / "explore" / "groups.json", groups)
    table = pd.read_csv(tmp_path / "explore" / "inventory.csv", dtype=str, keep_default_na=False)
    table.assign(group=table.index).to_csv(tmp_path / "explore" / "inventory.csv", index=False)
    assert "If the split ignored" not in report.build_report(tmp_path).read_text()
    scores = {"honest": (0.70, 0.72), "naive": (0.80, 0.86)}
    rows = [{"split": k, "seed": n, "balanced_accuracy": v} for k, both in scores.items() for n, v in enumerate(both)]
    disk.write_json(tmp_path / "split" / "leakage.json", groups | {"honest_gap": rows})
    text = report.build_report(tmp_path).read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "score 83.0 % balanced accuracy instead of 71.0 %, on average over 2 splits" in text


@pytest.mark.parametrize("done", [("data",), ("data", "head"), ("evaluation",), ("head", "fine_tune")])
def test_a_run_that_stopped_early_says_what_is_missing(tmp_path, done):
    for part in done:
        add = {"data": add_data, "evaluation": add_evaluation}.get(part)
        if add:
            add(tmp_path)
        else:
            add_training(tmp_path, part, 1, 1)
    text = report.build_report(tmp_path).read_text()
    assert ("They come with notebook <code>05_evaluate</code>" in text) == ("evaluation" not in done)
    assert ("It comes with notebook <code>03_train_head</code>" in text) == ("head" not in done)
    assert ("It comes with notebook <code>00_explore</code>" in text) == ("data" not in done)
    assert tmp_path.name in text


def test_a_perfect_run_has_no_gallery(tmp_path):
    add_evaluation(tmp_path, names=["0", "NA"], n=20, perfect=True)
    text = report.build_report(tmp_path).read_text()
    assert "every test image was classified correctly" in text
    assert "no interval: it never varied" in text


def test_many_classes(tmp_path):
    add_evaluation(tmp_path, names=[f"kind {i}" for i in range(72)], n=150)
    assert report.build_report(tmp_path).read_text().count("<td>kind 71</td>") >= 1


def test_pictures_that_are_gone_are_named(tmp_path):
    add_evaluation(tmp_path)
    for path in (tmp_path / "resize").rglob("*.png"):
        path.unlink()
    assert "image no longer there" in report.build_report(tmp_path).read_text()


def test_a_stage_that_the_report_knows_nothing_of_is_named(tmp_path, toy_notebooks, notebook):
    for path in (project.ROOT / "notebooks").glob("0*.ipynb"):
        (toy_notebooks / path.name).symlink_to(path)
    cell = 'evaluate: str = "runs/demo/evaluate"  # from 05_evaluate\nout: str = "runs/demo/ship"  # folder'
    notebook(toy_notebooks / "07_ship.ipynb", cell)
    stage(tmp_path, "ship", headline="a bundle of 13.5 MB")
    text = report.build_report(tmp_path).read_text()
    assert "<b>07_ship</b>" in text and "a bundle of 13.5 MB" in text


def test_a_chain_without_the_stages_that_the_report_shows(tmp_path, toy_notebooks, notebook):
    notebook(toy_notebooks / "00_explore.ipynb", 'out: str = "runs/demo/look"  # folder')
    stage(tmp_path, "look")
    assert "<b>00_explore</b>" in report.build_report(tmp_path).read_text()


def test_an_unfinished_stage_does_not_count(tmp_path):
    stage(tmp_path, "head", status="open")
    with pytest.raises(FileNotFoundError, match="no finished stage"):
        report.build_report(tmp_path)


def test_the_old_report_stays_when_a_new_one_fails(tmp_path):
    add_data(tmp_path)
    before = report.build_report(tmp_path).read_text()
    stage(tmp_path, "evaluate")
    with pytest.raises(FileNotFoundError):
        report.build_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (42, "42 s"), (75.2, "1 min 15 s"), (3725, "1 h 2 min"), (59.7, "60 s")]
)
def test_durations_read_well(seconds, text):
    assert words.duration(seconds) == text

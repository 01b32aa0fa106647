"""Recipes: the grammar of the parameters cell, and everything that must be refused before the first notebook starts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.core import notebooks, project
from helpers.pipeline import recipes

EXPLORE = """
source: str = "photos"  # the folder that holds the images
out: str = "runs/demo/explore"  # folder this notebook writes
"""
HEAD = """
from typing import Union

images: str = "runs/demo/explore"  # folder written by 00_explore
epochs: int = 50  # passes over the training images [1, 10000]
learning_rate: float = 1e-2  # step size at the start (0, 10]
momentum: float = 0.9  # of sgd [0, 1)
decay: float = 0.0  # of the weights [0, inf)
optimizer: str = "adam"  # the rule {adam, adamw, sgd}
ratio: list[float] = [0.6, 0.15, 0.25]  # shares; must add up to 1 [0, 1]
units: list[int] = []  # of the hidden layers [1, 4096]
names: list[str] = []  # of the classes (cat, dog)
parts: list[str] = ["val"]  # to look at {train, val, test}
folds: int = 5  # of the data {3, 5, 10}
unfreeze: Union[str, int, float, dict] = "none"  # none, all, a layer, a number or {from_index: n}
limit: Union[int, str] = ""  # a number of images or "smallest" [1, inf)
keep: bool = False  # keep the cache
augmentation: Union[str, list[dict]] = "default"  # a preset or a list of {layer: arguments}
out: str = "runs/demo/head"  # folder this notebook writes
"""


@pytest.fixture
def toys(toy_notebooks, notebook):
    notebook(toy_notebooks / "00_explore.ipynb", EXPLORE)
    notebook(toy_notebooks / "03_train_head.ipynb", HEAD)


@pytest.fixture
def write(tmp_path):
    def write(text, name="job.yaml", encoding="utf-8"):
        path = tmp_path / name
        path.write_text(text, encoding=encoding)
        return path

    return write


@pytest.fixture
def resolve(toys, write):
    """The parameters of the stage `head` that are in force with the YAML text `section` and overrides."""
    return lambda section, *sets: recipes.load(write(f"head: {section}"), list(sets)).resolved("head")


@pytest.fixture
def refuse(toys, write):
    """The message with which a recipe is refused."""

    def refuse(text, *sets, name=""):
        with pytest.raises(notebooks.RecipeError) as caught:
            recipes.load(write(text), list(sets), name)
        return str(caught.value)

    return refuse


# The parameters cell


def test_a_line_of_the_parameters_cell_says_everything():
    p = notebooks.read_parameters(HEAD)["learning_rate"]
    assert (p.name, p.annotation, p.type_text, p.default) == ("learning_rate", float, "float", 1e-2)
    assert (p.meaning, p.allowed) == ("step size at the start", "(0, 10]")


def test_choices_stand_as_a_set_at_the_end_of_the_comment():
    p = notebooks.read_parameters(HEAD)["optimizer"]
    assert (p.meaning, p.allowed) == ("the rule", "{adam, adamw, sgd}")


@pytest.mark.parametrize("name", ["names", "unfreeze", "augmentation"])
def test_brackets_that_are_not_numbers_belong_to_the_meaning(name):
    p = notebooks.read_parameters(HEAD)[name]
    assert p.allowed == "" and p.meaning.endswith((")", "}"))


@pytest.mark.parametrize(
    "line",
    [
        'unfreeze: str = (\n    "block7"  # where to thaw\n)',
        'unfreeze: list[\n    str\n] = ["block7"]  # where to thaw',
        'unfreeze: list[str] = [\n    "block7",\n]  # where to thaw',
    ],
)
def test_a_formatter_may_break_a_long_line(line):
    assert notebooks.read_parameters(line)["unfreeze"].meaning == "where to thaw"


@pytest.mark.parametrize("line", ["epochs = 50  # passes", "epochs: int  # passes", "print(1)", "a, b = 1, 2"])
def test_a_line_that_is_not_a_parameter_is_refused_by_its_number(line):
    with pytest.raises(notebooks.RecipeError, match="Line 2 of the parameters cell is not"):
        notebooks.read_parameters(f'name: str = "x"  # of the run\n{line}')


def test_a_type_that_nobody_knows_is_refused():
    with pytest.raises(notebooks.RecipeError, match=r"Line 1 .*'Path'"):
        notebooks.read_parameters('folder: Path = "x"  # somewhere')


def test_a_default_that_is_computed_is_refused():
    with pytest.raises(notebooks.RecipeError, match="Line 1"):
        notebooks.read_parameters("epochs: int = 2 + len('x')  # passes [1, 10]")


def test_folders_are_inputs_and_never_settings(toys):
    stage = notebooks.find_stage("head")
    assert stage.inputs == {"images": "explore"}
    assert "images" not in stage.settings and "out" not in stage.settings and "epochs" in stage.settings


def test_stages_are_found_by_name_notebook_and_number(toys):
    assert {notebooks.find_stage(text).name for text in ("head", "03_train_head", "03", "3")} == {"head"}
    assert notebooks.find_stage("0").name == "explore"
    with pytest.raises(notebooks.RecipeError, match=r"no stage 'haed'\. Did you mean head\?"):
        notebooks.find_stage("haed")


SMOOTH = """
# optional, in place of explore
source: str = "runs/demo/explore"  # folder written by 00_explore
out: str = "runs/demo/smooth"  # folder this notebook writes
"""


def test_a_stage_is_optional_where_its_cell_says_so(toys, toy_notebooks, notebook, write):
    assert not any(stage.optional for stage in notebooks.stages().values())
    notebook(toy_notebooks / "00z_smooth.ipynb", SMOOTH)
    notebook(toy_notebooks / "07_export.ipynb", SMOOTH.replace(", in place of explore", "").replace("smooth", "export"))
    notebooks.stages.cache_clear()
    smooth, export = notebooks.stages()["smooth"], notebooks.stages()["export"]
    assert (smooth.optional, smooth.replaces) == (True, "explore")
    assert (export.optional, export.replaces) == (True, "")
    assert recipes.load(write("name: without")).chain() == ["explore", "head"]
    assert recipes.load(write("smooth: {}\nexport: {}")).chain() == ["explore", "smooth", "head", "export"]


def test_a_stage_can_replace_only_what_it_reads(toys, toy_notebooks, notebook):
    notebook(toy_notebooks / "00z_smooth.ipynb", SMOOTH.replace("place of explore", "place of head"))
    notebooks.stages.cache_clear()
    with pytest.raises(notebooks.RecipeError, match=r"a stage that it reads \(explore\), not head"):
        notebooks.stages()


def test_a_notebook_without_a_parameters_cell_is_named(toy_notebooks, notebook):
    path = notebook(toy_notebooks / "00_explore.ipynb", EXPLORE)
    path.write_text(path.read_text().replace('"parameters"', '"other"'))
    with pytest.raises(notebooks.RecipeError, match=r"00_explore\.ipynb needs exactly one cell tagged `parameters`"):
        notebooks.stages()


# Values


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("{learning_rate: 1e-2}", "learning_rate", 0.01),
        ("{learning_rate: 1E-2}", "learning_rate", 0.01),
        ("{learning_rate: 10}", "learning_rate", 10),
        ("{decay: 1e6}", "decay", 1e6),
        ("{names: [on, no, yes, off]}", "names", ["on", "no", "yes", "off"]),
        ("{names: ['1', 'null']}", "names", ["1", "null"]),
        ("{keep: true}", "keep", True),
        ("{ratio: [1, 0, 0]}", "ratio", [1, 0, 0]),
        ("{unfreeze: {from_index: 19}}", "unfreeze", {"from_index": 19}),
        ("{unfreeze: 0.4}", "unfreeze", 0.4),
        ("{unfreeze: 3}", "unfreeze", 3),
        ("{limit: smallest}", "limit", "smallest"),
        ("{limit: 5}", "limit", 5),
        ("{parts: [train, test]}", "parts", ["train", "test"]),
        ("{folds: 10}", "folds", 10),
        (
            "{augmentation: [{RandomZoom: {height_factor: 0.2}}]}",
            "augmentation",
            [{"RandomZoom": {"height_factor": 0.2}}],
        ),
    ],
)
def test_accepted(resolve, section, name, value):
    found = resolve(section)[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("{epochs: 0}", "head.epochs: expected int in [1, 10000], got 0. It is: passes over the training images."),
        ("{epochs: 10001}", "head.epochs"),
        ("{epochs: 1.5}", "head.epochs"),
        ("{epochs: true}", "head.epochs"),
        ("{epochs: '5'}", "head.epochs"),
        ("{epochs: null}", "head.epochs"),
        ("{learning_rate: 0}", "head.learning_rate: expected float in (0, 10], got 0"),
        ("{learning_rate: .nan}", "head.learning_rate"),
        ("{learning_rate: .inf}", "head.learning_rate"),
        ("{momentum: 1.0}", "head.momentum: expected float in [0, 1), got 1.0"),
        ("{decay: .inf}", "head.decay"),
        ("{decay: -1e-9}", "head.decay"),
        ("{optimizer: Adam}", "head.optimizer: expected str in {adam, adamw, sgd}, got 'Adam'"),
        ("{optimizer: 3}", "head.optimizer"),
        ("{parts: [train, tset]}", "head.parts: expected list[str] in {train, val, test}, got ['train', 'tset']"),
        ("{parts: train}", "head.parts"),
        ("{folds: 4}", "head.folds: expected int in {3, 5, 10}, got 4"),
        ("{ratio: [0.6, 1.4]}", "head.ratio: expected list[float] in [0, 1], got [0.6, 1.4]"),
        ("{ratio: 0.6}", "head.ratio"),
        ("{ratio: [a]}", "head.ratio"),
        ("{units: [16, 0]}", "head.units"),
        ("{units: [1.5]}", "head.units"),
        ("{limit: 0}", "head.limit"),
        ("{unfreeze: [1]}", "head.unfreeze"),
        ("{unfreeze: true}", "head.unfreeze"),
        ("{keep: 1}", "head.keep"),
        ("{augmentation: [RandomZoom]}", "head.augmentation"),
        ("{epoch: 5}", "head.epoch: there is no such parameter. Did you mean epochs?"),
        ("{images: x}", "head.images: the pipeline sets this folder"),
        ("{out: x}", "head.out: the pipeline sets this folder"),
        ("{7: 5}", "head.7: there is no such parameter"),
        ("[epochs]", "head: expected parameters, e.g. {epochs: ...}, got ['epochs']"),
        ("5", "head: expected parameters"),
    ],
)
def test_refused(refuse, section, expected):
    assert expected in refuse(f"head: {section}")


@given(st.integers())
def test_an_interval_holds_exactly(value):
    parameters = notebooks.read_parameters("epochs: int = 5  # passes [1, 10000]")
    import pydantic

    adapter = pydantic.TypeAdapter(parameters["epochs"].constrained(), config={"strict": True})
    if 1 <= value <= 10000:
        assert adapter.validate_python(value) == value
    else:
        with pytest.raises(pydantic.ValidationError):
            adapter.validate_python(value)


def test_all_problems_are_told_at_once(refuse):
    message = refuse("haed: {epochs: 5}\nhead: {epoch: 5, optimizer: Adam}\nexplore: {sauce: x}", "head.momentum=7")
    assert "job.yaml cannot be run:" in message
    assert message.count("\n  - ") == 5
    for part in (
        "haed: there is no such stage. Did you mean head?",
        "head.epoch:",
        "head.optimizer:",
        "explore.sauce:",
    ):
        assert part in message
    assert "head.momentum: expected float in [0, 1), got 7" in message


def test_a_stage_named_by_a_number_is_refused(refuse):
    assert "3: there is no such stage" in refuse("3: {epochs: 5}")


def test_an_empty_section_is_the_notebook_as_it_is(resolve):
    assert resolve("") == {name: p.default for name, p in notebooks.find_stage("head").settings.items()}


# YAML


def test_a_key_given_twice_is_an_error(refuse):
    assert "is not valid YAML" in refuse("head: {epochs: 5, epochs: 6}")
    assert "head" in refuse("head: {epochs: 5}\nhead: {epochs: 6}")


@pytest.mark.parametrize("text", ["", "- head", "just text", "head: {epochs: 5", "head: !!python/object:os.x {}", "\t"])
def test_what_is_not_a_recipe(refuse, text):
    assert "job.yaml" in refuse(text)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("head:\n  epochs: 5\n epochs: 6\n", "line 3, column 2: expected <block end>"),
        ("head:\n\t- b\n", "line 2, column 1: found character '\\t' that cannot start any token"),
        ("head: {epochs: 5, epochs: 6}", 'line 1, column 19: found duplicate key "epochs"'),
        ("name: @x", "line 1, column 7: found character '@'"),
    ],
)
def test_a_mistake_in_yaml_is_told_in_one_line_with_its_place(refuse, text, where):
    message = refuse(text)
    assert f"job.yaml is not valid YAML: {where}" in message and "\n" not in message


def test_bytes_that_are_not_text(toys, tmp_path):
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00head")
    with pytest.raises(notebooks.RecipeError, match=r"job\.yaml is not UTF-8 text: invalid start byte at byte 0"):
        recipes.load(tmp_path / "job.yaml")


def test_a_byte_order_mark_and_windows_line_ends_do_not_matter(toys, write):
    recipe = recipes.load(write("name: win\r\nhead:\r\n  epochs: 5\r\n", encoding="utf-8-sig"))
    assert recipe.name == "win" and recipe.resolved("head")["epochs"] == 5


def test_a_missing_recipe_names_those_that_are_close():
    with pytest.raises(notebooks.RecipeError, match=r"no recipe recipes/elvp\.yaml\. Did you mean recipes/elpv\.yaml"):
        recipes.load("recipes/elvp.yaml")


def test_a_recipe_is_found_from_any_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert recipes.load("recipes/elpv.yaml").name == recipes.load("elpv.yaml").name == "elpv"


# Names


@pytest.mark.parametrize("name", ["solar", "a", "s1_campus-2", "2024", "Zürich", "x" * 100, "sweep/member"])
def test_good_names(toys, write, name):
    assert recipes.load(write("head: {}"), name=name).name == name


@pytest.mark.parametrize(
    "name", ["a/b/c", "a/", "../x", "/abs", "a.b", ".store", "..", "-x", "_x", "a b", "x" * 101, "a\\b", "a\n"]
)
def test_names_that_are_no_folder(refuse, name):
    assert "cannot name a run. Use letters, digits" in refuse("head: {}", name=name)


@pytest.mark.parametrize("name", ["5", "[a]", "''", "null", "2024-01-01"])
def test_names_that_yaml_does_not_read_as_text(refuse, name):
    assert "cannot name a run" in refuse(f"name: {name}")


def test_a_recipe_without_a_name_is_named_after_its_file(toys, write):
    assert recipes.load(write("head: {}", "my_job.yaml")).name == "my_job"


def test_published_numbers_are_numbers(refuse, write):
    assert recipes.load(write("published: {SVM: 82.44, CNN: 88}")).published == {"SVM": 82.44, "CNN": 88}
    assert "published: expected a mapping" in refuse("published: {SVM: best}")
    assert "published: expected a mapping" in refuse("published: 82")


# Extends


def test_a_recipe_extends_another_parameter_by_parameter(toys, write):
    write("name: base\ndescription: of both\nexplore: {source: a}\nhead: {epochs: 5, momentum: 0.5}", "base.yaml")
    write("extends: base.yaml\nhead: {epochs: 6}", "middle.yaml")
    recipe = recipes.load(write("extends: middle.yaml\nhead: {keep: true}", "child.yaml"), ["head.momentum=0.7"])
    assert recipe.name == "child" and recipe.description == "of both"
    assert recipe.stages == {"explore": {"source": "a"}, "head": {"epochs": 6, "momentum": 0.7, "keep": True}}


def test_a_list_or_dict_replaces_that_of_the_base(toys, write):
    write("head: {ratio: [1, 0, 0], unfreeze: {from_index: 1}}", "base.yaml")
    recipe = recipes.load(write("extends: base.yaml\nhead: {ratio: [0.5, 0.5], unfreeze: {from_index: 2}}"))
    assert recipe.stages["head"] == {"ratio": [0.5, 0.5], "unfreeze": {"from_index": 2}}


def test_an_extension_is_found_beside_the_recipe_from_anywhere(toys, write, monkeypatch):
    write("head: {epochs: 5}", "base.yaml")
    path = write("extends: base.yaml")
    monkeypatch.chdir("/")
    assert recipes.load(path).resolved("head")["epochs"] == 5


def test_recipes_that_extend_each_other_are_refused(toys, write, refuse):
    write("extends: job.yaml", "base.yaml")
    assert "extends itself: job.yaml -> base.yaml -> job.yaml" in refuse("extends: base.yaml")
    assert "extends itself" in refuse("extends: job.yaml")


def test_a_missing_base_is_refused(refuse):
    message = refuse("extends: nowhere.yaml")
    assert "There is no recipe" in message and "nowhere.yaml" in message


def test_a_mistake_in_the_base_is_found(write, refuse):
    write("head: {epochs: 0}", "base.yaml")
    assert "head.epochs: expected int" in refuse("extends: base.yaml")


# Overrides


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("head.epochs=5", "epochs", 5),
        ("head.learning_rate=1e-4", "learning_rate", 1e-4),
        (" head.epochs = 5", "epochs", 5),
        ("head.ratio=[0.7, 0.1, 0.2]", "ratio", [0.7, 0.1, 0.2]),
        ("head.names=[on, no]", "names", ["on", "no"]),
        ("head.unfreeze={from_index: 19}", "unfreeze", {"from_index": 19}),
        ("head.unfreeze=block7", "unfreeze", "block7"),
        ("head.unfreeze=", "unfreeze", ""),
        ("head.unfreeze=a=b", "unfreeze", "a=b"),
        ("head.unfreeze=@odd, [text", "unfreeze", "@odd, [text"),
        ("head.keep=true", "keep", True),
    ],
)
def test_an_override_is_read_as_yaml(resolve, override, name, value):
    assert resolve("{epochs: 7, keep: false}", override)[name] == value


def test_a_folder_named_by_a_number_can_be_given(toys, write):
    recipe = recipes.load(write("head: {}"), ["explore.source=2024"])
    assert recipe.resolved("explore")["source"] == "2024"


def test_the_last_override_wins_and_the_others_stay(resolve):
    found = resolve("{momentum: 0.5}", "head.epochs=5", "head.epochs=6")
    assert (found["epochs"], found["momentum"]) == (6, 0.5)


@pytest.mark.parametrize("override", ["epochs=5", "head.epochs", "head.=5", "=5", "head epochs 5", ""])
def test_an_override_that_is_none(refuse, override):
    assert f"--set {override}: expected stage.parameter=value" in refuse("head: {}", override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("haed.epochs=5", "haed: there is no such stage. Did you mean head?"),
        ("head.epoch=5", "head.epoch: there is no such parameter. Did you mean epochs?"),
        ("head.epochs=many", "head.epochs: expected int"),
        ("name.x=5", "name"),
    ],
)
def test_an_override_is_checked_like_the_recipe(refuse, override, expected):
    assert expected in refuse("head: {}", override)


# What is written, what is in force


def test_a_resolved_recipe_can_be_run_again(toys, write, tmp_path):
    text = (
        "name: first\ndescription: ü\npublished: {SVM: 82.5}\nhead: {learning_rate: 1e-7, names: [on, '1'], limit: '5'}"
    )
    recipe = recipes.load(write(text))
    again = recipes.load(write(recipe.as_yaml(), "again.yaml"))
    assert (again.name, again.description, again.published) == ("first", "ü", {"SVM": 82.5})
    assert {stage: again.resolved(stage) for stage in notebooks.stages()} == {
        stage: recipe.resolved(stage) for stage in notebooks.stages()
    }


def test_in_force_shows_what_a_notebook_has_now(toys):
    values = {name: p.default for name, p in notebooks.find_stage("head").parameters.items()} | {"epochs": 3}
    table = notebooks.in_force("head", values | {"something_else": 1})
    assert list(table.columns) == ["value", "default", "meaning"]
    assert table.loc["epochs"].to_list() == [3, 50, "passes over the training images"]
    assert table.loc["out", "value"] == "runs/demo/head" and list(table.index) == list(values)


def test_in_force_refuses_what_papermill_let_through(toys):
    values = {name: p.default for name, p in notebooks.find_stage("head").parameters.items()}
    with pytest.raises(
        notebooks.RecipeError, match=r"03_train_head\.ipynb: head\.epochs: expected int in \[1, 10000\]"
    ):
        notebooks.in_force("head", values | {"epochs": "5"})


def test_every_recipe_of_the_project_can_be_run():
    found = [path for path in sorted((project.ROOT / "recipes").rglob("*.yaml")) if path.parent.name != "sweeps"]
    assert found
    for path in found:
        recipes.load(path)


# Parameters that follow another one, and those of earlier versions


def test_a_parameter_takes_the_value_of_the_one_that_it_follows(toy_notebooks, notebook, write):
    notebook(toy_notebooks / "00_explore.ipynb", EXPLORE)
    later = 'next_unfreeze: str = "block7"  # what comes next (as tune.unfreeze)\nout: str = "runs/demo/head"  # folder'
    notebook(toy_notebooks / "03_head.ipynb", later)
    notebook(
        toy_notebooks / "04_tune.ipynb",
        'unfreeze: str = "block7"  # what trains\nout: str = "runs/demo/tune"  # folder',
    )

    def value(text, *sets):
        return recipes.load(write(text), list(sets)).resolved("head")["next_unfreeze"]

    assert value("name: x") == "block7"
    assert value("tune: {unfreeze: block5}") == value("name: x", "tune.unfreeze=block5") == "block5"
    assert value("tune: {unfreeze: block5}\nhead: {next_unfreeze: none}") == "none"


def test_phase_one_prepares_what_phase_two_thaws():
    assert notebooks.stages()["head"].parameters["next_unfreeze"].follows == ("fine_tune", "unfreeze")
    recipe = recipes.Recipe("x", {"fine_tune": {"unfreeze": "all"}})
    assert recipe.resolved("head")["next_unfreeze"] == "all"


@pytest.mark.parametrize("name", notebooks.RETIRED)
def test_a_parameter_of_an_earlier_version_is_refused_with_what_to_do(name):
    """A recipe that worked before is not answered with "there is no such parameter" alone."""
    assert not [stage for stage in notebooks.stages().values() if name in stage.parameters]
    (line,) = notebooks.problems(notebooks.find_stage("evaluate"), {name: 200})
    assert line.startswith(f"evaluate.{name}: this parameter is gone: ") and line.endswith("Delete this line.")

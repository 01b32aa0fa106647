"""The check before a run: everything that only Keras can refuse is refused with a helpful line, all at once."""

import pytest

from helpers.core import child
from helpers.pipeline import recipes
from helpers.training import checks


@pytest.fixture
def check():
    """The lines with which a recipe of vgg16 and these parameters is refused; none when it is not."""

    def check(head=None, fine_tune=None, backbone="vgg16", size=32):
        recipe = recipes.Recipe("x")
        start = {"head": {"backbone": backbone, "next_unfreeze": "block5"}, "fine_tune": {"unfreeze": "block5"}}
        given = {"head": head or {}, "fine_tune": fine_tune or {}}
        asked = {stage: recipe.resolved(stage) | start[stage] | given[stage] for stage in start}
        return "\n".join(checks.problems(size, **asked)).splitlines()

    return check


def test_good_choices_pass(check):
    head = {"optimizer": {"name": "lion", "use_ema": True}, "schedule": {"name": "one_cycle", "peak_epoch": 3}}
    head |= {"output": {"l2": 1e-3}, "dense": [64], "stop_smoothed": {"alpha": 0.3, "gain": 0.02, "epochs": 10}}
    table = {"name": "table", "below": {7: 1e-3, 8: 5e-4, 16: 5e-5}, "then": 1e-5}
    steps = [{"unfreeze": unfreeze} for unfreeze in (3, {"from_index": 15})] + [{"schedule": table}]
    assert check(head, {"unfreeze": 0.4, "steps": steps, "loss": {"name": "focal", "gamma": 1.5}}) == []


def test_everything_wrong_is_told_at_once(check):
    head = {"optimizer": "adan", "schedule": {"name": "cosine", "warmup": 2}, "loss": "focus"}
    head |= {
        "output": {"batchnorm": True},
        "dense": [{"units": 8, "dropuot": 0.5}],
        "stop_smoothed": {"gian": 0.1},
        "profile_steps": [3],
    }
    lines = check(head | {"next_unfreeze": "block6"}, {"unfreeze": "block9", "steps": [{}, {"unfreeze": "blok5"}]})
    expected = [
        "head: loss: there is no 'focus'. Did you mean focal?",
        "head: stop_smoothed has no 'gian'. Did you mean gain?",
        "head: profile_steps: expected [first, last] step",
        "head: output has no 'batchnorm'. Did you mean batch_norm?",
        "head: A dense layer has no ['dropuot']",
        "head: optimizer: there is no 'adan'. Did you mean adam",
        "head: schedule: cosine has no argument 'warmup'. Did you mean warmup_epochs?",
        "fine_tune.unfreeze: The backbone has no block or layer 'block9'. Did you mean",
        "head.next_unfreeze: The backbone has no block or layer 'block6'",
        "fine_tune.steps 2: unfreeze: The backbone has no block or layer 'blok5'. Did you mean block5",
    ]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected


def test_a_step_is_checked_like_the_stage(check):
    (line,) = check(fine_tune={"steps": [{"optimizer": {"name": "sgd", "momentun": 0.9}}]})
    assert line.startswith("fine_tune: optimizer: sgd has no argument 'momentun'. Did you mean momentum")
    (line,) = check(fine_tune={"steps": [{"epoch": 3}]})
    assert line == "fine_tune: steps 1: there is no 'epoch'. Did you mean epochs?"


def test_augmentation_is_checked(check):
    assert check({"augmentation": [{"RandomZoom": {"height_factor": 0.2}}], "flip": "dihedral", "mix": "mixup"}) == []
    [line] = check({"augmentation": [{"RandomZom": {}}]})
    assert line.startswith("head: ") and "RandomZoom" in line
    [line] = check({"mix": "cutmix", "imbalance": "balanced_batches"})
    assert line == "head: mix: views are blended before batches are drawn, so balanced_batches needs views: 0."


@pytest.mark.parametrize("head", [{"views": 0}, {"epochs": 0}, {"from_run": "other"}])
def test_what_comes_next_matters_only_where_it_is_computed(check, head):
    assert check(head | {"next_unfreeze": "block7"}) == []


@pytest.mark.parametrize(
    ("backbone", "size", "message"), [("resnet5", 32, "'resnet5'"), ("xception", 64, "needs images of at least 71 px")]
)
def test_a_backbone_that_cannot_be(check, backbone, size, message):
    (line,) = check(backbone=backbone, size=size)
    assert line.startswith("head.backbone: ") and message in line


def test_in_a_process_of_its_own():
    recipe = recipes.Recipe("x")
    asked = {stage: recipe.resolved(stage) for stage in ("head", "fine_tune")} | {"image_size": 64}
    asked["head"]["optimizer"] = "adamm"
    (problem,) = child.ask("helpers.training.checks", asked).value
    assert problem.startswith("head: optimizer: there is no 'adamm'. Did you mean adam")

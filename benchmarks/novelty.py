"""How well a run separates its own images from images of none of its classes, which here are those of another run.

Two finished runs are enough, `thaw run recipes/elpv.yaml` and `thaw run recipes/textile.yaml`:

    python benchmarks/novelty.py elpv textile

For each run, the distances of its own test images are compared with those of the other's. AUROC is the chance that an
image of the other set lies farther away; its interval is a bootstrap of both sets.
"""

import argparse

import numpy as np
from sklearn.metrics import roc_auc_score

from helpers.compute import hardware
from helpers.core import disk, project, stages
from helpers.data import images
from helpers.evaluation import entries, metrics
from helpers.evaluation.trust import distances, novelty


def main() -> None:
    """Print AUROC and the flagged images of both runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2)
    parser.add_argument("--most", type=int, default=400, help="images of each set")
    args = parser.parse_args()
    folders = [entries.measured(run) for run in args.runs]
    for one, other in ((0, 1), (1, 0)):
        own, strange = (how_far(folders[one], files(folders[of], args.most)) for of in (one, other))
        value, low, high = auroc(own, strange)
        flagged = [(values > distances.read(folders[one]).threshold).mean() for values in (own, strange)]
        print(
            f"{args.runs[one]}: {len(own)} own test images against {len(strange)} of {args.runs[other]}: AUROC"
            f" {value:.4f} ({low:.4f} to {high:.4f}); flagged {100 * flagged[0]:.1f} % of its own,"
            f" {100 * flagged[1]:.1f} % of the others"
        )


def files(folder, most: int) -> list:
    """Return up to `most` test images of a run, in the size of that run."""
    resized = project.resolve(disk.read_json(folder / stages.STAGE_FILE)["parameters"]["images"])
    table = disk.read_table(resized / "images.csv")
    rows = table[table["part"] == "test"]
    return [resized / file for file in rows["file"].sample(min(most, len(rows)), random_state=0)]


def how_far(folder, paths: list) -> np.ndarray:
    """Return how far images lie from what the run of `folder` has learned, float32 (images,)."""
    learned, about = distances.read(folder), disk.read_json(folder / "model.json")
    run = novelty.features_of(hardware.load(folder / "model.keras"))
    values = []
    for at in range(0, len(paths), 32):
        batch = np.stack([images.load(path, about["image_size"], about["fit"]) for path in paths[at : at + 32]])
        values.append(learned.distance(run(batch)))
    return np.concatenate(values)


def auroc(own: np.ndarray, strange: np.ndarray) -> tuple[float, float, float]:
    """Return the area with the ends of its 95 % interval."""
    rng = np.random.default_rng(0)
    areas = [area(rng.choice(own, len(own)), rng.choice(strange, len(strange))) for _ in range(500)]
    return area(own, strange), *np.quantile(areas, metrics.ENDS)


def area(own: np.ndarray, strange: np.ndarray) -> float:
    return float(roc_auc_score(np.r_[np.zeros(len(own)), np.ones(len(strange))], np.r_[own, strange]))


if __name__ == "__main__":
    main()

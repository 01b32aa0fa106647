"""How exact, small and fast each format of a bundle is: of a run's trained model, on its validation images.

    python benchmarks/export.py runs/elpv

It runs every format as `thaw export` does. Which format carries which family: make families.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import setting

from helpers.core import disk, project
from helpers.evaluation import prediction
from helpers.export import bundle, certificate, formats


def main() -> None:
    """Print the certificate of every format, also of those that `thaw export` would not write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run with a measured model")
    parser.add_argument("--formats", nargs="+", default=list(formats.FORMATS))
    parser.add_argument("--checked", type=int, default=0, help="images of the proof; 0: all")
    arguments = parser.parse_args()
    print(setting.machine())
    run = project.run_folder(arguments.run)
    model = prediction.load(run / "evaluate")
    proof = bundle.proof_images(run / "resize", run / "explore", "val", limit=arguments.checked)
    samples, certificates, refusals = bundle.samples(run / "resize"), [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "bundle")
        about = bundle.begin(folder, run / "evaluate")
        expected = bundle.expected(prediction.asking(model, run / "evaluate"), proof.files, about)
        classes = disk.read_json(folder / "classes.json")
        for kind in arguments.formats:
            formats.write(model, kind, folder, samples)
            bundle._describe(folder, run.name, [kind])
            parity, answers = certificate.compare(folder, kind, proof.files, expected, proof.labels, classes)
            certificates.append(parity)
            refusals.append(certificate.judge(parity, answers, expected, proof.files, 0.02, len(classes)))
    print(certificate.table(certificates).to_string())
    print("\n".join(filter(None, refusals)))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # TensorFlow and OpenVINO in one process may never end

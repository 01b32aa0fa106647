"""By hand: every notebook opened in a real JupyterLab, run from top to bottom by its menu, compared with headless.

Not part of `make test`; `python -m pytest -m browser -s` runs it. THAW_SCREENSHOTS=folder keeps an image of each
notebook as a reader sees it when it has run.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from helpers.core import notebooks, project, stages

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TOKEN = "only-for-this-test"
# What makes the defaults of the notebooks small; all else is as a reader finds it.
SMALL = {
    "01_split": {"ratio": "[0.5, 0.25, 0.25]"},
    "02_resize": {"image_size": "32"},
    "03_train_head": {"epochs": "4", "views": "2", "batch_size": "8"},
    "04_fine_tune": {"epochs": "2", "views": "2", "batch_size": "8"},
}
SHOWN = {"stream", "display_data", "execute_result"}
PLAIN = {"text/plain", "text/html", "image/png"}  # which VS Code and the classic Notebook show as Lab does
QUIET = '{"fetchNews": "false", "checkForUpdates": false, "doNotDisturbMode": true}'


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, image_folder) -> Path:
    """A copy of the project whose notebooks have photos of the test and few epochs as defaults."""
    folder = tmp_path_factory.mktemp("lab") / "project"
    for name in ("helpers", "notebooks", "recipes"):
        shutil.copytree(project.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(project.ROOT / "pyproject.toml", folder)
    photos = image_folder(folder / "photos", {"disc": 12, "square": 12, "cross": 12}, size=48)
    for name, changes in (SMALL | {"00_explore": {"source": f'"{photos}"'}}).items():
        path = folder / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        for parameter, value in changes.items():
            cell = notebook.cells[1]
            cell.source, count = re.subn(rf"(?m)^({parameter}: .*? = ).*?(?=  #)", rf"\g<1>{value}", cell.source)
            assert count == 1, f"{name} has no parameter {parameter}"
        nbformat.write(notebook, path)
    return folder


@pytest.fixture(scope="module")
def environment(checkout, tmp_path_factory) -> dict[str, str]:
    """Nothing of the person who runs the test is read or written, and `helpers` is that of the copy."""
    home = tmp_path_factory.mktemp("home")
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(QUIET)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "THAW", "TF_CPP"))}
    kept |= {"PYTHONPATH": str(checkout), "JUPYTER_CONFIG_DIR": str(home / "config"), "COLUMNS": "200"}
    kept |= {"JUPYTER_RUNTIME_DIR": str(home / "runtime"), "IPYTHONDIR": str(home / "ipython")}
    kept |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    return kept


@pytest.fixture(scope="module")
def lab(checkout, environment):
    """The address of a JupyterLab in the project's copy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--ServerApp.port={port}", f"--IdentityProvider.token={TOKEN}", "--ServerApp.port_retries=0"]
    options += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", *options]
    log = checkout.parent / "lab.log"
    with open(log, "w") as stream:
        process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                kernels(address)
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


def run_all(page, address: str, path: Path, limit: float = 900) -> None:
    """Open a notebook, choose Run All Cells from its menu, wait until every cell has its number, and save."""
    page.goto(f"{address}/lab/tree/notebooks/{path.name}?token={TOKEN}&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
    wait_until(
        lambda: any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels(address))
    )
    choose(page, "Run", "runmenu:run-all")
    numbers = page.locator(".jp-CodeCell .jp-InputPrompt")
    failed = page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]')

    def ran() -> bool:
        assert failed.count() == 0, failed.first.text_content()
        return all(re.fullmatch(r"\[\d+\]:", text.strip()) for text in numbers.all_text_contents())

    wait_until(ran, limit)
    choose(page, "File", "docmanager:save")
    wait_until(lambda: is_saved(path))


def is_saved(path: Path) -> bool:
    try:
        return all(cell.get("execution_count", 1) for cell in nbformat.read(path, as_version=4).cells)
    except ValueError:  # it is being written
        return False


def choose(page, menu: str, command: str) -> None:
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.locator(f'.lm-Menu-item[data-command="{command}"]').click()


def kernels(address: str) -> list[dict]:
    return json.load(urllib.request.urlopen(f"{address}/api/kernels?token={TOKEN}", timeout=30))


def wait_until(happens, limit: float = 180) -> None:
    end = time.monotonic() + limit
    while not happens():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.5)


def screenshot(page, name: str) -> None:
    """Keep an image of the whole notebook, without the panels at its side, where one is asked for."""
    if folder := os.environ.get("THAW_SCREENSHOTS"):
        panel = page.locator(".jp-WindowedPanel-outer")
        for _ in range(3):  # what comes into view is drawn only then, and changes the height
            height = panel.evaluate("panel => { panel.scrollTop = 0; return panel.scrollHeight }")
            page.set_viewport_size({"width": 1400, "height": min(int(height) + 200, 12_000)})
            page.wait_for_timeout(1000)
        page.locator(".jp-NotebookPanel").screenshot(path=Path(folder) / f"lab-{name}.png")
        page.set_viewport_size({"width": 1400, "height": 1000})


@pytest.fixture(scope="module")
def by_hand(browser, lab, checkout, say) -> Path:
    """The folder of the run that was made by hand, notebook by notebook."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    names = [stage.notebook.stem for stage in notebooks.stages().values() if not stage.notebook.stem[2].isalpha()]
    for name in names[:6]:
        begun = time.monotonic()
        run_all(page, lab, checkout / "notebooks" / f"{name}.ipynb")
        screenshot(page, name)
        say(f"{name} in JupyterLab: {time.monotonic() - begun:.0f} s")
    page.close()
    return checkout / "runs" / "demo"


@pytest.fixture(scope="module")
def say(request):
    """A function that prints whatever pytest captures."""
    manager = request.config.pluginmanager.getplugin("capturemanager")

    def show(text: str) -> None:
        with manager.global_and_fixture_disabled():
            print(f"\n{text}", end="")

    return show


@pytest.fixture(scope="module")
def headless(by_hand, checkout, environment) -> Path:
    """The same, by `thaw run` with a recipe that changes nothing."""
    (checkout / "recipes" / "headless.yaml").write_text("name: headless\n")
    thaw(checkout, environment, "run", "recipes/headless.yaml")
    return checkout / "runs" / "headless"


def thaw(checkout: Path, environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "helpers.cli.main", *arguments]
    ran = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def artefacts(stage: Path) -> dict[str, Path]:
    """A stage's files by name, without what only a headless run or a clock puts there."""
    files = {path.relative_to(stage).as_posix(): path for path in stage.rglob("*") if path.is_file()}
    return {name: path for name, path in files.items() if not re.match(r"notebook\.|stage\.json|logs/", name)}


def test_by_hand_and_headless_leave_the_same(by_hand, headless):
    for stage in ("explore", "split", "resize", "head", "fine_tune", "evaluate"):
        first, second = artefacts(by_hand / stage), artefacts((headless / stage).resolve())
        assert set(first) == set(second) and stages.status(by_hand / stage) == "done", stage
        for name in (name for name in first if name.endswith((".csv", ".json", ".png"))):
            if name == "history.csv":
                whole, other = (pd.read_csv(folder[name]).drop(columns="seconds") for folder in (first, second))
                pd.testing.assert_frame_equal(whole, other)
            else:
                assert first[name].read_bytes() == second[name].read_bytes(), f"{stage}/{name}"
    assert len(pd.read_csv(by_hand / "evaluate" / "predictions.csv")) == 9


def test_the_notebooks_were_saved_whole_and_without_errors(by_hand, checkout):
    for path in sorted((checkout / "notebooks").glob("0[0-5]_*.ipynb")):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), path.name
        outputs = [output for cell in cells for output in cell.outputs]
        assert {"stream", "display_data"} <= {output.output_type for output in outputs} <= SHOWN, path.name
        shown = [item for output in outputs for item in output.get("data", {}).items()]
        assert {kind for kind, _ in shown} <= PLAIN, path.name
        assert not [text for kind, text in shown if kind == "text/html" and re.search("<script|<iframe", text)]


def test_training_shows_a_bar_by_hand_and_a_line_an_epoch_headless(by_hand, headless, checkout):
    def printed(path: Path) -> str:
        cells = nbformat.read(path, as_version=4).cells
        return "".join(output.text for cell in cells for output in cell.get("outputs", []) if "text" in output)

    live, batch = printed(checkout / "notebooks/03_train_head.ipynb"), printed(headless / "03_train_head.ipynb")
    assert "Epoch 4/4" in live and "━" in live and "epoch   4 of 4" not in live
    assert "epoch   4 of 4" in batch and "━" not in batch and len(re.findall(r"(?m)^epoch ", batch)) == 4


def test_the_command_knows_what_was_made_by_hand(by_hand, headless, checkout, environment):
    shown = thaw(checkout, environment, "show", "recipes/headless.yaml", "--name", "demo")
    assert shown.count("made by hand; it is used as it is") == 6
    listed = thaw(checkout, environment, "ls")
    assert re.search(r"^demo .* 6 ", listed, re.M) and re.search(r"^headless .* 6 ", listed, re.M)

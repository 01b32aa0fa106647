"""What native libraries write stays off the terminal, and is at hand when something fails."""

import re
import subprocess
import sys
from pathlib import Path

from helpers.core import project

PROGRAM = """
import os, sys, warnings

from helpers.cli import main, quiet


@main.app.command()
def chatter(fails: bool = False):
    with quiet.native_log():
        os.write(2, b"E0000 failed call to cuInit\\n")
        print("progress", file=sys.stderr)
        warnings.warn("a true warning")
        if fails:
            raise ValueError("the image is broken")
    print("answer")
    os.write(2, b"after\\n")


main.entry()
"""


def run(tmp_path, *arguments):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), "chatter", *arguments]
    environment = {"PYTHONPATH": str(project.ROOT), "TMPDIR": str(tmp_path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_answers_progress_and_warnings_reach_the_terminal_and_native_words_do_not(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0 and done.stdout == "answer\n"
    assert done.stderr.startswith("progress\n") and "a true warning" in done.stderr and done.stderr.endswith("after\n")
    assert "cuInit" not in done.stderr and not list(tmp_path.glob("thaw-*.log"))


def test_an_error_names_the_file_with_the_native_words(tmp_path):
    done = run(tmp_path, "--fails")
    assert done.returncode == 1
    log = re.fullmatch(r"the image is broken\nMessages of TensorFlow and other libraries: (\S+)\n", done.stdout)[1]
    assert Path(log).read_text() == "E0000 failed call to cuInit\n"

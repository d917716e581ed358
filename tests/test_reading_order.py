"""How many files one opens to follow a story of the code, and that CONTRIBUTING.md names them in that order."""

import json
import re
import subprocess
import sys

import pytest

from tests.reading_order import LIMITS, ROOT


@pytest.fixture(scope="module")
def stories() -> dict[str, list[str]]:
    """Of a fresh process, in which nothing is remembered from other tests."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.reading_order", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("story", LIMITS)
def test_a_story_runs_through_few_files(stories, story):
    assert 0 < len(stories[story]) <= LIMITS[story], stories[story]


@pytest.mark.parametrize("story", ["step", "picture", "conversion"])
def test_the_reading_order_is_what_was_counted(stories, story):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition(f"<!-- story: {story} -->")[2].partition("<!-- end -->")[0]
    assert re.findall(r"^\d+\. `([^`]+)`", section, flags=re.MULTILINE) == stories[story]

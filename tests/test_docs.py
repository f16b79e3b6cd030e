"""The documents: links lead somewhere, commands exist, and what they show of the command line is what it takes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gemmconv import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Files and headings; no address of a machine."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name) if name else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short(page):
    """Tables, pictures, code and what is shown of a terminal cannot be broken."""
    fixed = ("|", "![", "    ")
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith(fixed)] == []


def test_every_page_is_reached_from_the_readme():
    """A page nobody links to is not read."""
    text = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_command_line_are_accepted(page):
    """Every `python -m gemmconv` line in a console block parses."""
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.S):
        for line in re.findall(r"^\$ (.*)$", block, re.M):
            for part in line.split("&&"):
                words = shlex.split(part)
                if "gemmconv" in words and "-m" in words:
                    cli._parser().parse_args(words[words.index("gemmconv") + 1 :])


def test_the_readme_names_one_test_command_that_ci_runs():
    """.ci/run takes it from there."""
    assert len(re.findall(r"^\$ .*-m pytest$", (ROOT / "README.md").read_text(), re.M)) == 1
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_plan_in_the_readme_is_as_it_is_printed():
    """On two cores with 2 MiB of L2 cache each, as it says there, and by the kernels that BLAS has for this CPU."""
    code = (
        "from gemmconv import plan_conv3d_transpose\n"
        "from gemmconv.blas import small_products\n"
        "from gemmconv.machine import Machine\n"
        "from gemmconv.plan import make_plan\n"
        "asked = plan_conv3d_transpose((1, 16, 16, 16, 128), (4, 4, 4, 64, 128), strides=2).problem\n"
        "if small_products():\n"
        "    print(make_plan(asked, Machine(2, 2 << 20, 32 << 20), 'auto', 2))\n"
    )
    environment = {name: text for name, text in os.environ.items() if not name.startswith("OPENBLAS_")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    if not found.stdout:
        pytest.skip(
            "the plan that is shown has small products, and no kernels of BLAS for this CPU leave them unpacked"
        )
    shown = re.search(r"^operation .*?(?=^```)", (ROOT / "README.md").read_text(), re.M | re.S)
    assert shown is not None
    assert shown[0] == found.stdout

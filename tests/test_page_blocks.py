"""What `make docs-check` makes of a page: its blocks, its marks, and what it compares."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs import check
from docs.check import (
    Scratch,
    blocks,
    commands,
    exchanges,
    missing,
    page_blocks,
    pages,
    same,
    small,
)

PAGE = """# A page

    first --option \\
        more

## A heading
<!-- check: no needs a cluster -->
    sbatch job.sh

* a list

      echo in a list

```console
$ echo one; \\
  echo two
one
two
$ true
```

<!-- check: before
mkdir folder
-->
<!-- check: file folder/a.yaml -->
```yaml
a: 1
```

```{toctree}
quickstart
```
"""


@pytest.mark.parametrize("page", pages())
def test_every_block_of_a_page_is_run_or_says_why_not(page: str) -> None:
    for block in page_blocks(page):
        assert block.what or block.language in check.DATA
        if block.what == "no":
            assert len((block.mark("no") or "").split()) > 1, block.line


def test_a_page_is_read_as_it_is_shown() -> None:
    found = [(block.line, block.what, block.text) for block in blocks(PAGE)]
    assert found == [
        (3, "shell", "first --option \\\n    more\n"),
        (8, "no", "sbatch job.sh\n"),
        (12, "shell", "echo in a list\n"),
        (14, "console", "$ echo one; \\\n  echo two\none\ntwo\n$ true\n"),
        (26, "file", "a: 1\n"),
    ]
    assert blocks(PAGE)[1].mark("no") == "needs a cluster"
    assert blocks(PAGE)[4].mark("before") == "mkdir folder"


@pytest.mark.parametrize(
    "page",
    [
        "<!-- check: never because -->\n    true\n",
        "<!-- check: no -->\n    true\n",
        "<!-- check: python -->\n\nno block\n",
        "```python\nprint()\n```\n",
        "```bsah\ntrue\n```\n",
    ],
)
def test_a_mark_that_would_change_nothing_is_an_error(page: str) -> None:
    with pytest.raises(ValueError, match="check"):
        blocks(page)


@pytest.mark.parametrize(
    ("command", "run"),
    [
        ("distseg train preset=toy\n", "distseg train preset=toy steps=2 batch_size=4\n"),
        (
            "torchrun -m distseg.train \\\n  a=1  # why\n",
            "torchrun -m distseg.train \\\n  a=1 steps=2 batch_size=4  # why\n",
        ),
        ("distseg train steps=9\n", "distseg train steps=9\n"),
        ("distseg train --help loss\n", "distseg train --help loss\n"),
        (
            "distseg prepare toy --out a.h5\n",
            "distseg prepare toy --out a.h5 num_train=32 num_val=8\n",
        ),
        ("distseg evaluate runs/toy\n", "distseg evaluate runs/toy\n"),
    ],
)
def test_sizes_are_those_of_a_check(command: str, run: str) -> None:
    assert small(command) == run


def test_commands_and_what_they_print_are_told_apart() -> None:
    assert list(commands("a \\\n b\nc\n")) == ["a \\\n b\n", "c\n"]
    console = "$ a \\\n  b\nx\n$ c\n"
    assert exchanges(console) == [("a \\\n  b\n", ["x"]), ("c\n", [])]


@pytest.mark.parametrize(
    ("shown", "got", "equal"),
    [
        ("wrote data/a.h5: 400 train", "wrote data/a.h5: 400 train", True),
        ("loss 2.129", "loss 2.4", True),  # another CPU
        ("loss 2.129", "loss 3.1", False),
        ("loss 2.129", "lost 2.129", False),
        ("4.0 img/s  left 0:15:39", "91 img/s left 1:02", True),
        ("weights: /home/me/a.pth: 288 tensors", "weights: /b.pth: 288 tensors", True),
        ("health: the discriminator ...", "health: the discriminator has won", True),
        ("0 errors", "1 errors", False),
    ],
)
def test_lines_are_compared_but_for_what_differs_by_machine(
    shown: str, got: str, equal: bool
) -> None:
    assert same(shown, got) is equal


def test_lines_are_looked_for_in_their_order() -> None:
    assert missing(["a", "...", "c"], "a\nb\nc\n") is None
    assert missing(["c", "a"], "a\nb\nc\n") == "a"


def test_blocks_are_run_in_their_folder_and_fail_where_they_do(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    for block in blocks(PAGE)[2:]:
        scratch.run(block)
    assert (tmp_path / "folder" / "a.yaml").read_text() == "a: 1\n"
    page = "    true\n    false\n\ntext\n\n    $ echo 1\n    2\n"
    for block in blocks(page):
        with pytest.raises(ValueError, match=r"exit code 1|not in its output: 2"):
            scratch.run(block)
    marked = "<!-- check: exit 3 -->\n<!-- check: replace 7 with 3 -->\n    exit 7\n"
    scratch.run(blocks(marked)[0])
    marked = "<!-- check: exit 3 -->\n    $ echo 1\n    1\n    $ echo 2; exit 3\n    2\n"
    scratch.run(blocks(marked)[0])


def test_keys_are_read_as_by_training(tmp_path: Path) -> None:
    mark = "<!-- check: keys preset=toy -->\n"
    lines = "    steps=9         # a comment\n    'data.keep_classes=[road]' \\\n    seed=1\n"
    Scratch(tmp_path).run(blocks(mark + lines)[0])
    with pytest.raises(ValueError, match="unknown key 'stepps'"):
        Scratch(tmp_path).run(blocks(f"{mark}    stepps=9\n")[0])


def test_a_page_s_program_is_whole_and_its_errors_name_the_page_s_lines(tmp_path: Path) -> None:
    mark = "<!-- check: python -->\n"
    page = f"{mark}    a = 1\n\ntext\n\n{mark}    assert a == 2\n"
    scratch = Scratch(tmp_path)
    for block in blocks(page):
        scratch.run(block)
    with pytest.raises(ValueError, match=r'page.py", line 7'):
        scratch.end()

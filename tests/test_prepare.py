"""What `prepare` was asked for is checked before a data set is read, and nothing else is
overwritten.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import toy_samples

from shards.errors import InputError
from shards.maps import MapsReader, write_maps
from shards.prepare import NAMES, prepare, preparer_of
from shards.sample import STANFORD


@pytest.mark.parametrize(
    ("name", "root", "options", "message"),
    [
        ("stanfrod", ".", {}, "(?s)'stanfrod'.*toy, stanford, voc, .*ohe"),
        ("stanford", None, {}, "(?s)no --root.*the folder that stanford was unpacked to"),
        ("stanford", "absent", {}, "--root .*absent: no such folder"),
        ("folder", None, {}, "(?s)no --root.*the folder that your images and masks are in"),
        ("stanford", ".", {"sed": "1"}, "(?s)option 'sed' of stanford.*one of: seed"),
        ("stanford", ".", {"root": "1"}, "option 'root' of stanford"),
        ("stanford", ".", {"seed": "one"}, "(?s)seed=one.*whole number"),
        ("stanford", ".", {"seed": "-1"}, "no images"),
        ("toy", ".", {}, "(?s)no --root: toy is generated"),
    ],
)
def test_request_that_cannot_be_met(
    tmp_path: Path, name: str, root: str | None, options: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(name, None if root is None else tmp_path / root, tmp_path / "maps.h5", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_like_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    with pytest.raises(InputError, match=r"did you mean scenes\?"):
        prepare("folder", tmp_path / "scens", tmp_path / "maps.h5")
    (tmp_path / "notes").touch()
    with pytest.raises(InputError, match="notes, which is a file"):
        prepare("folder", tmp_path / "notes", tmp_path / "maps.h5")


def test_only_maps_of_the_same_data_are_replaced(tmp_path: Path) -> None:
    samples, out = toy_samples(), tmp_path / "maps.h5"
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(InputError, match=r"write --out .*/raw\.h5"):
        prepare("toy", None, tmp_path / "raw", num_train=1, num_val=1)
    for path in (tmp_path / "thesis.txt", tmp_path):
        with pytest.raises(InputError, match="exists"):
            prepare("toy", None, path, num_train=1, num_val=1)
    assert (tmp_path / "thesis.txt").read_text() == "words"
    write_maps(out, "another", STANFORD, samples, len(samples))
    with pytest.raises(InputError, match="exists: the data set 'another'"):
        prepare("toy", None, out, num_train=1, num_val=1)
    write_maps(out, "toy", STANFORD, samples, len(samples))
    prepare("toy", None, out, num_train="2", num_val=1)
    with MapsReader(out) as reader:
        assert {name: len(keys) for name, keys in reader.splits.items()} == {"train": 2, "val": 1}


def test_every_name_has_its_preparer() -> None:
    for name in NAMES:
        assert preparer_of(name).__module__ == f"shards.prepare.{name}"

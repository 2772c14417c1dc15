"""The palette `safe`: how far its colours are apart, for the usual eye and for others."""

from __future__ import annotations

import numpy as np
import pytest

from distseg.tracking.palettes import SAFE, coloured, safe_colors
from docs.figures.palette import chosen, ciede2000, views
from shards.errors import InputError
from shards.sample import STANFORD, ClassSet

# (one, other, CIEDE2000) of CIELAB: of the test data of Sharma, Wu and Dalal 2005, table 1
PAIRS = (
    ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
    ((50, -1.3802, -84.2814), (50, 0, -82.7485), 1.0000),
    ((50, 0, 0), (50, -1, 2), 2.3669),
    ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
    ((50, 2.5, 0), (61, -5, 29), 22.8977),
    ((50, 2.5, 0), (58, 24, 15), 19.4535),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((22.7233, 20.0904, -46.694), (23.0331, 14.973, -42.5619), 2.0373),
    ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
)


def distances(colors: list[tuple[int, int, int]]) -> np.ndarray:
    """CIEDE2000 of all pairs, (3, n, n), for the usual eye, deuteranopia and protanopia."""
    seen = views(np.array(colors))
    found = ciede2000(seen[:, :, None], seen[:, None])
    found[:, np.arange(len(colors)), np.arange(len(colors))] = np.inf
    return found


def test_the_difference_of_colours_is_that_of_the_published_test_data() -> None:
    for one, other, expected in PAIRS:
        found = ciede2000(np.array(one, float), np.array(other, float))
        assert found == pytest.approx(expected, abs=1e-4)


def test_colours_of_up_to_12_classes_are_far_apart_for_all_eyes() -> None:
    # 2 is what can just be told side by side; void is black, paper white
    found = distances([*safe_colors(12), (0, 0, 0), (255, 255, 255)])
    assert found.shape == (3, 14, 14) and found.min() > 11
    # the colours that tell Stanford's classes apart now: the bound means something
    assert distances(list(STANFORD.palette)).min() < 11


@pytest.mark.parametrize("number", [1, 2, 21, 150, 255])
def test_any_number_of_classes_has_colours_of_its_own(number: int) -> None:
    colors = safe_colors(number)
    assert len({*colors}) == number and not {(0, 0, 0), (255, 255, 255)} & {*colors}
    assert colors == SAFE[:number]
    if number > 1:
        # for every eye, and not only as numbers
        assert distances([*colors, (0, 0, 0), (255, 255, 255)]).min() > 2


def test_the_table_is_what_the_search_finds() -> None:
    assert tuple(chosen(16)) == safe_colors(16)


def test_classes_are_coloured_by_the_words_of_the_key() -> None:
    assert coloured(STANFORD, "data") is STANFORD
    safe = coloured(STANFORD, "safe")
    assert safe == ClassSet(STANFORD.names, safe_colors(8)) and safe.palette != STANFORD.palette
    with pytest.raises(InputError, match="1 to 255"):
        safe_colors(256)

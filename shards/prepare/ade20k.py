"""ADE20K's scene parsing benchmark (Zhou et al. 2017): 150 classes, 0 for all other things, which
is void.

Names: of those that the benchmark's objectInfo150 gives each class, the one that segmentation
toolboxes list. Colours: the benchmark's color150, as they list it; road and skyscraper share one.
"""

from __future__ import annotations

from pathlib import Path

from shards.errors import InputError
from shards.prepare.dataset import DataSet
from shards.prepare.masks import Coding, masked_sample
from shards.prepare.pairing import Pair, files_by_id, locate, pair_tasks
from shards.sample import IGNORE_INDEX, ClassSet

# name and colour in hexadecimal digits, in the order of the masks' values, which begin with 1
TABLE = """
wall 787878, building b47878, sky 06e6e6, floor 503232, tree 04c803, ceiling 787850, road 8c8c8c,
bed cc05ff, windowpane e6e6e6, grass 04fa07, cabinet e005ff, sidewalk ebff07, person 96053d, earth
787846, door 08ff33, table ff0652, mountain 8fff8c, plant ccff04, curtain ff3307, chair cc4603, car
0066c8, water 3de6fa, painting ff0633, sofa 0b66ff, shelf ff0747, house ff09e0, sea 0907e6, mirror
dcdcdc, rug ff095c, field 7009ff, armchair 08ffd6, seat 07ffe0, fence ffb806, desk 0aff47, rock
ff290a, wardrobe 07ffff, lamp e0ff08, bathtub 6608ff, railing ff3d06, cushion ffc207, base ff7a08,
box 00ff14, column ff0829, signboard ff0599, chest_of_drawers 0633ff, counter eb0cff, sand a09614,
sink 00a3ff, skyscraper 8c8c8c, fireplace fa0a0f, refrigerator 14ff00, grandstand 1fff00, path
ff1f00, stairs ffe000, runway 99ff00, case 0000ff, pool_table ff4700, pillow 00ebff, screen_door
00adff, stairway 1f00ff, river 0bc8c8, bridge ff5200, bookcase 00fff5, blind 003dff, coffee_table
00ff70, toilet 00ff85, flower ff0000, book ffa300, hill ff6600, bench c2ff00, countertop 008fff,
stove 33ff00, palm 0052ff, kitchen_island 00ff29, computer 00ffad, swivel_chair 0a00ff, boat adff00,
bar 00ff99, arcade_machine ff5c00, hovel ff00ff, bus ff00f5, towel ff0066, light ffad00, truck
ff0014, tower ffb8b8, chandelier 001fff, awning 00ff3d, streetlight 0047ff, booth ff00cc,
television_receiver 00ffc2, airplane 00ff52, dirt_track 000aff, apparel 0070ff, pole 3300ff, land
00c2ff, bannister 007aff, escalator 00ffa3, ottoman ff9900, bottle 00ff0a, buffet ff7000, poster
8fff00, stage 5200ff, van a3ff00, ship ffeb00, fountain 08b8aa, conveyer_belt 8500ff, canopy 00ff5c,
washer b800ff, plaything ff001f, swimming_pool 00b8ff, stool 00d6ff, barrel ff0070, basket 5cff00,
waterfall 00e0ff, tent 70e0ff, bag 46b8a0, minibike a300ff, cradle 9900ff, oven 47ff00, ball ff00a3,
food ffcc00, step ff008f, tank 00ffeb, trade_name 85ff00, microwave ff00eb, pot f500ff, animal
ff007a, bicycle fff500, lake 0abed4, dishwasher d6ff00, screen 00ccff, blanket 1400ff, sculpture
ffff00, hood 0099ff, sconce 0029ff, vase 00ffcc, traffic_light 2900ff, tray 29ff00, ashcan ad00ff,
fan 00f5ff, pier 4700ff, crt_screen 7a00ff, plate 00ffb8, monitor 005cff, bulletin_board b8ff00,
shower 0085ff, radiator ffd600, glass 19c2c2, clock 66ff00, flag 5c00ff
"""
# as text: 150 classes as nested tuples would be 150 lines that nobody compares with the source
_ROWS = [entry.split() for entry in TABLE.split(",")]
ADE20K = ClassSet(
    tuple(name.replace("_", " ") for name, _ in _ROWS),
    tuple((int(color[:2], 16), int(color[2:4], 16), int(color[4:], 16)) for _, color in _ROWS),
)
# the masks' 0 is void here, so that every class moves down by one
CODING = Coding(((0, IGNORE_INDEX), *((value, value - 1) for value in range(1, len(_ROWS) + 1))))
SPLITS = {"train": "training", "val": "validation"}


def samples(root: Path) -> DataSet:
    """images/(training|validation)/<id>.jpg and annotations/(training|validation)/<id>.png, paired
    by id.

    root: ADEChallengeData2016, or a folder with it inside. Missing: an image without a mask, and
    the reverse. Raises InputError for a folder without images; a sample, when it is read, for an
    unreadable file, a mask of another size or with values above 150 (those of the full ADE20K,
    whose masks are coloured, are not these).
    """
    root = locate(root, "annotations", "ADEChallengeData2016")
    pairs: list[Pair] = []
    notes: list[str] = []
    for split, name in SPLITS.items():
        folders = root / "images" / name, root / "annotations" / name
        images = files_by_id(folders[0], notes=notes)
        masks = files_by_id(folders[1], notes=notes)
        if not images:
            raise InputError(
                f"no images in {folders[0]}", "<id>.jpg", "unpack all of ADEChallengeData2016"
            )
        # ids of both folders: an image without a mask, or the reverse, becomes a task that says so
        for id_ in sorted(images.keys() | masks.keys()):
            image = images.get(id_, folders[0] / f"{id_}.jpg")
            pairs.append(Pair(id_, split, image, masks.get(id_, folders[1] / f"{id_}.png")))
    tasks = pair_tasks(root, pairs, masked_sample, coding=CODING, source="ade20k")
    return DataSet(ADE20K, tasks, tuple(notes))

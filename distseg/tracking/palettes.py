"""Colours of classes that colour-blind readers tell apart too.

How they were chosen: docs/figures/palette.py, whose `chosen` computes them again.
"""

from __future__ import annotations

from dataclasses import replace

from shards.errors import InputError
from shards.sample import ClassSet

Color = tuple[int, int, int]

# Okabe and Ito's, then each as far from those before it as three kinds of eyes allow; the first
# colours of a long list are those of a short one, so that a class that is added changes no other
_SAFE = """
0072b2 e69f00 009e73 cc79a7 56b4e9 d55e00 f0e442 960000 4b5a5a 00e1a5 1e3c69 1e0fd2
5a694b c3e1ff 3c87ff 87d2c3 780f2d 697878 b43c00 4b5a78 c3ffa5 d2a569 3c3c4b 3c963c
691eff d28796 1ed2d2 c30f96 1e4b3c b4f0d2 f06978 e169c3 f0c378 2d874b 695aff c32dc3
ffa596 5a6978 5ad2ff 78b4a5 780096 69692d 00a5ff d2e1e1 694b2d a5ffc3 c35a96 4b695a
ff4b5a e1f0ff 785a96 ffb43c e1a5b4 b46987 6996c3 697869 a5ff78 2d4b0f 2d4b69 87965a
3c3cd2 ffb4e1 5a6969 783c4b 780f4b 69870f 00c387 b4962d e10f69 d2a5c3 3ca587 4b4b5a
2d96e1 c3e196 6996a5 3c8787 870fb4 f0964b e1ff00 8778a5 4b5ae1 5aa596 f0c3b4 ff0087
5a6900 1e5a4b 3c00f0 694b3c 4b78d2 781e3c b48778 2da5e1 a55a3c 4b00b4 c396c3 78c378
d25a3c c35a5a 5a8769 005a87 ffb4c3 871e1e b43ca5 2d3c5a a5002d c396b4 5a8796 d296a5
695a3c f0b45a 78b4d2 f07800 4bc3ff 875a69 2de169 3cb496 78c3b4 5ae1e1 0f4bb4 961e96
0f4b78 4bd2a5 b4e1d2 2d875a ff3cff e12db4 966978 ffc300 c3e15a 4b784b b4f087 c36996
96b44b 00d296 3c4be1 691e5a 2d87e1 f0e1b4 1e9687 b4ffd2 c3d2d2 870f78 c3a587 5a87b4
c39669 c387b4 b4fff0 5aa5d2 2d96ff 694b69 c3e1f0 f0f0e1 a5d2f0 ffa5c3 786987 b43c2d
e12d1e 5a4bff 005a1e a58769 2d78a5 a5874b 967878 b4005a e15ab4 004b2d f0d2b4 e1c387
4b69e1 b42d78 e1d2c3 784b5a d2b4d2 962d87 3c3c3c a5b4e1 5ad2e1 f00f78 87782d f0b4a5
ff3c69 fff05a 690087 f04b2d c3f0f0 c387d2 8787d2 87000f 0f69a5 2d5a3c c33c87 87f0e1
a50078 f05a87 f03cc3 695a4b ffa50f 873cc3 69c3f0 4bb478 96963c b4f0c3 2d4b1e c3c3b4
3c2da5 00873c 1e2dd2 d2ff96 870069 007887 960f87 a50f1e c3e1a5 87b45a 5ac3c3 2dff2d
2d5a96 f09696 ff963c c3ffb4 7869f0 f0f0f0 f087a5 f07896 87784b c3f0a5 c3d2ff a50f69
ff69b4 f0005a d20000 f0a587 4b3c00 96691e 1e3cc3 e1961e 69e1d2 a5ffe1 5af0f0 5ad25a
f01e2d f096f0 d23cc3 8787f0 78872d ff0f96 87ffff 8778f0 4b00ff 3c5ad2 d2874b a51ea5
69c369 f0d278 3c2de1
"""
SAFE: tuple[Color, ...] = tuple((c[0], c[1], c[2]) for c in map(bytes.fromhex, _SAFE.split()))


def safe_colors(number: int) -> tuple[Color, ...]:
    """So many colours, RGB from 0 to 255, none of them black or white: 1 to 255."""
    if not 1 <= number <= len(SAFE):
        raise InputError(f"{number} colours", f"1 to {len(SAFE)}", "ask for fewer")
    return SAFE[:number]


def coloured(classes: ClassSet, palette: str) -> ClassSet:
    """The classes in the colours that `evaluate.palette` names: data, their own, or safe."""
    if palette == "data":
        return classes
    return replace(classes, palette=safe_colors(classes.num_classes))

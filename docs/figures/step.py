"""One alternating step, as distseg/train/step.py's `alternate` takes it, and its course in time."""

from __future__ import annotations

from matplotlib.figure import Figure

from docs.figures.style import (
    BLUE,
    GREEN,
    ORANGE,
    ORANGE_LINE,
    PAPER,
    PURPLE,
    PURPLE_LINE,
    SLATE,
    Canvas,
    columns,
)

HEIGHT = 58
INPUTS, NETWORK, MAPS, JUDGE, LOSSES = 10, 102, 194, 286, 392  # upper edges of the rows
LANE = 25  # height


def draw() -> Figure:
    canvas = Canvas(640, 634)
    (a, width), (b, _), (c, _) = columns(8, 632, 3, 50)
    lefts = (a, b, c)
    _boxes(canvas, lefts, width)
    _forward(canvas, lefts, width)
    _gradients(canvas, lefts, width)
    _legend(canvas)
    _time(canvas)
    return canvas.figure


def _boxes(canvas: Canvas, lefts: tuple[float, ...], width: float) -> None:
    a, b, c = lefts
    box = (width, HEIGHT)
    canvas.box((a, INPUTS, *box), "image x", "(n, 3, H, W)", color=GREEN)
    canvas.box((c, INPUTS, *box), "label", "(n, H, W), 255: void", color=GREEN)
    canvas.box((a, NETWORK, *box), "segmentor", "one forward", color=BLUE)
    canvas.box((a, MAPS, *box), "logits and s(x)", "s(x): softmax, (n, C, h, w)", color=BLUE)
    canvas.box((b, MAPS, *box), "fake", "s(x) as a leaf of its own", color=SLATE)
    canvas.box((c, MAPS, *box), "real y", "one-hot or scaled; void: s(x)", color=GREEN)
    canvas.box(
        (b, JUDGE, c + width - b, HEIGHT),
        "discriminator",
        "one forward on real and one on fake; its work on x is shared",
        color=ORANGE,
    )
    losses = (width, HEIGHT + 8)
    canvas.box((a, LOSSES, *losses), "own losses", "cross entropy,", "Dice, ...", color=BLUE)
    canvas.box(
        (b, LOSSES, *losses), "adversarial loss", "adv_weight ×", "BCE(D(fake), real)", color=PURPLE
    )
    canvas.box(
        (c, LOSSES, *losses),
        "discriminator's loss",
        "BCE(D(y), real)",
        "+ BCE(D(fake), fake)",
        color=ORANGE,
    )


def _forward(canvas: Canvas, lefts: tuple[float, ...], width: float) -> None:
    """Solid arrows: what is computed from what."""
    a, b, c = lefts
    left = a + width * 0.4
    canvas.arrow((left, INPUTS + HEIGHT), (left, NETWORK))
    canvas.arrow((left, NETWORK + HEIGHT), (left, MAPS))
    canvas.arrow((left, MAPS + HEIGHT), (left, LOSSES))
    # the image passes between the maps to the discriminator
    gap = (b + width + c) / 2
    canvas.arrow((a + width, INPUTS + HEIGHT / 2), (gap, INPUTS + HEIGHT / 2), (gap, JUDGE))
    right = c + width / 2
    canvas.arrow((right, INPUTS + HEIGHT), (right, MAPS))
    canvas.arrow((right, MAPS + HEIGHT), (right, JUDGE))
    high = MAPS + HEIGHT * 0.3
    canvas.arrow((a + width, high), (b, high))
    canvas.text((a + width + b) / 2, high - 11, "detach", size=10.5)
    for x in (b + width * 0.4, c + width * 0.4):
        canvas.arrow((x, JUDGE + HEIGHT), (x, LOSSES))
    canvas.arrow((b + width * 0.4, MAPS + HEIGHT), (b + width * 0.4, JUDGE))


def _gradients(canvas: Canvas, lefts: tuple[float, ...], width: float) -> None:
    """Dashed arrows: 1, the proxy; 2, the one backward."""
    a, b, c = lefts
    x, low = b + width * 0.6, MAPS + HEIGHT * 0.72
    first = {"color": PURPLE_LINE, "dashed": True}
    canvas.arrow((x, LOSSES), (x, JUDGE + HEIGHT), **first)
    canvas.arrow((x, JUDGE), (x, MAPS + HEIGHT), **first)
    canvas.arrow((b, low), (a + width, low), **first)
    _number(canvas, x + 14, (JUDGE + HEIGHT + LOSSES) / 2, "1", PURPLE)
    second = {"color": ORANGE_LINE, "dashed": True}
    x = a + width * 0.6
    canvas.arrow((x, LOSSES), (x, MAPS + HEIGHT), **second)
    canvas.arrow((x, MAPS), (x, NETWORK + HEIGHT), **second)
    _number(canvas, x + 14, (MAPS + HEIGHT + LOSSES) / 2, "2", ORANGE)
    x = c + width * 0.6
    canvas.arrow((x, LOSSES), (x, JUDGE + HEIGHT), **second)
    _number(canvas, x + 14, (JUDGE + HEIGHT + LOSSES) / 2, "2", ORANGE)


def _number(canvas: Canvas, x: float, y: float, number: str, color: str) -> None:
    canvas.box((x - 8, y - 8, 16, 16), "", color=color)
    canvas.text(x, y, number, color=PAPER, size=11, weight="bold")


def _legend(canvas: Canvas) -> None:
    y = LOSSES + HEIGHT + 32
    _number(canvas, 16, y, "1", PURPLE)
    text = "the proxy: the adversary's gradient at fake, handed to s(x); none to D's parameters"
    canvas.text(32, y, text, align="left")
    _number(canvas, 16, y + 22, "2", ORANGE)
    text = "one backward for both networks, from own losses, proxy and discriminator's loss"
    canvas.text(32, y + 22, text, align="left")


def _time(canvas: Canvas) -> None:
    """The step's parts in their order on one rank, and what the network carries meanwhile."""
    top = LOSSES + HEIGHT + 82
    canvas.text(
        8,
        top,
        "in time, on every rank (DDP; lengths are not measured)",
        align="left",
        weight="bold",
    )
    computed, sent = top + 18, top + 18 + LANE + 8
    canvas.text(8, computed + LANE / 2, "computes", align="left")
    canvas.text(8, sent + LANE / 2, "sends", align="left")
    parts = (
        (78, 104, "S forward", BLUE),
        (184, 88, "D forward", ORANGE),
        (274, 56, "proxy", PURPLE),
        (332, 92, "D backward", ORANGE),
        (426, 132, "S backward", BLUE),
        (576, 56, "update", SLATE),
    )
    for x, width, name, color in parts:
        _bar(canvas, (x, computed, width, LANE), name, color)
    _bar(canvas, (372, sent, 96, LANE), "D gradients", ORANGE)
    _bar(canvas, (472, sent, 102, LANE), "S gradients", BLUE)
    _bar(canvas, (67, sent, 10, LANE), "", SLATE)
    _bar(canvas, (177, sent, 10, LANE), "", SLATE)
    y = sent + LANE + 12
    canvas.text(67, y, "pixel counts", size=10.5, align="left")
    canvas.text(177, y, "running statistics", size=10.5, align="left")
    canvas.text(372, y, "all-reduces, beside the backward", size=10.5, align="left")


def _bar(canvas: Canvas, place: tuple[float, float, float, float], name: str, color: str) -> None:
    canvas.box(place, "", color=color)
    x, y, width, height = place
    canvas.text(x + width / 2, y + height / 2, name, color=PAPER, size=11.5)

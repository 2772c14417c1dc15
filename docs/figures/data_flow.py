"""From raw data to a score: what is made once, and what happens at every step."""

from __future__ import annotations

from matplotlib.figure import Figure

from docs.figures.style import BLUE, GREEN, PURPLE, SLATE, Canvas, columns

ROWS = (44, 184, 324, 444)  # upper edges
HEIGHT = 72


def draw() -> Figure:
    canvas = Canvas(640, 532)
    (a, width), (b, _), (c, _) = columns(16, 624, 3, 42)
    _once(canvas, (a, b, c), width)
    _ahead(canvas, (a, b, c), width)
    _step(canvas, (a, b, c), width)
    return canvas.figure


def _once(canvas: Canvas, lefts: tuple[float, ...], width: float) -> None:
    """Raw data to shards."""
    a, b, c = lefts
    y = ROWS[0]
    canvas.frame((4, y - 34, 632, HEIGHT + 46), "once, on CPUs")
    canvas.text(624, y - 19, "distseg prepare, distseg pack", align="right", mono=True, size=11)
    box = (width, HEIGHT)
    canvas.box((a, y, *box), "raw data set", "images and masks", "in their own layout", color=SLATE)
    canvas.box(
        (b, y, *box),
        "maps.h5",
        "the images' own bytes,",
        "one-hot maps (C, H, W)",
        color=GREEN,
        mono=True,
    )
    canvas.box(
        (c, y, *box), "shards", "*.tar: image, index label", "+ index, manifest.json", color=GREEN
    )
    middle = y + HEIGHT / 2
    canvas.arrow((a + width, middle), (b, middle))
    canvas.arrow((b + width, middle), (c, middle))


def _ahead(canvas: Canvas, lefts: tuple[float, ...], width: float) -> None:
    """Shards to batches."""
    a, b, c = lefts
    y, above = ROWS[1], ROWS[0] + HEIGHT
    canvas.frame((4, y - 34, 632, HEIGHT + 46), "on every rank, ahead of the step")
    box = (width, HEIGHT)
    canvas.box((a, y, *box), "plan", "position → sample,", "by the seed alone", color=GREEN)
    canvas.box(
        (b, y, *box), "threads", "fetch, decode, warp:", "scale, crop, flip, colours", color=GREEN
    )
    canvas.box(
        (c, y, *box),
        "batch",
        "image (n, 3, h, w) uint8,",
        "label (n, h, w), 255: void",
        color=GREEN,
    )
    middle = y + HEIGHT / 2
    canvas.arrow((a + width, middle), (b, middle))
    canvas.arrow((b + width, middle), (c, middle))
    # from the shards down the gap between the columns into the threads' upper edge
    turn, x = above + 26, b + width * 0.75
    canvas.arrow((c + width / 2, above), (c + width / 2, turn), (x, turn), (x, y))


def _step(canvas: Canvas, lefts: tuple[float, ...], width: float) -> None:
    """Batches to trained networks and their scores."""
    a, b, c = lefts
    y, last, above = ROWS[2], ROWS[3], ROWS[1] + HEIGHT
    canvas.frame((4, y - 34, 632, last - y + HEIGHT + 44), "on all ranks together, every step")
    canvas.text(16, (y + HEIGHT + last) / 2, "every so many steps", align="left", weight="bold")
    box = (width, HEIGHT)
    canvas.box(
        (c, y, *box),
        "training_step",
        "gradients of both networks,",
        "averaged over the ranks",
        color=BLUE,
        mono=True,
    )
    canvas.box(
        (b, y, *box), "learners", "update both networks,", "then the EMA weights", color=BLUE
    )
    canvas.box(
        (a, y, *box),
        "metrics.jsonl",
        "health, W&B, TensorBoard",
        "every log_every steps",
        color=PURPLE,
        mono=True,
    )
    canvas.box(
        (a, last, *box),
        "scores",
        "val/mean_iou, ...; at the end",
        "evaluation.json, pictures",
        color=PURPLE,
    )
    canvas.box(
        (b, last, *box), "evaluation", "each validation image once,", "at full size", color=PURPLE
    )
    canvas.box(
        (c, last, *box),
        "checkpoints/",
        "every tensor, and the step:",
        "the plan goes on there",
        color=PURPLE,
        mono=True,
    )
    upper, lower = y + HEIGHT / 2, last + HEIGHT / 2
    canvas.arrow((c + width / 2, above), (c + width / 2, y))
    canvas.arrow((c, upper), (b + width, upper))
    canvas.arrow((b, upper), (a + width, upper))
    turn = (y + HEIGHT + last) / 2
    canvas.arrow(
        (b + width / 2, y + HEIGHT),
        (b + width / 2, turn),
        (c + width / 2, turn),
        (c + width / 2, last),
    )
    canvas.arrow((c, lower), (b + width, lower))
    canvas.arrow((b, lower), (a + width, lower))

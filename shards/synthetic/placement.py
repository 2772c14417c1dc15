"""Where things stand: each on the ground that it belongs to, at the size that its distance gives
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from shards.synthetic.canvas import GRASS, Canvas
from shards.synthetic.layout import Layout, chance, pick_index, uniform
from shards.synthetic.standing import Block, paint_block, paint_tree
from shards.synthetic.things import USUAL, paint_thing

Item = tuple[float, Callable[[], None]]  # depth in metres, and what paints it
TRIES = 16  # a place that suits is looked for so many times, then the thing is left out
LAST_HOUSE_M = 130.0  # a street's rows of houses end here: further ones would be a few pixels


@dataclass(frozen=True)
class Site:
    """A scene with painted land. ground: (H, W) uint8, the label before anything stood there."""

    canvas: Canvas
    layout: Layout
    ground: np.ndarray
    rng: np.random.Generator

    def paint(self) -> None:
        """Choose buildings, trees and things, and paint the far ones first, so that near ones hide
        them.
        """
        items = [*self._buildings(), *self._trees(), *self._things()]
        # by depth alone: where two are equal, the functions behind them have no order
        for _, paint in sorted(items, key=lambda item: -item[0]):
            paint()

    def _buildings(self) -> list[Item]:
        blocks: list[Block] = []
        if self.layout.place == "street":
            # each side by itself: a street that is open to one side is seen, too
            for side in (-1, 1):
                blocks += self._row_of_houses(side) if chance(self.rng, 0.9) else []
        else:
            for _ in range(pick_index(self.rng, 4)):
                blocks += self._lone_house()
        # by the near edge, which hides what stands behind it
        return [
            (block.near, partial(paint_block, self.canvas, block, self.rng)) for block in blocks
        ]

    def _lone_house(self) -> list[Block]:
        half_m, height_m = uniform(self.rng, 3, 8), uniform(self.rng, 2.6, 7)
        spot = self._spot((GRASS,), (2.2, 14), half_m)
        if spot is None:
            return []
        x_m, near_m = spot
        gable = uniform(self.rng, 1.2, 3.5) if chance(self.rng, 0.75) else 0.0
        far_m = near_m + uniform(self.rng, 5, 12)
        return [Block(x_m - half_m, x_m + half_m, near_m, far_m, height_m, gable)]

    def _row_of_houses(self, side: int) -> list[Block]:
        """Blocks along one side of the street (-1 left, 1 right), with gaps, from the camera to far
        away.
        """
        rng = self.rng
        depth_m = self.layout.camera.nearest_m * uniform(rng, 0.6, 2.5)
        edge_m = uniform(rng, 7.5, 13)
        # one usual height for a row: houses of a street are alike
        usual_m = uniform(rng, 4, 18)
        blocks: list[Block] = []
        while depth_m < LAST_HOUSE_M and len(blocks) < 8:
            long_m, wide_m = uniform(rng, 7, 20), uniform(rng, 7, 14)
            inner = side * (edge_m + uniform(rng, 0, 1.5))
            left, right = sorted((inner, inner + side * wide_m))
            gable = uniform(rng, 1, 3) if usual_m < 8 and chance(rng, 0.7) else 0.0
            height_m = usual_m * uniform(rng, 0.65, 1.35)
            blocks.append(Block(left, right, depth_m, depth_m + long_m, height_m, gable))
            depth_m += long_m + (uniform(rng, 2, 14) if chance(rng, 0.45) else 0.0)
        return blocks

    def _trees(self) -> list[Item]:
        count = pick_index(self.rng, 5 if self.layout.place == "street" else 11)
        spots = [self._spot((GRASS,), (1.4, 16), 0.3) for _ in range(count)]
        return [
            (z, partial(paint_tree, self.canvas, x, z, self.rng)) for x, z in filter(None, spots)
        ]

    def _things(self) -> list[Item]:
        items: list[Item] = []
        usual = USUAL[self.layout.place]
        for number in range(1 + pick_index(self.rng, 7)):
            thing = usual[pick_index(self.rng, len(usual))]
            # the first one is near: something to see
            reach = (1.02, 2.0) if number == 0 else (1.05, 9.0)
            spot = self._spot(thing.ground, reach, thing.half_m)
            if spot:
                items.append((spot[1], partial(paint_thing, self.canvas, thing, *spot, self.rng)))
        return items

    def _spot(
        self, classes: tuple[int, ...], reach: tuple[float, float], half_m: float
    ) -> tuple[float, float] | None:
        """(x, depth) in metres of a place in view on ground of `classes`, `half_m` to each side
        too; or None.

        reach: least and greatest depth, in depths of the lowest row. Rows are drawn alike: near and
        far.
        """
        camera = self.layout.camera
        height, width = camera.size
        below = height - camera.horizon_px
        # rows, not depths: drawn by depth, nearly everything would be a few pixels large
        low, high = camera.horizon_px + below / reach[1], camera.horizon_px + below / reach[0]
        for _ in range(TRIES):
            row, column = uniform(self.rng, low, high), uniform(self.rng, 0, width)
            depth_m = camera.depth(row)
            half_px = camera.focal_px * half_m / depth_m
            # both edges and the middle: a car half on grass would teach a wrong rule
            feet = (
                int(min(max(at, 0), width - 1))
                for at in (column - half_px, column, column + half_px)
            )
            if all(self.ground[min(int(row), height - 1), at] in classes for at in feet):
                return (column - camera.vanishing_px) * depth_m / camera.focal_px, depth_m
        return None

"""Pictures of a run: the colours mean what the legend says, and each curve and class is in its
picture.
"""

from __future__ import annotations

import base64
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from distseg.tracking import bars, fonts
from distseg.tracking import figures as figures_module
from distseg.tracking.legend import legend_strip
from distseg.tracking.metric import Panel
from shards.sample import STANFORD, ClassSet

SVG = "{http://www.w3.org/2000/svg}"
TRAIN = ("loss/segmentor", "loss/cross_entropy")
ADVERSARIAL = ("loss/adversarial", "loss/discriminator_real", "loss/discriminator_fake")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved, for a look at what is in it."""
    saved: list[Figure] = []
    original = figures_module.save

    def save(figure: Figure, out: Path) -> None:
        saved.append(figure)
        original(figure, out)

    for module in (figures_module, bars):
        monkeypatch.setattr(module, "save", save)
    return saved


def rows(names: tuple[str, ...], num_steps: int = 200) -> list[dict[str, Any]]:
    values = np.random.default_rng(0).random((num_steps, len(names)))
    return [
        {"step": 10 * s, "time": 0.0, **dict(zip(names, row, strict=True))}
        for s, row in enumerate(values)
    ]


def titles(figure: Figure) -> list[str]:
    return [
        axes.get_title(loc)
        for axes in figure.axes
        for loc in ("left", "center")
        if axes.get_title(loc)
    ]


def test_curves_between_domains_name_the_domains(tmp_path: Path, figures: list[Figure]) -> None:
    figures_module.curves(rows(TRAIN + ADVERSARIAL), tmp_path / "curves.png", of_domains=True)
    assert titles(figures[0])[:2] == [
        "Discriminator on predictions for the source",
        "Discriminator on predictions for the target",
    ]


def test_curves_of_an_adversarial_run_show_each_value_and_its_running_mean(
    tmp_path: Path, figures: list[Figure]
) -> None:
    metrics = rows(TRAIN + ADVERSARIAL)
    metrics[50]["loss/discriminator_real"] = float("nan")
    metrics += [{"step": 500, "val/mean_iou": 0.5, "val/pixel_accuracy": 0.8}]
    figures_module.curves(metrics, tmp_path / "pictures" / "curves.png")
    (figure,) = figures
    assert titles(figure) == [
        "Discriminator on real label maps",
        "Discriminator on predictions",
        "Segmentor",
        "Adversarial term, unweighted",
        "Validation",
    ]
    raw, smooth, undecided = figure.axes[0].lines
    values = np.array([row["loss/discriminator_real"] for row in metrics[:200]])
    np.testing.assert_array_equal(raw.get_ydata(), values)
    np.testing.assert_array_equal(smooth.get_xdata(), np.arange(0, 2000, 10))
    np.testing.assert_allclose(np.asarray(smooth.get_ydata())[100], values[97:104].mean())
    assert np.isfinite(np.asarray(smooth.get_ydata())).all()
    np.testing.assert_allclose(undecided.get_ydata(), np.log(2))
    scores = figure.axes[4]
    assert scores.get_ylim() == (0, 1)
    assert scores.get_legend_handles_labels()[1] == [
        "mean IoU, last 50.0%",
        "pixel accuracy, last 80.0%",
    ]
    assert figure.axes[2].get_legend_handles_labels()[1] == ["total", "cross entropy"]
    assert figure.axes[3].get_legend_handles_labels()[1] == ["labelled", "undecided (ln 2)"]
    with Image.open(tmp_path / "pictures" / "curves.png") as png:
        assert png.format == "PNG" and min(png.size) > 600
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["curves.png"]


@pytest.mark.parametrize(
    ("form", "unit", "levels"),
    [
        ("saturating", "loss, nats", (np.log(2), np.log(2), -np.log(2))),
        ("hinge", "loss", (1.0, 1.0, 0.0)),
        ("least_squares", "loss", (0.25, 0.25, 0.25)),
    ],
)
def test_curves_have_the_unit_and_the_level_of_their_form(
    tmp_path: Path, figures: list[Figure], form: str, unit: str, levels: tuple[float, ...]
) -> None:
    figures_module.curves(rows(TRAIN + ADVERSARIAL, 3), tmp_path / "curves.png", form)
    real, fake, segmentor, adversarial = figures[0].axes
    for axes, level in zip((real, fake, adversarial), levels, strict=True):
        np.testing.assert_allclose(axes.lines[-1].get_ydata(), level)
        assert axes.lines[-1].get_label().startswith("undecided")  # type: ignore[union-attr]
    assert {axes.get_ylabel() for axes in figures[0].axes} == {unit}
    assert len(segmentor.lines) == len([name for name in TRAIN if name.startswith("loss/")])


def test_curves_of_a_supervised_run_have_no_discriminator(
    tmp_path: Path, figures: list[Figure]
) -> None:
    figures_module.curves(rows(TRAIN), tmp_path / "curves.png")
    assert titles(figures[0]) == ["Segmentor"]
    assert (
        figures[0].axes[-1].get_xlabel() == "training step"
        and figures[0].axes[0].get_ylabel() == "loss, nats"
    )


@pytest.mark.parametrize(
    "metrics", [[], rows(TRAIN, 1), [{"step": 0, "loss/segmentor": float("nan")}]]
)
def test_curves_of_hardly_anything_are_still_a_picture(
    tmp_path: Path, metrics: list[dict[str, Any]]
) -> None:
    figures_module.curves(metrics, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as png:
        assert png.format == "PNG"


@pytest.mark.parametrize("window", [1, 2, 3, 10, 99])
def test_running_mean_equals_the_mean_of_each_window(window: int) -> None:
    values = np.random.default_rng(window).normal(size=40)
    values[[3, 4, 5, 20]] = np.nan, np.inf, -np.inf, np.nan
    half = window // 2
    for place, mean in enumerate(figures_module.running_mean(values, window)):
        part = values[max(0, place - half) : place + half + 1]
        part = part[np.isfinite(part)]
        np.testing.assert_allclose(mean, part.mean() if len(part) else np.nan)


@pytest.mark.parametrize(
    ("size", "num_classes"), [((48, 64), 8), ((64, 40), 21), ((20, 90), 1), ((1, 1), 8)]
)
def test_the_panel_shows_each_class_from_0_to_1(
    tmp_path: Path, figures: list[Figure], size: tuple[int, int], num_classes: int
) -> None:
    rng = np.random.default_rng(0)
    classes = ClassSet(
        tuple(f"class {c}" for c in range(num_classes)), ((10, 20, 30),) * num_classes
    )
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    label = rng.integers(0, num_classes, size, dtype=np.uint8)
    planes = rng.dirichlet(np.ones(num_classes), size).transpose(2, 0, 1).astype(np.float32)
    figures_module.sample_panel(image, label, planes, classes, tmp_path / "a.png")
    figure = figures[0]
    errors = (planes.argmax(0) != label).mean()
    top = ["picture", "label", "prediction", f"errors: {errors:.1%} of pixels"]
    occurring = sorted({*label.ravel().tolist(), *planes.argmax(0).ravel().tolist()})
    names = [classes.names[index] for index in occurring]
    assert titles(figure) == top + names
    shown = [axes.images[0] for axes in figure.axes if axes.images]
    np.testing.assert_array_equal(shown[0].get_array(), image)
    for index, picture in zip(occurring, shown[4:], strict=True):
        np.testing.assert_array_equal(picture.get_array(), planes[index])
        assert picture.get_clim() == (0, 1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(
        box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
        for box in boxes
    )


def test_the_panel_without_a_label_has_picture_and_prediction(
    tmp_path: Path, figures: list[Figure]
) -> None:
    planes = np.full((8, 30, 40), 0.125, np.float32)
    planes[5, :, 20:] += 0.01
    figures_module.sample_panel(
        np.zeros((30, 40, 3), np.uint8), None, planes, STANFORD, tmp_path / "a.png"
    )
    # of eight classes the two that occur
    assert titles(figures[0]) == ["picture", "prediction", "sky", "building"]


@pytest.mark.parametrize("form", ["svg", "pdf"])
def test_a_drawing_has_its_text_as_text_and_every_pixel(tmp_path: Path, form: str) -> None:
    rng = np.random.default_rng(0)
    classes = ClassSet(("cost in $ or $", "<b> & c"), ((1, 2, 3), (200, 2, 3)))
    image = rng.integers(0, 256, (90, 700, 3), dtype=np.uint8)
    label = rng.integers(0, 2, (90, 700), dtype=np.uint8)
    planes = np.stack([label, 1 - label]).astype(np.float32)
    for name in ("a", "b"):
        out = tmp_path / f"{name}.{form}"
        figures_module.sample_panel(image, label, planes, classes, out)
    content = (tmp_path / f"a.{form}").read_bytes()
    assert content == (tmp_path / f"b.{form}").read_bytes()
    if form == "pdf":
        # fonts as outlines that keep their letters, and not as bitmaps or drawn by hand
        assert content.startswith(b"%PDF") and b"/Subtype /Type0" in content
        assert b"/Width 700" in content and b"/Height 90" in content
        return
    texts = [
        "".join(node.itertext()) for node in ElementTree.fromstring(content).iter(SVG + "text")
    ]
    assert {*classes.names, "picture", "probability"} <= {*texts}
    pictures = re.findall(r'href="data:image/png;base64,([^"]*)"', content.decode())
    sizes = [Image.open(io.BytesIO(base64.b64decode(one))).size for one in pictures]
    assert sizes.count((700, 90)) == 6


def test_what_a_teacher_is_not_sure_of_is_striped_and_counted(
    tmp_path: Path, figures: list[Figure]
) -> None:
    image = np.zeros((48, 64, 3), np.uint8)
    label = np.tile(np.arange(64, dtype=np.uint8) // 16, (48, 1))  # four classes
    label[:, 60:] = 255
    half = np.zeros((48, 64), bool)
    half[:24] = True
    weak = figures_module.Taught(image, label, half)
    strong = figures_module.Taught(image, label, np.ones_like(half))
    figures_module.taught_panel(weak, strong, STANFORD, 0.95, tmp_path / "a.png")
    (figure,) = figures
    pictures = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes}
    assert [*pictures][1::2] == ["pseudo-label: 50% confident", "its pseudo-label: 100% confident"]
    solid = figures_module.colourise(label, STANFORD)
    assert np.array_equal(pictures["its pseudo-label: 100% confident"], solid)
    shown = np.asarray(pictures["pseudo-label: 50% confident"])
    assert np.array_equal(shown[:24], solid[:24]) and np.array_equal(shown[:, 60:], solid[:, 60:])
    # no unsure pixel has the colour of any class, and half of them have some of their own
    unsure = shown[24:, :60].reshape(-1, 3)
    assert not {tuple(color) for color in unsure} & {tuple(color) for color in STANFORD.palette}
    assert 0.4 < (unsure == 255).all(1).mean() < 0.6
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [*STANFORD.names[:4], "void", "probability < 0.95"]


@pytest.mark.parametrize(
    ("values", "dots"),
    [
        ([1.0], [0]),
        ([1.0, 2.0], []),
        ([np.nan, 1.0, np.nan, 2.0, 3.0, np.inf, 4.0], [1, 6]),
        ([np.nan], []),
    ],
)
def test_a_point_without_neighbours_is_a_dot(values: list[float], dots: list[int]) -> None:
    line = figures_module.Line(np.arange(len(values)), np.array(values), "a", "#000000")
    axes = Figure().subplots()
    figures_module.draw_panel(axes, Panel("a", "b"), [line])
    (drawn,) = axes.lines
    found = drawn.get_markevery() if drawn.get_marker() == "o" else []
    assert found == dots


@pytest.mark.parametrize("values", [[0.9, 1.0], [-0.5, 1.0], [0.0, 0.0], [0.5]])
def test_a_curve_that_hardly_moves_has_room_above_it(values: list[float]) -> None:
    line = figures_module.Line(np.array([10, 12])[: len(values)], np.array(values), "a", "#000000")
    axes = Figure().subplots()
    figures_module.draw_panel(axes, Panel("a", "b"), [line])
    bottom, top = axes.get_ylim()
    assert bottom <= 0 and (top - max(values)) >= 0.04 * (top - bottom)
    # there is no step 10.5
    assert all(step == int(step) for step in axes.get_xticks())


def test_void_is_named_in_the_legend_where_it_occurs(tmp_path: Path, figures: list[Figure]) -> None:
    label = np.full((30, 40), 255, np.uint8)
    planes = np.full((8, 30, 40), 0.125, np.float32)
    figures_module.sample_panel(
        np.zeros((30, 40, 3), np.uint8), label, planes, STANFORD, tmp_path / "a.png"
    )
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "sky",
        "void",
    ]
    assert "errors (label is all void)" in titles(figures[0])


BLACK_FIRST = ClassSet(STANFORD.names, ((0, 0, 0), *STANFORD.palette[1:]))


@pytest.mark.parametrize(
    ("classes", "void"), [(STANFORD, (0, 0, 0)), (BLACK_FIRST, (255, 255, 255))]
)
def test_colours_are_the_palettes_and_void_has_none_of_them(
    classes: ClassSet, void: tuple[int, int, int]
) -> None:
    label = np.array([[0, 7, 255], [3, 3, 1]], np.uint8)
    result = figures_module.colourise(label, classes)
    assert result.dtype == np.uint8
    for value, color in zip(label.ravel(), result.reshape(-1, 3), strict=True):
        assert tuple(color) == (void if value == 255 else classes.palette[value])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_overlay_mixes_by_alpha_and_leaves_void_alone(alpha: float) -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
    label = rng.integers(0, 8, (9, 11), dtype=np.uint8)
    label[2] = 255
    result = figures_module.overlay(image, label, STANFORD, alpha).astype(float)
    mixed = (1 - alpha) * image + alpha * figures_module.colourise(label, STANFORD)
    mixed[2] = image[2]
    assert np.abs(result - mixed).max() <= 0.51


def test_error_map_separates_right_wrong_and_void() -> None:
    colors = figures_module.error_map(
        np.array([[1, 2, 3]], np.uint8), np.array([[1, 0, 255]], np.uint8)
    )
    right, wrong, void = (tuple(color) for color in colors[0])
    assert len({right, wrong, void}) == 3 and void == (0, 0, 0)
    assert wrong[0] > 200 and max(wrong[1:]) < 50 and len(set(right)) == 1


def test_bars_have_the_length_of_the_iou(tmp_path: Path, figures: list[Figure]) -> None:
    per_class = {"sky": 0.9, "tree": 0.5, "road": float("nan"), "grass": 0.0}
    bars.iou_bars(per_class, tmp_path / "iou.png")
    axes = figures[0].axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.9, 0.5, 0.0, 0.0]
    assert [text.get_text() for text in axes.texts] == ["90.0%", "50.0%", "absent", "0.0%"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(per_class)
    assert figures[0].legends[0].get_texts()[0].get_text() == "mean IoU 46.7%"


def test_shares_of_both_domains_stand_beside_one_another(
    tmp_path: Path, figures: list[Figure]
) -> None:
    bars.share_bars({"sky": (0.41, 0.3), "car": (0.0, 0.05)}, tmp_path / "shares.png")
    axes = figures[0].axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.41, 0.0, 0.3, 0.05]
    assert [text.get_text() for text in axes.texts] == ["41.0%", "0.0%", "30.0%", "5.0%"]
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    # the axis ends where the largest does, or classes of a few per cent could not be seen
    assert legend == ["target", "source"] and axes.get_xticks().max() == pytest.approx(0.5)


def test_two_runs_stand_beside_picture_and_label(tmp_path: Path, figures: list[Figure]) -> None:
    classes = ClassSet(("a", "b", "c"), ((10, 0, 0), (0, 20, 0), (0, 0, 30)))
    label = np.array([[0, 1], [1, 255]], np.uint8)
    found = {"plain": np.zeros((2, 2), np.uint8), "adapted": np.array([[0, 1], [1, 2]], np.uint8)}
    image = np.full((2, 2, 3), 7, np.uint8)
    figures_module.beside_panel(image, label, found, classes, tmp_path / "beside.png")
    shown = {axes.get_title(): np.asarray(axes.images[0].get_array()) for axes in figures[0].axes}
    assert [*shown] == ["picture", "label", "plain: 33.3% right", "adapted: 100.0% right"]
    assert np.array_equal(shown["plain: 33.3% right"], np.full((2, 2, 3), (10, 0, 0)))
    assert shown["adapted: 100.0% right"][1, 1].tolist() == [0, 0, 30]
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["a", "b", "c", "void"]


def _rare_letter() -> tuple[str, Path]:
    """A letter that DejaVu Sans has not, and the font of matplotlib's that has it."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    common = FT2Font(str(folder / "DejaVuSans.ttf")).get_charmap()
    for code in FT2Font(str(folder / "STIXGeneral.ttf")).get_charmap():
        if code not in common and unicodedata.category(chr(code)) in ("Ll", "Lu", "Lo"):
            return chr(code), folder / "STIXGeneral.ttf"
    raise AssertionError("STIX has no letter of its own")


@pytest.fixture
def system_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The files of fonts that this machine has besides matplotlib's: none, until they are added."""
    found: list[str] = []
    monkeypatch.setattr(fonts.font_manager, "findSystemFonts", lambda: found)
    monkeypatch.setattr(fonts, "_told", set())
    caches = (fonts.system_fonts, fonts._fonts_for)
    for cache in caches:
        cache.cache_clear()
    yield found
    for cache in caches:
        cache.cache_clear()


def _panel(classes: ClassSet, out: Path) -> None:
    rng = np.random.default_rng(0)
    label = np.array([[0, 1], [1, 0]], np.uint8)
    probabilities = rng.random((2, 2, 2), np.float32)
    figures_module.sample_panel(np.zeros((2, 2, 3), np.uint8), label, probabilities, classes, out)


def test_names_in_any_script_are_written_by_a_font_that_has_the_letters(
    tmp_path: Path, system_fonts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    letter, file = _rare_letter()
    (tmp_path / "damaged.ttf").write_text("no font")
    system_fonts += [str(tmp_path / "damaged.ttf"), str(file)]
    classes = ClassSet((f"a{letter}$x$", "road"), ((255, 0, 0), (0, 0, 255)))
    # matplotlib warns of a box that it draws
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _panel(classes, tmp_path / "panel.png")
        bars.iou_bars({letter: 0.5, "road": 0.25}, tmp_path / "iou.pdf")
    strip = legend_strip(ClassSet((letter,), ((255, 0, 0),)), [0], 60, 60)
    # what Pillow draws of the letter by itself is in the strip
    glyph = Image.new("RGB", (20, 20), "white")
    font = ImageFont.truetype(str(file), 12, layout_engine=ImageFont.Layout.BASIC)
    ImageDraw.Draw(glyph).text((0, 10), letter, (30, 30, 30), font, anchor="lm")
    ink = np.asarray(glyph)
    rows, columns = (np.flatnonzero((ink < 255).any((other, 2))) for other in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    windows = np.lib.stride_tricks.sliding_window_view(strip, ink.shape)[..., 0, :, :, :]
    assert (windows == ink).all((-3, -2, -1)).any()
    assert not caplog.records


def test_a_name_that_no_font_can_write_is_a_number_and_is_told_once(
    tmp_path: Path,
    figures: list[Figure],
    system_fonts: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    letter, _ = _rare_letter()
    classes = ClassSet((letter, "class 0"), ((255, 0, 0), (0, 0, 255)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in ("png", "svg", "pdf"):
            _panel(classes, tmp_path / f"panel.{form}")
    # one that is called so already is told from it
    assert "class 0 (no font)" in titles(figures[0]) and "class 0" in titles(figures[0])
    legend = [text.get_text() for text in figures[2].legends[0].get_texts()]
    assert legend[:2] == ["class 0 (no font)", "class 0"]
    # a browser has fonts of its own
    assert letter in titles(figures[1]) and f">{letter}<" in (tmp_path / "panel.svg").read_text()
    bars.iou_bars({letter: 0.5, "class 0": 0.25}, tmp_path / "iou.png")
    assert len(figures[3].axes[0].patches) == 2
    # the name of a sample is no class
    figure = Figure()
    figure.suptitle(f"val_{letter}1")
    figures_module.save(figure, tmp_path / "title.png")
    assert figure.get_suptitle() == "val_?1"
    (record,) = caplog.records
    assert f"can write {letter}: pictures say class 0; a font" in record.getMessage()

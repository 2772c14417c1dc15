"""Look into a trained adversary: which masks its discriminator takes to be real, and where.

    python examples/trained_adversary.py        # or cell by cell, in an editor that knows `# %%`

Of a run with a discriminator: masks of people, the segmentor's predictions, and masks that are
damaged on purpose. Leaves confidence.png and means.svg in OUT. docs/examples.md shows them.
"""

# %% What is used
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import distseg
from distseg.evaluate.run import open_samples
from distseg.tracking.figures import colourise, save

# %% Settings
# as `distseg train preset=toy discriminator.options.head=patch` leaves it: such a discriminator
# judges every place; others judge an image as a whole, which gives a map of one value
RUN = Path("runs/adversary")
OUT = Path("adversary")
NUM_IMAGES = 30  # of the validation split, for the means
NUM_SHOWN = 2  # of them, in the picture

# %% The run, and images with their masks
trained = distseg.load(RUN, device="cpu")
samples = open_samples(trained.config, trained.checkpoint)
print(f"{RUN}: step {trained.step}, {len(samples)} validation images")


# %% Damage: each function takes a mask (H, W) of class indices and gives another one
def shifted(mask: np.ndarray) -> np.ndarray:
    """Every object an eighth of the width to the right of where it is seen."""
    return np.roll(mask, mask.shape[1] // 8, axis=1)


def swapped(mask: np.ndarray) -> np.ndarray:
    """The two largest classes take each other's place: sky below, for example."""
    first, second = np.bincount(mask[mask != 255], minlength=2).argsort()[::-1][:2]
    changed = mask.copy()
    changed[mask == first], changed[mask == second] = second, first
    return changed


def with_holes(mask: np.ndarray) -> np.ndarray:
    """Nine squares, in rows and columns, of the next class: as a tool that went wrong leaves."""
    side = max(2, min(mask.shape) // 10)
    changed = mask.copy()
    for row in np.linspace(side, mask.shape[0] - 2 * side, 3).astype(int):
        for column in np.linspace(side, mask.shape[1] - 2 * side, 3).astype(int):
            square = changed[row : row + side, column : column + side]
            square[square != 255] = (square[square != 255] + 1) % len(trained.classes)
    return changed


# %% What the discriminator says of each kind of mask, at every pixel
def judged(image: np.ndarray, label: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(mask, confidence map) by kind; the confidence is the probability of being real."""
    prediction = trained.predict(image)
    masks = {
        "right mask": label,
        "prediction,\nmade one-hot": prediction,
        "shifted": shifted(label),
        "two classes\nswapped": swapped(label),
        "holes": with_holes(label),
    }
    found = {kind: (mask, trained.confidence(image, mask)) for kind, mask in masks.items()}
    # as the segmentor gives it: probabilities, which the discriminator was trained to doubt
    found["prediction"] = prediction, trained.confidence(image)
    return found


ORDER = ("right mask", "prediction", "prediction,\nmade one-hot")
ORDER += ("shifted", "two classes\nswapped", "holes")
means: dict[str, list[float]] = {kind: [] for kind in ORDER}
shown = []
for index in np.linspace(0, len(samples) - 1, min(NUM_IMAGES, len(samples))).astype(int):
    _, image, label = samples.load(int(index))
    if label is None:  # an image without a mask
        continue
    kinds = judged(image, label)
    for kind in ORDER:
        # where somebody has said what is right
        means[kind].append(float(kinds[kind][1][label != 255].mean()))
    if len(shown) < NUM_SHOWN:
        shown.append((image, label, kinds))

# %% The maps: above each mask, below what the discriminator thinks of it
height, width = shown[0][1].shape
cell = 1.3  # inches
figure = Figure(figsize=(cell * (len(ORDER) + 1), 2 * len(shown) * cell * height / width + 0.9))
axes = figure.subplots(2 * len(shown), len(ORDER) + 1, squeeze=False)
figure.subplots_adjust(0.005, 0.09, 0.995, 0.93, 0.03, 0.06)
for one in axes.flat:
    one.set_axis_off()
for row, (image, label, kinds) in enumerate(shown):
    axes[2 * row, 0].imshow(image)
    for column, kind in enumerate(ORDER, start=1):
        mask, confidence = kinds[kind]
        # void as in the label: there a mask says nothing
        picture = colourise(np.where(label == 255, 255, mask), trained.class_set)
        axes[2 * row, column].imshow(picture, interpolation="nearest")
        scale = axes[2 * row + 1, column].imshow(confidence, cmap="cividis", vmin=0, vmax=1)
for column, name in enumerate(("image", *ORDER)):
    axes[0, column].set_title(name, fontsize=9)
place = figure.add_axes((0.3, 0.055, 0.4, 0.02))
bar = figure.colorbar(scale, cax=place, orientation="horizontal", ticks=[0, 0.5, 1])
bar.set_ticklabels(["fake", "cannot tell", "real"], fontsize=8)
save(figure, OUT / "confidence.png")

# %% The means, with a dot for every image
figure = Figure(figsize=(6.4, 2.9), layout="constrained")
axes = figure.subplots()
for row, kind in enumerate(ORDER):
    mean = float(np.mean(means[kind]))
    axes.barh(row, mean, color="#56B4E9", height=0.65)
    axes.plot(means[kind], [row] * len(means[kind]), ".", color="#333333", ms=3, alpha=0.5)
    axes.text(1.02, row, f"{mean:.2f}", va="center", fontsize=9)
    print(f"{kind.replace(chr(10), ' '):26} {mean:.3f}")
axes.set_yticks(range(len(ORDER)), [kind.replace("\n", " ") for kind in ORDER])
axes.invert_yaxis()
axes.axvline(0.5, color="#333333", lw=0.8, ls=":")
axes.set(xlim=(0, 1.1), xticks=[0, 0.5, 1], xlabel="mean confidence: 0 fake, 1 real")
axes.spines[["top", "right"]].set_visible(False)
save(figure, OUT / "means.svg")
print(f"look at {OUT / 'confidence.png'} and {OUT / 'means.svg'}")

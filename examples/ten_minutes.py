"""Your own images and masks to a trained network and pictures of its errors, in ten minutes.

    python examples/ten_minutes.py        # or cell by cell, in an editor that knows `# %%`

Of a folder with images/, masks/ and distseg.yaml (docs/your_data.md says what it may look like).
Where there is none, one of generated scenes is made first. docs/examples.md shows what it leaves.
"""

# %% What is used
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure
from PIL import Image

import distseg
from distseg.evaluate.run import open_samples
from distseg.inspection.run import run as inspect
from distseg.predict.run import PredictOptions, predict
from distseg.tracking.figures import sample_panel, save
from shards.pack import pack
from shards.prepare import prepare
from shards.sample import STANFORD
from shards.synthetic import render_scene

# %% Settings
FOLDER = Path("street")  # with images/ and masks/
OUT = Path("ten_minutes")
NUM_SCENES = 100  # that are made where FOLDER is not there
# toy: a small network from ImageNet's weights, and a discriminator at a rate at which it does not
# win against a small data set. `distseg train --help KEY` explains each
TRAINING = {"preset": "toy", "steps": 150, "batch_size": 8}
TRAINING |= {"discriminator": {"options": {"head": "patch"}}, "discriminator_optimizer.lr": 3e-5}
NUM_SHOWN = 3  # pictures of errors

# %% The folder: a mask has its image's name and size, and the index of a class at each pixel
if not FOLDER.exists():
    for name in ("images", "masks"):
        (FOLDER / name).mkdir(parents=True)
    for number in range(NUM_SCENES):
        image, mask = render_scene(seed=1, index=number, size=(120, 160))
        Image.fromarray(image).save(FOLDER / "images" / f"{number:03}.jpg", quality=92)
        Image.fromarray(mask).save(FOLDER / "masks" / f"{number:03}.png")
    classes = []
    for name, color in zip(STANFORD.names, STANFORD.palette, strict=True):
        classes.append({"name": name, "color": list(color)})
    (FOLDER / "distseg.yaml").write_text(yaml.safe_dump({"classes": classes}))

# %% Checked, and packed into shards: every problem of a mask is told here, before any training
made = prepare("folder", FOLDER, OUT / "maps.h5")
print("samples:", made.num_samples, *made.notes)
pack(OUT / "maps.h5", OUT / "shards")
# prints a table of the classes, and leaves contact_sheet.png: do the masks lie on their images?
inspect(OUT / "shards", OUT, num_threads=None)

# %% Trained. Run again, it goes on where it was; Ctrl-C saves and returns
settings = {"data.shards": OUT / "shards", "data.num_classes": None, "run_dir": OUT / "run"}
result = distseg.fit(**TRAINING, **settings)
print(f"step {result.step}:", "finished" if result.finished else "stopped, and looked at as it is")

# %% The images with most errors: label, prediction, where they differ, and each class by itself
trained = distseg.load(OUT / "run")
samples = open_samples(trained.config, trained.checkpoint)
wrong = {}
for index in range(len(samples)):
    key, image, label = samples.load(index)
    if label is not None:
        wrong[index] = float((trained.predict(image) != label)[label != 255].mean())
worst = sorted(wrong, key=lambda index: wrong[index], reverse=True)[:NUM_SHOWN]
for index in worst:
    key, image, label = samples.load(index)
    probabilities = trained.probabilities(image)
    sample_panel(image, label, probabilities, trained.class_set, OUT / "errors" / f"{key}.png")
    print(f"{key}: {wrong[index]:.1%} of the pixels are wrong")

# %% Which class is taken for which
scores = trained.evaluate(quick=True)
print(f"mean IoU {scores['val/mean_iou']:.1%}")
counts = np.array(scores["confusion"], float)  # rows = truth
shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
np.fill_diagonal(counts, 0)
largest = [divmod(int(cell), len(counts)) for cell in counts.ravel().argsort()[::-1][:8]]
figure = Figure(figsize=(6.4, 2.8), layout="constrained")
axes = figure.subplots()
for row, (truth, guess) in enumerate(largest):
    axes.barh(row, shares[truth, guess], color="#D55E00", height=0.65)
names = [f"{trained.classes[truth]} taken for {trained.classes[guess]}" for truth, guess in largest]
axes.set_yticks(range(len(names)), names)
axes.invert_yaxis()
axes.set_xlabel("share of the true class's pixels")
axes.xaxis.set_major_formatter("{x:.0%}")
axes.spines[["top", "right"]].set_visible(False)
save(figure, OUT / "confusions.svg")

# %% New images: indices, colours, and an overlay with the names of what was found
new = sorted((FOLDER / "images").iterdir())[:NUM_SHOWN]
predict(trained.network, new, OUT / "overlays", trained.class_set, PredictOptions())
print(f"look at {OUT}/contact_sheet.png, errors/, confusions.svg and overlays/")

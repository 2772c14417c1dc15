"""Label an image with a segmentor exported to ONNX. Needs onnxruntime, numpy and Pillow, and
nothing of distseg.

python predict_onnx.py model.onnx picture.jpg labels.png
"""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main(model: str, picture: str, out: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=onnxruntime.get_available_providers())
    about = json.loads(session.get_modelmeta().custom_metadata_map["distseg"])
    image = ImageOps.exif_transpose(Image.open(picture)).convert("RGB")
    if min(image.size) < about["input"]["min_side_px"]:
        sys.exit(
            f"{picture} is {image.size} px; enlarge it to at least "
            f"{about['input']['min_side_px']} on each side"
        )
    # (H, W, 3) in [0, 1]; the rest of the preprocessing is in the model
    pixels = np.asarray(image, np.float32) / 255
    (logits,) = session.run(["logits"], {"image": pixels.transpose(2, 0, 1)[None]})  # (1, C, H, W)
    label = logits[0].argmax(0).astype(np.uint8)
    colored = Image.fromarray(label)
    colored.putpalette([part for color in about["palette"] for part in color])
    colored.save(out)
    for index in np.unique(label):
        print(f"{about['classes'][index]:20} {(label == index).mean():6.1%} of the pixels")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])

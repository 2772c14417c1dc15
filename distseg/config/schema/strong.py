"""`strong`: what strong views of training crops are."""

from __future__ import annotations

from dataclasses import dataclass

from distseg.config.keys import key


@dataclass
class StrongConfig:
    """Strong views of crops: colours, blur, and a part of another image.

    Unlabelled images have them wherever there is a teacher, and with `labelled` in modes
    consistency and domain_adaptation without one. The defaults are UniMatch's (Yang et al. 2023).
    """

    # of its own: what unlabelled images gain can only be seen beside labels with the same views
    labelled: bool = key(
        False,
        "labelled images are trained on in strong views too, made on the device, instead of "
        "data.color_jitter and data.blur_probability; in modes consistency and domain_adaptation "
        "unlabelled ones that no teacher has labelled as well, but for classmix",
    )
    # partners are neighbours in the global batch, so any number of ranks mixes the same pairs
    mix: str = key(
        "cutmix",
        "what is laid over a strong view and, in the same place, over its label or pseudo-label",
        choices={
            "cutmix": "a rectangle of another image",
            "classmix": "half of the classes that another image shows",
            "cutout": "an empty rectangle, which does not count",
            "none": "",
        },
        source="Yun et al. 2019, Olsson et al. 2021, DeVries and Taylor 2017",
    )
    mix_probability: float = key(0.5, "of mixing, for each image", low=0, high=1)
    mix_area_min: float = key(
        0.02, "smallest share of a crop that a rectangle takes", low=0, high=1
    )
    mix_area_max: float = key(0.4, "largest share", low=0, high=1)
    jitter_probability: float = key(0.8, "of changing an image's colours", low=0, high=1)
    color_jitter: float = key(
        0.5, "brightness, contrast and saturation by factors in 1 -+ this", low=0, high=1
    )
    hue_jitter: float = key(
        0.25, "hue by up to this", unit="turns of the colour circle", low=0, high=0.5
    )
    gray_probability: float = key(0.2, "of leaving an image its gray alone", low=0, high=1)
    blur_probability: float = key(0.5, "of blurring an image", low=0, high=1)
    blur_max_px: float = key(
        2.0, "largest standard deviation of that", unit="pixels", low=0.1, high=20
    )

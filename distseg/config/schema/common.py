"""What several sections name: modes, bounds, sources, and the networks there are."""

from __future__ import annotations

MAX_SEED = 2**31 - 1  # what every library's generator takes
MAX_BETA = 0.99999  # of moving averages: at 1 nothing new would come in
WITH_DISCRIMINATOR = ("adversarial", "semi_supervised", "domain_adaptation")  # modes
SEMI_SUPERVISED = ("semi_supervised",)
ADAPTATION = ("domain_adaptation",)
WITH_GROUND_TRUTH = ("adversarial", "semi_supervised")  # for the discriminator to see
WITH_UNLABELLED = ("semi_supervised", "consistency", "domain_adaptation")

HUNG = "Hung et al. 2018"
LUC = "Luc et al. 2016"
ADVENT = "Vu et al. 2019 (AdvEnt)"
UNIMATCH = "Yang et al. 2023 (UniMatch)"

# as distseg/models has them, which needs torch: so a misspelt one is told at once
ENCODERS = (
    *("vits14", "vitb14", "vitl14", "vitg14"),
    *("vits14_reg", "vitb14_reg", "vitl14_reg", "vitg14_reg"),
    *("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16"),
    *("mitb0", "mitb1", "mitb2", "mitb3", "mitb4", "mitb5"),
    *("convnext_tiny", "convnext_small", "convnext_base"),
)
HEADS = ("linear", "multilevel", "dpt", "segformer", "upernet")
_WHOLE = (
    *("deeplabv2_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101"),
    *("deeplabv3_efficientnet_lite0", "deeplabv3_efficientnet_lite1"),
    *("deeplabv3_efficientnet_lite2", "deeplabv3plus_resnet50", "deeplabv3plus_resnet101"),
    *("deeplabv3plus_efficientnet_lite0", "deeplabv3plus_efficientnet_lite1"),
    *("deeplabv3plus_efficientnet_lite2", "fcn32s_vgg16", "fcn16s_vgg16", "fcn8s_vgg16"),
    *("fcn8s_atonce_vgg16", "dilated8_vgg16", "multiscale"),
)
SEGMENTORS = (*_WHOLE, *(f"{head}_{encoder}" for encoder in ENCODERS for head in HEADS))
# what stands for a list of them all
SEGMENTORS_TOLD = (
    f"{', '.join(_WHOLE)}; or HEAD_ENCODER, such as linear_vitb14, of the heads "
    f"{', '.join(HEADS)} and the encoders {', '.join(ENCODERS)}"
)
DISCRIMINATORS = (
    *("two_branch", "fully_convolutional", "large_fov", "large_fov_light"),
    *("small_fov", "small_fov_light", "image_conditioned"),
)

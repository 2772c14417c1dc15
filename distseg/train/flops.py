"""How much arithmetic a step is, and which share of the device's own speed it reaches."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distseg.config.schema import Config
from distseg.distributed.device import autocast_dtype
from distseg.models.catalogue import gflop
from distseg.models.own_discriminator import OwnDiscriminator
from distseg.models.own_segmentor import OwnSegmentor
from distseg.train.schedules import Phase

# of the convolution that stands for the device: DeepLab's at stride 8, 321 px images
_CHANNELS, _SIDE = 256, 41
_IMAGES = {"cpu": 2, "cuda": 64}  # enough to keep all of the device busy
_REPETITIONS = {"cpu": 3, "cuda": 20}


@dataclass(frozen=True)
class StepWork:
    """Operations of the convolutions of one image's forward, a multiply-add counted as two."""

    segmentor: float
    discriminator: float = 0.0  # for one label map, of the size that the run has, with its image

    uncounted: str = ""  # why there is no count

    @classmethod
    def of(cls, config: Config, segmentor: nn.Module, discriminator: nn.Module | None) -> StepWork:
        """Counted on copies of the networks, without their values, at the size of the run's crops.

        A network of the user's own may not run without values: then nothing is counted.
        """
        try:
            # Counted once at the start. A counter in the loop would slow down every step, and
            # FlopCounterMode does not survive autograd.grad to a leaf, which the step is built on.
            return cls._counted(config, segmentor, discriminator)
        except Exception as error:
            # of the package's own networks it is an error of the program, which nobody would see in
            # a missing curve
            if not isinstance(segmentor, OwnSegmentor) | isinstance(
                discriminator, OwnDiscriminator
            ):
                raise
            return cls(0.0, 0.0, (str(error).splitlines() or [type(error).__name__])[0])

    @classmethod
    def _counted(
        cls, config: Config, segmentor: nn.Module, discriminator: nn.Module | None
    ) -> StepWork:
        side = config.data.crop_px
        num_classes = int(segmentor.num_classes)  # type: ignore[arg-type]
        of_segmentor = 1e9 * gflop(_copy(segmentor), _segment, (3, side))
        if discriminator is None:
            return cls(of_segmentor)
        # of the label map: at the image's size it is 64 times as large as at stride 8
        stride = int(segmentor.output_stride)  # type: ignore[arg-type]
        stride = 1 if config.loss.map_resolution == "image" else stride

        def judge(network: nn.Module, label_map: Tensor) -> Tensor:
            return network(torch.empty(1, 3, side, side), label_map)[0]

        label_map = (num_classes, -(-side // stride))
        return cls(of_segmentor, 1e9 * gflop(_copy(discriminator), judge, label_map))

    def of_step(self, phase: Phase, num_labelled: int, num_unlabelled: int) -> float:
        """Operations of one step on so many images.

        A forward is one unit, the gradients of a network's parameters another, those of its
        activations a third; the latter are computed twice in a discriminator whose scores on a
        prediction serve both losses. (The gradient of the pixels, which nobody asks for, is not
        taken off: it is below a hundredth.)
        """
        num_images = num_labelled + num_unlabelled
        # a phase of the discriminator alone needs the prediction, but no gradient of it
        operations = self.segmentor * num_images * (3 if phase.segmentor else 1)
        if not phase.adversary:
            return operations
        # forward; gradients of the label map for the segmentor; of parameters and activations for
        # its own loss
        on_prediction = 1 + phase.segmentor + 2 * phase.discriminator
        on_truth = 3 * phase.discriminator
        return operations + self.discriminator * (
            on_prediction * num_images + on_truth * num_labelled
        )


def _copy(network: nn.Module) -> nn.Module:
    # counting runs the forward, in which dropout and running statistics would otherwise move
    return copy.deepcopy(network).eval()


def _segment(network: nn.Module, pixels: Tensor) -> Tensor:
    return network(pixels)


@torch.no_grad()
def convolution_peak(device: torch.device, precision: str) -> float:
    """Operations per second of a 3x3 convolution of 256 channels on this device, in a resolved
    precision.

    It stands for the best that a segmentation network could get here, on whatever part of the
    machine this rank has: about 0.1 s on a CPU core, a few ms on a GPU.
    """
    # the run's own precision: a share of the bf16 peak would say little about an fp32 run
    dtype = autocast_dtype(precision) or (torch.float64 if precision == "fp64" else torch.float32)
    images, weight = (
        torch.full(shape, 0.5, dtype=dtype, device=device).contiguous(
            memory_format=torch.channels_last
        )
        for shape in ((_IMAGES[device.type], _CHANNELS, _SIDE, _SIDE), (_CHANNELS, _CHANNELS, 3, 3))
    )
    seconds = []
    for _ in range(_REPETITIONS[device.type] + 1):  # the first one chooses an algorithm
        before = time.perf_counter()
        nn.functional.conv2d(images, weight, padding=1)
        # a kernel is only queued when the call returns
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - before)
    # the median: one repetition that something else interrupts moves a mean
    return 2 * images.numel() * _CHANNELS * 9 / statistics.median(seconds[1:])

"""How much arithmetic a step is, and which share of the device's own speed it reaches."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from distseg.config.schema import ADAPTATION, Config
from distseg.distributed.device import autocast_dtype
from distseg.models.connections import Filled
from distseg.models.own_discriminator import OwnDiscriminator
from distseg.models.own_segmentor import OwnSegmentor
from distseg.train.schedules import Phase

# of the convolution that stands for the device: DeepLab's at stride 8, 321 px images
_CHANNELS, _SIDE = 256, 41
_IMAGES = {"cpu": 2, "cuda": 64}  # enough to keep all of the device busy
_REPETITIONS = {"cpu": 3, "cuda": 20}


@dataclass(frozen=True)
class StepWork:
    """Operations of the convolutions for one image, a multiply-add counted as two.

    Of the segmentor, with its auxiliary head, and of the discriminator for one label map of the
    run's size, or one of each output: its forward; its backward, to the parameters that are not
    frozen; and what the segmentor's gradient costs in the discriminator.
    """

    segmentor: float
    segmentor_backward: float = 0.0
    discriminator: float = 0.0
    discriminator_backward: float = 0.0
    through_discriminator: float = 0.0

    num_truths: int = 1  # ground truths that the discriminator judges beside each labelled image
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
            if not (isinstance(segmentor, OwnSegmentor) or _has_own(discriminator)):
                raise
            return cls(0.0, uncounted=(str(error).splitlines() or [type(error).__name__])[0])

    @classmethod
    def _counted(
        cls, config: Config, segmentor: nn.Module, discriminator: nn.Module | None
    ) -> StepWork:
        side = config.data.crop_px
        pixels = torch.empty(1, 3, side, side, device="meta")
        of_segmentor = _work(segmentor, pixels)
        if discriminator is None:
            return cls(*of_segmentor)
        # of the label map: at the image's size it is 64 times as large as at stride 8
        stride = int(segmentor.output_stride)  # type: ignore[arg-type]
        of_map = side if config.loss.map_resolution == "image" else -(-side // stride)
        shape = (1, int(segmentor.num_classes), of_map, of_map)  # type: ignore[arg-type]
        label_map = torch.empty(shape, device="meta")
        num_outputs = getattr(discriminator, "num_outputs", 1)
        frozen = copy.deepcopy(discriminator).requires_grad_(False)
        _, to_label_map = _work(frozen, pixels, *[label_map.requires_grad_()] * num_outputs)
        of_discriminator = _work(discriminator, pixels, *[label_map.detach()] * num_outputs)
        num_truths = 2 if config.loss.mismatched_weight else 1
        if config.mode in ADAPTATION:
            num_truths = 0  # predictions on the source stand in their place
        return cls(*of_segmentor, *of_discriminator, to_label_map, num_truths)

    def of_step(
        self, phase: Phase, num_labelled: int, num_unlabelled: int, num_views: int = 1
    ) -> float:
        """Operations of one step on so many images; num_views: strong ones of each that a teacher
        labels.
        """
        taught = num_unlabelled * self.segmentor if phase.taught else 0.0
        num_images = num_labelled + num_unlabelled * (num_views if phase.taught else 1)
        # a phase of the discriminator alone needs the prediction, but no gradient of it
        of_image = self.segmentor + phase.segmentor * self.segmentor_backward
        if not phase.adversary:
            return num_images * of_image + taught
        own_loss = phase.discriminator * self.discriminator_backward
        # one forward on a prediction serves the losses of both networks
        on_prediction = self.discriminator + phase.segmentor * self.through_discriminator + own_loss
        on_truth = phase.discriminator * self.num_truths * (self.discriminator + own_loss)
        if phase.r1:  # a gradient to the label map, and a backward through its products
            on_truth += self.through_discriminator + self.discriminator_backward
        # to match its features ground truth is judged in steps that do not update it, too
        if not phase.discriminator and phase.weights.get("feature_matching"):
            on_truth = self.discriminator
        return num_images * (of_image + on_prediction) + num_labelled * on_truth + taught


def _has_own(discriminator: nn.Module | None) -> bool:
    """Whether a discriminator is of the user's own, or one of two outputs' is."""
    layers = () if discriminator is None else discriminator.modules()
    return any(isinstance(layer, OwnDiscriminator) for layer in layers)


def _work(network: nn.Module, *inputs: Tensor) -> tuple[float, float]:
    """Operations of a forward on inputs without values, and of its backward to what needs one."""
    network = copy.deepcopy(network).train()
    for layer in network.modules():
        # of one image a batch norm may have one value, and those of all ranks would send it
        if isinstance(layer, _BatchNorm):
            layer.eval()
    counter = FlopCounterMode(display=False)
    # fake tensors, which call themselves CPU tensors: under autocast the meta device is refused
    # attention by plain products: its kernel for CPUs is not counted (torch 2.13.0)
    plainly = sdpa_kernel(SDPBackend.MATH)
    with FakeTensorMode(), plainly, counter, torch.enable_grad(), _Backward(counter) as backward:
        filled = Filled(network, torch.empty)
        for name, parameter in network.named_parameters(remove_duplicate=False):
            if name in filled.values:
                filled.values[name].requires_grad_(parameter.requires_grad)
        filled(*(torch.empty(it.shape).requires_grad_(it.requires_grad) for it in inputs))
    return float(counter.get_total_flops()), float(backward.operations)


class _Backward(TorchFunctionMode):
    """Counts while a forward runs what its backward costs: the gradient of either operand of a
    product costs what the product does, where it is asked for.

    Not FlopCounterMode in a backward: it takes a grouped convolution's gradient for a whole one's.
    """

    def __init__(self, counter: FlopCounterMode):
        super().__init__()
        self._counter, self.operations = counter, 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self._counter.get_total_flops()
        # here, as within the function nothing is told any more
        tensors = [it for it in (*args, *(kwargs or {}).values()) if isinstance(it, Tensor)]
        needed = sum(it.requires_grad for it in tensors[:2])
        result = func(*args, **(kwargs or {}))
        self.operations += needed * (self._counter.get_total_flops() - before)
        return result


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

"""Our vision transformers beside those of Hugging Face's transformers, of the same sizes: a forward
and a backward pass of each part and of the whole, in turn, in fp32.

Run: pip install transformers && python -m benchmarks.peers [--rounds 15]

That they compute the same is in tests/test_vit.py and tests/test_encoders.py. A ratio is theirs to
ours, of two passes one after the other: above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.conditions import conditions
from distseg.models import build_segmentor

IMAGES, VIT_PX, MIT_PX, CLASSES = 2, 252, 256, 21
Part = Callable[[], Any]
Network = Callable[[Any], Any]


def vit_parts() -> Iterator[tuple[str, Part, Part]]:
    """(what, ours, theirs) of DINOv2's ViT-S/14."""
    from transformers import Dinov2Config, Dinov2Model

    ours = build_segmentor("linear_vits14", CLASSES, init="random").train().encoder
    size = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    theirs = Dinov2Model(Dinov2Config(**size)).train()
    image = torch.rand(IMAGES, 3, VIT_PX, VIT_PX)
    tokens = torch.randn(IMAGES, 1 + (VIT_PX // 14) ** 2, 384, requires_grad=True)
    yield "patch embedding", *pair(ours.patch_embed, theirs.embeddings.patch_embeddings, image)
    first, theirs_first = ours.blocks[0], theirs.encoder.layer[0]
    yield "attention", *pair(lambda x: first.attn(x, None), theirs_first.attention, tokens)
    yield "a block", *pair(lambda x: first(x, None), theirs_first, tokens)
    yield "ViT-S/14", *pair(ours, theirs, image)


def mit_parts() -> Iterator[tuple[str, Part, Part]]:
    """(what, ours, theirs) of SegFormer-B0."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    ours = build_segmentor("segformer_mitb0", CLASSES, init="random").train()
    # as ours: no branch is left out
    theirs = SegformerForSemanticSegmentation(
        SegformerConfig(num_labels=CLASSES, drop_path_rate=0.0)
    ).train()
    image = torch.rand(IMAGES, 3, MIT_PX, MIT_PX)
    maps = [it.detach().requires_grad_() for it in ours.encoder(image)]
    yield "MiT-B0", *pair(ours.encoder, theirs.segformer, image)
    yield "SegFormer's head", *pair(ours.head, theirs.decode_head, maps)
    yield "SegFormer-B0", *pair(ours, theirs, image)


def pair(ours: Network, theirs: Network, given: Any) -> tuple[Part, Part]:
    """A forward and a backward pass of each."""
    return lambda: there_and_back(ours, given), lambda: there_and_back(theirs, given)


def there_and_back(network: Network, given: Any) -> None:
    """Of the sum of all that comes out, to parameters and what was given."""
    answer = network(given)
    if isinstance(answer, Mapping):  # theirs of whole networks
        answer = answer.values()
    tensors = [answer] if isinstance(answer, Tensor) else [it for it in answer if it is not None]
    torch.stack([it.sum() for it in tensors]).sum().backward()


def ratios(ours: Part, theirs: Part, rounds: int) -> list[float]:
    """Theirs to ours, of so many rounds after one of each that does not count."""
    found = []
    for number in range(rounds + 1):
        # who comes first takes turns, as caches are warm for the second
        seconds = dict.fromkeys((ours, theirs), 0.0)
        for part in (ours, theirs) if number % 2 else (theirs, ours):
            start = time.perf_counter()
            part()
            seconds[part] = time.perf_counter() - start
        found.append(seconds[theirs] / seconds[ours])
    return found[1:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    print(conditions(torch.get_num_threads()))
    print("| part | theirs / ours, median | from | to |\n|---|---|---|---|")
    for parts in (vit_parts, mit_parts):
        for what, ours, theirs in parts():
            found = ratios(ours, theirs, options.rounds)
            row = f"{statistics.median(found):.2f} | {min(found):.2f} | {max(found):.2f}"
            print(f"| {what} | {row} |", flush=True)


if __name__ == "__main__":
    main()

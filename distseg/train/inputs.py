"""What a run reads: its sample sets, and the streams of batches cut from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from distseg.config.schema import WITH_UNLABELLED, Config
from distseg.data.own_view import OwnView
from distseg.data.samples import (
    HELD_OUT_FILE,
    LABELLED_FILE,
    SampleSet,
    check_not_void,
    hold_out,
    open_reader,
    plan_for,
    split_labelled,
)
from distseg.data.stream import PairedStream, TrainStream
from distseg.data.transforms import TrainView
from distseg.distributed.ranks import Ranks
from distseg.train.strong_views import check_pairs, has_teacher
from shards.errors import InputError
from shards.files import write_text
from shards.reader import ShardReader
from shards.storage import is_file
from shards.verified import check_verified
from shards.words import counted


def check_batch(key: str, batch_size: int, world_size: int, num_micro_batches: int) -> None:
    """Raise InputError unless ranks and micro-batches divide the images of a step evenly."""
    # Equal shares only. Unequal ones would have ranks wait for the largest, and a batch that is
    # padded or cut short is not the configured one.
    divisor = world_size * num_micro_batches
    if batch_size % divisor:
        below, above = batch_size // divisor * divisor, -(-batch_size // divisor) * divisor
        got = f"{key}={batch_size} for {world_size} ranks"
        if num_micro_batches > 1:
            got += f" and gradient_accumulation_steps={num_micro_batches}"
        nearest = f"{below} or {above}" if below else str(above)
        action = f"write {key}={nearest}, or start other ranks"
        raise InputError(got, f"a multiple of {divisor}", action)


@dataclass(frozen=True)
class Data:
    """What a run reads: labelled training samples, unlabelled ones in semi-supervised mode,
    validation samples, and labelled ones of the training split that are not trained on.
    """

    train: SampleSet
    unlabelled: SampleSet | None
    val: SampleSet
    held_out: SampleSet | None = None

    def tell(self, moved: Callable[[], None]) -> None:
        """Call `moved` whenever bytes of shards that are far away arrive."""
        # the unlabelled ones come from the reader of the labelled
        for samples in (self.train, self.val):
            samples.reader.tell(moved)


def open_data(config: Config, world_size: int) -> Data:
    """The sample sets of a run.

    InputError when they are not there or do not fit the configuration.
    """
    options = config.data
    # a reader reads manifest and index here, and no sample yet: names and sizes are enough to
    # refuse
    train, val = (open_reader(options, name) for name in (options.train_split, options.val_split))
    # The training split's verification is the data set's: what `distseg inspect` found sound stays
    # so as long as the manifest has the same sum.
    if not options.allow_unverified:
        check_verified(train)
    saved = Path(config.run_dir) / LABELLED_FILE  # of a run that goes on: its own list counts
    wanted = str(saved) if options.labelled != "all" and is_file(saved) else options.labelled
    # drawn by a seed of its own, so that runs of several seeds can share their labelled images
    labelled, rest = split_labelled(train, wanted, options.labelled_seed)
    room = options.keep_decoded_bytes
    labelled, held_out = _hold_out(config, train, labelled)
    # the labels that a fraction leaves out are not read at all: `rest` goes into a set without
    # labels
    train_set = SampleSet(train, labelled, keep=options.keep_classes, keep_decoded_bytes=room)
    val_set = SampleSet(val, keep=options.keep_classes)
    # now, and not after the last step, when the scores turn out to be of no pixel
    check_not_void(train_set, "to train on")
    check_not_void(val_set, "to score on")
    # after `keep_classes`, which changes how many there are
    _check_classes(config, train_set)
    own_view(config, train_set.classes.num_classes)  # or training would find out what is wrong
    check_pairs(config, world_size)
    unlabelled_set = None
    if config.mode in WITH_UNLABELLED:
        unlabelled_set = _open_unlabelled(config, world_size, train_set, rest)
    return Data(train_set, unlabelled_set, val_set, held_out)


def _hold_out(
    config: Config, reader: ShardReader, labelled: Sequence[int]
) -> tuple[Sequence[int], SampleSet | None]:
    """Whose labels are trained on, and the samples whose labels judge the teacher's."""
    count = config.consistency.held_out
    if not (has_teacher(config) and count):
        return labelled, None
    options = config.data
    labelled, held_out = hold_out(reader, labelled, count, options.labelled_seed)
    samples = SampleSet(reader, held_out, keep=options.keep_classes)
    check_not_void(samples, "to compare pseudo-labels with")
    return labelled, samples


def _check_classes(config: Config, samples: SampleSet) -> None:
    """Raise InputError where data.num_classes is not the number of classes."""
    classes, asked = samples.classes, config.data.num_classes
    if asked not in (None, classes.num_classes):
        there, names = classes.num_classes, ", ".join(classes.names)
        got = f"data.num_classes={asked}, but {config.data.shards} has {there} classes ({names})"
        action = f"write data.num_classes={there}, or choose other shards"
        raise InputError(got, "the same number", action)


def _open_unlabelled(
    config: Config, world_size: int, labelled: SampleSet, rest: Sequence[int]
) -> SampleSet:
    """The samples whose labels are not used."""
    if not rest:
        which = f"all of {counted(len(labelled), 'sample')} of {labelled.reader.split}"
        got = f"mode={config.mode}, but {which} are used with their labels"
        instead = "adversarial" if config.mode == "semi_supervised" else "supervised"
        action = f"write for example data.labelled=1/8, or mode={instead}"
        raise InputError(got, "unlabelled samples", action)
    size = config.semi.batch_size or config.batch_size
    check_batch("semi.batch_size", size, world_size, config.gradient_accumulation_steps)
    # the labelled ones come first: being fewer, they come more often
    room = config.data.keep_decoded_bytes
    room -= labelled.decoded_bytes(room)
    keep = config.data.keep_classes
    return SampleSet(labelled.reader, rest, labelled=False, keep=keep, keep_decoded_bytes=room)


def save_labelled(run_dir: Path, config: Config, data: Data) -> None:
    """Write which samples are labelled, where that is a choice, and which of them are held out;
    lists that are there stay.
    """
    held_out = [] if data.held_out is None else data.held_out.keys
    lists = {HELD_OUT_FILE: held_out} if held_out else {}
    if config.data.labelled != "all":
        lists[LABELLED_FILE] = [*data.train.keys, *held_out]
    for name, keys in lists.items():
        if not is_file(run_dir / name):
            # whole or not at all: half a list would be taken for the run's choice by the next
            # attempt
            write_text(run_dir / name, "\n".join(keys) + "\n")


def open_streams(
    config: Config, ranks: Ranks, data: Data, start_step: int
) -> TrainStream | PairedStream:
    """This rank's part of the endless sequence of batches, from `start_step` on."""
    # labelled images have the order that they have without unlabelled ones, so that such runs
    # compare
    own = (config.batch_size, config.seed)
    # the strong view's colours and blur are laid over it in the step, and replace these
    weak = replace(config, data=replace(config.data, color_jitter=0.0, blur_probability=0.0))
    of_labelled = weak if config.strong.labelled else config
    labelled = open_stream(of_labelled, ranks, data.train, start_step, own)
    if data.unlabelled is None:
        return labelled
    # beyond every seed that a user can choose: another order, other crops
    other = (config.semi.batch_size or config.batch_size, config.seed + 2**32)
    # weak: what a teacher labels
    of_rest = weak if config.consistency.weight else config
    return PairedStream(labelled, open_stream(of_rest, ranks, data.unlabelled, start_step, other))


def open_stream(
    config: Config,
    ranks: Ranks,
    samples: SampleSet,
    start_step: int,
    size_and_seed: tuple[int, int],
) -> TrainStream:
    """One stream of training crops: so many images a step over all ranks, in the seed's order."""
    data, (batch_size, seed) = config.data, size_and_seed
    own = own_view(config, samples.classes.num_classes)
    # the fields of a view are keys of the `data` section, so that a new one needs no line here
    names = [field.name for field in fields(TrainView) if field.name != "own"]
    crop = TrainView(**{name: getattr(data, name) for name in names}, own=own)
    # Everything but rank and world size is the same on every rank: the stream is cut, not drawn, by
    # rank.
    return TrainStream(
        samples,
        plan_for(samples, data, seed),
        crop,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_threads=data.num_threads,
        worker_type=data.worker_type,
        start_step=start_step,
        # pinned memory is what lets a copy to the GPU go on beside its work; without a GPU it only
        # costs
        pin_memory=ranks.device.type == "cuda",
    )


def own_view(config: Config, num_classes: int) -> OwnView | None:
    """The view of the user's own, tried on a crop; None where there is none.

    Raises InputError for one that is none, or that draws random numbers of its own.
    """
    if not config.data.view:
        return None
    view = OwnView(config.data.view, config.data.view_options, num_classes)
    # Tried before the run: in a worker, an error of the user's own code would come steps later, and
    # a view that draws random numbers of its own would break resuming without any error.
    view.check(config.data.crop_px)
    return view

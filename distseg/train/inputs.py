"""What a run reads: its sample sets, and the streams of batches cut from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from distseg.config.schema import Config
from distseg.data.own_view import OwnView
from distseg.data.samples import SampleSet, open_reader, plan_for, split_labelled
from distseg.data.stream import PairedStream, TrainStream
from distseg.data.transforms import TrainView
from distseg.distributed.ranks import Ranks
from shards.errors import InputError
from shards.files import published
from shards.verified import check_verified

LABELLED_FILE = "labelled.txt"


def check_batch(key: str, batch_size: int, world_size: int, num_parts: int) -> None:
    """Raise InputError unless ranks and parts divide the images of a step evenly."""
    if batch_size % (world_size * num_parts):
        divisor = world_size * num_parts
        below, above = batch_size // divisor * divisor, -(-batch_size // divisor) * divisor
        got = f"{key}={batch_size} for {world_size} ranks" + (
            f" and {num_parts} parts" if num_parts > 1 else ""
        )
        nearest = f"{below} or {above}" if below else str(above)
        raise InputError(
            got, f"a multiple of {divisor}", f"write {key}={nearest}, or start other ranks"
        )


@dataclass(frozen=True)
class Data:
    """What a run reads: labelled training samples, unlabelled ones in semi-supervised mode, and
    validation samples.
    """

    train: SampleSet
    unlabelled: SampleSet | None
    val: SampleSet

    def tell(self, moved: Callable[[], None]) -> None:
        """Call `moved` whenever bytes of shards that are far away arrive."""
        # the unlabelled ones come from the reader of the labelled
        for samples in (self.train, self.val):
            samples.reader.tell(moved)


def open_data(config: Config, world_size: int) -> Data:
    """The sample sets of a run; InputError when they are not there or do not fit the configuration."""
    options = config.data
    train, val = (open_reader(options, name) for name in (options.train_split, options.val_split))
    if not options.allow_unverified:
        check_verified(train)
    saved = Path(config.run_dir) / LABELLED_FILE  # of a run that goes on: its own list counts
    wanted = str(saved) if options.labelled != "all" and saved.is_file() else options.labelled
    labelled, rest = split_labelled(train, wanted, options.labelled_seed)
    room = options.keep_decoded_bytes
    train_set = SampleSet(train, labelled, keep=options.keep_classes, keep_decoded_bytes=room)
    there, asked = train_set.classes.num_classes, options.num_classes
    if asked not in (None, there):
        names = ", ".join(train_set.classes.names)
        got = f"data.num_classes={asked}, but {options.shards} has {there} classes ({names})"
        raise InputError(
            got, "the same number", f"write data.num_classes={there}, or choose other shards"
        )
    unlabelled_set = None
    if config.mode == "semi_supervised":
        if not rest:
            got = f"mode=semi_supervised, but all {len(labelled)} samples of {train.split} are used with their labels"
            raise InputError(
                got,
                "unlabelled samples",
                "write for example data.labelled=1/8, or mode=adversarial",
            )
        size = config.semi.batch_size or config.batch_size
        check_batch("semi.batch_size", size, world_size, config.accumulate_steps)
        # the labelled ones come first: being fewer, they come more often
        room -= train_set.decoded_bytes(room)
        unlabelled_set = SampleSet(
            train, rest, labelled=False, keep=options.keep_classes, keep_decoded_bytes=room
        )
    own_view(config, there)  # or training would find out what is wrong with it
    return Data(train_set, unlabelled_set, SampleSet(val, keep=options.keep_classes))


def save_labelled(run_dir: Path, config: Config, data: Data) -> None:
    """Write which samples are labelled, where that is a choice; a list that is there stays."""
    path = run_dir / LABELLED_FILE
    if config.data.labelled != "all" and not path.is_file():
        with published(path) as partial:
            partial.write_text("\n".join(data.train.keys) + "\n", encoding="utf-8")


def open_streams(
    config: Config, ranks: Ranks, data: Data, start_step: int
) -> TrainStream | PairedStream:
    """This rank's part of the endless sequence of batches, from `start_step` on."""
    labelled = open_stream(config, ranks, data.train, start_step, config.batch_size, config.seed)
    if data.unlabelled is None:
        return labelled
    batch_size = config.semi.batch_size or config.batch_size
    # beyond every seed that a user can choose: another order, other views
    seed = config.seed + 2**32
    return PairedStream(
        labelled, open_stream(config, ranks, data.unlabelled, start_step, batch_size, seed)
    )


def open_stream(
    config: Config, ranks: Ranks, samples: SampleSet, start_step: int, batch_size: int, seed: int
) -> TrainStream:
    """One stream of training views."""
    data = config.data
    own = own_view(config, samples.classes.num_classes)
    names = [field.name for field in fields(TrainView) if field.name != "own"]
    view = TrainView(**{name: getattr(data, name) for name in names}, own=own)
    return TrainStream(
        samples,
        plan_for(samples, data, seed),
        view,
        batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        num_threads=data.num_threads,
        worker_type=data.worker_type,
        start_step=start_step,
        pin_memory=ranks.device.type == "cuda",
    )


def own_view(config: Config, num_classes: int) -> OwnView | None:
    """The view of the user's own, tried on a crop; None where there is none.

    Raises InputError for one that is none, or that draws random numbers of its own.
    """
    if not config.data.view:
        return None
    view = OwnView(config.data.view, config.data.view_options, num_classes)
    view.check(config.data.crop_px)
    return view

"""What a run reads: its sample sets, and the streams of batches cut from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from distseg.config.rules.networks import goes_by_loss
from distseg.config.schema import ADAPTATION, WITH_UNLABELLED, Config, DataConfig
from distseg.config.world_size import check_batches, has_teacher, unlabelled_as_labelled
from distseg.data.mixture import (
    Mixture,
    check_apart,
    check_not_scored,
    check_shares,
    listed_by_set,
    mixed_plan,
    names_of,
)
from distseg.data.own_view import OwnView
from distseg.data.partners import mapped_classes
from distseg.data.plan import MixedPlan
from distseg.data.samples import (
    HELD_OUT_FILE,
    LABELLED_FILE,
    Mapped,
    SampleSet,
    check_not_void,
    hold_out,
    kept,
    open_reader,
    split_labelled,
)
from distseg.data.stream import PairedStream, TrainStream
from distseg.data.transforms import TrainView
from distseg.distributed.ranks import Ranks, on_each
from distseg.runs.checkpoint import OTHER, OWN, TARGET
from shards.errors import InputError
from shards.files import write_text
from shards.reader import ShardReader
from shards.storage import is_file
from shards.verified import check_verified
from shards.words import counted


@dataclass(frozen=True)
class Data:
    """What a run reads: labelled training samples, unlabelled ones in the modes that have them,
    validation samples, and labelled ones of the training split that are not trained on. source:
    validation samples of the domain that has the labels, where the others are of another. domain:
    of the validation samples, as distseg.runs.checkpoint has it.
    """

    train: Mixture
    unlabelled: Mixture | None
    val: SampleSet
    held_out: SampleSet | None = None
    source: SampleSet | None = None
    domain: str = OWN

    @property
    def chosen_by(self) -> dict[str, str]:
        """Whose labels choose the best checkpoint, as it is noted."""
        reader = self.val.reader
        name = names_of([reader])[0]
        return {"data": name, "split": reader.split, "domain": self.domain}

    @property
    def readers(self) -> list[ShardReader]:
        """All that is read from, each once."""
        unlabelled = [] if self.unlabelled is None else self.unlabelled.readers
        source = [] if self.source is None else [self.source.reader]
        every = [*self.train.readers, *unlabelled, self.val.reader, *source]
        return list(dict.fromkeys(every))

    def tell(self, moved: Callable[[], None]) -> None:
        """Call `moved` whenever bytes of shards that are far away arrive."""
        for reader in self.readers:
            reader.tell(moved)

    def verify(self, ranks: Ranks) -> None:
        """Compare all indices with the manifests, on one rank of each machine: to hash the same
        files again on its other ranks would find nothing more. Raises InputError on every rank.
        """
        # of one process they were compared when they were read
        if ranks.world_size > 1:
            on_each(ranks, self._verify if ranks.local_rank == 0 else lambda: None)

    def _verify(self) -> None:
        for reader in self.readers:
            reader.verify()


def open_data(config: Config, world_size: int) -> Data:
    """The sample sets of a run.

    InputError when they are not there or do not fit the configuration. Of several ranks none
    compares indices with the manifest here: `verify`.
    """
    check_batches(config, world_size)
    options, verify = config.data, world_size == 1
    # a reader reads manifest and index here, and no sample yet: names and sizes are enough to
    # refuse
    train_split = options.train_split
    readers = [open_reader(options, train_split, folder, verify) for folder in options.shards]
    val = open_reader(options, options.val_split, options.val_shards, verify)
    _check_verified(options, readers)
    names = names_of(readers)
    mapped = _mapped(options, [*readers, val], [*names, *names_of([val])])
    choices = _choices(config, readers, names)
    labelled = [indices for indices, _ in choices]
    labelled[0], held_out = _hold_out(config, readers[0], labelled[0], mapped[0])
    train = Mixture(_sets(readers, labelled, mapped[:-1], options.keep_decoded_bytes), names)
    val_set = SampleSet(val, mapped=mapped[-1])
    # now, and not after the last step, when the scores turn out to be of no pixel
    for samples in train.sets:
        check_not_void(samples, "to train on")
    check_not_void(val_set, "to score on")
    # after `keep_classes`, which changes how many there are
    _check_classes(config, train)
    check_shares(train, options.weights, config.batch_size, "data.weights")
    own_view(config, train.classes.num_classes)  # or training would find out what is wrong
    unlabelled = None
    if config.mode in WITH_UNLABELLED:
        unlabelled = _open_unlabelled(config, train, [rest for _, rest in choices], verify)
    check_apart([train] if unlabelled is None else [train, unlabelled])
    check_not_scored(train, val_set)
    source = _open_source(config, readers[0], val, mapped[0], verify)
    domain = _domain(config, readers, unlabelled, val)
    data = Data(train, unlabelled, val_set, held_out, source, domain)
    _check_course(config, data)
    return data


def _domain(
    config: Config, labelled: Sequence[ShardReader], unlabelled: Mixture | None, val: ShardReader
) -> str:
    """Of the validation split, by the manifests: one data set may lie in several places."""
    sha256 = val.manifest.sha256
    if sha256 in [reader.manifest.sha256 for reader in labelled]:
        return OWN
    # a data set for validation alone is the target where two domains are told apart; elsewhere it
    # may well be of the same domain, packed by itself
    others = [] if unlabelled is None else unlabelled.readers
    is_target = config.mode in ADAPTATION or sha256 in [it.manifest.sha256 for it in others]
    return TARGET if is_target else OTHER


def _check_course(config: Config, data: Data) -> None:
    """Raise InputError where labels of the target would decide on the course of what adapts to
    it: on its learning rates, or on its end.
    """
    named = goes_by_loss(config)
    if named and data.domain == TARGET:
        got = f"{named} with validation on {data.chosen_by['data']}, the target"
        needed = "a course that asks none of its labels: both go by the loss on them"
        action = "write schedule.name=poly schedule.early_stop_patience=0, or leave data.val_shards"
        raise InputError(got, needed, f"{action} out, which validates on the source")


def _open_source(
    config: Config, first: ShardReader, val: ShardReader, mapped: Mapped, verify: bool
) -> SampleSet | None:
    """The validation split of the first data set, where another one is validated on."""
    options = config.data
    if not (options.unlabelled_shards or config.evaluate.first_set):
        return None
    is_other = val.manifest.sha256 != first.manifest.sha256
    if not is_other or options.val_split not in first.manifest.splits:
        return None
    reader = open_reader(options, options.val_split, options.shards[0], verify)
    samples = SampleSet(reader, mapped=mapped)
    check_not_void(samples, "to score on")
    return samples


def _hold_out(
    config: Config, reader: ShardReader, labelled: Sequence[int], mapped: Mapped
) -> tuple[Sequence[int], SampleSet | None]:
    """Whose labels are trained on, and the samples whose labels judge the teacher's: of the first
    data set.
    """
    count = config.consistency.held_out
    # without one there is nothing to judge, and labels are dear
    if not (has_teacher(config) and count):
        return labelled, None
    labelled, held_out = hold_out(reader, labelled, count, config.data.labelled_seed)
    samples = SampleSet(reader, held_out, mapped=mapped)
    check_not_void(samples, "to compare pseudo-labels with")
    return labelled, samples


def _check_verified(options: DataConfig, readers: Sequence[ShardReader]) -> None:
    """Raise InputError for a data set that nobody has found sound."""
    # The training split's verification is the data set's: what `distseg inspect` found sound stays
    # so as long as the manifest has the same sum.
    for reader in readers if not options.allow_unverified else ():
        check_verified(reader)


def _mapped(
    options: DataConfig, readers: Sequence[ShardReader], names: Sequence[str]
) -> list[Mapped]:
    """The run's classes, those of the first data set, and which of them each of the others' is.

    The last reader is that of the validation split. Raises InputError for classes without partner.
    """
    unknown = [name for name in options.class_map if name not in names[1:]]
    if unknown:
        needed = f"a further data set: {', '.join(dict.fromkeys(names[1:]))}"
        action = "correct the name; the classes of the first data set are the run's"
        raise InputError(f"data.class_map.{unknown[0]}", needed, action)
    # the first, not a union: what a network predicts must not depend on what else is mixed in
    first = kept(readers[0].classes, options.keep_classes)
    found = {readers[0].manifest.sha256: first}
    for reader, name in zip(readers, names, strict=True):
        # of a split of the same data set they are the same
        if reader.manifest.sha256 not in found:
            of_set = mapped_classes(first[0], reader.classes, options, name)
            found[reader.manifest.sha256] = of_set
    return [found[reader.manifest.sha256] for reader in readers]


def _choices(
    config: Config, readers: Sequence[ShardReader], names: Sequence[str]
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Of each data set the samples whose labels are used, and the others: a share is one of each
    set, drawn as if it were alone.
    """
    options = config.data
    saved = Path(config.run_dir) / LABELLED_FILE  # of a run that goes on: its own list counts
    wanted = str(saved) if options.labelled != "all" and is_file(saved) else options.labelled
    listed: Sequence[Sequence[str] | None] = [None] * len(readers)
    if len(readers) > 1 and wanted != "all" and is_file(Path(wanted)):
        listed = listed_by_set(Path(wanted), readers, names)
    # drawn by a seed of its own, so that runs of several seeds can share their labelled images
    return [
        split_labelled(reader, wanted, options.labelled_seed, keys)
        for reader, keys in zip(readers, listed, strict=True)
    ]


def _sets(
    readers: Sequence[ShardReader],
    indices: Sequence[Sequence[int]],
    mapped: Sequence[Mapped],
    room: float,
    *,
    labelled: bool = True,
) -> list[SampleSet]:
    """A sample set of each reader; room: bytes for samples that stay decoded, the first ones
    first.
    """
    sets = []
    for reader, some, classes in zip(readers, indices, mapped, strict=True):
        # the labels that a fraction leaves out are not read at all: those samples go into a set
        # without labels
        options: dict[str, Any] = {"labelled": labelled, "mapped": classes}
        sets.append(SampleSet(reader, some, keep_decoded_bytes=room, **options))
        room -= sets[-1].decoded_bytes(room)
    return sets


def _check_classes(config: Config, samples: Mixture) -> None:
    """Raise InputError where data.num_classes is not the number of classes."""
    classes, asked = samples.classes, config.data.num_classes
    if asked not in (None, classes.num_classes):
        there, names = classes.num_classes, ", ".join(classes.names)
        got = f"data.num_classes={asked}, but {config.data.shards[0]} has {there} classes ({names})"
        action = f"write data.num_classes={there}, or choose other shards"
        raise InputError(got, "the same number", action)


def _open_unlabelled(
    config: Config, labelled: Mixture, rest: Sequence[Sequence[int]], verify: bool
) -> Mixture:
    """The samples whose labels are not used: of data sets of their own, or the rest of the
    labelled.
    """
    options = config.data
    readers, names = labelled.readers, list(labelled.names)
    if options.unlabelled_shards:
        split = options.unlabelled_split or options.train_split
        folders = options.unlabelled_shards
        readers = [open_reader(options, split, folder, verify) for folder in folders]
        names, rest = names_of(readers), [range(len(reader)) for reader in readers]
        _check_verified(options, readers)
    else:
        _check_rest(config, labelled, rest)
    size = config.semi.batch_size or config.batch_size
    # a set with all of its labels used has none left to give
    some = [number for number, indices in enumerate(rest) if len(indices)]
    # the labelled ones come first: being fewer, they come more often
    room = options.keep_decoded_bytes
    room -= labelled.decoded_bytes(room)
    # no label is read, so that there is nothing to map
    mapped: list[Mapped] = [(labelled.classes, None)] * len(some)
    chosen = [readers[number] for number in some], [rest[number] for number in some]
    sets = _sets(*chosen, mapped, room, labelled=False)
    unlabelled = Mixture(sets, [names[number] for number in some])
    check_shares(unlabelled, options.unlabelled_weights, size, "data.unlabelled_weights")
    return unlabelled


def _check_rest(config: Config, labelled: Mixture, rest: Sequence[Sequence[int]]) -> None:
    """Raise InputError where no sample is left without its label being used."""
    if not any(rest):
        which = f"all of {counted(len(labelled), 'sample')} of {config.data.train_split}"
        got = f"mode={config.mode}, but {which} are used with their labels"
        instead = "adversarial" if config.mode == "semi_supervised" else "supervised"
        action = (
            f"write for example data.labelled=1/8, data.unlabelled_shards=DIR, or mode={instead}"
        )
        raise InputError(got, "unlabelled samples", action)


def save_labelled(run_dir: Path, config: Config, data: Data) -> None:
    """Write which samples are labelled, where that is a choice, and which of them are held out;
    lists that are there stay.
    """
    held_out = [] if data.held_out is None else data.held_out.keys
    if len(data.train.names) > 1:
        held_out = [f"{data.train.names[0]}/{key}" for key in held_out]  # as the others have it
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
    options, size = config.data, config.batch_size
    own = mixed_plan(data.train, options, options.weights, batch_size=size, seed=config.seed)
    # the strong view's colours and blur are laid over it in the step, and replace these
    weak = replace(config, data=replace(config.data, color_jitter=0.0, blur_probability=0.0))
    of_labelled = weak if config.strong.labelled else config
    labelled = open_stream(of_labelled, ranks, data.train, start_step, (size, own))
    if data.unlabelled is None:
        return labelled
    size = config.semi.batch_size or config.batch_size
    # beyond every seed that a user can choose: another order, other crops
    seed = config.seed + 2**32
    other = mixed_plan(
        data.unlabelled, options, options.unlabelled_weights, batch_size=size, seed=seed
    )
    # weak: what a teacher labels, too
    of_rest = weak if has_teacher(config) or unlabelled_as_labelled(config) else config
    return PairedStream(
        labelled, open_stream(of_rest, ranks, data.unlabelled, start_step, (size, other))
    )


def open_stream(
    config: Config,
    ranks: Ranks,
    samples: Mixture,
    start_step: int,
    size_and_plan: tuple[int, MixedPlan],
) -> TrainStream:
    """One stream of training crops: so many images a step over all ranks, in the plan's order."""
    data, (batch_size, plan) = config.data, size_and_plan
    own = own_view(config, samples.classes.num_classes)
    # the fields of a view are keys of the `data` section, so that a new one needs no line here
    names = [field.name for field in fields(TrainView) if field.name != "own"]
    crop = TrainView(**{name: getattr(data, name) for name in names}, own=own)
    # Everything but rank and world size is the same on every rank: the stream is cut, not drawn, by
    # rank.
    return TrainStream(
        samples,
        plan,
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

"""A folder as model hubs keep them.

Weights, config.json, and a model card that says what the model is and does.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from distseg.config import loading
from distseg.config.schema import WITH_DISCRIMINATOR, Config, TrackingConfig
from distseg.evaluate import document
from distseg.evaluate.document import SAME_AUGMENTATION, SAME_DATA
from distseg.evaluate.judged import judges_auxiliary
from distseg.export.formats import SUFFIXES, Trained, export
from distseg.tracking.catalogue import SCORES, VALIDATION
from shards import user_code
from shards.errors import InputError
from shards.files import published, write_json
from shards.words import counted

# a file of its own, so that it is linted and tested like all others
EXAMPLE = Path(__file__).with_name("predict_onnx.py")
# what makes two evaluations of a step the same one
_CONDITIONS = (*SAME_DATA, *SAME_AUGMENTATION, "precision")


def write_folder(run_dir: Path, trained: Trained, form: str, folder: Path) -> list[Path]:
    """Write model.safetensors, the model in `form`, config.json and README.md; returns their paths.

    With ONNX also a program that runs it without distseg. Scores are those of the run's
    evaluation*.json of the same step. Raises InputError for a folder that holds something else.
    """
    # config.json is the sign of an earlier export, which may be replaced
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} holds other files",
            "a new folder, or a model's",
            "choose another --hub-folder",
        )
    written = []
    # once, where the form is safetensors itself: its weights are always there
    for each in dict.fromkeys(("safetensors", form)):
        written.append(folder / f"model{SUFFIXES[each]}")
        export(trained.segmentor, trained.metadata, each, written[-1])
    # of this very step: another checkpoint's scores would be a claim about other weights
    evaluations = _evaluations(run_dir, trained.step)
    write_json(
        folder / "config.json",
        trained.metadata | {"step": trained.step, "evaluations": evaluations},
    )
    texts = {"README.md": model_card(run_dir.name, trained, form, evaluations)}
    # all keys: what a training of the same network would need
    texts |= {"training.yaml": loading.to_yaml(_without_places(trained.config))}
    texts |= {EXAMPLE.name: EXAMPLE.read_text(encoding="utf-8")} if form == "onnx" else {}
    for name, text in texts.items():
        # one by one whole: an upload that runs beside meets no half of a file
        with published(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return [*written, folder / "config.json", *(folder / name for name in texts)]


def _without_places(config: Config) -> Config:
    """The configuration without what names places of the machine or the account, which are nobody's
    concern.
    """
    # copies: the caller's configuration stays as it is
    data = replace(config.data, shards=[], cache_dir="", labelled=_last_part(config.data.labelled))
    data = replace(data, unlabelled_shards=[], val_shards="", weights=[], unlabelled_weights=[])
    data.unlabelled_split = ""  # of data sets that are named no more
    data.view = user_code.short(config.data.view)
    segmentor = replace(config.segmentor, init=Path(config.segmentor.init).name)
    segmentor.name = user_code.short(config.segmentor.name)
    discriminator = replace(config.discriminator, init=Path(config.discriminator.init).name)
    discriminator.name = user_code.short(config.discriminator.name)
    terms = {
        name: replace(term, use=user_code.short(term.use))
        for name, term in config.loss.terms.items()
    }
    parallel = replace(
        config.parallel, deepspeed_config=_last_part(config.parallel.deepspeed_config)
    )
    own = {"data": data, "parallel": parallel, "tracking": TrackingConfig()}
    own |= {"segmentor": segmentor, "discriminator": discriminator}
    own |= {"loss": replace(config.loss, terms=terms)}
    return replace(config, run_dir="", **own)  # type: ignore[arg-type]


def _last_part(path: str) -> str:
    """The name of a file, and any other value as it is (1/8)."""
    # "1/8" is a share of the labels, and no path
    return Path(path).name if Path(path).suffix or Path(path).is_absolute() else path


def _evaluations(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """The run's evaluations of a step, without the confusion matrices.

    Details first, training's own last.
    """
    found: dict[str, dict[str, Any]] = {}
    of_run = run_dir.glob("evaluation*.json")
    # False sorts before True: training's own last, as the first of equal conditions is kept
    for path in sorted(of_run, key=lambda path: (path.name == "evaluation.json", path.name)):
        content = document.read(path)
        if content["step"] == step:
            # classes x classes numbers, which no reader of a model card looks at
            content.pop("confusion", None)
            conditions = json.dumps([content.get(key) for key in _CONDITIONS])
            found.setdefault(conditions, content)
    return list(found.values())


def model_card(name: str, trained: Trained, form: str, evaluations: list[dict[str, Any]]) -> str:
    """README.md: a YAML header that hubs read, and the text."""
    header = {"library_name": "distseg", "pipeline_tag": "image-segmentation"}
    tags = {"tags": ["semantic-segmentation", trained.config.mode, trained.metadata["segmentor"]]}
    index = {
        "model-index": [
            {
                "name": name,
                "results": list(map(_result, evaluations, _names(evaluations))),
            }
        ]
    }
    about = header | tags | (index if evaluations else {})
    parts = [
        # in the order given: name and task are what people look for first
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---",
        f"# {name}\n\n{_what(trained)}",
        f"## Use\n\n{_use(form)}",
        f"## Classes\n\n{_classes(trained.metadata)}",
        f"## Scores\n\n{_scores(evaluations)}",
        f"## Training\n\n{_training(trained.config)}",
    ]
    return "\n\n".join(parts) + "\n"


def _what(trained: Trained) -> str:
    about = trained.metadata
    parameters = sum(parameter.numel() for parameter in trained.segmentor.parameters()) / 1e6
    options = ", ".join(f"{key}={value}" for key, value in about["options"].items())
    network = f"`{about['segmentor']}`" + (f" ({options})" if options else "")
    return (
        f"A semantic segmentation network, {network}, {parameters:.2f} M parameters, "
        f"{counted(len(about['classes']), 'class', 'classes')}, "
        f"after step {trained.step} of {trained.config.steps}.\n\n"
        f"Input `image`: (N, 3, H, W) float32, RGB, 8-bit values divided by 255, sides of "
        f"{about['input']['min_side_px']} to {about['input']['max_side_px']} px. Mean and "
        "deviation are inside the "
        "network.\nOutput `logits`: (N, C, H, W) float32 at the image's size; argmax over C is "
        "the class."
    )


def _use(form: str) -> str:
    uses = {
        "onnx": "Without distseg: `python predict_onnx.py model.onnx picture.jpg labels.png` "
        "(`pip install onnxruntime pillow`). Classes, colours and preprocessing are in the "
        "file's metadata.",
        "torch-export": "With torch alone: `torch.export.load('model.pt2').module()(image)`; the "
        "extra file "
        "`distseg.json` in it names classes and preprocessing.",
        "safetensors": "",
    }
    call = "distseg.export.formats.read_safetensors(Path('model.safetensors'))"
    own = f"`{call}` is the network, at its own output stride."
    return "\n\n".join(text for text in (uses[form], f"With distseg: {own}") if text)


def _classes(about: dict[str, Any]) -> str:
    lines = ["| index | class | colour (RGB) |", "|---:|---|---|"]
    for index, (name, color) in enumerate(zip(about["classes"], about["palette"], strict=True)):
        lines.append(f"| {index} | {_cell(name)} | {', '.join(map(str, color))} |")
    return "\n".join(lines)


def _scores(evaluations: list[dict[str, Any]]) -> str:
    if not evaluations:
        return "Not evaluated at this step."
    scored: set[str] = set()
    for scores in evaluations:
        scored |= {name for name, value in scores.items() if value is not None}
    # no empty columns: which scores there are depends on how it was evaluated
    shown = [score for score in SCORES if score.name in scored]
    lines = [
        "| data | test-time augmentation | " + " | ".join(score.title for score in shown) + " |",
        "|---|---|" + "---:|" * len(shown),
    ]
    names = _names(evaluations)
    for scores, name in zip(evaluations, names, strict=True):
        cells = [
            f"{_cell(name)}, {scores['num_images']} images of {scores['split']}",
            _augmentation(scores),
        ]
        cells += [_score(scores, score.name) for score in shown]
        lines.append("| " + " | ".join(cells) + " |")
    note = "Per cent; every image once, at full resolution, void excluded, "
    note += "one confusion matrix over all images."
    has_intervals = any("intervals_95" in scores for scores in evaluations)
    note += " In brackets 95 % bootstrap intervals over images." if has_intervals else ""
    return "\n".join([*lines, "", note])


def _score(scores: dict[str, Any], name: str) -> str:
    if scores.get(name) is None:
        return ""
    low, high = scores.get("intervals_95", {}).get(name, (None, None))
    interval = "" if low is None else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{100 * scores[name]:.1f}{interval}"


def _augmentation(scores: dict[str, Any]) -> str:
    window = f", windows of {scores['window_px']} px" if scores.get("window_px") else ""
    scales = ", ".join(f"{scale:g}" for scale in scores["scales"])
    return (
        f"scale {scales}"
        + (", flipped too" if scores["horizontal_flip"] else "")
        + window
        + f", {scores['precision']}"
    )


def _training(config: Config) -> str:
    default = loading.flattened(loading.to_dict(Config()))
    own = loading.flattened(loading.to_dict(_without_places(config)))
    named = [
        "mode",
        "steps",
        "batch_size",
        "seed",
        "data.labelled",
        "data.crop_px",
        "segmentor.init",
    ]
    if config.mode in WITH_DISCRIMINATOR:
        named.append("loss.adv_weight")
    if judges_auxiliary(config):
        named.append("adaptation.aux_adv_weight")
    shown = [
        f"{key}={own[key]}"
        for key in named
        # what differs from the default; the first three are asked for anyway
        if key in ("mode", "steps", "batch_size") or own[key] != default[key]
    ]
    return f"By distseg: {', '.join(shown)}. Every key: `training.yaml`."


def _names(evaluations: list[dict[str, Any]]) -> list[str]:
    """What each evaluation's data are called: with their checksum where others have the name."""
    contents: dict[str, set[str]] = {}
    for scores in evaluations:
        # of an earlier version, which did not say: ""
        contents.setdefault(scores["data"], set()).add(scores.get("data_sha256", ""))
    names = []
    for scores in evaluations:
        sha256 = scores.get("data_sha256", "")
        is_shared = sha256 and len(contents[scores["data"]]) > 1
        names.append(scores["data"] + (f" ({document.short(sha256)})" if is_shared else ""))
    return names


def _result(scores: dict[str, Any], data: str) -> dict[str, Any]:
    """One entry of a model index, as hubs show them."""
    metrics = [
        {
            "type": score.name.removeprefix(VALIDATION),
            "name": f"{score.title}, {_augmentation(scores)}",
            "value": round(scores[score.name], 4),
        }
        for score in SCORES
        # absent where an evaluation did not compute it
        if scores.get(score.name) is not None
    ]
    dataset = {"name": data, "type": "custom", "split": scores["split"]}
    return {"task": {"type": "image-segmentation"}, "dataset": dataset, "metrics": metrics}


def _cell(text: str) -> str:
    # or it would end the cell
    return text.replace("|", "\\|")

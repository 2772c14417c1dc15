"""The import direction cli -> launchers -> distseg -> shards, and a light command line, read from
the source.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def uses(path: Path, *packages: str) -> set[str]:
    return {
        name
        for name in imported(path)
        if any(name == p or name.startswith(p + ".") for p in packages)
    }


def test_shards_knows_neither_torch_nor_distseg() -> None:
    files = sorted((ROOT / "shards").rglob("*.py"))
    assert len(files) > 5
    for path in files:
        assert not uses(path, "torch", "distseg", "launchers"), path


def test_distseg_does_not_reach_up_into_launchers() -> None:
    for path in (ROOT / "distseg").rglob("*.py"):
        if path.name != "cli.py":
            assert not uses(path, "launchers"), path


def test_launchers_know_the_command_line_not() -> None:
    files = sorted((ROOT / "launchers").glob("*.py"))
    assert len(files) > 5
    for path in files:
        assert not uses(path, "distseg.cli"), path
    # of jobs by sbatch, whose machines need no submitit
    for name in ("supervisor", "agent", "places", "check"):
        assert not uses(ROOT / "launchers" / f"{name}.py", "submitit"), name


# Each room imports only rooms further up in this list; the modules of distseg/ itself may import
# all.
ROOMS = (
    *("config", "losses", "models", "catalogue", "distributed", "data", "parallel", "runs"),
    *("tracking", "evaluate", "predict", "pseudo_label", "export", "inspection", "doctor"),
    *("report", "train", "estimate"),
)
MAX_MODULES = 6  # of distseg/ itself, beside the rooms


def modules() -> dict[str, Path]:
    """All modules of distseg by their dotted names; a package stands for its __init__."""
    paths = sorted((ROOT / "distseg").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def room_of(name: str) -> str:
    """The folder of distseg/ that a module lies in; "" for those of distseg/ itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


def graph() -> dict[str, set[str]]:
    """Which modules of distseg each one imports, anywhere in it."""
    known = modules()
    return {name: imported(path) & known.keys() - {name} for name, path in known.items()}


def test_every_folder_is_a_room_and_few_modules_lie_outside() -> None:
    folders = {
        path.name for path in (ROOT / "distseg").iterdir() if (path / "__init__.py").is_file()
    }
    assert folders == set(ROOMS)
    assert len(list((ROOT / "distseg").glob("*.py"))) <= MAX_MODULES


def test_each_room_imports_only_rooms_below_it() -> None:
    for name, needed in graph().items():
        room = room_of(name)
        if not room or name.endswith(".__main__"):  # those hand over to the command line
            continue
        below = {*ROOMS[: ROOMS.index(room) + 1]}
        strangers = {
            other for other in needed if other != "distseg" and room_of(other) not in below
        }
        assert not strangers, f"{name} imports {strangers}"


def test_no_module_is_part_of_an_import_circle() -> None:
    left = graph()
    while left:
        free = {name for name, needed in left.items() if not needed & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: needed for name, needed in left.items() if name not in free}


def test_networks_and_losses_are_plain_torch() -> None:
    folders = [ROOT / "distseg" / name for name in ("models", "losses")]
    for path in [path for folder in folders for path in folder.glob("*.py")]:
        forbidden = (
            "torch.distributed",
            "deepspeed",
            "distseg.distributed",
            "distseg.parallel",
            "distseg.config",
        )
        assert not uses(path, *forbidden), path


HEAVY = {"torch", "numpy", "omegaconf", "h5py", "wandb", "submitit", "yaml"}


def test_help_imports_nothing_heavy() -> None:
    for arguments in (["--help"], ["train", "--help"], ["train", "--help", "loss"]):
        program = (
            "import contextlib, sys; from distseg.cli import main\n"
            f"with contextlib.suppress(SystemExit): main({arguments})\n"
            "print('imported:', *sys.modules)"
        )
        ran = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        )
        text, _, modules = ran.stdout.partition("imported:")
        assert "distseg" in text or "loss.adv_weight" in text
        assert not HEAVY & set(modules.split())

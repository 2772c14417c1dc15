"""The import direction cli -> launchers -> distseg -> shards, and a light command line, read from the source."""

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
    return {name for name in imported(path) if any(name == p or name.startswith(p + ".") for p in packages)}


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
    for name in ("supervisor", "agent", "places", "check"):  # of jobs by sbatch, whose machines need no submitit
        assert not uses(ROOT / "launchers" / f"{name}.py", "submitit"), name


def test_networks_and_losses_are_plain_torch() -> None:
    for path in [*(ROOT / "distseg" / "models").glob("*.py"), ROOT / "distseg" / "losses.py"]:
        forbidden = ("torch.distributed", "deepspeed", "distseg.distributed", "distseg.parallel", "distseg.config")
        assert not uses(path, *forbidden), path


def test_help_imports_nothing_heavy() -> None:
    program = "import sys; from distseg.cli import build_parser; build_parser().format_help(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "omegaconf", "h5py", "wandb", "submitit", "yaml"} & set(modules.stdout.split())

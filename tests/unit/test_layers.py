"""Imports point one way: what the rooms may know of each other; nothing goes in circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import mlx_diffgemma

ROOT = Path(mlx_diffgemma.__file__).parent
# Each room may import from those before it, and of a row none from another; `.` is the package.
ROWS = [
    ["errors", "files", "arguments"],
    ["distributed"],
    ["model"],
    ["diffusion"],
    ["text", "images"],
    ["checkpoint", "tasks"],
    ["convert", "training"],
    ["measure", "server"],
    ["cli"],
]
FLOOR = {room: floor for floor, rooms in enumerate(ROWS) for room in rooms}


def imports() -> dict[str, set[str]]:
    """What each module of the package imports of the package, also within functions."""
    found: dict[str, set[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        here = found.setdefault(".".join(parts), set())
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            name = (node.module or "").split(".")
            if node.level:
                name = [*parts[: len(parts) - node.level], *filter(None, name)]
            elif name[0] == "mlx_diffgemma":
                name = name[1:]
            else:
                continue
            base = ROOT.joinpath(*name)
            for alias in node.names:
                if alias.name == "__version__":  # the package itself
                    continue
                module = base / alias.name if base.is_dir() else base
                if not module.is_dir():
                    here.add(".".join(module.relative_to(ROOT).parts))
    return found


def test_imports_point_one_way() -> None:
    for module, others in imports().items():
        room = module.split(".")[0]
        for other in others if room in FLOOR else ():
            its = other.split(".")[0]
            assert room == its or FLOOR[its] < FLOOR[room] or FLOOR[room] == 0, (
                f"{module} -> {other}"
            )


def test_no_module_imports_itself_by_way_of_others() -> None:
    """canvas, generation and schema did, and info, loading and memory."""
    list(TopologicalSorter(imports()).static_order())

"""The public names: what type checkers read, what is resolved, `__all__` and `__dir__` agree."""

import ast
from importlib import import_module
from pathlib import Path

import mlx_diffgemma


def imported() -> dict[str, str]:
    """Public name -> module, of the imports that only type checkers see."""
    tree = ast.parse(Path(mlx_diffgemma.__file__).read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(guarded.test) == "TYPE_CHECKING"
    found: dict[str, str] = {}
    for node in guarded.body:
        assert isinstance(node, ast.ImportFrom)
        assert node.level == 1
        for alias in node.names:
            assert alias.name == alias.asname  # else it is not exported
            found[alias.name] = node.module or ""
    return found


def test_the_tables_of_public_names_agree() -> None:
    assert imported() == mlx_diffgemma._HOME
    assert list(mlx_diffgemma.__all__) == sorted(imported())
    assert set(mlx_diffgemma.__all__) <= set(dir(mlx_diffgemma))
    assert len(mlx_diffgemma.__all__) == sum(
        map(len, map(str.split, mlx_diffgemma._EXPORTS.values()))
    )


def test_every_public_name_is_there() -> None:
    for name in mlx_diffgemma.__all__:
        home = import_module(f"mlx_diffgemma.{imported()[name]}")
        assert getattr(mlx_diffgemma, name) is getattr(home, name)

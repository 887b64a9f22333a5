"""What the modules that can be compiled (setup.py) must keep to, so that they mean the same as Python and as C."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
HOT: list[Path] = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["hot_path"](ROOT / "disagg_proxy")
_DO_NOT_SUSPEND = {"within", "slot"}
"""Context managers that let nobody else run when they are left: a timeout, a semaphore."""


def suspensions(nodes: Iterable[ast.AST]) -> Iterator[int]:
    """Lines at which others may run, functions within left out."""
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, (ast.Await, ast.AsyncFor, ast.AsyncWith, ast.Yield, ast.YieldFrom)):
            yield node.lineno
        yield from suspensions(ast.iter_child_nodes(node))


def while_handling(tree: ast.AST) -> Iterator[int]:
    """Lines that let others run while an exception is handled."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            yield from suspensions(node.body)
        elif isinstance(node, ast.Try):
            yield from suspensions(node.finalbody)
        elif isinstance(node, ast.AsyncWith):
            for item in node.items:
                manager: Any = item.context_expr.func if isinstance(item.context_expr, ast.Call) else item.context_expr
                if getattr(manager, "id", None) not in _DO_NOT_SUSPEND:
                    yield node.lineno


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("async def f():\n try:\n  await a\n except E:\n  await b", [5]),
        ("async def f():\n try:\n  await a\n finally:\n  x = [await b]", [5]),
        ("async def f():\n try:\n  await a\n except E:\n  async def g():\n   await b", []),
        ("async def f():\n async with lock:\n  await a", [2]),
        ("async def f():\n async with within(3):\n  await a", []),
    ],
)
def test_the_check_itself(code: str, lines: list[int]) -> None:
    assert list(while_handling(ast.parse(code))) == lines


@pytest.mark.parametrize("module", HOT, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_awaited_while_an_exception_is_handled(module: Path) -> None:
    """mypyc does not put the exception aside when a coroutine is suspended: whoever runs next would be handling it."""
    assert list(while_handling(ast.parse(module.read_text()))) == []


def test_all_of_the_hot_path_is_there() -> None:
    names = {str(path.relative_to(ROOT / "disagg_proxy")) for path in HOT}
    assert {
        "coordinator/coordinator.py",
        "downstream/response_stream.py",
        "server/fast_path.py",
        "upstream/connection.py",
        "cluster/selection.py",
    } <= names


def test_the_compiled_stage_names_folders_that_exist_and_all_that_are_compiled_have() -> None:
    script = (ROOT / "tests" / "compiled").read_text()
    (line,) = [line for line in script.splitlines() if line.startswith("folders=(")]
    named = set(line.removeprefix("folders=(").removesuffix(")").split())
    assert all((ROOT / "tests" / folder).is_dir() for folder in named)
    compiled = {path.relative_to(ROOT / "disagg_proxy").parts[0] for path in HOT if path.parent.name != "disagg_proxy"}
    assert {folder for folder in compiled if (ROOT / "tests" / folder).is_dir()} <= named

"""Sees threads at each statement of some modules, so that they can be interrupted there.

A statement is named by its function and by how many statements come before it there, not by its
line. Nothing in the code under test is touched: Python calls a trace function for each line.
"""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any


class Statements:
    """The statements of functions, as the modules' source has them."""

    def __init__(self, modules: Iterable[ModuleType]) -> None:
        self._lines: dict[tuple[str, int], dict[int, str]] = {}
        self.functions: set[str] = set()
        """Those that have statements other than their docstring."""
        for module in modules:
            assert module.__file__
            tree = ast.parse(Path(module.__file__).read_text())
            self._visit(tree, module.__file__, module.__name__.rpartition(".")[2])

    def lines(self, code: CodeType) -> dict[int, str] | None:
        """Names of a function's statements by the line that they begin in; ``None``: not ours."""
        return self._lines.get((code.co_filename, code.co_firstlineno))

    def around(self, name: str) -> Statements:
        """Those of the function only that has this one."""
        found = Statements(())
        found._lines = {at: lines for at, lines in self._lines.items() if name in lines.values()}
        return found

    def _visit(self, node: ast.AST, file: str, where: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{where}.{child.name}"
                first = min([child.lineno, *(one.lineno for one in child.decorator_list)])
                lines = self._lines[file, first] = {}
                self._number(child.body, name, lines)
                if lines:
                    self.functions.add(name)
                self._visit(child, file, name)
            elif isinstance(child, ast.ClassDef):
                self._visit(child, file, f"{where}.{child.name}")
            else:
                self._visit(child, file, where)

    def _number(self, body: Iterable[ast.AST], name: str, lines: dict[int, str]) -> None:
        for node in body:
            says = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            own = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            if isinstance(node, ast.stmt) and not says and node.lineno not in lines:
                lines[node.lineno] = f"{name} {len(lines) + 1}"
            if not isinstance(node, own):
                self._number(ast.iter_child_nodes(node), name, lines)


class Tracing:
    """While entered, calls ``reached`` with the name of each statement before it is executed.

    In threads that start meanwhile, and in this one. What ``reached`` raises is raised there.
    """

    def __init__(self, statements: Statements, reached: Callable[[str], None]) -> None:
        self._statements = statements
        self._reached = reached

    def __enter__(self) -> Tracing:
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        lines = self._statements.lines(frame.f_code)
        if lines is None:
            return None

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            name = lines.get(frame.f_lineno) if event == "line" else None
            if name is not None:
                self._reached(name)
            return line

        return line

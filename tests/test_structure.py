"""Functions that fit on a screen, and calls that are clear without the signature at hand."""

import ast
from collections.abc import Iterator
from pathlib import Path

import deepfm_dist

PACKAGE = Path(deepfm_dist.__file__).parent
MAX_LINES = 60
"""Of a function, docstring included."""
MAX_PARAMETERS = 10
MAX_POSITIONAL = 6
"""Arguments of a call that are given without their names."""
MAX_CONFIG_LINES = 300
"""Of config.py, which composes the sections, reads YAML and overrides, and does nothing else."""
EXCEPTIONS = {
    "model.deepfm.build_deepfm": "the parts of the model, each a keyword with a default",
}
"""Functions that may be longer or take more, with the reason."""
COMPILERS = {"compiled", "intrinsic", "jit"}
"""Decorators: numba and Triton compile for arrays and numbers, and inline what is called."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    """Every function inside a node, with its dotted name."""
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, Function | ast.ClassDef):
            name = f"{prefix}.{child.name}"
        if isinstance(child, Function):
            yield name, child
        yield from functions(child, name)


def is_compiled(function: Function) -> bool:
    names = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for decorator in function.decorator_list
        for node in ast.walk(decorator)
        if isinstance(node, ast.Attribute | ast.Name)
    }
    return bool(names & COMPILERS)


def n_parameters(function: Function) -> int:
    actual = function.args
    names = [a.arg for a in (*actual.posonlyargs, *actual.args, *actual.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


TREES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
    if "_bundled" not in path.parts
}
FUNCTIONS = [found for module, tree in TREES.items() for found in functions(tree, module)]
INSIDE = {id(node) for _, f in FUNCTIONS if is_compiled(f) for node in ast.walk(f)}
"""What is compiled."""


def test_functions_are_short_and_take_few_parameters() -> None:
    too_much = {}
    for name, function in FUNCTIONS:
        assert function.end_lineno is not None
        size = function.end_lineno - function.lineno + 1, n_parameters(function)
        if (size[0] > MAX_LINES or size[1] > MAX_PARAMETERS) and id(function) not in INSIDE:
            too_much[name] = f"{size[0]} lines, {size[1]} parameters"
    assert {n: size for n, size in too_much.items() if n not in EXCEPTIONS} == {}
    assert too_much.keys() == EXCEPTIONS.keys()  # an exception that is none any more leaves


def test_calls_name_the_arguments_that_are_many() -> None:
    compiled = {name.rpartition(".")[2] for name, f in FUNCTIONS if is_compiled(f)}
    wrong = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or len(node.args) <= MAX_POSITIONAL:
                continue
            called = ast.unparse(node.func)
            is_log = called.startswith("log.")  # its arguments fill in the text, one by one
            if called.rpartition(".")[2] not in compiled and not is_log and id(node) not in INSIDE:
                wrong.append(f"{module}:{node.lineno} {called}: {len(node.args)} arguments")
    assert wrong == []


def test_the_configuration_only_composes() -> None:
    assert len((PACKAGE / "config.py").read_text().splitlines()) <= MAX_CONFIG_LINES

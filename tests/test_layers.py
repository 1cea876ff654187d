"""The arrows of the design: an import may only point down, heavy packages wait inside the functions that need them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# aecore, from the bottom: base, then data and models side by side, then the jobs (everything that is named in none of these)
BASE = ("_base", "artifact", "errors", "loss", "native", "registry", "store", "threads")
DATA = ("data",)
MODELS = ("mil", "nn", "vanilla", "variational")
MAY_IMPORT = {
    "base": {"base"},
    "data": {"base", "data"},
    "models": {"base", "models"},
    "jobs": {"base", "data", "models", "jobs"},
}
# pipelines, from the bottom; every room is named
LEVEL = {"recipe": 1, "cluster": 2, "steps": 3, "doctor": 3, "flows": 4, "deploy": 5, "cli": 6}
COMMAND_LINE = {"cli"}  # what every `aepipe --help` loads
ORCHESTRATION = {"ray", "prefect", "pydantic"}
ONLY_IN = {"prefect": {"flows", "deploy"}, "ray": {"cluster"}, "pydantic": {"recipe"}}
CODECS = {"imagecodecs", "simplejpeg", "PIL"}
LAZY_IN_AECORE = {"s3fs", "fsspec", "botocore", "webdataset", "pandas", "matplotlib", "sklearn", "scipy"} | CODECS
HEAVY = {"torch", "ray", "prefect", "pyarrow", "pandas", "webdataset", "s3fs", "fastapi"}


@dataclass(frozen=True)
class Import:
    module: str  # who imports
    target: str  # what, dotted
    line: int
    top_level: bool  # runs when the module is imported

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def modules(package: str) -> list[tuple[str, Path]]:
    paths = sorted((ROOT / package).rglob("*.py"))
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path) for path in paths]


def imports(package: str) -> Iterator[Import]:
    for module, path in modules(package):
        tree = ast.parse(path.read_text(), str(path))
        yield from found_in(tree, module, path.name == "__init__.py", True)


def found_in(node: ast.AST, module: str, is_package: bool, top_level: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(module, alias.name, child.lineno, top_level) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parts = module.split(".")
            home = parts[: len(parts) - child.level + is_package] if child.level else []
            source = ".".join([*home, *filter(None, [child.module])])
            yield from (Import(module, f"{source}.{alias.name}", child.lineno, top_level) for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from found_in(child, module, is_package, False)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from found_in(child, module, is_package, top_level and not is_function)


def layer(dotted: str) -> str:
    room = dotted.split(".")[1] if "." in dotted else ""
    for name, rooms in (("base", BASE), ("data", DATA), ("models", MODELS)):
        if room in rooms:
            return name
    return "jobs"


def room(dotted: str) -> str:
    return dotted.split(".")[1] if "." in dotted else ""


def root(dotted: str) -> str:
    return dotted.split(".")[0]


def test_aecore_imports_no_orchestration_and_no_pipelines() -> None:
    assert not [str(i) for i in imports("aecore") if root(i.target) in ORCHESTRATION | {"pipelines", "tests"}]


def test_names_are_suggested_in_one_place() -> None:
    assert {i.module for package in ("aecore", "pipelines") for i in imports(package) if root(i.target) == "difflib"} == {"aecore.errors"}


def test_the_kind_of_training_data_is_chosen_in_one_place() -> None:
    """Besides the specs' own checks (`InputSpec`, `require_streamable`) only `Session` asks whether tars are streamed."""
    trees = [(module, ast.parse(path.read_text())) for package in ("aecore", "pipelines") for module, path in modules(package)]
    asking = [module for module, tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "streams"]
    assert [module for module in asking if module != "aecore.data.read.loader"] == ["aecore.training.job", "aecore.training.session"]


def test_imports_in_aecore_point_down() -> None:
    ours = [i for i in imports("aecore") if root(i.target) == "aecore" and i.module != "aecore"]
    assert ours, "no imports found: is the package where this test looks?"
    assert not [str(i) for i in ours if layer(i.target) not in MAY_IMPORT[layer(i.module)]]


@pytest.mark.parametrize("package", ["aecore", "pipelines"])
def test_no_module_imports_itself_through_others_not_even_inside_a_function(package: str) -> None:
    known = {name for name, _ in modules(package)}
    arrows: dict[str, set[str]] = {name: set() for name in known}
    for found in imports(package):
        target = found.target if found.target in known else found.target.rpartition(".")[0]
        if target in known and target not in (package, found.module):
            arrows[found.module].add(target)
    assert any(arrows.values()), "no imports found: is the package where this test looks?"
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_rooms_are_few_and_tied_by_few_imports_without_a_circle() -> None:
    """A room is a folder or a loose module directly below `aecore`; `pipelines` is one, `infra` (which nobody imports) another."""
    arrows: dict[tuple[str, str], str] = {}
    for found in (*imports("aecore"), *imports("pipelines")):
        ends = [room(name) if root(name) == "aecore" else root(name) for name in (found.module, found.target)]
        if root(found.target) in ("aecore", "pipelines") and all(ends) and ends[0] != ends[1]:
            arrows.setdefault((ends[0], ends[1]), str(found))
    rooms = {end for arrow in arrows for end in arrow}
    assert {"data", "training", "pipelines"} <= rooms
    assert len(rooms) + 1 <= 24, sorted(rooms)
    assert len(arrows) <= 120
    graph: dict[str, set[str]] = {}
    for importer, imported in arrows:
        graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = error.args[1]
        raise AssertionError([arrows[pair] for pair in zip(cycle[1:], cycle, strict=False)]) from None


def test_optional_and_slow_packages_are_imported_inside_functions_of_aecore() -> None:
    assert not [str(i) for i in imports("aecore") if i.top_level and root(i.target) in LAZY_IN_AECORE]


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_orchestration_package_is_imported_only_in_its_room(package: str) -> None:
    assert not [str(i) for i in imports("pipelines") if root(i.target) == package and room(i.module) not in ONLY_IN[package]]


def test_imports_in_pipelines_point_down() -> None:
    ours = [i for i in imports("pipelines") if root(i.target) == "pipelines" and i.module != "pipelines"]
    assert ours, "no imports found: is the package where this test looks?"
    assert not [str(i) for i in ours if LEVEL.get(room(i.target), 3) > LEVEL.get(room(i.module), 3)]


def test_command_line_imports_nothing_heavy_at_its_top() -> None:
    assert not [str(i) for i in imports("pipelines") if room(i.module) in COMMAND_LINE and i.top_level and root(i.target) in HEAVY]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_of_aecore_imports_where_orchestration_and_optional_packages_are_missing() -> None:
    names = [name for name, _ in modules("aecore")]
    blocked = sorted(ORCHESTRATION | LAZY_IN_AECORE)
    out = python(
        "import importlib, sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked!r}: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print('all imported')\n"
    )
    assert out.strip() == "all imported"


def test_help_of_the_command_line_loads_nothing_heavy() -> None:
    out = python(
        "import sys\n"
        "sys.argv = ['aepipe', '--help']\n"
        "from pipelines.cli.main import main\n"
        "try: status = main()\n"
        "except SystemExit as end: status = end.code\n"
        f"print(status or 0, sorted(set({sorted(HEAVY)!r}) & set(sys.modules)))\n"
    )
    assert out.splitlines()[-1] == "0 []"

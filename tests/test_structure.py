"""What keeps the code readable: layers of folders, docstrings, and nothing out of its place."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

# The layers. A room (a folder of minmacpo, the programs, or a folder of bench) may import itself,
# the rooms beside its name, and `minmacpo` for UserError; never one that is not listed.
MAY_IMPORT = {
    "config": [],
    "runtime": [],
    "kernels": ["runtime"],
    "data": ["config", "runtime"],
    "core": ["kernels", "data", "runtime"],
    "pipeline": ["core", "kernels", "data", "config", "runtime"],
    "method": ["pipeline", "core", "data", "config", "runtime"],
    "cli": ["method", "pipeline", "core", "kernels", "data", "config", "runtime"],
    "evaluation": ["method", "pipeline", "core", "kernels", "data", "config", "runtime"],
    "programs": ["cli", "evaluation", "method", "pipeline", "core", "data", "config", "runtime"],
    "bench": [
        "cli", "evaluation", "method", "pipeline", "core", "kernels", "data", "config", "runtime",
    ],
}  # fmt: skip

# Imports against the table that are still to be mended: (importing module, what it imports).
KNOWN: set[tuple[str, str]] = set()

PROGRAMS = ["train", "sample", "eval"]
THIRD_PARTY = {"torch", "safetensors", "sentencepiece", "numpy", "tqdm"}
# Imported where they are used, by one module.
OPTIONAL = {
    "tokenizers": "data.tokenizer_json",
    "pyarrow": "data.parquet",
    "huggingface_hub": "runtime.hub",
    "jinja2": "data.own_template",
}
NETWORK = {"urllib", "http", "socket", "requests", "ssl", "ftplib"}
PICKLES = {"pickle", "marshal", "shelve", "dill"}
CODE_FROM_DATA = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system",
}  # fmt: skip


def find_modules() -> dict[str, Path]:
    """{dotted name without "minmacpo.": file} of the library, the programs and bench."""
    modules = {}
    for program in PROGRAMS:
        modules[program] = REPO / f"{program}.py"
    for file in sorted((REPO / "minmacpo").rglob("*.py")):
        parts = file.relative_to(REPO / "minmacpo").with_suffix("").parts
        modules[".".join(parts)] = file
    for file in sorted((REPO / "bench").rglob("*.py")):
        parts = file.relative_to(REPO).with_suffix("").parts
        modules[".".join(parts)] = file
    return modules


FILES = find_modules()
TREES = {name: ast.parse(file.read_text(), str(file)) for name, file in FILES.items()}
LIBRARY = [name for name in FILES if not name.startswith("bench.")]


def room_of(name: str) -> str:
    """The room of a module: "core" of "core.model", "programs" of "train", "" of __init__."""
    if name in PROGRAMS:
        return "programs"
    if "." not in name:
        return ""
    return name.split(".")[0]


def imported_names(name: str, for_types: bool = True) -> set[str]:
    """Dotted names of everything that a module imports, also inside functions.

    Args:
        for_types: count what is imported under `if TYPE_CHECKING:` too.
    """
    skipped = set()
    names = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            skipped |= set(ast.walk(node))
        elif node in skipped:
            continue
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(dotted: str) -> str | None:
    """The module of this project that an imported name lies in, None for one of another package."""
    package = dotted.split(".")[0]
    if package not in ("minmacpo", "bench", *PROGRAMS):
        return None
    name = dotted.removeprefix("minmacpo.")
    while name:
        if name in FILES:
            return name
        if f"{name}.__init__" in FILES:
            return f"{name}.__init__"
        name = name.rpartition(".")[0]
    return "__init__"


def project_imports(name: str, for_types: bool = True) -> set[str]:
    """Modules of this project that a module imports, without the package that holds UserError."""
    modules = {module_of(dotted) for dotted in imported_names(name, for_types)}
    return modules - {None, "__init__"}


def foreign_packages(name: str) -> set[str]:
    """Packages that a module imports from outside the standard library and this project."""
    packages = {dotted.split(".")[0] for dotted in imported_names(name)}
    return packages - {"minmacpo", "bench", *PROGRAMS} - set(sys.stdlib_module_names)


def users_of(package: str) -> set[str]:
    """The modules of the library that import a package."""
    return {name for name in LIBRARY if package in foreign_packages(name)}


def public_functions(name: str) -> list[tuple[str, ast.FunctionDef]]:
    """("module.Class.name", node) of functions and methods that are not nested in a function."""
    functions = []
    for node in TREES[name].body:
        if isinstance(node, ast.FunctionDef):
            functions.append((f"{name}.{node.name}", node))
        elif isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.FunctionDef):
                    functions.append((f"{name}.{node.name}.{child.name}", child))
    return [(label, node) for label, node in functions if not node.name.startswith("_")]


def run_python(code: str) -> str:
    """What a fresh Python prints for `code`; it must succeed."""
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


# ---- layers ---------------------------------------------------------------------------------


def violations() -> set[tuple[str, str]]:
    """Every import that the table does not allow, and tensors in the algorithm."""
    forbidden = set()
    for name in FILES:
        if room_of(name) == "method":
            # The algorithm speaks of agents, files and stages, never of tensors
            forbidden |= {(name, package) for package in foreign_packages(name)}
        allowed = {room_of(name), *MAY_IMPORT.get(room_of(name), [])}
        for other in project_imports(name):
            if room_of(other) not in allowed:
                forbidden.add((name, other))
    return forbidden


def test_every_room_is_in_the_table():
    rooms = {room_of(name) for name in FILES} - {""}

    assert rooms == set(MAY_IMPORT), "put a new folder into this file's table"


def test_imports_go_down_only():
    assert not sorted(violations() - KNOWN)


def test_what_has_been_mended_is_no_longer_listed():
    assert not sorted(KNOWN - violations())


def test_there_is_no_circle_of_imports():
    # Annotations may name each other: a run and the stage that it hands out
    unfinished = {name: project_imports(name, for_types=False) - {name} for name in FILES}

    # Take away what imports nothing that is left, until nothing can be taken away
    while unfinished:
        free = [name for name, others in unfinished.items() if not others & unfinished.keys()]
        assert free, f"these modules import each other in a circle: {sorted(unfinished)}"
        for name in free:
            del unfinished[name]


def test_data_knows_settings_only_where_it_makes_a_world():
    users = {name for name in FILES if "config.schema" in project_imports(name)}

    assert {name for name in users if room_of(name) == "data"} <= {"data.synthetic"}


def test_what_trains_does_not_know_the_rules_of_the_synthetic_world():
    users = {name for name in LIBRARY if "data.synthetic" in project_imports(name)}
    learners = [name for name in users if room_of(name) in ("method", "core", "kernels")]

    assert not learners
    assert {name for name in users if room_of(name) == "pipeline"} <= {"pipeline.prepare_data"}


# ---- other packages -------------------------------------------------------------------------


def test_third_party_imports_are_the_five():
    used = set()
    for name in LIBRARY:
        used |= foreign_packages(name) - OPTIONAL.keys()
    requirements = (REPO / "requirements.txt").read_text().split()

    assert used <= THIRD_PARTY
    assert {line.split("=")[0] for line in requirements} == THIRD_PARTY


def test_optional_packages_are_imported_by_one_module_within_a_function():
    for package, home in OPTIONAL.items():
        assert users_of(package) == {home}
        code = f"import sys, minmacpo.{home}; print({package!r} in sys.modules)"
        assert run_python(code).strip() == "False"


def test_libraries_have_one_home():
    assert users_of("sentencepiece") == {"data.sentencepieces"}
    assert users_of("safetensors") == {"core.checkpoint"}

    for name in LIBRARY:
        if name != "runtime.distributed":
            assert "torch.distributed" not in FILES[name].read_text(), name
            assert "torch.distributed" not in imported_names(name), name


def test_the_network_has_one_home():
    for name in LIBRARY:
        packages = {dotted.split(".")[0] for dotted in imported_names(name)}
        if name != "evaluation.remote_judge":
            assert not packages & NETWORK, name


def test_the_model_and_its_losses_need_nothing_but_torch():
    for name in ("core.model", "core.losses", "core.lora"):
        assert foreign_packages(name) == {"torch"}, name


def test_settings_and_data_need_no_torch():
    names = [name for name in FILES if room_of(name) in ("config", "data")]
    code = "import sys\n"
    for name in names:
        code += f"import minmacpo.{name.removesuffix('.__init__')}\n"
    code += "print('torch' in sys.modules)"

    assert run_python(code).strip() == "False"


def test_settings_and_the_world_need_no_package_at_all():
    for name in FILES:
        if room_of(name) in ("config", "data") and name != "data.sentencepieces":
            assert not foreign_packages(name) - OPTIONAL.keys(), name


def test_help_needs_no_torch():
    """`--help` answers at once: it may not wait for torch."""
    code = "import sys, train; train.main(['--help']); assert 'torch' not in sys.modules"

    assert "--run.root" in run_python(code)


# ---- manners --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("__init__")])
def test_every_module_says_what_it_is(name):
    assert ast.get_docstring(TREES[name])


def test_public_functions_say_what_they_do():
    silent = []
    for name in LIBRARY:
        for label, node in public_functions(name):
            lines = node.end_lineno - node.lineno + 1
            if lines > 10 and not ast.get_docstring(node):
                silent.append(label)

    assert not silent


def test_no_path_of_somebodys_machine():
    pattern = re.compile(r"""["']/(work|tmp|home|root|usr)/""")
    texts = [*FILES.values(), *(REPO / ".ci").glob("*"), *REPO.rglob("minmacpo/**/*.toml")]
    texts += (REPO / "bench").rglob("*.toml")

    assert not [file for file in texts if pattern.search(file.read_text())]


@pytest.mark.parametrize("name", LIBRARY)
def test_no_pickle_and_no_code_from_data(name):
    packages = {dotted.split(".")[0] for dotted in imported_names(name)}
    assert not packages & PICKLES

    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in CODE_FROM_DATA, f"line {node.lineno}"
            assert "shell" not in [keyword.arg for keyword in node.keywords], f"line {node.lineno}"


def is_definition(node: ast.stmt, name: str) -> bool:
    """Whether a statement of a module's top level defines something, rather than doing it."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    if isinstance(node, kinds):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)  # a docstring
    if isinstance(node, ast.If):
        guards = ("__name__ == '__main__'", "TYPE_CHECKING")
        # the check of Python's version in minmacpo/__init__.py is the one exception
        return ast.unparse(node.test) in guards or name == "__init__"
    return False


@pytest.mark.parametrize("name", LIBRARY)
def test_nothing_happens_at_import(name):
    for node in TREES[name].body:
        assert is_definition(node, name), f"line {node.lineno}"
    for node in ast.walk(TREES[name]):
        assert not isinstance(node, ast.Global), f"line {node.lineno}"


def test_no_environment_variable_is_read():
    """But for a judge's key, torchrun's own, limits of libraries, and a worker's number."""
    homes = {
        "evaluation.remote_judge",
        "pipeline.scheduler",
        "runtime.distributed",
        "runtime.device",
    }
    for name in LIBRARY:
        if name in homes:
            continue
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("environ", "getenv"), f"{name}, line {node.lineno}"

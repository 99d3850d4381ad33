"""What keeps the code readable: floors, sizes, docstrings, and nothing that reaches out of its place."""

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

PACKAGE = REPO / "minmacpo"
FLOORS = [
    {"config", "data", "domains", "families", "heap", "patterns", "progress"},
    {
        "bpe",
        "forms",
        "diversity",
        "world",
        "commandline",
        "files",
        "machine",
        "model",
        "lora",
        "losses",
        "quant",
        "page",
    },
    {"tokenizer", "tables", "tensors", "remote", "packed", "parallel", "folder"},
    {"run", "checkpoint", "batching", "monitor", "templates", "memory"},
    {"fit", "generate", "score"},
    {"bases"},
    {"workshop"},
    {"choose", "answers", "chat", "likelihood"},
    {"stages", "feedback"},
    {"pairing"},
    {"macpo"},
    {"methods"},
    {"evaluate"},
    {"report", "experiments", "compare", "judge", "reward", "plan"},
    {"dryrun"},
    {"train", "sample", "eval"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
PROGRAMS = FLOORS[-1]
THIRD_PARTY = {"torch", "safetensors", "sentencepiece", "numpy", "tqdm"}
WITHOUT_TORCH = [
    "heap",
    "config",
    "data",
    "forms",
    "families",
    "domains",
    "bpe",
    "patterns",
    "world",
    "commandline",
    "diversity",
]
TREES = {
    file.stem: ast.parse(file.read_text(), str(file))
    for file in sorted([*PACKAGE.glob("*.py"), *REPO.glob("*.py")])
    if file.stem != "__init__"
}
TREES["__init__"] = ast.parse((PACKAGE / "__init__.py").read_text())


def path_of(name: str) -> Path:
    return REPO / f"{name}.py" if name in PROGRAMS else PACKAGE / f"{name}.py"


def imported(name: str) -> set[str]:
    """Dotted names of everything that a module imports, also inside functions."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(name: str) -> set[str]:
    """Modules of this project that a module imports."""
    found = {dotted.split(".")[1] for dotted in imported(name) if dotted.startswith("minmacpo.")}
    return {part for part in found if (PACKAGE / f"{part}.py").exists()}


def foreign(name: str) -> set[str]:
    """Packages that a module imports from outside the standard library and this project."""
    return (
        {dotted.split(".")[0] for dotted in imported(name)}
        - {"minmacpo"}
        - set(sys.stdlib_module_names)
    )


def functions() -> list[tuple[str, ast.FunctionDef, bool]]:
    """("module.name", node, whether it is nested in another function) of every function."""
    found = []

    def walk(node, label, nested):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((f"{label}.{child.name}", child, nested))
                walk(child, f"{label}.{child.name}", True)
            else:
                walk(
                    child,
                    f"{label}.{child.name}" if isinstance(child, ast.ClassDef) else label,
                    nested,
                )

    for name, tree in TREES.items():
        walk(tree, name, False)
    return found


def length(node) -> int:
    return node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1


# ---- floors ---------------------------------------------------------------------------------


def test_every_module_has_a_floor():
    assert set(TREES) - {"__init__"} == set(FLOOR), (
        "put new modules on a floor of this file's table"
    )


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_imports_go_down_only(name):
    for other in own(name):
        assert FLOOR[other] < FLOOR[name], (
            f"{name} (floor {FLOOR[name]}) imports {other} (floor {FLOOR[other]})"
        )


def test_nobody_imports_a_program():
    for name in TREES:
        assert not PROGRAMS & {dotted.split(".")[0] for dotted in imported(name)}, name


def test_only_evaluation_and_programs_know_the_world():
    assert {name for name in TREES if "world" in own(name)} <= {"evaluate", *PROGRAMS}
    for name in ("evaluate", "report"):  # and nothing that trains may reach it through them
        assert all(
            FLOOR[user] > FLOOR[name] for user in TREES if user in FLOOR and name in own(user)
        )


def test_libraries_have_one_home():
    assert {name for name in TREES if "sentencepiece" in foreign(name)} == {"tokenizer"}
    assert {name for name in TREES if "safetensors" in foreign(name)} == {"tensors"}
    assert {name for name in TREES if "distributed" in path_of(name).read_text()} <= {"parallel"}
    network = {"urllib", "http", "socket", "requests", "ssl", "ftplib"}
    assert not [
        name
        for name in TREES
        if name != "remote" and network & {d.split(".")[0] for d in imported(name)}
    ]


def test_third_party_imports_are_the_five():
    assert {package for name in TREES for package in foreign(name)} <= THIRD_PARTY
    stated = {
        line.split("=")[0] for line in (REPO / "requirements.txt").read_text().split() if line
    }
    assert stated == THIRD_PARTY


def test_model_losses_and_lora_import_torch_and_their_settings_only():
    for name in ("model", "losses", "lora"):
        assert own(name) <= {"config", "families"} and foreign(name) == {"torch"}, name


def test_the_algorithm_moves_no_tensor():
    assert not foreign("macpo") | foreign("methods") | foreign("feedback") | foreign("monitor"), (
        "they speak of agents, files and stages"
    )


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_the_ground_floor_needs_no_torch(name):
    assert not foreign(name), name
    code = f"import sys, minmacpo.{name}; print(*({{'torch', 'numpy', 'sentencepiece', 'safetensors'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert not done.stdout.strip()


def test_help_needs_no_torch():
    """`--help` answers at once: it may not wait for torch."""
    code = "import sys; sys.argv = ['train.py', '--help']; import train; train.main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, check=True)


# ---- sizes ----------------------------------------------------------------------------------


def test_functions_are_short():
    lengths = {label: length(node) for label, node, _ in functions()}
    assert not {label: n for label, n in lengths.items() if n > 60}
    ordered = sorted(lengths.values())
    assert len(ordered) > 150 and statistics.median(ordered) <= 12
    assert ordered[int(0.9 * len(ordered))] <= 30


def test_files_are_short():
    assert not {
        name: n for name in TREES if (n := len(path_of(name).read_text().splitlines())) > 350
    }


def code_lines(name: str) -> int:
    """JsonlView of a module that are neither blank nor docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    documented = [
        n.body[0]
        for n in ast.walk(TREES[name])
        if isinstance(n, kinds) and ast.get_docstring(n) is not None
    ]
    written = sum(bool(line.strip()) for line in path_of(name).read_text().splitlines())
    text = path_of(name).read_text().splitlines()
    inside = {line for node in documented for line in range(node.lineno, node.end_lineno + 1)}
    return written - sum(bool(text[line - 1].strip()) for line in inside)


def test_the_library_is_small():
    """7,200 lines of code; docstrings and blank lines do not count, so that nobody saves on them."""
    assert sum(code_lines(name) for name in TREES if name not in PROGRAMS) <= 7200


def test_the_programs_are_small():
    lengths = {name: len(path_of(name).read_text().splitlines()) for name in PROGRAMS & set(TREES)}
    assert sum(lengths.values()) <= 300 and not {name: n for name, n in lengths.items() if n >= 100}


# ---- manners --------------------------------------------------------------------------------


def test_every_module_says_what_it_is():
    assert not [name for name, tree in TREES.items() if not ast.get_docstring(tree)]


def test_public_functions_say_what_they_do():
    silent = [
        label
        for label, node, nested in functions()
        if not nested
        and not node.name.startswith("_")
        and length(node) > 6
        and not ast.get_docstring(node)
    ]
    assert not silent


def test_no_path_of_somebodys_machine():
    pattern = re.compile(r"""["']/(work|tmp|home|root|usr)/""")
    files = [
        *map(path_of, TREES),
        *REPO.glob("bench/*"),
        *PACKAGE.glob("presets/*"),
        *REPO.glob(".ci/*"),
    ]
    assert not [file.name for file in files if file.is_file() and pattern.search(file.read_text())]


def test_no_pickle_and_no_code_from_data():
    for name, tree in TREES.items():
        assert not {"pickle", "marshal", "shelve", "dill"} & {
            dotted.split(".")[0] for dotted in imported(name)
        }, name
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in (
                    "eval",
                    "exec",
                    "torch.load",
                    "torch.save",
                    "compile",
                    "__import__",
                    "os.system",
                ), name
                assert not any(k.arg == "shell" for k in node.keywords), name


def test_nothing_happens_at_import():
    """Modules define things; state and work live in functions (the version check is the one exception)."""
    harmless = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    for name, tree in TREES.items():
        for node in tree.body:
            guard = isinstance(node, ast.If) and (
                name == "__init__" or ast.unparse(node.test) == "__name__ == '__main__'"
            )
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert isinstance(node, harmless) or guard or text, f"{name}, line {node.lineno}"
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.Global)], name


def test_no_environment_variable_is_read():
    """But for the key of a judge, torchrun's own, and limits of libraries and of malloc, which have no other way in."""
    for name, tree in (
        (name, tree)
        for name, tree in TREES.items()
        if name not in ("remote", "parallel", "machine", "heap")
    ):
        assert not [
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")
        ], name

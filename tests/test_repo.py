"""The repository itself: imports point one way, public functions have docstrings, the README's commands are real."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import generate
import train

HERE = Path(__file__).parent.parent
ROOMS = ("", "support/", "evaluate/", "interop/", "tools/")
FILES = {f"{room}{p.stem}".replace("/", "."): p for room in ROOMS for p in sorted((HERE / room).glob("*.py"))}


def imports(name: str) -> set:
    """Product files that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found & FILES.keys()


def test_imports_point_one_way():
    """No file reaches itself by following imports, at the top of files and inside functions; nothing needs a tool."""
    graph = {name: imports(name) for name in FILES}
    for name, needs in graph.items():
        tools = {n for n in needs if n.startswith("tools.")}
        assert not tools or name.startswith("tools.") or tools == {"support.serve"}, name
    done = set()
    while graph:
        free = {n for n, needs in graph.items() if needs <= done}
        assert free, f"a circle among {sorted(graph)}"
        done |= free
        graph = {n: needs for n, needs in graph.items() if n not in free}


@pytest.mark.parametrize("name", FILES)
def test_public_functions_have_docstrings(name):
    tree = ast.parse(FILES[name].read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node), f"{name}.{node.name}"


@pytest.mark.parametrize("name", FILES)
def test_lines_fit_and_paths_stay_home(name):
    for i, line in enumerate(FILES[name].read_text().splitlines(), 1):
        assert len(line) <= 140, f"{name}.py:{i}"
        assert "/work/" not in line and "/tmp/" not in line, f"{name}.py:{i}"


PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]


def readme_commands() -> list:
    """The commands of the README and of docs/."""
    blocks = re.findall(r"```bash\n(.*?)```", "".join(p.read_text() for p in PAGES), re.S)
    joined = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in joined if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("command", [c for c in readme_commands() if "train.py" in c])
def test_training_commands_of_the_readme_parse(command):
    """Every flag in the README exists and its value is allowed."""
    world = int(m.group(1)) if (m := re.search(r"--nproc_per_node=(\d+)", command)) else 1
    args = train.build_parser().parse_args(shlex.split(command.split("train.py", 1)[1]))
    args.device = args.device or "cpu"
    train.fill_flags(args, world)
    train.check_flags(args, world)


def test_docs_name_every_flag_that_exists_and_no_other():
    text = (HERE / "docs" / "flags.md").read_text()
    table = set(re.findall(r"^\| `--(\w+)`", text, re.M))
    flags = {a.dest for a in train.build_parser()._actions if a.dest != "help"}
    assert table == flags, f"missing {sorted(flags - table)}, gone {sorted(table - flags)}"


def test_generating_commands_of_the_readme_parse(capsys):
    """They fail for want of a run, not of a flag."""
    commands = [c for c in readme_commands() if "generate.py" in c]
    assert commands
    for command in commands:
        argv = shlex.split(command.split("generate.py", 1)[1])
        argv[argv.index("--model" if "--model" in argv else "--run") + 1] = "missing_run"
        if "--prompts" in argv:
            continue                                                 # read before the run is
        assert generate.main(argv) == 2
        error = capsys.readouterr().err
        assert "no best.pt" in error or "--serve" in argv and "needs the gradio package" in error


def test_the_readme_is_short():
    assert len((HERE / "README.md").read_text().splitlines()) <= 250

"""The repository itself: layout, names and imports; README and docs/ name commands and flags that exist."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import generate
import train
from support.flag import NOT_SAID
from support.flags import flags_by_name

HERE = Path(__file__).parent.parent
# in reading order
TOP = ("patterns", "model", "conditioning", "tokenizer", "toy", "data", "generate", "train")
ROOMS = ("support", "evaluate", "interop", "tools")
FILES = {p.stem: p for p in sorted(HERE.glob("*.py"))}
FILES |= {f"{room}.{p.stem}": p for room in ROOMS for p in sorted((HERE / room).glob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
TESTS = sorted((HERE / "tests").glob("*.py"))
MOST_LINES = 620                               # of a file
# methods that PyTorch and Python name
UNNAMED = ("forward", "backward", "find_spec", "create_module", "exec_module")


def line_count(path: Path) -> int:
    """Lines of a file."""
    return len(path.read_text().splitlines())


def imports(name: str) -> set:
    """Product files that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found & FILES.keys()


def test_eight_scripts_at_the_top():
    assert sorted(p.stem for p in HERE.glob("*.py")) == sorted(TOP)
    assert sum(line_count(FILES[name]) for name in TOP) <= 3_300


def test_the_eight_are_not_written_densely(tmp_path):
    """As ruff would set them they are hardly longer."""
    pytest.importorskip("ruff")
    for name in TOP:
        (tmp_path / f"{name}.py").write_text(FILES[name].read_text())
    command = [sys.executable, "-m", "ruff", "format", "-q", "--line-length", "110", str(tmp_path)]
    subprocess.run(command, check=True)
    assert sum(map(line_count, tmp_path.glob("*.py"))) <= 3_700


@pytest.mark.parametrize("path", [*FILES.values(), *TESTS], ids=lambda p: p.stem)
def test_files_and_lines_are_short(path):
    assert line_count(path) <= MOST_LINES
    for i, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 110, f"{path.name}:{i}"


@pytest.mark.parametrize("name", FILES)
def test_paths_stay_home(name):
    for i, line in enumerate(FILES[name].read_text().splitlines(), 1):
        assert "/work/" not in line and "/tmp/" not in line, f"{name}:{i}"


def test_imports_point_one_way():
    """No file reaches itself by following imports, at the top of files and inside functions."""
    graph = {name: imports(name) for name in FILES}
    while graph:
        free = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}


def test_rooms_keep_to_themselves():
    """Nothing needs a tool; nothing but tools needs train.py; a script needs none that is read after it."""
    for name in FILES:
        needs = imports(name)
        if not name.startswith("tools."):
            assert not [n for n in needs if n.startswith("tools.")], name
            assert "train" not in needs, name
        if name in TOP:
            later = set(TOP[TOP.index(name) + 1:]) - ({"toy"} if name == "conditioning" else set())
            assert not needs & later, name


@pytest.mark.parametrize("name", [n for n in FILES if not n.startswith("interop.")])
def test_foreign_formats_stay_in_their_room(name):
    """No other file reads or writes what Hugging Face and audiocraft keep."""
    text = FILES[name].read_text()
    assert not re.findall(r"safetensors|state_dict\.bin|xp\.cfg|spiece\.model", text), name


@pytest.mark.parametrize("name", [n for n in FILES if n.split(".")[0] not in ("conditioning", "interop")])
def test_no_condition_is_named_but_in_its_own_file(name):
    """What loops over the conditions finds them: it would do the same with another one."""
    own = {"support.melody", "support.style", "support.chroma"}
    constants = {node.value for node in ast.walk(TREES[name]) if isinstance(node, ast.Constant)}
    assert name in own or not constants & {"melody", "style"}


@pytest.mark.parametrize("name", FILES)
def test_public_definitions_have_docstrings(name):
    assert ast.get_docstring(TREES[name]), name
    for node in TREES[name].body:
        methods = node.body if isinstance(node, ast.ClassDef) else []
        for part in (node, *methods):
            if isinstance(part, (ast.FunctionDef, ast.ClassDef)):
                known = part.name in UNNAMED or part.name.startswith("_") or part.name == "main"
                assert known or ast.get_docstring(part), f"{name}.{part.name}"


def test_a_name_stands_for_one_thing():
    """No two public functions, classes or constants of one name, in whichever files."""
    names = Counter()
    for tree in TREES.values():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names[node.name] += 1
            elif isinstance(node, ast.Assign):
                names.update(t.id for t in node.targets if isinstance(t, ast.Name))
    twice = [name for name, times in names.items() if times > 1]
    assert not [name for name in twice if name != "main" and not name.startswith("_")]


def test_a_new_flag_says_what_runs_had_before():
    """A flag that changes numbers and that the oldest run folder does not know says what that run had."""
    known = torch.load(HERE / "tests" / "old_run" / "best.pt", weights_only=True)["args"]
    new = [flag for name, flag in flags_by_name().items() if name not in known and not flag.may_change]
    assert not [flag.name for flag in new if flag.before is NOT_SAID]


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("tools.") and n != "tools.peers"])
def test_tools_explain_themselves(name, capsys):
    with pytest.raises(SystemExit) as error:
        importlib.import_module(name).main(["--help"])
    assert error.value.code == 0 and "usage" in capsys.readouterr().out


PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]


def readme_commands() -> list:
    """The commands of the README and of docs/."""
    blocks = re.findall(r"```bash\n(.*?)```", "".join(p.read_text() for p in PAGES), re.S)
    joined = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in joined if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("command", [c for c in readme_commands() if "train.py" in c])
def test_training_commands_of_the_readme_parse(command, monkeypatch):
    """Every flag in the README exists and its value is allowed."""
    monkeypatch.setattr(train.load, "read_model", lambda name: None)           # no --init_from is here
    world = int(m.group(1)) if (m := re.search(r"--nproc_per_node=(\d+)", command)) else 1
    args = train.build_parser().parse_args(shlex.split(command.split("train.py", 1)[1]))
    args.device = args.device or "cpu"
    train.fill_flags(args, world)
    train.check_flags(args, world)


def test_docs_have_every_flag(capsys):
    """docs/flags.md is what the command writes."""
    importlib.import_module("tools.write_flags").main([])
    assert (HERE / "docs" / "flags.md").read_text() == capsys.readouterr().out


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


def test_the_readme_knows_the_eight():
    """Each with about as many lines as it has."""
    rows = re.findall(r"^\| `(\w+)\.py` \| (\d+) \|", (HERE / "README.md").read_text(), re.M)
    assert sorted(name for name, _ in rows) == sorted(TOP)
    for name, lines in rows:
        assert abs(line_count(FILES[name]) - int(lines)) <= 20, name


def test_the_readme_leads_from_the_paper_to_code_that_exists():
    text = (HERE / "README.md").read_text()
    table = text[text.index("| paper | code |"):].split("\n\n")[0]
    names = re.findall(r"`([\w.]+)`", table)
    assert len(names) > 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_docs_lead_somewhere(page):
    """To a file, and to a heading by the name that GitHub gives it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if target.startswith("http"):
            continue
        found = page.parent / path if path else page
        assert found.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.M)
            assert heading in [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles], target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_the_docs_name_are_there(page):
    for name in re.findall(r"`((?:\w+/)+\w+\.\w+)`", page.read_text()):
        if name.split("/")[0] in (*ROOMS, "tests", "assets", "docs"):
            assert (HERE / name).exists(), name

"""Words and numbers agree with code: equations, names, links, flags, ceilings, README's figures.

Each check is a function that returns its findings; it must find nothing here, and must find the
fault that its test plants (the negative control). In results/README.md a number that comes from a
run is followed by <!-- FILE:PATH -->, the stem of a results/*.json and the dotted path of the value
in it; README.md and theory.md are clean, and MEASURED below lists their sentences and paths.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CEILINGS = {"spac.py": 240, "toy_bandit.py": 780, "train_mistral.py": 900}
CEILINGS |= {"theory.md": 1000, "README.md": 160}
MODULES = ["spac", "toy_bandit", "train_mistral"]
THEORY = (ROOT / "theory.md").read_text(encoding="utf-8")
README = ROOT / "README.md"
PAGE = ROOT / "results/README.md"


@pytest.fixture
def readme() -> str:
    if not README.exists():
        pytest.skip("README.md is not written yet")
    return README.read_text(encoding="utf-8")


def project_files() -> list[Path]:
    """What git holds or would hold; without git, everything but caches and outputs."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        names = done.stdout.splitlines() if done.returncode == 0 else []
    except FileNotFoundError:
        names = []
    if names:
        return [ROOT / name for name in names if (ROOT / name).is_file()]
    skipped = {".git", "out", "__pycache__", ".venv", ".pytest_cache", ".ruff_cache"}
    found = (p for p in ROOT.rglob("*") if p.is_file())
    return [p for p in found if not skipped & set(p.relative_to(ROOT).parts)]


PYTHON_FILES = [path for path in project_files() if path.suffix == ".py"]


@pytest.fixture
def page() -> str:
    """What was measured: all claims, and how to read a log."""
    return PAGE.read_text(encoding="utf-8")


# -------------------------------------------------------- equations


def headings() -> dict[int, str]:
    """{N: the section below "### Eq. N - name"}, up to the next heading."""
    parts = re.split(r"^(#{2,3} .*)$", THEORY, flags=re.M)
    titled = zip(parts[1::2], parts[2::2])
    found = [(re.match(r"### Eq\. (\d+) - \S", title), body) for title, body in titled]
    numbers = [int(match[1]) for match, _ in found if match]
    assert len(numbers) == len(set(numbers)), "an equation number is used twice"
    return {int(match[1]): body for match, body in found if match}


def cited_equations(text: str) -> set[int]:
    """Numbers in "Eq. 4", "Eq. 4, 7", "Eq. 2 and 3", "Eq. 28 to 31"."""
    numbers = set()
    for match in re.finditer(r"\bEqs?\.\s+(\d+(?:(?:,|\s+and|\s+to|\s+or)\s+\d+)*)", text):
        numbers |= {int(number) for number in re.findall(r"\d+", match[1])}
        for low, high in re.findall(r"(\d+)\s+to\s+(\d+)", match[1]):
            numbers |= set(range(int(low), int(high)))
    return numbers


def test_equation_headings_are_numbered_without_gaps():
    """Part I tells them in another order than the proofs; each number stands once."""
    assert sorted(headings()) == list(range(1, len(headings()) + 1)) and len(headings()) >= 45
    assert re.findall(r"^###? Eq\. .*", THEORY, re.M) == [
        line for line in THEORY.splitlines() if re.match(r"### Eq\. \d+ - \S", line)
    ]


def test_the_story_is_short_and_comes_before_the_proofs():
    """Part I within 350 lines; what it states as equations, it proves or defines itself."""

    def lengths(text):
        parts = re.split(r"^(# Part I+ - .*)$", text, flags=re.M)
        return {title: body.count("\n") for title, body in zip(parts[1::2], parts[2::2])}

    (story, first), (proofs, rest) = lengths(THEORY).items()
    assert story.startswith("# Part I ") and proofs.startswith("# Part II ")
    assert first <= 350 and rest > first
    planted = "# Part I - a\nx\n# Part II - b\n" + "y\n" * 400
    assert list(lengths(planted).values()) == [2, 401]


def test_every_equation_cited_is_a_heading_of_the_theory():
    files = [*PYTHON_FILES, ROOT / "theory.md", README, PAGE]
    for path in files:
        text = path.read_text(encoding="utf-8")
        if path == Path(__file__).resolve():
            continue  # it plants faults
        assert not cited_equations(text) - set(headings()), path.name
    assert cited_equations((ROOT / "spac.py").read_text()) >= {2, 3, 4, 8, 28, 31}
    planted = "see Eq. 1, 98 and Eq. 3 to 5, with Eq. 97 on 20 worlds (Eq.\n 96)"
    assert cited_equations(planted) == {1, 98, 3, 4, 5, 97, 96}


def test_every_equation_is_evaluated_by_a_test_of_the_theory():
    """Each heading occurs in a docstring of tests/test_theory.py, and 99 does not."""
    tree = ast.parse((ROOT / "tests/test_theory.py").read_text())
    tests = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")]
    cited = set().union(*(cited_equations(ast.get_docstring(f) or "") for f in tests))
    assert set(headings()) <= cited and 99 not in cited


def test_each_function_of_an_equation_is_named_below_that_equation():
    """A docstring of spac.py that begins with Eq. N, and the theory's section N that cites it."""
    tree, found = ast.parse((ROOT / "spac.py").read_text()), []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            match = re.match(r"Eq\. (\d+)", ast.get_docstring(node) or "")
            found += [(node.name, int(match[1]))] if match else []
    assert len(found) >= 10
    missing = [(name, n) for name, n in found if f"`spac.{name}`" not in headings()[n]]
    assert not missing
    assert "`spac.data_fit`" not in headings()[2]  # the control: the wrong section


# -------------------------------------------------------- names


def names_in(module: str) -> dict[str, set[str]]:
    """{top-level name: names inside it}, the module's own identifiers under ''."""
    tree, found = ast.parse((ROOT / f"{module}.py").read_text()), {}

    def inside(node) -> set[str]:
        names = set()
        for child in ast.walk(node):
            names |= {getattr(child, field, None) for field in ("id", "arg", "attr", "name")}
            if isinstance(child, ast.Constant) and isinstance(child.value, str):
                plain = re.fullmatch(r"\w+( \w+)*", child.value)  # a name, or some in a row
                names |= set(child.value.split()) if plain else set()
        return {name for name in names if isinstance(name, str)}

    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = inside(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                found |= {name: inside(node) for name in inside(target)}
    return found | {"": inside(tree)}


NAMES = {module: names_in(module) for module in MODULES}


def exists(name: str) -> bool:
    """module.name, module.Class.member, Class.member, or a top-level name of any module."""
    head, *rest = name.split(".")
    if head in NAMES:
        places, rest = [NAMES[head]], rest
    else:
        places, rest = list(NAMES.values()), [head, *rest]
    return any(
        rest[0] in place and all(inner in place[rest[0]] for inner in rest[1:]) for place in places
    )


def dangling_names(text: str) -> list[str]:
    """`spac.x`, `toy_bandit.x`, `train_mistral.x`, `Theorem.x` and the like that do not exist."""
    owners = "|".join([*MODULES, "Instance", "Theorem", "Run", "Critic"])
    found = re.findall(rf"`((?:{owners})(?:\.[A-Za-z_]\w*)+)(?:\(.*?\))?`", text)
    return [name for name in found if not name.endswith(".py") and not exists(name)]


def test_code_that_the_prose_names_exists():
    assert not dangling_names(THEORY)
    assert not dangling_names(README.read_text(encoding="utf-8"))
    assert not dangling_names(PAGE.read_text(encoding="utf-8"))
    planted = "`spac.spac_loss`, `spac.py`, `spac.nothing`, `Theorem.bound`, `Theorem.nothing`"
    assert dangling_names(planted) == ["spac.nothing", "Theorem.nothing"]
    assert len(re.findall(r"`(?:spac|toy_bandit)\.\w+`", THEORY)) > 15


def tables(text: str) -> list[list[list[str]]]:
    """Blocks of consecutive rows, split into cells."""
    blocks = re.findall(r"(?:^\|.*\n?)+", text, re.M)
    # | between backticks or dollars, or behind a backslash, is no border
    safe = [re.sub(r"\\\||\$`.*?`\$", lambda m: m[0].replace("|", "\0"), b) for b in blocks]
    return [
        [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in block.splitlines()]
        for block in safe
    ]


def broken_tables(text: str) -> list[str]:
    """First rows of blocks without a separator, and rows of another width than their header."""
    found = []
    for block in tables(text):
        if len(block) < 3 or not all(re.fullmatch(r":?-+:?", cell) for cell in block[1]):
            found.append(block[0][0])
        found += [row[0] for row in block if len(row) != len(block[0])]
    return found


def test_tables_are_whole_and_their_rows_complete():
    """A blank line within a table would cut it; GitHub shows the rest as text."""
    assert not broken_tables(THEORY)
    assert not broken_tables(README.read_text(encoding="utf-8"))
    assert not broken_tables(PAGE.read_text(encoding="utf-8"))
    assert broken_tables("| a | b |\n|---|---|\n| 1 | 2 |\n\n| 3 | 4 |\n") == ["3"]
    assert broken_tables("| a | b |\n|---|---|\n| 1 |\n") == ["1"]


def dangling_symbols(text: str) -> list[str]:
    """Names in the symbol table's last column that are no code; `a` in `f` must occur within f."""
    rows = [row for block in tables(text) for row in block if len(row) == 3]
    start = next(k for k, row in enumerate(rows) if row[2] == "name in the code")
    everything = set().union(*(place[""] for place in NAMES.values()))
    missing = []
    for row in rows[start + 2 :]:
        cell = row[2]
        if not re.match(r"\$", row[0]) or "`" not in cell:
            break  # the next table
        owners = re.findall(r"in `(\w+)`", cell)
        scopes = [NAMES["toy_bandit"].get(owner, set()) for owner in owners]
        for name in re.findall(r"`([A-Za-z_][\w.]*)`", cell):
            local = scopes and name not in owners
            found = any(name in scope for scope in scopes) if local else exists(name)
            missing += [] if found or (not local and name in everything) else [name]
    return missing


def test_every_name_of_the_symbol_table_is_code():
    assert not dangling_symbols(THEORY)
    header = "| symbol | meaning | name in the code |\n|---|---|---|\n"
    planted = header + "| $`v`$ | | `v` in `theorem` |\n| $`q`$ | | `nowhere`, `wins` |\n"
    planted += "| $`d`$ | | `nothing` in `theorem` |\n| $`J`$ | | `Instance.nothing` |\n"
    assert dangling_symbols(planted) == ["nowhere", "nothing", "Instance.nothing"]


def test_the_names_in_readmes_reading_order_and_log_are_code(readme, page):
    """Functions that a reader is sent to; fields of the log, as the trainer spells them."""

    def section(text, title):
        return re.search(rf"^## {title}$(.*?)(?=^## |\Z)", text, re.M | re.S)[1]

    sent = re.findall(r"`([A-Za-z_][\w.]*)`", section(readme, "Files"))
    sent = [name for name in sent if not name.endswith(".py")]
    assert sent and not [name for name in sent if not exists(name)]
    (log,) = tables(section(page, "How to read a run's log"))
    fields = [name for row in log[2:] for name in re.findall(r"`(\w+)`", row[0])]
    assert len(fields) > 10
    spelt = NAMES["train_mistral"][""] | NAMES["spac"][""]
    assert not [name for name in fields if name not in spelt]
    assert "not_a_field" not in spelt and not exists("not_a_function")


# -------------------------------------------------------- ceilings and manners


def visible(line: str) -> str:
    """A line of prose as a reader sees it: no HTML comments, no link targets."""
    return re.sub(r"<!--.*?-->|(?<=\])\(\S*?\)", "", line)


def too_wide(name: str, text: str) -> list[int]:
    """Lines beyond 100 columns of code or 120 of prose. Rows of tables cannot be broken."""
    prose = name.endswith(".md")
    lines = [visible(line) if prose else line for line in text.splitlines()]
    limit = 120 if prose else 100
    return [
        k for k, s in enumerate(lines, 1) if len(s) > limit and not (prose and s.startswith("|"))
    ]


MISSED = pytest.mark.xfail(
    reason="1,240 lines: every real input, bf16, average, resume, with their guards", strict=True
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=MISSED) if n == "train_mistral.py" else n for n in CEILINGS],
)
def test_a_file_stays_below_its_ceiling(name):
    if not (ROOT / name).exists():
        pytest.skip(f"{name} is not written yet")
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= CEILINGS[name]


def test_no_line_is_too_wide():
    for path in project_files():
        if path.suffix in (".py", ".md"):
            assert not too_wide(path.name, path.read_text(encoding="utf-8")), path.name
    assert too_wide("x.py", "a" * 101) == [1] == too_wide("x.md", "b" * 121)
    assert not too_wide("x.md", "[c](" + "d" * 200 + ")" + "e" * 100)


def test_readme_states_the_ceilings_that_hold(readme):
    """The agreed one, or, of a file that misses it, a number that it keeps."""
    stated = dict(re.findall(r"^\| \[(\S+)\]\(\1\) \| (\d+) \|", readme, re.M))
    assert set(stated) == set(CEILINGS) - {"README.md"}
    for name, number in stated.items():
        lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert lines <= int(number) and (int(number) == CEILINGS[name] or lines > CEILINGS[name])


def imported(text: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(text)))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in plain} | {
        (node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)
    }


def test_the_loss_needs_torch_only_and_the_scripts_what_is_pinned():
    """spac.py: torch. The rest: the standard library, each other and requirements.txt."""
    assert imported((ROOT / "spac.py").read_text()) == {"torch"}
    requirements = (ROOT / "requirements.txt").read_text()
    pinned = re.findall(r"^(\w+)==[\d.]+", requirements, re.M)
    local = {path.stem for path in PYTHON_FILES}
    comes_along = {"tokenizers", "safetensors", "jinja2", "tqdm"}  # with torch and transformers
    known = {*pinned, *local, *comes_along, *sys.stdlib_module_names}
    known |= {"lm_eval", "trl"}  # the leaderboard's harness, a peer: installed apart, by hand
    for path in PYTHON_FILES:
        assert not imported(path.read_text(encoding="utf-8")) - known, path.name
    assert imported("import torch.nn as nn\nfrom wandb.sdk import x") - known == {"wandb"}
    scripts = {*imported((ROOT / "toy_bandit.py").read_text())}
    assert not scripts & {"scipy", "transformers", "pytest"}


def test_importing_a_module_prints_nothing():
    """All three in one fresh process; a print would be seen."""
    code = "; ".join(f"import {module}" for module in MODULES)
    for more, silent in (("", True), ("; print()", False)):
        if more:
            code = "import spac"
        done = subprocess.run(
            [sys.executable, "-c", code + more], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert (done.stdout + done.stderr == "") == silent, done.stdout + done.stderr


def test_no_file_speaks_of_the_workplace():
    """Nor of where it was made; the words are put together here, so that this file may stay."""
    words = ["../" + "shared", "/wo" + "rk/", "helper" + "-"]

    def mentions(text):
        return [word for word in words if word in text]

    for path in project_files():
        if path.suffix not in (".png", ".gif"):
            assert not mentions(path.read_text(encoding="utf-8", errors="ignore")), path
            assert not mentions(str(path.relative_to(ROOT)))
    assert mentions("see ../" + "shared/x") == words[:1]


# -------------------------------------------------------- README: links, flags, commands


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return text.replace(" ", "-")


def dead_links(text: str, here: Path) -> list[str]:
    dead = []
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|\$`.*?`\$", "", text, flags=re.S)
    ):
        if re.match(r"https://\S+\.\S+", target):
            continue
        name, _, anchor = target.partition("#")
        path = here.parent / name if name else here
        known = path.exists()
        if known and anchor:
            titles = re.findall(r"^#{1,6} (.*)$", path.read_text(encoding="utf-8"), re.M)
            known = anchor in map(slug, titles)
        dead += [] if known else [target]
    return dead


def test_links_and_headings_resolve(readme, page):
    assert not dead_links(readme, README)
    assert not dead_links(page, PAGE)
    assert not dead_links(THEORY, ROOT / "theory.md")
    planted = "[a](spac.py) [b](nothing.py) [c](theory.md#nothing) [d](theory.md#5-the-certificate)"
    assert dead_links(planted, README) == ["nothing.py", "theory.md#nothing"]


ASK = """
import os, runpy, sys
for path in sys.argv[1:]:
    sys.path.insert(0, os.path.dirname(path))
    sys.argv = [path, "--help"]
    print(chr(0), path, sep="")
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit:
        pass
"""


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """{script: options of its --help}, for each script that has a main; one process asks them all,
    for most of an answer's seconds are imports."""
    scripts = [str(path) for path in PYTHON_FILES if "ArgumentParser(" in path.read_text()]
    scripts.remove(str(Path(__file__).resolve()))
    asking = [sys.executable, "-c", ASK, *scripts]
    said = subprocess.run(asking, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    answers = dict(answer.split("\n", 1) for answer in said.split("\0")[1:])
    assert list(answers) == scripts and all("usage:" in answer for answer in answers.values())
    found = {
        Path(path).relative_to(ROOT).as_posix(): set(re.findall(r"--\w[\w-]*", answer))
        for path, answer in answers.items()
    }
    from torch.distributed.run import get_args_parser

    found["torchrun"] = set(get_args_parser()._option_string_actions)
    return found


FOREIGN = r"\b(?:lm_eval|lm-eval|pip|git)\b[^`\n]*"  # commands of other programs


def unknown_flags(text: str, flags: dict[str, set[str]], prose=True) -> list[str]:
    """Flags of commands that the script named there does not have; in prose, flags of no script."""
    text = re.sub(FOREIGN, "", text.replace("\\\n", " "))
    everywhere = set().union({"--help"}, *flags.values())
    used = re.findall(r"(?<![\w-])--[a-z]\w*", re.sub(r"<!--.*?-->", "", text))
    unknown = [flag for flag in used if prose and flag not in everywhere]
    for command in re.findall(r"(?:python|torchrun)\s[^`\n]*?\.py[^`\n]*", text):
        head, script, tail = re.match(r"(.*?)(\S+\.py)(.*)", command).groups()
        unknown += [f for f in re.findall(r"--\w+", tail) if f not in flags.get(script, {"--help"})]
        if head.startswith("torchrun"):
            unknown += [f for f in re.findall(r"--\w+", head) if f not in flags["torchrun"]]
    return unknown


def test_the_flags_that_readme_and_docstrings_name_exist(readme, page, flags):
    assert {"toy_bandit.py", "train_mistral.py"} <= set(flags)
    assert not unknown_flags(readme, flags)
    assert not unknown_flags(page, flags)
    assert not unknown_flags(THEORY, flags)
    for path in PYTHON_FILES:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert not unknown_flags(docstring, flags, prose=False), path.name
    planted = (
        "`--nothing` `python toy_bandit.py --dry_run` torchrun --nodes train_mistral.py --out x"
    )
    assert unknown_flags(planted, flags) == ["--nothing", "--nodes", "--dry_run", "--nodes"]


def test_the_commands_of_readme_name_files_that_exist(readme, page):
    text = (readme + page).replace("\\\n", " ")
    named = re.findall(r"(?:python|torchrun)\s[^`\n]*?(\S+\.py)", text)
    assert len(named) >= 5 and not [name for name in named if not (ROOT / name).exists()]


def commands(text: str) -> list[list[str]]:
    """Words of each shell command, split at line ends and &&."""
    return [part.split() for line in text.splitlines() for part in line.split("&&") if part.split()]


def test_readmes_test_command_is_the_one_of_the_checks(readme):
    """The same pytest, with reporting options at most, after installing the same requirements."""
    if not (ROOT / ".ci/run").exists():
        pytest.skip(".ci/run is not written yet")
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", readme, re.M | re.S))
    checks = commands((ROOT / ".ci/run").read_text())

    def command(found, word):
        (one,) = [c for c in found if word in c[:3]]
        quiet = ("-q", "--quiet", "--durations", "--disable-pip-version-check")
        return [part for part in one if not part.startswith(quiet)]

    for word in ("pytest", "install"):
        assert command(commands(blocks), word) == command(checks, word)
    assert command(commands("pytest -x"), "pytest") != command(checks, "pytest")


def test_the_python_in_readme_runs(readme):
    """Each block in a fresh process, from the repository's root; an undefined name is noticed."""
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)
    for block in [*blocks, "print(undefined)"]:
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True
        )
        assert (done.returncode == 0) == (block in blocks), done.stderr
        assert bool(done.stdout.strip()) == (block in blocks)


# -------------------------------------------------------- README: numbers


TAGGED = re.compile(r"(-?[\d,]*\.?\d+)\s*<!--\s*(\w+):([^>]+?)\s*-->")


def value_at(found, path: str):
    """Follow a dotted path; keys may hold dots themselves."""
    if not path:
        return found
    if isinstance(found, list):
        head, _, rest = path.partition(".")
        return value_at(found[int(head)], rest)
    for key in sorted(found, key=len, reverse=True):
        if path == key or path.startswith(key + "."):
            return value_at(found[key], path[len(key) + 1 :])
    raise KeyError(path)


def wrong_numbers(text: str, results: dict[str, dict]) -> list[str]:
    """Tagged numbers that are not the JSON's value rounded to the digits printed."""
    wrong = []
    for printed, stem, path in TAGGED.findall(text):
        digits = len(printed.partition(".")[2])
        try:
            rounded = f"{float(value_at(results[stem], path)):.{digits}f}"
        except (KeyError, IndexError, ValueError, TypeError):
            rounded = "nothing"
        if rounded == "nothing" or float(rounded) != float(printed.replace(",", "")):
            wrong.append(f"{printed} is {rounded} in {stem}:{path}")
    return wrong


def recorded() -> dict[str, dict]:
    return {p.stem: json.loads(p.read_text()) for p in (ROOT / "results").glob("*.json")}


def test_numbers_in_the_page_of_results_are_those_of_the_records(page):
    assert len(TAGGED.findall(page)) >= 10
    assert len(TAGGED.findall(page)) == len(re.findall(r"<!-- *\w+:", page))  # none unread
    assert not wrong_numbers(page, recorded())
    good = "-0.48 <!-- t:v --> 5,000<!-- t:n --> .5<!-- t:h.1 -->"
    values = {"t": {"v": -0.4811, "n": 5000, "h": [0, 0.4567]}}
    assert not wrong_numbers(good, values)
    assert len(wrong_numbers(good.replace("8", "7").replace("5,0", "5,1"), values)) == 2
    assert len(wrong_numbers(good.replace("t:", "u:"), values)) == 3
    dotted = {"t": {"a": {"n=1e5, T.3": [{"b": 7}]}}}  # keys may hold dots and spaces
    assert not wrong_numbers("7<!-- t:a.n=1e5, T.3.0.b -->", {"t": dotted["t"]})
    assert value_at(dotted, "t.a.n=1e5, T.3.0.b") == 7


# Phrases that hold measured numbers in braces, and where each is recorded: the stem of a
# results/*.json and the dotted path in it. They are the record's, rounded to the digits shown.
MEASURED = {
    "theory.md": {
        "n = 300,000 SPAC by three rules loses at most {.0023}": (
            "toy_bandit:claims.shared_evidence.value.untuned"
        ),
        "RPO {.0008}": "toy_bandit:claims.shared_evidence.value.RPO",
        "one bar a policy {.001}": "practical:claims.policies_not_bars.value.policy",
        "all others at least {.13}": "toy_bandit:claims.shared_evidence.value.rivals",
        "the plain rule loses {18} times": "toy_bandit:claims.coverage_cost.value.plain",
        "Eq. 45's rule at most {1.125} times": "toy_bandit:claims.coverage_cost.value.no_C",
        "n = 300,000: {.000002}, {.00005} (Eq. 45), {.0002} (plain)": (
            "toy_bandit:data.rivals.regrets.sure.SPAC theorem.3; "
            "toy_bandit:data.rivals.regrets.sure.SPAC no C.3; "
            "toy_bandit:data.rivals.regrets.sure.SPAC plain.3"
        ),
        "after one gradient step the critic's error is {1.2} times": (
            "practical:claims.certificate_reads.value.inexact,1-step"
        ),
        "the way to the comparator {9} times": (
            "practical:claims.certificate_reads.value.travel,eta-x-1"
        ),
        "KL spent is {.02} of Hoeffding's": (
            "practical:claims.certificate_reads.value.steps/Hoeffding"
        ),
        "ten proximal rounds lose {.03} of": "practical:claims.proximal_pays.value.error/SPAC-T",
    },
    "README.md": {
        "| [SPAC](spac.py) | samples y' each round | Eq. 20 | {.91} | {.85} |": (
            "worlds:data.methods.styles-1000.SPAC.average.reward.0; "
            "worlds:data.methods.copy-300.SPAC.average.reward.0"
        ),
        (
            "| SPAC, `--critic proximal` | rounds, no y' | Eq. 40: the pessimistic value never "
            "falls | {.92} | {.87} |"
        ): (
            "worlds:data.methods.styles-1000.proximal.average.reward.0; "
            "worlds:data.methods.copy-300.proximal.average.reward.0"
        ),
        (
            ") | a supervised term on the chosen response | near one proximal step (Eq. 40) "
            "| {.92} | {.84} |"
        ): (
            "worlds:data.methods.styles-1000.RPO.average.reward.0; "
            "worlds:data.methods.copy-300.RPO.average.reward.0"
        ),
        "| DPO in rounds, tuned | rounds | nothing | {.91} | {.79} |": (
            "worlds:data.methods.styles-1000.iterated DPO.average.reward.0; "
            "worlds:data.methods.copy-300.iterated DPO.average.reward.0"
        ),
        "/2305.18290), tuned | nothing | nothing: Eq. 32, 33 | {.90} | {.76} |": (
            "worlds:data.methods.styles-1000.DPO.average.reward.0; "
            "worlds:data.methods.copy-300.DPO.average.reward.0"
        ),
        "/2401.01335) | samples y', no labels | imitates the chosen responses | {.69} | {.75} |": (
            "worlds:data.methods.styles-1000.SPIN.average.reward.0; "
            "worlds:data.methods.copy-300.SPIN.average.reward.0"
        ),
        "| the bound of the theorem holds | Eq. 10, 17, 20 | {0} violations in {5,400} runs |": (
            "toy_bandit:claims.bound_holds.value.violations; toy_bandit:claims.bound_holds.runs"
        ),
        (
            "| nobody does better in C and n than by a constant | Eq. 44 | none tried comes "
            "below {3.8} times the floor |"
        ): ("toy_bandit:claims.lower_bound.value.regret/floor"),
        (
            "| C, the price of coverage, need not be known | Eq. 45 | in two worlds at most "
            "{1.125} times the loss of who knows it; more elsewhere |"
        ): ("toy_bandit:claims.coverage_cost.value.no_C"),
        (
            ", greedy RLHF, run to their minima | Eq. 33 | at 300,000 pairs they lose {.112} "
            "at least (RLHF with a KL penalty {.075}), SPAC by rule {.0006} at most |"
        ): (
            "toy_bandit:claims.baselines_fail.value.rivals; "
            "toy_bandit:data.rivals.regrets.rare.RLHF + KL.3; "
            "toy_bandit:claims.baselines_fail.value.untuned"
        ),
        (
            "| the certificate adds up in a network's run | Eq. 36 to 38 | sum and gap at most "
            "{2.7} standard errors apart |"
        ): ("worlds:claims.certificate_adds_up.value.styles-1000"),
        (
            "*Reward divided by the best possible, 16 seeds unseen by SPAC's rule for lam. "
            "Rivals take the best of one to three settings, mostly grid-edge, on these very "
            "seeds. After equal steps SPAC's average leads tuned DPO's by {.012} to {.091} "
            "(three of six intervals above 0) and RPO's by {-.004} to {.019}."
        ): (
            "worlds:data.methods.styles-1000.DPO.average.SPAC's average less this.0; "
            "worlds:data.methods.copy-300.DPO.average.SPAC's average less this.0; "
            "worlds:data.methods.styles-1000.RPO.average.SPAC's average less this.0; "
            "worlds:data.methods.styles-3000.RPO.average.SPAC's average less this.0"
        ),
        (" The proximal form (Eq. 39) is level or ahead: SPAC's lead is {-.023} to {.001}."): (
            "worlds:data.methods.copy-300.proximal.average.SPAC's average less this.0; "
            "worlds:data.methods.styles-3000.proximal.average.SPAC's average less this.0"
        ),
        "GB a card for 7B, computed (measured, H100, Adafactor: {61}, {66}):": (
            "gpu:data.full.peaks_GB.generate; gpu:data.full.peaks_GB.train"
        ),
        "[7B's shape](results/README.md#on-a-gpu): 128 pairs in {45} seconds.": (
            "gpu:data.full.training.step_seconds.1"
        ),
        (
            "Over eight seeds SPAC's average ends at reward {.92}, outside {.21}; DPO's at {.89}, "
            "{.75}."
        ): (
            "tiny_lm:data.reward.SPAC, average.0; tiny_lm:data.rounds.SPAC.average outside.9; "
            "tiny_lm:data.reward.DPO, average.0; tiny_lm:data.rounds.DPO.average outside.0"
        ),
    },
}


def stale_figures(text: str, measured: dict[str, str], results: dict[str, dict]) -> list[str]:
    """Phrases that the text has not, or whose number is not the record's."""
    flat, stale = " ".join(text.split()), []
    for phrase, sources in measured.items():
        numbers, fine = re.findall(r"\{(.*?)\}", phrase), True
        for printed, source in zip(numbers, sources.split("; "), strict=True):
            stem, path = source.split(":")
            right = f"{float(value_at(results[stem], path)):.{len(printed.partition('.')[2])}f}"
            fine &= float(right) == float(printed.replace(",", ""))
        fine &= phrase.replace("{", "").replace("}", "") in flat
        stale += [] if fine else [phrase]
    return stale


@pytest.mark.parametrize("name", MEASURED)
def test_measured_numbers_of_the_prose_are_those_of_the_records(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not stale_figures(text, MEASURED[name], recorded()) and MEASURED[name]
    results = {"x": {"claims": {"a": 0.137}}}
    assert not stale_figures("it is\n.14 now", {"it is {.14} now": "x:claims.a"}, results)
    for text in ("it is .14", "it is .15 now"):
        assert stale_figures(text, {f"{text[:6]}{{{text[6:9]}}} now": "x:claims.a"}, results)


def unlike_the_records(block: str) -> list[str]:
    """Lines of shown output that results/toy_bandit.json or the logs in results/tiny do not bear
    out."""
    claims, verdict, where, wrong = recorded()["toy_bandit"]["claims"], None, "", []
    for line in block.splitlines():
        words = line.split()
        if words == [".."]:
            fine = True
        elif words[0] in ("ok", "MISSED"):
            verdict = claims[words[1]]
            fine = verdict["holds"] == (words[0] == "ok") and words[2] == f"{verdict['runs']:,}"
        elif "expected" in line:
            low, high = verdict["limit"][words[0]]
            fine = line.split("expected")[1].split() == [f"{low:g}", "to", f"{high:g}"]
            fine &= words[1] == f"{verdict['value'][words[0]]:.4g}"
        elif words[0] == "a":  # world of ours
            where, fine = "dpo_log" if line.endswith("-dpo") else "log", True
        else:  # heldout-3 .. reward 0.9  outside 0.1
            kind, number = words[0].split("-")
            log = (ROOT / f"results/tiny/{where}.jsonl").read_text().splitlines()
            rounds = [x for x in map(json.loads, log) if x["event"] == "round"]
            (told,) = [x for x in rounds if x["round"] == int(number)]
            before = {"heldout": "", "average": "average_"}[kind]
            pairs = zip(words[2::2], words[3::2], strict=True)
            fine = all(f"{told[before + name]:.3f}" == value for name, value in pairs)
        wrong += [] if fine else [line]
    return wrong


def test_the_outputs_that_readme_shows_are_the_records(readme):
    blocks = re.findall(r"^```\n(.*?)^```", readme, re.M | re.S)
    shown = [b for b in blocks if re.match(r"ok |a world ", b)]
    assert len(shown) == 2 and not any(map(unlike_the_records, shown))
    for block in shown:  # control: another last digit of any number but the rounds', and a verdict
        numbers = [m for m in re.finditer(r"(?<=[ ])[\d.,]*\d(?=[ \n])", block)]
        assert len(numbers) > 7
        for at in (m.end() - 1 for m in numbers):
            planted = f"{block[:at]}{(int(block[at]) + 1) % 10}{block[at + 1 :]}"
            assert len(unlike_the_records(planted)) == 1, planted
    assert len(unlike_the_records(shown[0].replace("ok ", "MISSED ", 1))) == 1


def wrong_verdicts(page: str) -> list[str]:
    """Rows of the second table of claims that say "holds" or "missed at" against worlds.json."""
    claims, wrong = recorded()["worlds"]["claims"], []
    for name, kind, told in re.findall(r"^\| `(\w+)` \| (\w+) \|.*\| (.*?) \|$", page, re.M):
        if name in claims:
            of = claims.pop(name)
            within = {k: low <= of["value"][k] <= high for k, (low, high) in of["limit"].items()}
            missed = [k for k in of["value"] if not within[k]]
            fine = told == ("missed at " + ", ".join(missed) if missed else "holds")
            wrong += [] if fine and kind == of["kind"] else [name]
    return wrong + [*claims]


def test_the_verdicts_of_the_worlds_are_the_records(page):
    assert not wrong_verdicts(page)
    planted = page.replace("| missed at styles-10000 |", "| holds |")
    assert wrong_verdicts(planted) == ["average_beats_oracle_stop"]
    assert wrong_verdicts("") == [*recorded()["worlds"]["claims"]]


def test_the_ablations_caption_in_the_theory_is_the_records():
    rows = recorded()["practical"]["data"]["ablation"]["table"]
    base, soft = rows["base"], rows["smoothed, no box"]
    ratios = sorted(soft[c]["error"] / base[c]["error"] for c in base if c != "why")
    low, high = re.search(r"(\d+) to (\d+) times the base in 3 of 4", THEORY).groups()
    assert [round(ratios[1]), round(ratios[3])] == [int(low), int(high)] and ratios[0] < ratios[1]


def test_readme_is_short_and_clean_in_its_source(readme):
    """A page that is read to its end: 1,200 words beside its code blocks, and no comments."""

    def faults(text):
        prose = re.sub(r"^```.*?^```|(?<=\])\(\S*?\)", "", text, flags=re.M | re.S)
        words = [word for word in prose.split() if re.search(r"\w", word)]
        return ["long"] * (len(words) > 1200) + re.findall(r"<!--.*?-->", text, re.S)

    assert not faults(readme)
    assert faults("word " * 1201 + "<!-- x -->") == ["long", "<!-- x -->"]


def claim_rows(text: str) -> dict[str, list[str]]:
    """{claim: the other cells} of the table of claims."""
    for block in tables(text):
        if block[0][0] == "claim":
            return {row[0].strip("`"): row[1:] for row in block[2:]}
    raise AssertionError("no table of claims")


def test_the_pages_claims_are_the_codes_with_their_kinds(page):
    """All claims of the two scripts whose numbers the table holds; no others, and no other kind."""
    pattern = r"^(theorem|goal) +(\w+) +\S+ +\S+ +\S+ +\S"
    kinds = {}
    for path in (ROOT / "toy_bandit.py", ROOT / "tests/study_practical.py"):
        kinds |= {name: kind for kind, name in re.findall(pattern, path.read_text(), re.M)}
    stated = {name: cells[0] for name, cells in claim_rows(page).items()}
    assert stated == kinds and len(kinds) >= 10


def test_every_claim_is_backed_by_a_test_that_exists(page):
    """The words for pytest -k occur in the name of a test; the planted ones in none."""
    names = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        names |= set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M))

    def unbacked(rows):
        words = {claim: re.fullmatch(r"`(\w+)`", cells[2]) for claim, cells in rows.items()}
        return [c for c, w in words.items() if not w or not any(w[1] in name for name in names)]

    assert not unbacked(claim_rows(page))
    planted = {"a": ["goal", "Eq. 1", "`hedge_regret`"], "b": ["goal", "Eq. 1", "`no_such_test`"]}
    assert unbacked(planted | {"c": ["goal", "Eq. 1", ""]}) == ["b", "c"]


def unconfessed(rows: dict[str, list[str]], results: dict[str, dict]) -> list[str]:
    """Claims that a record does not bear out, where the table does not say "missed"; and those
    that are said to be missed and are not."""
    claims = {
        name: claim for result in results.values() for name, claim in result["claims"].items()
    }
    said = {name: "missed" in " ".join(cells).lower() for name, cells in rows.items()}
    return [name for name in rows if name in claims and said[name] == claims[name]["holds"]]


def test_missed_goals_are_said_to_be_missed(page):
    """In the table of claims; and every other record that holds one is linked."""
    assert not unconfessed(claim_rows(page), recorded())
    results = {"x": {"claims": {"a": {"holds": True}, "b": {"holds": False}}}}
    assert unconfessed({"a": ["fine"], "b": ["fine"]}, results) == ["b"]
    assert unconfessed({"a": ["goal", "missed"], "b": ["Missed"]}, results) == ["a"]
    for stem, result in recorded().items():
        missed = {name for name, claim in result["claims"].items() if not claim["holds"]}
        assert not missed - set(claim_rows(page)) or f"({stem}.json)" in page, stem


def test_no_measured_decimal_stands_in_the_table_of_claims_without_its_source(page):
    def untagged(cell):
        return re.findall(r"(?<![\w.])-?\d*\.\d+", TAGGED.sub("", cell))

    assert not [n for n, cells in claim_rows(page).items() if untagged(cells[-1])]
    assert untagged("slope -0.48 at n = 3,000, 0.1<!-- a:b -->") == ["-0.48"]


def test_recorded_results_have_the_agreed_form():
    """claims, data, setting; a verdict's fields; theorems hold."""
    for stem, result in recorded().items():
        assert set(result) == {"claims", "data", "setting"}, stem
        for name, claim in result["claims"].items():
            assert {"holds", "value", "limit", "runs", "says", "kind"} <= set(claim), name
            assert claim["kind"] in ("theorem", "goal")
            assert claim["holds"] or claim["kind"] == "goal", name
            if isinstance(claim["value"], dict):
                assert set(claim["value"]) >= set(claim["limit"]), name


# -------------------------------------------------------- figures


def pixels(path: Path):
    from matplotlib import image

    return image.imread(path)  # (height, width, channels), 0 to 1


def test_figures_are_drawn_from_the_record_beside_them(tmp_path, monkeypatch):
    """Drawn again from the JSON they are the same; with one line moved they are not. Fonts and
    rasteriser come with matplotlib, but a rounding elsewhere may tip a pixel."""
    monkeypatch.syspath_prepend(ROOT / "tests")
    monkeypatch.syspath_prepend(ROOT)
    import bench_growth
    import study_practical
    import study_worlds

    import toy_bandit

    def differs(one, other):
        return one.shape != other.shape or (abs(one - other).max(-1) > 0.02).mean() > 1e-3

    everything = {name: data for r in recorded().values() for name, data in r["data"].items()}
    kept = {path.stem: pixels(path) for path in (ROOT / "results").glob("*.png")}
    again = tmp_path / "again.png"
    for name, there in kept.items():
        if name in ("ablation", "certificate"):
            draw = getattr(study_practical, f"draw_{name}")
            draw(again, everything["ablation"]["table"])
        elif name in ("mechanism", "story"):
            getattr(study_practical, f"draw_{name}")(again, everything[name])
        elif name == "worlds":
            study_worlds.draw(again, everything["methods"])
        elif name == "bench_growth":
            bench_growth.draw(everything["step"]["points"], again)
        else:
            toy_bandit.draw(again, everything[name]["panels"])
        assert not differs(pixels(again), there), name
    panels = everything["rates"]["panels"]
    line = next(iter(panels[0]["lines"].values()))
    line["mean"] = [2 * value for value in line["mean"]]
    toy_bandit.draw(again, panels)
    assert differs(pixels(again), kept["rates"]) and len(kept) >= 8


def test_figures_can_be_read_on_a_light_and_on_a_dark_page():
    """They bring their own white ground: on a transparent one black letters would vanish."""

    def has_white_ground(picture):
        opaque = picture.shape[-1] == 3 or picture[..., 3].min() == 1.0
        return opaque and (picture[[0, 0, -1, -1], [0, -1, 0, -1], :3] == 1.0).all()

    found = {path.name: pixels(path) for path in (ROOT / "results").rglob("*.png")}
    assert found and not [name for name, picture in found.items() if not has_white_ground(picture)]
    picture = found["rivals.png"].copy()
    picture[0, 0, 3] = 0.0
    assert not has_white_ground(picture) and not has_white_ground(found["rivals.png"] * 0.9)


def pictures(text: str) -> list[tuple[str, str]]:
    return re.findall(r"!\[(.*?)\]\((\S+?)\)", text, re.S)


def test_every_picture_has_words_for_those_who_cannot_see_it(readme):
    shown = pictures(readme) + pictures(THEORY)
    assert len(shown) >= 7 and not [name for words, name in shown if len(words.split()) < 4]
    assert pictures("![](a.png) ![b](c.png)") == [("", "a.png"), ("b", "c.png")]

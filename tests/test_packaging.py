"""The package as people meet it: a checkout, a wheel, an environment without extras, make.

No network and no compiler: the native module is built by ``make``, before the tests.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("triton", "timm", "torchvision", "PIL", "safetensors", "tensorboard", "rich", "sklearn")
EXTRAS += ("matplotlib", "pybind11", "pytest", "hypothesis")


def run(*command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command and what it printed (both streams), without softcl's own switches."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SOFTCL_", "MAKE", "MFLAGS"))}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**kept, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,  # below the limit of a test; a busy machine is slow
    )


def run_python(code: str, cwd: Path = ROOT) -> str:
    answer = run(sys.executable, "-c", code, cwd=cwd)
    assert answer.returncode == 0, answer.stdout
    return answer.stdout.strip()


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """A copy of what setup.py reads, as an unbuilt checkout has it."""
    pytest.importorskip("setuptools")
    tree = tmp_path / "softcl"
    tree.mkdir()
    built = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("softcl", "kernels", "csrc", "bench/native"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=built)
    for pattern in ("*.py", "*.toml", "*.txt", "*.in", "*.md", "LICENSE", "Makefile"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, tree)
    return tree


def wheel_of(tree: Path, **variables: str) -> tuple[Path, list[str], str]:
    """The wheel that setup.py makes: its file, the names in it, and what was printed."""
    answer = run(sys.executable, "setup.py", "bdist_wheel", cwd=tree, **variables)
    assert answer.returncode == 0, answer.stdout
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel, archive.namelist(), answer.stdout


# ---- A checkout ----------------------------------------------------------------------------------


def test_checkout_finds_kernels_beside_softcl() -> None:
    names = [file.stem for file in (ROOT / "kernels").glob("*.py") if file.stem != "__init__"]
    assert names
    code = "import importlib.util as u\n"
    code += f"for name in {names}: print(u.find_spec('softcl.kernels.' + name).origin)"
    found = [Path(line) for line in run_python(code).splitlines()]
    assert found == [ROOT / "kernels" / f"{name}.py" for name in names]


def test_kernels_outside_softcl_is_refused() -> None:
    answer = run(sys.executable, "-c", "import kernels")
    assert answer.returncode == 1
    assert "ImportError" in answer.stdout and "import softcl.kernels" in answer.stdout


def test_kernels_package_holds_no_names() -> None:
    # A checkout does not run that file: names in it would exist in an installed package alone.
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    docstring, guard = body
    assert isinstance(docstring, ast.Expr) and isinstance(guard, ast.If)


def test_import_needs_torch_and_numpy_alone() -> None:
    code = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS} or name == "softcl._C":
            raise ModuleNotFoundError("not installed: " + name, name=name)

sys.meta_path.insert(0, Refuse())
import softcl, torch

unit = torch.nn.functional.normalize
query, key, queue = (unit(torch.randn(n, 8), dim=1) for n in (4, 4, 16))
rule = softcl.AdaptiveSoftLabels(2)
print(softcl.choose_backend(query, queue, rule=rule, temperature=0.1, teacher_temperature=0.05))
loss = softcl.soft_contrastive_loss(
    query.requires_grad_(), key, queue, rule, temperature=0.1, teacher_temperature=0.05
)
loss.backward()
print(bool(query.grad.isfinite().all()))
"""
    choice, *told, finite = run_python(code).splitlines()
    assert sum("softcl runs reference: softcl._C is not built" in line for line in told) == 1
    assert choice.startswith("reference") and "softcl._C is not built" in choice
    assert finite == "True"


def test_version_is_read_without_importing() -> None:
    # pip's isolated build has no torch: setuptools must find the version in the text of the file.
    values = [
        ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "softcl" / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert len(values) == 1 and re.fullmatch(r"\d+\.\d+\.\d+(\.?\w+)?", values[0])


# ---- Wheel and sdist -----------------------------------------------------------------------------


def test_pure_wheel(source_tree: Path) -> None:
    # Left by earlier builds, and not to be packed.
    stale = source_tree / "build" / "lib" / "softcl"
    stale.mkdir(parents=True)
    (stale / "stale.py").touch()
    (source_tree / "softcl" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    wheel, names, _ = wheel_of(source_tree, SOFTCL_BUILD="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"softcl"}
    assert {name for name in names if not name.endswith(".py") and ".dist-info/" not in name} == {
        "softcl/py.typed"
    }
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "softcl = softcl.__main__:main" in archive.read(entry).decode()
    assert "softcl/kernels.py" not in names and "softcl/stale.py" not in names
    kernels = {f"softcl/kernels/{file.name}" for file in (ROOT / "kernels").glob("*.py")}
    assert kernels <= set(names)
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "softcl").rglob("*.py")}
    assert modules - {"softcl/kernels.py"} <= set(names)


def test_installed_package_has_real_kernels(source_tree: Path, tmp_path: Path) -> None:
    wheel, _, _ = wheel_of(source_tree, SOFTCL_BUILD="0")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    found = run_python("import softcl.kernels; print(softcl.kernels.__file__)", cwd=site)
    assert Path(found) == site / "softcl" / "kernels" / "__init__.py"


def test_install_without_compiler_is_pure(source_tree: Path) -> None:
    wheel, names, printed = wheel_of(source_tree, CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith(".so")]
    lines = [line for line in printed.splitlines() if line.startswith("softcl: ")]
    assert "missing: a C++ compiler" in lines[0]


def test_build_by_name_fails_without_compiler(source_tree: Path) -> None:
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    answer = run(*command, cwd=source_tree, CXX="no-such-compiler")
    assert answer.returncode == 1
    assert answer.stdout.splitlines()[-1].startswith("softcl: native module not built (missing: ")


def test_switches_take_0_or_1(source_tree: Path) -> None:
    command = (sys.executable, "setup.py", "--version")
    answer = run(*command, cwd=source_tree, SOFTCL_BUILD="maybe")
    assert answer.returncode == 1
    assert answer.stdout.strip() == "softcl: SOFTCL_BUILD must be 0 or 1, got 'maybe'"


def test_sdist_holds_what_a_build_needs(source_tree: Path) -> None:
    answer = run(sys.executable, "setup.py", "sdist", cwd=source_tree)
    assert answer.returncode == 0, answer.stdout
    (archive,) = (source_tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    assert sources <= names
    assert {"setup.py", "CMakeLists.txt", "pyproject.toml", "softcl/kernels.py"} <= names
    assert "kernels/__init__.py" in names


def test_cmake_lists_every_source() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text()
    sources = [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]
    assert sources
    assert [f for f in sources if str(f.relative_to(ROOT)) not in listed] == []


# ---- Requirements --------------------------------------------------------------------------------


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"]]
    requirements += [r for extra in project["optional-dependencies"].values() for r in extra]
    pins = set()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            # Nothing but name==version, with a marker: no addresses, no paths of one machine.
            found = re.fullmatch(r"([\w.-]+)==[\w.+!]+(; python_version (<|>=) '3\.11')?", line)
            assert found, line
            pins.add(normalized(found[1]))
    assert {normalized(re.match(r"[\w.-]+", r)[0]) for r in requirements} <= pins


def test_isolated_build_downloads_no_torch() -> None:
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not [requirement for requirement in requires if "torch" in requirement]


# ---- make ----------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_sets_up_once(source_tree: Path) -> None:
    log = source_tree / "log"
    python = source_tree / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # Stands for the environment's interpreter: notes what it is asked and does what make waits for.
    python.write_text(f'#!/bin/sh\necho "$*" | head -n 1 >> {log}\ntouch softcl/_C.stand-in.so\n')
    python.chmod(0o755)

    def asked(target: str) -> list[str]:
        log.write_text("")
        options = ("VENV=environment", f"PYTHON={sys.executable}", "PROCESSES=2", "ARGS=")
        answer = run("make", target, *options, cwd=source_tree)
        assert answer.returncode == 0, answer.stdout
        return log.read_text().splitlines()

    build = "setup.py build_ext --inplace"
    test = "-m pytest tests -q -n 2 --dist loadfile --no-loadscope-reorder"
    first = asked("test")
    assert first[-2:] == [build, test] and any("-c constraints.txt" in line for line in first)
    assert asked("test") == [test]
    assert asked("train") == ["-m softcl.train --fused"]
    with open(source_tree / "csrc" / "bindings.cpp", "a") as file:
        file.write("// changed\n")
    assert asked("build") == [build]
    with open(source_tree / "constraints.txt", "a") as file:
        file.write("# changed\n")
    assert any("-c constraints.txt" in line for line in asked("build"))
    assert asked("build") == []
    (source_tree / "softcl" / "_C.stand-in.so").unlink()
    assert asked("build") == [build]

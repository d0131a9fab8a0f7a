"""The wheel itself: what it holds, exports, declares and documents."""

import inspect
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import nblock
import pytest

PROJECT = pathlib.Path(__file__).resolve().parent.parent
ROOT = PROJECT.parent.parent
EXAMPLES = sorted((ROOT / "examples" / "python").glob("*.py"))


def command(*arguments, **options):
    done = subprocess.run(arguments, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{arguments} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_what_is_tested_is_what_is_installed():
    for module in (nblock, nblock._nblock):
        assert pathlib.Path(module.__file__).is_relative_to(sys.prefix)


def test_the_module_exports_nothing_but_its_entry_point():
    symbols = command("nm", "--dynamic", "--defined-only", nblock._nblock.__file__).split("\n")
    assert [line.split()[-1] for line in symbols if line] == ["PyInit__nblock"]


def test_the_wheel_is_typed_and_for_every_python():
    directory = pathlib.Path(nblock.__file__).parent
    assert {path.name for path in directory.iterdir()} >= {"py.typed", "_nblock.pyi", "_nblock.abi3.so"}
    [wheel] = [path for path in (ROOT / ".build").glob("wheels-*/*.whl") if "abi3" in path.name][:1]
    assert "-cp310-abi3-" in wheel.name
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "test" in name]


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Runs mypy away from the sources: what is installed is checked. What it learns is kept for the next run."""
    directory = tmp_path_factory.mktemp("mypy")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", *arguments], cwd=directory, capture_output=True, text=True
        )

    return run


def test_the_package_and_the_examples_are_typed_strictly(mypy):
    for arguments in ["-p", "nblock"], map(str, EXAMPLES):
        done = mypy(*arguments)
        assert done.returncode == 0, done.stdout


def test_what_is_typed_wrongly_is_found(mypy):
    done = mypy("-c", "import nblock; nblock.Lock(b'x'); nblock.Lock('x').lock(timeout='1')")
    assert "Found 2 errors" in done.stdout


def test_stubs_are_what_the_module_has(tmp_path):
    assert "Success" in command(sys.executable, "-m", "mypy.stubtest", "nblock", cwd=tmp_path)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example, tmp_path):
    environment = {**os.environ, "NBLOCK_DIR": str(tmp_path / "store")}
    for _ in range(2):
        # Everything that is wrong is said: nothing is forgotten, deprecated or left open.
        command(sys.executable, "-W", "error", str(example), env=environment, cwd=tmp_path)


def test_the_program_of_the_start_page_runs(tmp_path):
    [program] = re.findall(r"^```python \S+\n(.*?)^```", (ROOT / "docs" / "start.md").read_text(), flags=re.M | re.S)
    environment = {**os.environ, "NBLOCK_DIR": str(tmp_path / "store")}
    assert command(sys.executable, "-W", "error", "-c", program, env=environment) == "working\n"


def test_everything_public_is_documented():
    missing = []
    for name in nblock.__all__:
        thing = getattr(nblock, name)
        if name.startswith("_"):
            continue
        if not (thing.__doc__ or "").strip():
            missing.append(name)
        if inspect.isclass(thing) and not issubclass(thing, BaseException):
            for member, value in vars(thing).items():
                if not member.startswith("_") and not (value.__doc__ or "").strip():
                    missing.append(f"{name}.{member}")
    assert missing == []


def test_signatures_can_be_asked_for():
    assert "blocking=True, timeout=-1" in str(inspect.signature(nblock.Lock.acquire))
    assert "*, expire=None, timeout=None" in str(inspect.signature(nblock.Lock.lock))
    assert "client=None" in str(inspect.signature(nblock.Lock))


def test_importing_opens_no_store(tmp_path):
    store = tmp_path / "store"
    code = "import nblock; lock = nblock.Lock('x'); nblock.synchronized('y')(print); repr(lock)"
    command(sys.executable, "-c", code, env={**os.environ, "NBLOCK_DIR": str(store)}, cwd=tmp_path)
    assert not store.exists()

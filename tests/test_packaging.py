"""The package as it is installed: its tag and its files, and what importing it does and does not do."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsekit

PACKAGE = Path(sparsekit.__file__).parent
ROOT = Path(__file__).parent.parent

installed = pytest.mark.skipif(
    not list(importlib.metadata.Distribution.discover(name="sparsekit", path=[str(PACKAGE.parent)])),
    reason=f"{PACKAGE} is a source tree, not an installed wheel",
)


def run(code: str, **environment) -> str:
    """What a fresh interpreter prints for `code`; like this one it finds sparsekit, and it has nothing imported."""
    paths = os.pathsep.join([str(PACKAGE.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@installed
def test_wheel_tag_is_one_for_every_python():
    wheel = importlib.metadata.distribution("sparsekit").read_text("WHEEL")
    tags = re.findall(r"^Tag: (.*)$", wheel, re.MULTILINE)
    assert len(tags) == 1
    assert re.fullmatch(r"cp310-abi3-(many)?linux\w*_\w+", tags[0])


@installed
def test_metadata():
    metadata = importlib.metadata.metadata("sparsekit")
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert metadata["Version"] == sparsekit.__version__ == version
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert {re.match(r"[\w-]+", r)[0] for r in required} == {"torch", "numpy", "nanobind-backend"}
    assert {"demo", "docs", "test"} <= set(metadata.get_all("Provides-Extra"))


def test_no_file_belongs_to_one_python_version():
    libraries = {path.name for path in PACKAGE.rglob("*.so")}
    assert {"_sparsekit.so", "_numpy.abi3.so"} <= libraries
    assert not [name for name in libraries if "cpython" in name or "libtorch" in name or "libcudart" in name]
    assert (PACKAGE / "py.typed").exists()


def test_libraries_need_no_path_and_only_torch_and_the_system():
    readelf = subprocess.run(
        ["readelf", "-d", *map(str, PACKAGE.glob("*.so"))], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", readelf))
    assert "libtorch.so" in needed
    system = r"lib(torch|stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so(\.\d+)?|ld-linux.*"
    assert not [name for name in needed if not re.fullmatch(system, name)]
    assert not re.search(r"R(UN)?PATH", readelf)


def test_import_touches_no_driver():
    code = """
import sparsekit, torch
sparsekit.info()
maps = open("/proc/self/maps").read()
print(torch.cuda.is_initialized(), "libcuda.so" in maps, hasattr(torch.ops.sparsekit, "block_sparse_attn"))
"""
    assert run(code) == "False False True"


def test_numpy_entry_does_not_import_torch():
    assert run("import sys, sparsekit.numpy; print('torch' in sys.modules)") == "False"


def test_package_works_after_the_numpy_entry():
    code = """
import sparsekit.numpy, sparsekit, torch
x = torch.randn(1, 1, 32, 32)
pattern = sparsekit.BlockPattern.from_bool(torch.ones(1, 1, 2, 2, dtype=torch.bool), 16)
dense = torch.nn.functional.scaled_dot_product_attention(x, x, x)
print(torch.allclose(sparsekit.block_sparse_attention(x, x, x, pattern), dense, atol=1e-5))
"""
    assert run(code) == "True"


def test_ops_work_after_fork():
    code = """
import os, torch, sparsekit
x = torch.randn(1, 2, 300, 64)
pattern = sparsekit.BlockPattern.from_bool(torch.ones(1, 1, 5, 5, dtype=torch.bool), 64, seq_lengths=(300, 300))
before = sparsekit.block_sparse_attention(x, x, x, pattern)
if os.fork() == 0:
    torch.set_num_threads(1)  # torch's own threads are gone in a child
    same = torch.equal(before, sparsekit.block_sparse_attention(x, x, x, pattern))
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert run(code) == "0"


def test_schemas_are_as_published():
    """A caller's saved graph holds them: arguments are only ever added at the end, with a default."""
    schema = str(torch.ops.sparsekit.block_sparse_attn.default._schema)
    arguments = (
        "Tensor query, Tensor key, Tensor value, Tensor kv_num_blocks, Tensor kv_indices, Tensor? full_kv_num_blocks, "
        "Tensor? full_kv_indices, Tensor? partial_bits, Tensor? partial_bits_index, SymInt[2] block_size"
    )
    assert re.sub(r"SymInt\[2\]|int\[2\]", "SymInt[2]", schema).startswith(f"sparsekit::block_sparse_attn({arguments}")
    for option in (
        "float? scale=None",
        "bool causal=False",
        "softcap=0.",
        "Tensor? key_bias=None",
        "Tensor? sinks=None",
    ):
        assert option in schema


def found_include(prologue: str, **environment) -> Path:
    """What the build's search for torch prints, after `prologue` in the same interpreter."""
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")}
    script = str(ROOT / "cmake" / "find_torch_include.py")
    code = f"import runpy, sys\n{prologue}\nrunpy.run_path({script!r}, run_name='__main__')"
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    return Path(process.stdout.strip())


def test_build_finds_the_torch_of_the_environment_even_isolated():
    """An isolated build runs the environment's interpreter, with a search path that lacks its packages."""
    hidden = "sys.path = [path for path in sys.path if not path.endswith('-packages')]"
    assert found_include(hidden) == Path(torch.__file__).parent / "include"


def test_build_finds_nothing_where_no_torch_is():
    hidden = "sys.path = [path for path in sys.path if not path.endswith('-packages')]; sys.prefix = sys.base_prefix = '/nowhere'"
    assert found_include(hidden, PYTHONUSERBASE="/nowhere") == Path("")


def test_build_takes_no_torch_that_is_too_old(tmp_path):
    old = tmp_path / "torch" / "include" / "torch" / "headeronly"
    old.mkdir(parents=True)
    (old / "version.h").write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 10\n")
    assert found_include("", PYTHONPATH=str(tmp_path)) == Path(torch.__file__).parent / "include"


def test_readme_example_runs():
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert run(code + "\nprint(tuple(out.shape), bool(out.isfinite().all()))") == "(1, 8, 2048, 64) True"


def test_documentation_links_lead_somewhere():
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "third_party/README.md")]
    for page in [*pages, *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"

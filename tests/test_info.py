"""What `sparsekit.info()` says, how the package is imported, and what it says when it cannot be."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsekit
from backends import ABSENT, BACKENDS, CPU_NAMES
from sparsekit import _info, _library

PACKAGE = Path(sparsekit.__file__).parent


def run_python(code: str, path: Path | None = None, **environment) -> subprocess.CompletedProcess:
    """Python that finds this very package (or the one in `path`) first."""
    environment = {**os.environ, "PYTHONPATH": str(path or PACKAGE.parent), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


# ---- info


def test_info_prints_versions_and_instruction_sets():
    report = sparsekit.info()
    assert report["sparsekit"]["version"] == sparsekit.__version__
    assert report["sparsekit"]["torch"] == torch.__version__
    assert {"reference", "portable"} <= set(report["cpu"]["instruction sets"].split())
    assert report["cuda"]["library"] == _library.cuda_status
    text = str(report)
    assert torch.__version__ in text and "instruction sets" in text and "attention" not in report


def test_info_says_what_runs_and_why_the_others_do_not(monkeypatch):
    query = torch.randn(1, 2, 64, 40)
    pattern = sparsekit.BlockPattern.from_bool(torch.ones(1, 1, 4, 4, dtype=torch.bool), 16)
    with sparsekit.isa("portable"):
        plan = sparsekit.info(query=query, value=query, pattern=pattern)["attention"]
    assert "float32, head dim 40, value dim 40, blocks (16, 16)" in plan["problem"]
    assert "SPARSEKIT_ISA" in plan["avx2"] or "processor" in plan["avx2"]
    assert plan["reference"] == "runs"
    named = sparsekit.info(dtype=torch.float64, head_dim=64, block_size=(64, 128), backward=True)["attention"]
    assert "cpu backward, float64, head dim 64, value dim 64, blocks (64, 128)" in named["problem"]
    assert [name for name, answer in named.items() if answer == "runs"] == ["reference"]
    with pytest.raises(ValueError, match="device: found 'tpu'"):
        sparsekit.info(head_dim=64, device="tpu")


def test_info_without_cuda_says_why():
    plan = sparsekit.info(head_dim=64, device="cuda")["attention"]
    if "cuda" in ABSENT and _library.cuda_status != "loaded":
        assert "not loaded" in plan["cuda"]
    else:
        assert "runs" in plan.values()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_info_of_a_gpu():
    report = sparsekit.info(query=torch.randn(1, 1, 64, 64, device="cuda", dtype=torch.bfloat16), block_size=64)
    assert report["cuda"]["library"] == "loaded" and report["cuda"]["devices"]
    assert {"sm_80", "compute_80"} <= set(report["cuda"]["architectures"].split())
    assert "runs" in report["attention"].values()


def test_command_line():
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "sparsekit.info", "--head-dim", "96", "--block-size", "64", "--backward"],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "cpu backward, bfloat16, head dim 96, value dim 96, blocks (64, 64)" in result.stdout
    assert re.search(r"reference +runs", result.stdout)


def test_info_can_be_called_even_as_a_module():
    result = run_python("import sparsekit, sparsekit.info; print(sparsekit.info()['sparsekit']['version'])")
    assert result.stdout.strip() == sparsekit.__version__, result.stderr


def test_version_is_that_of_the_installed_package():
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("sparsekit")
    except PackageNotFoundError:
        project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
        installed = re.search(r'^version = "(.*)"', project, re.MULTILINE).group(1)
    assert installed == sparsekit.__version__


def test_architectures_are_read_from_a_library(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    (tmp_path / "kernel.cu").write_text("__global__ void twice(float* x) { x[threadIdx.x] *= 2; }")
    codes = ["-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a"]
    for mode in ("none", "size"):
        command = [nvcc, "-c", "kernel.cu", "-o", "kernel.o", f"--compress-mode={mode}", *codes]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
        assert _info.cuda_architectures(tmp_path / "kernel.o") == ["compute_80", "sm_80", "sm_90a"]
    (tmp_path / "other").write_bytes(b"nothing \x50\xed\x55\xba of the kind" + bytes(100))
    assert _info.cuda_architectures(tmp_path / "other") == []


# ---- isa


def test_isa_is_restored(monkeypatch):
    monkeypatch.setenv("SPARSEKIT_ISA", "avx2")
    with pytest.raises(KeyError), sparsekit.isa("portable"):
        assert os.environ["SPARSEKIT_ISA"] == "portable"
        raise KeyError
    assert os.environ["SPARSEKIT_ISA"] == "avx2"
    monkeypatch.delenv("SPARSEKIT_ISA")
    with sparsekit.isa("reference"):
        pass
    assert "SPARSEKIT_ISA" not in os.environ


def test_an_unknown_isa_is_the_calls_error():
    pattern = sparsekit.BlockPattern.from_bool(torch.ones(1, 1, 1, 1, dtype=torch.bool), 16)
    query = torch.randn(1, 1, 16, 8)
    with sparsekit.isa("sse9"), pytest.raises(RuntimeError, match="SPARSEKIT_ISA.*portable"):
        sparsekit.block_sparse_attention(query, query, query, pattern)


def test_a_level_that_the_processor_lacks_is_the_calls_error():
    lacking = [name for name in CPU_NAMES if name not in torch.ops.sparsekit.cpu_features().split()]
    if not lacking:
        pytest.skip("this processor has every level")
    pattern = sparsekit.BlockPattern.from_bool(torch.ones(1, 1, 1, 1, dtype=torch.bool), 16)
    query = torch.randn(1, 1, 16, 8)
    with sparsekit.isa(lacking[-1]), pytest.raises(RuntimeError, match=f"SPARSEKIT_ISA={lacking[-1]}: "):
        sparsekit.block_sparse_attention(query, query, query, pattern)


# ---- import


@pytest.mark.parametrize("order", ["import torch, sparsekit", "import sparsekit, torch"])
def test_import_registers_the_ops_in_any_order(order):
    result = run_python(f"{order}; print(torch.ops.sparsekit.block_sparse_attn.default)")
    assert result.stdout.strip() == "sparsekit.block_sparse_attn.default", result.stderr


def test_import_does_not_touch_the_driver():
    code = """
import torch
def refuse(*args, **kwargs): raise AssertionError("the driver was asked")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = refuse
import sparsekit
pattern = sparsekit.BlockPattern.from_bool(torch.ones(1, 1, 2, 2, dtype=torch.bool), 16, causal=True)
query = torch.randn(1, 2, 32, 8, requires_grad=True)
sparsekit.block_sparse_attention(query, query, query, pattern).sum().backward()
sparsekit.check(pattern)
print(torch.cuda.is_initialized())
"""
    result = run_python(code)
    assert result.stdout.strip() == "False", result.stderr


def test_ops_survive_a_fork():
    code = """
import os, torch, sparsekit
pattern = sparsekit.BlockPattern.from_bool(torch.ones(1, 1, 2, 2, dtype=torch.bool), 16, causal=True)
query = torch.randn(1, 2, 32, 8)
out = sparsekit.block_sparse_attention(query, query, query, pattern)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # torch's pool does not survive a fork; its users know
    os._exit(0 if torch.equal(out, sparsekit.block_sparse_attention(query, query, query, pattern)) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = run_python(code)
    assert result.stdout.strip() == "0", result.stderr


def test_numpy_entry_does_not_import_torch():
    """And the rest follows when it is asked for."""
    if not list(PACKAGE.glob("_numpy*.so")):
        pytest.skip("built without the NumPy module")
    code = """
import sparsekit.numpy, sys
assert "torch" not in sys.modules
sparsekit.BlockPattern
assert "torch" in sys.modules
print(sparsekit.numpy.block_sparse_attention.__name__)
"""
    result = run_python(code)
    assert result.stdout.strip() == "block_sparse_attention", result.stderr


def test_public_names():
    assert set(sparsekit.__all__) <= set(dir(sparsekit))
    for name in sparsekit.__all__:
        assert getattr(sparsekit, name) is not None
    assert (PACKAGE / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'sparse_attention'"):
        _ = sparsekit.sparse_attention
    exported = ast.parse((PACKAGE / "attention.py").read_text())
    names = {node.name for node in exported.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}
    assert names <= set(sparsekit.__all__)


# ---- what a broken installation says


def copy_of_package(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "sparsekit", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_a_package_that_was_not_built_says_so(tmp_path):
    result = run_python("import sparsekit", copy_of_package(tmp_path))
    assert "ImportError" in result.stderr and "_sparsekit.so is missing" in result.stderr
    assert "make dev" in result.stderr and "pip install" in result.stderr


def test_a_damaged_library_says_so(tmp_path):
    (copy_of_package(tmp_path) / "sparsekit" / "_sparsekit.so").write_bytes(b"not a library")
    result = run_python("import sparsekit", tmp_path)
    assert "ImportError" in result.stderr and "_sparsekit.so does not load into torch" in result.stderr


def test_an_old_torch_is_named(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text('__version__ = "2.10.1+cpu"')
    result = run_python("import sparsekit", copy_of_package(tmp_path))
    assert "ImportError: sparsekit needs torch >= 2.11, and torch 2.10.1+cpu is installed" in result.stderr


def test_without_torch_the_package_says_what_to_install(tmp_path):
    """`import sparsekit` works, for sparsekit.numpy; everything else names the command."""
    code = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import sparsekit
try:
    sparsekit.block_sparse_attention
except ImportError as error:
    print(error)
"""
    result = run_python(code)
    assert "pip install 'torch>=2.11'" in result.stdout, result.stderr


def test_every_backend_was_looked_for():
    assert {backend.name for backend in BACKENDS} | set(ABSENT) >= {"reference", "portable", "avx2", "cuda"}

"""Builds the kernels with CMake and Ninja, and packs them as a wheel that fits every Python 3.

The environment variable TGI_CUDA_ARCHS names the CUDA architectures to build for, such as `90a` or `80;90a`;
without it they are those of the GPUs that nvidia-smi shows, and without GPUs there is no CUDA library.
TGI_BUILD_JOBS bounds the number of compilers that run at once. TGI_STRESS=1 builds CUDA kernels that pause at
random, for tests alone (csrc/common/stress.cuh).
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
from torch_headers import OLDEST_TORCH, find_torch  # noqa: E402 - the folder is not a package

CMAKE_DIR = ROOT / "build" / "cmake"
OUTPUT_DIR = ROOT / "build" / "kernels"


def find_tool(name: str, package_folder: str) -> str:
    """A tool's executable: its Python package's, which build isolation may have put anywhere, else PATH's."""
    try:
        packaged = shutil.which(name, path=getattr(importlib.import_module(name), package_folder))
    except ImportError:
        packaged = None
    found = packaged or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} was not found; install it with `pip install {name}`")
    return found


def find_nvcc() -> str | None:
    """CUDACXX, else nvcc of the PATH, else that of /usr/local/cuda."""
    usual = Path("/usr/local/cuda/bin/nvcc")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def visible_archs() -> str:
    """The architectures of this machine's GPUs that we have kernels for, as CMake writes them; '' without."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    shown = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    digits = {cap.replace(".", "") for cap in shown if cap.replace(".", "").isdigit()}
    return ";".join(sorted({"90a" if cap == "90" else cap for cap in digits if int(cap) >= 80}))


def cuda_options() -> list[str]:
    """CMake's CUDA arguments.

    Without nvcc a build that was asked for CUDA fails; one that was not does without.
    """
    asked = os.environ.get("TGI_CUDA_ARCHS")
    archs = visible_archs() if asked is None else asked.replace(",", ";").replace(" ", ";")
    nvcc = find_nvcc()
    if archs and nvcc is None:
        if asked is None:
            print(
                f"a GPU ({archs}) is visible but nvcc is not found: building without CUDA kernels",
                file=sys.stderr,
            )
            return ["-DTGI_CUDA_ARCHS="]
        raise SystemExit(f"TGI_CUDA_ARCHS is {asked!r} but no nvcc was found; install CUDA, or set CUDACXX")
    stress = "ON" if os.environ.get("TGI_STRESS") == "1" else "OFF"
    compiler = [f"-DCMAKE_CUDA_COMPILER={nvcc}"] if archs else []
    return [f"-DTGI_CUDA_ARCHS={archs}", f"-DTGI_STRESS={stress}", *compiler]


def build_jobs() -> int:
    """How many compilers run at once: one a core this process may use, at 2 GB each."""
    asked = os.environ.get("TGI_BUILD_JOBS")
    if asked:
        return max(1, int(asked))
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory_gb / 2)))


def run_logged(command: list[str], log: Path) -> None:
    """Runs a command, showing and keeping what it prints: the log holds ptxas' registers and spills."""
    with (
        log.open("w", encoding="utf-8") as kept,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            sys.stdout.write(line)
    if process.returncode:
        raise SystemExit(f"`{' '.join(command)}` failed ({process.returncode}); its output is in {log}")


def build_kernels() -> list[Path]:
    """Configures and builds; returns the shared libraries."""
    torch_dir = find_torch()
    if torch_dir is None:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise SystemExit(
            f"no torch >= {oldest} was found for {sys.executable}; install it, or build with isolation"
        )
    shutil.rmtree(OUTPUT_DIR, ignore_errors=True)  # a _cuda.so of an earlier build is no part of this one
    OUTPUT_DIR.mkdir(parents=True)
    CMAKE_DIR.mkdir(parents=True, exist_ok=True)
    cmake = find_tool("cmake", "CMAKE_BIN_DIR")
    options = [f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}", f"-DTGI_TORCH_DIR={torch_dir}"]
    options += [f"-DTGI_OUTPUT_DIR={OUTPUT_DIR}", *cuda_options()]
    configure = [cmake, "-S", str(ROOT), "-B", str(CMAKE_DIR), "-G", "Ninja", *options]
    run_logged(configure, CMAKE_DIR / "configure.log")
    run_logged([cmake, "--build", str(CMAKE_DIR), "-j", str(build_jobs())], CMAKE_DIR / "build.log")
    return sorted(OUTPUT_DIR.glob("*.so"))


class BuildPython(build_py):
    """Starts from an empty folder, so that a file deleted from the source is not in the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildKernels(build_ext):
    """One CMake build in place of setuptools' compilers; the libraries go into tgi_kernels/."""

    def run(self) -> None:
        started_s = time.monotonic()
        libraries = build_kernels()
        in_place = self.inplace or self.editable_mode
        package = ROOT / "tgi_kernels" if in_place else Path(self.build_lib) / "tgi_kernels"
        package.mkdir(parents=True, exist_ok=True)
        for old in package.glob("_c*.so"):
            old.unlink()
        for library in libraries:
            shutil.copy2(library, package)
        sizes = ", ".join(f"{library.name} {library.stat().st_size / 1e6:.2f} MB" for library in libraries)
        print(f"build: {sizes} in {time.monotonic() - started_s:.0f} s with {build_jobs()} jobs")

    def get_outputs(self) -> list[str]:
        return [
            str(Path(self.build_lib) / "tgi_kernels" / library.name) for library in OUTPUT_DIR.glob("*.so")
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class BuildWheel(bdist_wheel):
    """The libraries use torch's stable ABI and no Python: one wheel a platform, for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])

    def run(self) -> None:
        super().run()
        for wheel in Path(self.dist_dir).glob("*.whl"):
            print(f"build: {wheel.name} {wheel.stat().st_size / 1e6:.2f} MB")


setup(
    ext_modules=[Extension("tgi_kernels._kernels", sources=[])],
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels, "bdist_wheel": BuildWheel},
)

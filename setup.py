"""Build of the C++ extension ``fusedres._C`` and the mapping of ``kernels/`` to ``fusedres.kernels`` and of
``csrc/cuda/`` to ``fusedres.cuda``; the rest is in pyproject.toml.

FUSEDRES_BUILD says what is compiled:

    auto    (default) the CPU extension, or nothing, with a sentence that says why, where torch or a compiler is absent
    cpu     the CPU extension; anything absent is an error
    none    nothing: pure Python

A compiler that is present and fails is an error in every mode: an incomplete install must not look like a complete one.

FUSEDRES_SANITIZE (for development: ``address,undefined`` or ``thread``) builds the extension with those checks of the compiler's; Python is
then started with their runtime library in LD_PRELOAD.
"""

import os
import platform
import shutil
import sys
from glob import glob

from setuptools import find_packages, setup

BUILD = os.environ.get("FUSEDRES_BUILD", "auto")
SANITIZE = os.environ.get("FUSEDRES_SANITIZE", "")
# the oldest torch whose stable ABI is used: what is built here runs on 2.11 and on everything newer
FLAGS = ["-O3", "-g0", "-Werror=switch", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
LINK_FLAGS: list[str] = []
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O2", "-g1"]
    LINK_FLAGS += [f"-fsanitize={SANITIZE}"]


def missing() -> str | None:
    """What the extension would need and this machine lacks, or None."""
    if platform.system() == "Windows":
        return "the C++ kernels need GCC or Clang, which PyTorch does not use on Windows"
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        return f"{error}; install torch first and pass --no-build-isolation to pip"
    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        return f"no C++ compiler {cpp_extension.get_cxx_compiler()!r} was found; install one or set CXX"
    return None


def extension() -> dict:
    """The arguments of setup() that build the extension; empty where it is not to be built."""
    if BUILD not in ("auto", "cpu", "none"):
        sys.exit(f"FUSEDRES_BUILD={BUILD!r} is not known: expected auto, cpu or none")
    if BUILD == "none":
        return {}
    reason = missing()
    if reason is not None:
        if BUILD == "cpu":
            sys.exit(f"FUSEDRES_BUILD=cpu, but {reason}")
        print(f"fusedres is installed without its C++ kernels: {reason}.", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    module = CppExtension(
        "fusedres._C",
        sorted(glob("csrc/**/*.cpp", recursive=True)),
        depends=["setup.py", *sorted(glob("csrc/**/*.h", recursive=True))],
        include_dirs=[os.path.abspath("csrc")],
        py_limited_api=True,
        extra_compile_args={"cxx": FLAGS},
        extra_link_args=LINK_FLAGS,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[
        *find_packages(include=["fusedres", "fusedres.*"]),
        "fusedres.cuda",
        "fusedres.kernels",
        *(f"fusedres.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"fusedres.cuda": "csrc/cuda", "fusedres.kernels": "kernels"},
    package_data={
        "fusedres": ["py.typed", "**/*.json"],
        "fusedres.cuda": ["*.cu", "*.cuh"],
        "fusedres.kernels": ["**/*.json"],
    },
    **extension(),
)

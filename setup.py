"""Builds the extension ``flora._core``; everything else about the package is in pyproject.toml.

Environment: FLORA_DEVELOP=1 makes warnings errors, FLORA_SANITIZE=1 builds with the address and undefined-behaviour
sanitizers (run Python with LD_PRELOAD=$(gcc -print-file-name=libasan.so)).
"""

import os
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86_64 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # has no stable ABI

FLAGS = ["-std=c11", "-O3", "-ffp-contract=fast", "-fvisibility=hidden"]
if os.environ.get("FLORA_DEVELOP") == "1":
    FLAGS += ["-Wall", "-Wextra", "-Werror"]
LINK_FLAGS = []
if os.environ.get("FLORA_SANITIZE") == "1":
    FLAGS += ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-O1", "-g"]
    LINK_FLAGS += ["-fsanitize=address,undefined"]

# The bodies of these files are chosen at run time by what the CPU has; no other file may contain such instructions.
FILE_FLAGS = {
    "csrc/kernels/v3.c": ["-march=x86-64-v3"],
    "csrc/kernels/v4.c": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "csrc/kernels/bf16.c": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16"],
    "csrc/kernels/amx.c": ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


class BuildExt(build_ext):
    """Compiles the files in parallel, each with flags of its own."""

    def build_extensions(self) -> None:
        compile_all = self.compiler.compile
        prefix = ""
        if self.compiler.compiler_type == "msvc":
            self._use_clang()
            prefix = "/clang:"

        def compile_each(sources: list[str], **options: object) -> list[str]:
            def compile_one(source: str) -> list[str]:
                own = FILE_FLAGS.get(source.replace(os.sep, "/"), []) if X86_64 else []
                return compile_all([source], **{**options, "extra_postargs": [prefix + flag for flag in FLAGS + own]})

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [path for paths in pool.map(compile_one, sources) for path in paths]

        self.compiler.compile = compile_each
        super().build_extensions()

    def _use_clang(self) -> None:
        """Microsoft's own compiler has no vectors of a given width; LLVM's takes its options and links with it."""
        clang = shutil.which("clang-cl")
        if clang is None:
            raise RuntimeError("flora._core needs clang-cl on Windows, which is on no path here: install LLVM")
        self.compiler.initialize()
        self.compiler.cc = clang
        self.compiler.compile_options = [flag for flag in self.compiler.compile_options if flag != "/GL"]


core = Extension(
    "flora._core",
    sources=sorted(glob("csrc/*.c") + glob("csrc/kernels/*.c")),
    depends=["setup.py", *glob("csrc/**/*.h", recursive=True)],
    include_dirs=["csrc", numpy.get_include()],
    define_macros=[] if FREE_THREADED else [("Py_LIMITED_API", "0x030B0000")],
    libraries=["m"] if os.name == "posix" else [],
    extra_link_args=LINK_FLAGS,
    py_limited_api=not FREE_THREADED,
)

setup(
    ext_modules=[core],
    cmdclass={"build_ext": BuildExt},
    options={} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp311"}},
)

#!/usr/bin/env python3
"""Build llama-cpp-python with this project's llama.cpp patches, and keep the patches.

    build_llama_cpp_python.py              build the patched wheel (or find it in the cache), print its path
    build_llama_cpp_python.py install      the same, then install it into this Python (or --python)
    build_llama_cpp_python.py source       print where the patched source lies, convert_hf_to_gguf.py in it
    build_llama_cpp_python.py tools        for the tests: build llama-server, llama-mtmd-cli, ggml-rpc-server
                                           too, print the folder of programs and libraries
    build_llama_cpp_python.py dist DIR     build a wheel for other machines into DIR: its CPU backend
                                           loads the best variant that a CPU can run
    build_llama_cpp_python.py unpack DIR   make a git tree: the pinned source as base, one commit per patch
    build_llama_cpp_python.py export DIR   the inverse: write that tree's commits back to patches/

Only the standard library, git, a C/C++ compiler and pip are needed; cmake and ninja come with pip's
build isolation. What is built is stated in patches/pin.json (version and sha256 of the source
distribution) and patches/*.patch. Everything made lands in the user cache
($XDG_CACHE_HOME or ~/.cache, then sparsemm-edge/), so a machine builds a series once.

CMAKE_ARGS passes through to CMake and is part of the cache key, as are the CPU's features: the
default build is -march=native, and a wheel of another CPU would crash.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What a wheel for this project does not need, but for the RPC backend: a few seconds, and a laptop can
# lend its memory to another.
CMAKE_OPTIONS = (
    "-DGGML_RPC=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    # a wheel cannot hold symbolic links: versioned names would store every library three times
    "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",
)

# The programs that the tests run. They come out of the wheel's own build, which then takes 1.6 times as long.
TOOLS = ("llama-server", "llama-mtmd-cli", "ggml-rpc-server", "test-llama-archs")
TOOLS_OPTIONS = (
    "-DLLAMA_BUILD_COMMON=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_TESTS=ON",
    "-DLLAMA_TESTS_INSTALL=OFF",  # only one of them is built
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # would be downloaded
    "-DLLAMA_OPENSSL=OFF",
    # programs and libraries can be moved together
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
)
LIBRARIES = ("llama", "mtmd", "ggml", "ggml-base", "ggml-cpu", "ggml-rpc")

# For other machines: backends are libraries of their own, loaded at run time.
DIST_OPTIONS = ("-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON")

# Unpatched, for comparison: its mtmd is not needed.
STOCK_OPTIONS = ("-DLLAVA_BUILD=OFF", "-DGGML_RPC=OFF")

# Edits to the build's copy only, never to the tree that `unpack` makes: (file, old, new).
# {version} and {full_version} come from the pin.
BUILD_EDITS = (
    ("llama_cpp/__init__.py", '__version__ = "{version}"', '__version__ = "{full_version}"'),
    # forced ON, although nothing in the wheel links it, and it is over 40 % of the compile time
    ("CMakeLists.txt", 'set(LLAMA_BUILD_COMMON ON CACHE BOOL "Build llama.cpp common library" FORCE)', ""),
    # TOOLS_OPTIONS add it already
    (
        "CMakeLists.txt",
        "add_subdirectory(vendor/llama.cpp/tools/mtmd)",
        "if (NOT TARGET mtmd)\nadd_subdirectory(vendor/llama.cpp/tools/mtmd)\nendif()",
    ),
)

# For DIST_OPTIONS only, likewise
DIST_EDITS = (
    # into the package, as it does with the one CPU backend of other builds
    (
        "CMakeLists.txt",
        "llama_cpp_python_install_target(ggml-cpu)",
        """get_property(backends DIRECTORY vendor/llama.cpp/ggml/src PROPERTY BUILDSYSTEM_TARGETS)
    foreach(backend IN LISTS backends)
        get_target_property(kind ${{backend}} TYPE)
        if (kind STREQUAL "MODULE_LIBRARY")
            llama_cpp_python_install_target(${{backend}})
        endif()
    endforeach()""",
    ),
    # ggml itself looks for them beside the program, which is Python
    (
        "llama_cpp/llama_cpp.py",
        "_lib = load_shared_library(_lib_base_name, _base_path)",
        """_lib = load_shared_library(_lib_base_name, _base_path)
_load_backends = load_shared_library("ggml", _base_path).ggml_backend_load_all_from_path
_load_backends.argtypes, _load_backends.restype = [ctypes.c_char_p], None
_log_set = load_shared_library("ggml-base", _base_path).ggml_log_set
_quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
_log_set(_quiet, None)  # it names every backend on stderr
_load_backends(os.fsencode(_base_path))
_log_set(None, None)""",
    ),
)

# Headers, pkg-config and CMake files that upstream's install rules put at the top of site-packages.
WHEEL_EXCLUDE = ("bin/**", "include/**", "lib/**", "lib64/**")

IDENTITY = {"NAME": "sparsemm-edge", "EMAIL": "sparsemm-edge@localhost", "DATE": "2026-01-01T00:00:00+00:00"}


class BuildError(Exception):
    """What went wrong, in one line for the person who runs this."""


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------
# pin, series, cache


@dataclass(frozen=True)
class Series:
    """The pinned source distribution and the patches on top of it."""

    directory: Path
    project: str
    version: str
    sha256: str
    tree: str  # git's id of the unpacked source distribution, without the .git folders in it
    llama_cpp_commit: str
    local_version: int
    patches: tuple[Path, ...]

    @classmethod
    def read(cls, directory: Path) -> Series:
        pin_path = directory / "pin.json"
        try:
            pin = json.loads(pin_path.read_text(encoding="utf-8"))
            return cls(directory, patches=tuple(sorted(directory.glob("*.patch"))), **pin)
        except FileNotFoundError:
            raise BuildError(f"{pin_path}: not found; it states which source distribution to patch") from None
        except (ValueError, TypeError) as error:
            raise BuildError(f"{pin_path}: not a valid pin: {error}") from None

    @property
    def full_version(self) -> str:
        return f"{self.version}+sparsemm.{self.local_version}" if self.patches else self.version

    @property
    def sdist_name(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}.tar.gz"

    def key(self) -> str:
        """Changes with the pinned source and with any patch's name or content."""
        parts = [self.project.encode(), self.version.encode(), self.sha256.encode()]
        for patch in self.patches:
            parts += [patch.name.encode(), patch.read_bytes()]
        return digest(*parts)

    def build_key(self, *options: str) -> str:
        """Changes with everything that changes the built libraries."""
        cmake_args = os.environ.get("CMAKE_ARGS", "")
        parts = [self.key(), self.full_version, repr((CMAKE_OPTIONS, BUILD_EDITS, WHEEL_EXCLUDE, options))]
        parts += [cmake_args, sysconfig.get_platform(), *platform.libc_ver()]
        if "GGML_NATIVE=OFF" not in cmake_args:
            parts.append(cpu_features())
        return digest(*(part.encode() for part in parts))

    def wheel_dir(self) -> Path:
        """Where the wheel of this series lies once it is built."""
        return cache_dir("wheels") / self.build_key()

    def tools_dir(self) -> Path:
        """Where the programs of this series lie once they are built, with their libraries."""
        return cache_dir("tools") / self.build_key(*TOOLS_OPTIONS)

    def stock_dir(self) -> Path:
        """Where the libraries of the pinned source without the patches lie once they are built."""
        return cache_dir("stock") / replace(self, patches=()).build_key(*STOCK_OPTIONS)


def digest(*parts: bytes) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.hexdigest()[:16]


def cpu_features() -> str:
    """The instruction sets of this CPU, as far as the system tells them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return " ".join(sorted(value.split()))
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()


def cache_dir(*names: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = base.joinpath("sparsemm-edge", *names)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            f"{path}: cannot be made ({error.strerror}); set XDG_CACHE_HOME to a writable folder"
        ) from None
    return path


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """A temporary folder on the same file system as `target`, so that a rename puts the result in place."""
    path = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def move_into_place(made: Path, target: Path) -> None:
    """Rename; when another process was first, its result is as good as ours."""
    try:
        made.rename(target)
    except OSError:
        if not target.exists():
            raise


# --------------------------------------------------------------------------------------------
# the source distribution


def find_sdist(series: Series, given: Path | None) -> Path:
    """The pinned source distribution: given, from the cache or through pip; checksum verified."""
    if given is None and os.environ.get("SPARSEMM_SDIST"):
        given = Path(os.environ["SPARSEMM_SDIST"])
    if given is not None:
        if not given.is_file():
            raise BuildError(f"{given}: no such file (expected {series.sdist_name})")
        check_sha256(given, series)
        return given

    cached = cache_dir("sdist") / series.sdist_name
    if not cached.is_file():
        with temporary_beside(cached) as folder:
            downloaded = download_sdist(series, folder)
            check_sha256(downloaded, series)
            downloaded.replace(cached)
    check_sha256(cached, series)
    return cached


def check_sha256(path: Path, series: Series) -> None:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    if hasher.hexdigest() != series.sha256:
        raise BuildError(
            f"{path}: wrong checksum: sha256 is {hasher.hexdigest()}, "
            f"{series.directory / 'pin.json'} says {series.sha256}"
        )


def download_sdist(series: Series, folder: Path) -> Path:
    say(f"downloading {series.sdist_name} with pip")
    # pip runs the package's build backend to read its metadata: the hash makes it verify the file before that
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{series.project}=={series.version} --hash=sha256:{series.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += [f"--no-binary={series.project}", "--dest", str(folder), "-r", str(requirements)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path = folder / series.sdist_name
    if result.returncode != 0 or not path.is_file():
        if "DO NOT MATCH THE HASHES" in result.stdout:
            raise BuildError(
                f"{series.sdist_name}: wrong checksum: what pip downloaded is not the pinned file"
            )
        reason = next(
            (line for line in reversed(result.stdout.splitlines()) if "ERROR" in line), "pip failed"
        )
        raise BuildError(
            f"cannot download {series.sdist_name} ({reason.strip()}); "
            "check the network, or get the file elsewhere and pass it with --sdist FILE"
        )
    return path


def unpack_sdist(sdist: Path, folder: Path) -> Path:
    """Unpack into `folder`, without the .git files that the distribution carries; return the top folder."""
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    (top,) = [path for path in folder.iterdir() if path.is_dir()]
    for path in sorted(top.rglob(".git"), reverse=True):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return top


# --------------------------------------------------------------------------------------------
# git


def git(tree: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run git in `tree` without the user's configuration, so that commits and patches are reproducible."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment.update(GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_NOSYSTEM="1", LC_ALL="C")
    for name, value in IDENTITY.items():
        environment[f"GIT_COMMITTER_{name}"] = environment[f"GIT_AUTHOR_{name}"] = value
    settings = [
        f"safe.directory={tree}",
        "core.autocrlf=false",
        "core.fsync=none",
        "gc.auto=0",
        "advice.mergeConflict=false",
    ]
    command = ["git", *(part for setting in settings for part in ("-c", setting)), *arguments]
    try:
        result = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, errors="replace"
        )
    except FileNotFoundError:
        raise BuildError(
            "git not found: it applies the patch series; install it (for example: apt install git)"
        ) from None
    if check and result.returncode != 0:
        raise BuildError(f"git {arguments[0]} failed in {tree}: {one_line(result.stderr or result.stdout)}")
    return result


def one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[:2]) if lines else "no output"


def make_tree(series: Series, sdist: Path, folder: Path) -> Path:
    """A git tree under `folder`: the source as published is the first commit, each patch is one more.

    Commit ids depend on nothing but pin and series.
    """
    tree = unpack_sdist(sdist, folder)
    git(tree, "init", "--quiet", "--object-format=sha1", "--initial-branch=sparsemm")
    git(tree, "add", "--all", "--force")
    made = git(tree, "write-tree").stdout.strip()
    if made != series.tree:
        raise BuildError(
            f"{sdist}: unpacks to git tree {made}, {series.directory / 'pin.json'} says {series.tree}"
        )
    git(tree, "commit", "--quiet", "--no-gpg-sign", "-m", f"{series.project} {series.version}, as published")
    for patch in series.patches:
        options = [
            "--quiet",
            "--keep-cr",
            "--keep-non-patch",
            "--committer-date-is-author-date",
            "--no-gpg-sign",
        ]
        result = git(tree, "am", *options, "--whitespace=nowarn", str(patch.resolve()), check=False)
        if result.returncode != 0:
            reasons = [line for line in result.stderr.splitlines() if line.startswith("error:")]
            raise BuildError(
                f"{patch}: does not apply to {series.project} {series.version} and the patches before it: "
                f"{one_line(chr(10).join(reasons) or result.stderr)}"
            )
    return tree


def patched_source(series: Series, given_sdist: Path | None) -> Path:
    """The patched source in the cache, made on first use."""
    target = cache_dir("source") / series.key()
    if not target.is_dir():
        sdist = find_sdist(series, given_sdist)
        say(f"applying {len(series.patches)} patches to {series.project} {series.version}")
        with temporary_beside(target) as folder:
            tree = make_tree(series, sdist, folder)
            shutil.rmtree(tree / ".git")
            move_into_place(tree, target)
    return target


def unpack(series: Series, given_sdist: Path | None, target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BuildError(f"{target}: exists and is not empty; give a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(target) as folder:
        tree = make_tree(series, find_sdist(series, given_sdist), folder)
        if target.exists():
            target.rmdir()
        tree.rename(target)
    say(
        f"{target}: base and {len(series.patches)} patches; "
        f"commit on top, then: {Path(__file__).name} export {target}"
    )


def export(series: Series, tree: Path) -> None:
    """Write the commits of `tree` after its base to the patch folder; a patch without a commit goes."""
    if not (tree / ".git").exists():
        raise BuildError(f"{tree}: not a git tree; make one with: {Path(__file__).name} unpack {tree}")
    if changes := git(tree, "status", "--porcelain").stdout.splitlines():
        raise BuildError(
            f"{tree}: {len(changes)} uncommitted change(s), first {changes[0].strip()!r}: commit or drop them"
        )
    base = git(tree, "rev-list", "--max-parents=0", "HEAD").stdout.split()
    if len(base) != 1 or git(tree, "rev-parse", f"{base[0]}^{{tree}}").stdout.strip() != series.tree:
        raise BuildError(f"{tree}: its first commit is not {series.project} {series.version} as pinned")
    if git(tree, "rev-list", "--merges", "HEAD").stdout.strip():
        raise BuildError(f"{tree}: has merge commits; a series is linear: rebase first")

    with temporary_beside(series.directory / "pin.json") as folder:
        options = [
            "--no-signature",
            "--zero-commit",
            "--no-numbered",
            "--no-stat",
            "--full-index",
            "--no-renames",
        ]
        options += ["--no-ext-diff", "--diff-algorithm=myers", "--unified=3"]
        git(tree, "format-patch", "--quiet", *options, "-o", str(folder.resolve()), f"{base[0]}..HEAD")
        made = sorted(folder.glob("*.patch"))
        for old in series.patches:
            old.unlink()
        for patch in made:
            patch.replace(series.directory / patch.name)
    say(f"{series.directory}: {len(made)} patches written ({len(series.patches)} before)")


# --------------------------------------------------------------------------------------------
# the wheel


def check_compilers() -> None:
    for variable, language, names in (
        ("CC", "C", ("cc", "gcc", "clang")),
        ("CXX", "C++", ("c++", "g++", "clang++")),
    ):
        wanted = os.environ.get(variable)
        candidates = (wanted.split()[0],) if wanted else names
        if sys.platform != "win32" and not any(shutil.which(name) for name in candidates):
            raise BuildError(
                f"no {language} compiler found (looked for {', '.join(candidates)}): install one "
                "(Debian/Ubuntu: apt install gcc g++; macOS: xcode-select --install) or name it in "
                + variable
            )


def build_wheel(series: Series, given_sdist: Path | None) -> Path:
    """The wheel of the patched source, from the cache or built now."""
    target = series.wheel_dir()
    if not target.is_dir():
        with temporary_beside(target) as folder:
            move_into_place(compile_wheel(series, given_sdist, folder).parent, target)
    (wheel,) = target.glob("*.whl")
    return wheel


def build_tools(series: Series, given_sdist: Path | None) -> Path:
    """The folder of TOOLS and their libraries; the same build leaves the wheel in the cache."""
    target = series.tools_dir()
    if not target.is_dir():
        with temporary_beside(target) as folder:
            wheel = compile_wheel(series, given_sdist, folder, TOOLS_OPTIONS, (*LIBRARIES, *TOOLS))
            # the programs lie among object files and libraries
            move_into_place(folder / "build" / "bin", target)
            if not series.wheel_dir().is_dir():
                move_into_place(wheel.parent, series.wheel_dir())
    return target


def build_stock(series: Series, given_sdist: Path | None) -> Path:
    """The folder of libllama and ggml built from the pinned source without the patches."""
    target = series.stock_dir()
    if not target.is_dir():
        with temporary_beside(target) as folder:
            wheel = compile_wheel(replace(series, patches=()), given_sdist, folder, STOCK_OPTIONS)
            made = folder / "lib"
            made.mkdir()
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.startswith("llama_cpp/lib/"):
                        (made / Path(name).name).write_bytes(archive.read(name))
            move_into_place(made, target)
    return target


def build_dist(series: Series, given_sdist: Path | None, out: Path) -> Path:
    """A wheel for other machines, in the folder `out`; built each time."""
    out.mkdir(parents=True, exist_ok=True)
    with temporary_beside(out / "wheel") as folder:
        wheel = compile_wheel(series, given_sdist, folder, DIST_OPTIONS, edits=(*BUILD_EDITS, *DIST_EDITS))
        return wheel.replace(out / wheel.name)


def compile_wheel(
    series: Series,
    given_sdist: Path | None,
    folder: Path,
    options: Sequence[str] = (),
    targets: Sequence[str] = (),
    edits: Sequence[tuple[str, str, str]] = BUILD_EDITS,
) -> Path:
    """Build a wheel in `folder`, which is temporary: the wheel in wheel/, CMake's files in build/.

    Args:
        options: for CMake, after CMAKE_OPTIONS and before the user's CMAKE_ARGS.
        targets: of CMake; none: all.
        edits: of the build's copy of the source.
    """
    check_compilers()
    source = patched_source(series, given_sdist)
    log_path = cache_dir("logs") / f"build-{series.build_key(*options)}.log"
    n_jobs = str(usable_cores())
    what = f"{series.project} {series.full_version}" + (f" and {', '.join(TOOLS)}" if targets else "")
    say(f"building {what} on {n_jobs} cores, minutes, once per machine; log: {log_path}")

    # the build writes into its source: work on a copy
    build = folder / "source"
    shutil.copytree(source, build, symlinks=True)
    apply_build_edits(series, build, edits)
    environment = dict(os.environ)
    environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", n_jobs)
    options = (*CMAKE_OPTIONS, f"-DLLAMA_BUILD_COMMIT={series.llama_cpp_commit}", *options)
    environment["CMAKE_ARGS"] = " ".join([*options, os.environ.get("CMAKE_ARGS", "")]).strip()
    settings = {
        "wheel.exclude": WHEEL_EXCLUDE,
        "build-dir": (str(folder / "build"),),
        "build.targets": targets,
    }
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps"]
    command += ["--wheel-dir", str(folder / "wheel")]
    for name, values in settings.items():
        if values:
            command += ["--config-settings", f"{name}={';'.join(values)}"]
    if run_logged([*command, str(build)], environment, log_path) != 0:
        raise BuildError(f"the build failed: {failure_reason(log_path)} (all of it: {log_path})")
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def apply_build_edits(series: Series, build: Path, edits: Sequence[tuple[str, str, str]]) -> None:
    names = {"version": series.version, "full_version": series.full_version}
    for name, old, new in edits:
        path = build / name
        text = path.read_text(encoding="utf-8")
        if text.count(old.format(**names)) != 1:
            raise BuildError(
                f"{name} of {series.project} {series.version}: expected one {old.format(**names)!r}"
            )
        path.write_text(text.replace(old.format(**names), new.format(**names)), encoding="utf-8")


def run_logged(command: Sequence[str], environment: dict[str, str], log_path: Path) -> int:
    """Run with the output in `log_path`, and ninja's step counter on the terminal."""
    step = re.compile(r"\[(\d+)/(\d+)\]")
    shown = -1
    with log_path.open("w", encoding="utf-8") as log:
        # a group of its own, so that stopping this script stops the compilers too
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                if (match := step.search(line)) and (
                    percent := 100 * int(match[1]) // int(match[2])
                ) >= shown + 5:
                    shown = percent
                    say(f"  compiled {match[1]} of {match[2]}")
        except BaseException:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGTERM)
            else:
                process.terminate()
            process.wait()
            raise
        return process.wait()


def failure_reason(log_path: Path) -> str:
    """The first line of the log that names an error."""
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    pattern = re.compile(r"error:|CMake Error|ERROR:(?! pip's dependency resolver)|No space left|interrupted")
    return next((line.strip() for line in lines if pattern.search(line)), lines[-1] if lines else "no output")


def install(series: Series, wheel: Path, python: str) -> None:
    if installed_sha256(series, python) == hashlib.sha256(wheel.read_bytes()).hexdigest():
        say(f"{series.project} {series.full_version} is installed already")
        return
    pip = [python, "-m", "pip", "install", "--quiet"]
    # two calls: the first replaces another build of the same version, the second adds what it needs
    for command in ([*pip, "--force-reinstall", "--no-deps", str(wheel)], [*pip, str(wheel)]):
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode != 0:
            raise BuildError(f"{python}: pip cannot install {wheel.name}: {one_line(result.stdout)}")
    say(f"installed {series.project} {series.full_version} into {python}")


def installed_sha256(series: Series, python: str) -> str | None:
    """The hash of the wheel file that an installed llama-cpp-python came from, if it came from a file."""
    code = (
        "import importlib.metadata as m, json\n"
        f"t = m.distribution({series.project!r}).read_text('direct_url.json')\n"
        "print(json.loads(t)['archive_info']['hashes']['sha256'])"
    )
    try:
        result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{python}: cannot be run: {error.strerror}") from None
    return result.stdout.strip() if result.returncode == 0 else None


# --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--patches", type=Path, default=ROOT / "patches", help="folder of pin.json and the series"
    )
    parser.add_argument(
        "--sdist", type=Path, help="the pinned source distribution, if it is here already (or SPARSEMM_SDIST)"
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("build", help="build the wheel, print its path (the default)")
    command = commands.add_parser("install", help="build the wheel if need be and install it")
    command.add_argument(
        "--python", default=sys.executable, help="install into this interpreter's environment"
    )
    commands.add_parser("source", help="print the folder of the patched source")
    commands.add_parser("tools", help=f"build {', '.join(TOOLS)}, print their folder")
    commands.add_parser("stock", help="build libllama without the patches, print its folder")
    command = commands.add_parser("dist", help="build a wheel for other machines, print its path")
    command.add_argument("folder", type=Path)
    command = commands.add_parser("unpack", help="make a git tree for work on the patches")
    command.add_argument("folder", type=Path)
    command = commands.add_parser("export", help="write a tree's commits back to the patch folder")
    command.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)

    try:
        series = Series.read(options.patches)
        if options.command == "install":
            install(series, build_wheel(series, options.sdist), options.python)
        elif options.command == "source":
            print(patched_source(series, options.sdist))
        elif options.command == "tools":
            print(build_tools(series, options.sdist))
        elif options.command == "stock":
            print(build_stock(series, options.sdist))
        elif options.command == "dist":
            print(build_dist(series, options.sdist, options.folder))
        elif options.command == "unpack":
            unpack(series, options.sdist, options.folder)
        elif options.command == "export":
            export(series, options.folder)
        else:
            print(build_wheel(series, options.sdist))
    except BuildError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    # like Ctrl-C, stop what was started and leave no half-made folder
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())

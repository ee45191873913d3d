#!/usr/bin/env python3
"""Compiles the kernels to a cubin for each GPU architecture, without a GPU and without a CUDA toolkit.

    python3 -m venv target/nvrtc && target/nvrtc/bin/pip install -r worker/kernels/requirements.txt
    target/nvrtc/bin/python worker/kernels/compile.py [--verbose]

Writes cubin/*.cubin and cubin/manifest.json, which are checked in. The same sources give the same bytes.
"""
import ctypes
import hashlib
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
# A100; L4, L40S and RTX 40; H100 and H200 (whose own instructions the "a" allows).
ARCHITECTURES = ["sm_80", "sm_89", "sm_90a"]
OPTIONS = ["--std=c++17", "--fmad=true"]


def nvrtc():
    """The library of PyPI's wheel. It looks for its builtins by name, so they are opened first."""
    import nvidia

    for root in nvidia.__path__:
        libraries = pathlib.Path(root) / "cu13" / "lib"
        if libraries.is_dir():
            for name in ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"]:
                library = ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            return library
    sys.exit("compile.py: there is no nvidia-cuda-nvrtc; install requirements.txt")


def compile_for(library, architecture, sources, verbose):
    def check(status):
        if status:
            sys.exit(f"compile.py: {architecture}: {library.nvrtcGetErrorString(status).decode()}")

    program = ctypes.c_void_p()
    headers = {name: text for name, text in sources.items() if name.endswith(".cuh")}
    strings = ctypes.c_char_p * len(headers)
    check(
        library.nvrtcCreateProgram(
            ctypes.byref(program),
            sources["kernels.cu"],
            b"kernels.cu",
            len(headers),
            strings(*headers.values()),
            strings(*(name.encode() for name in headers)),
        )
    )
    options = [f"--gpu-architecture={architecture}", *OPTIONS]
    if verbose:
        options.append("--ptxas-options=-v")
    status = library.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    )
    size = ctypes.c_size_t()
    check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
    log = ctypes.create_string_buffer(size.value)
    check(library.nvrtcGetProgramLog(program, log))
    if log.value:
        print(log.value.decode(), file=sys.stderr)
    check(status)
    check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
    cubin = ctypes.create_string_buffer(size.value)
    check(library.nvrtcGetCUBIN(program, cubin))
    check(library.nvrtcDestroyProgram(ctypes.byref(program)))
    return cubin.raw


def main():
    library = nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    sources = {path.name: path.read_bytes() for path in sorted(HERE.glob("*.cu*")) if path.is_file()}
    folder = HERE / "cubin"
    folder.mkdir(exist_ok=True)
    digest = lambda data: hashlib.sha256(data).hexdigest()
    cubins = {}
    for architecture in ARCHITECTURES:
        cubin = compile_for(library, architecture, sources, "--verbose" in sys.argv)
        (folder / f"{architecture}.cubin").write_bytes(cubin)
        cubins[architecture] = digest(cubin)
        print(f"{architecture}: {len(cubin)} bytes")
    manifest = {
        "nvrtc": f"{major.value}.{minor.value}",
        "requirements": (HERE / "requirements.txt").read_text().splitlines()[-1],
        "options": OPTIONS,
        "sources": {name: digest(text) for name, text in sources.items()},
        "cubins": cubins,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()

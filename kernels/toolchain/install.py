"""The compilers: wheels of fixed versions and contents, unpacked below target/, which git ignores.

A folder is named after package and version. A rename makes it appear whole, so that several commands may run at the same time. A folder
that is there already is used as it is, without network.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from toolchain.sources import KERNELS, TOOLCHAIN, Refused

FOLDER = KERNELS.parent / "target" / "cuda-toolchain"


def wheel(key):
    """The folder of an entry of "wheels" in toolchain.json. Installs it if it is not there."""
    pin = TOOLCHAIN["wheels"][key]
    requirement = f"{pin['package']}=={pin['version']}"
    folder = FOLDER / f"{pin['package']}-{pin['version']}"
    if folder.is_dir():
        return folder
    if not sys.platform.startswith("linux"):
        raise Refused("kernels are compiled on Linux; the PTX in kernels/ptx serves every system")
    FOLDER.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".unpack-", dir=FOLDER))
    try:
        print(f"installing {requirement}", flush=True)
        hashes = " ".join(f"--hash=sha256:{h}" for h in pin["sha256"])
        (work / "requirements.txt").write_text(f"{requirement} {hashes}\n")
        quiet = ["--disable-pip-version-check", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        command = [sys.executable, "-m", "pip", "download", *quiet, "--dest", work, "-r", work / "requirements.txt"]
        if subprocess.run(command).returncode != 0:
            raise Refused(f"pip could not download {requirement}: kernels are compiled with it, see kernels/README.md")
        [archive] = work.glob("*.whl")
        with zipfile.ZipFile(archive) as contents:
            contents.extractall(work / "wheel")
        for program in (work / "wheel").glob("nvidia/*/bin/*"):
            program.chmod(0o755)
        try:
            os.rename(work / "wheel", folder)
        except OSError:
            # Another command was faster.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def program(key, name):
    [path] = wheel(key).glob(f"nvidia/*/bin/{name}")
    return path

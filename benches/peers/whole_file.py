"""What programs write and print: files that are there whole or not at all, and lines that nobody has to read."""

import os
import pathlib
import sys


def writable(folder: pathlib.Path) -> None:
    """Makes the folder and ends the program unless files can be written into it: before the work whose results they hold."""
    probe = folder / f".{os.getpid()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        sys.exit(f"cannot write into the folder {folder}: {error.strerror}")


def write(path: pathlib.Path, text: str) -> None:
    """A full disk or an interrupt leaves at `path` what was there before."""
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with open(draft, "w", newline="", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def say(*parts: object) -> None:
    """`print` that goes on when its reader has left, as `head` does: the files matter more."""
    try:
        print(*parts, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115

"""From a kernel file to PTX that every supported architecture accepts. `kernels/compile.py` is the command."""

"""Makes PTX of a kernel file, and sees to it that every supported architecture accepts it. `kernels/compile.py` is the command."""

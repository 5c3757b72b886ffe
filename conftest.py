"""What pytest leaves out, in the sources as well."""

from importlib.util import find_spec

# The kernels themselves cannot be imported without Triton.
collect_ignore = [] if find_spec("triton") else ["src/tokendial/kernels/programs.py"]

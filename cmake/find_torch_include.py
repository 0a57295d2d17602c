"""Prints the folder torch/include of the torch this build is for, or nothing.

Never imports torch (seconds, and in an isolated build impossible): it looks for the folder on the search path and, as an
isolated build hides the environment's packages, in the site-packages of the environment that runs the build.
"""

import os
import sys
import sysconfig


def candidates():
    yield from sys.path
    for prefix in (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), sys.prefix, sys.base_prefix):
        if prefix:
            variables = {"base": prefix, "platbase": prefix, "installed_base": prefix, "installed_platbase": prefix}
            for name in ("purelib", "platlib"):
                yield sysconfig.get_path(name, vars=variables)


for folder in candidates():
    include = os.path.join(folder or ".", "torch", "include")
    if os.path.exists(os.path.join(include, "torch", "csrc", "stable", "library.h")):
        print(include)
        break

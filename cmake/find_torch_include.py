"""Prints the folder torch/include of the torch (2.11 or later) this build is for, or nothing.

Never imports torch (seconds, and in an isolated build impossible): it looks for the folder on the search path and, as an
isolated build hides the environment's packages, in the site-packages of the environment that runs the build.
"""

import os
import re
import site
import sys
import sysconfig

OLDEST = (2, 11)


def candidates():
    yield from sys.path
    for prefix in (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), sys.prefix, sys.base_prefix):
        if prefix:
            variables = {"base": prefix, "platbase": prefix, "installed_base": prefix, "installed_platbase": prefix}
            for name in ("purelib", "platlib"):
                yield sysconfig.get_path(name, vars=variables)
    yield site.getusersitepackages()


def version(include):
    """(major, minor) of the torch whose headers these are; (0, 0) if it has no stable ABI."""
    try:
        with open(os.path.join(include, "torch", "headeronly", "version.h")) as file:
            text = file.read()
    except OSError:
        return (0, 0)
    return tuple(int(re.search(rf"TORCH_VERSION_{part} (\d+)", text)[1]) for part in ("MAJOR", "MINOR"))


def find():
    for folder in candidates():
        include = os.path.join(folder or ".", "torch", "include")
        if version(include) >= OLDEST:
            return include
    return ""


if __name__ == "__main__":
    print(find())

"""scikit-build-core, and before anything else a look for torch.

Without this, pip would resolve the requirements, download gigabytes of torch for them, and only then build and stop: the
headers must be there before the build, and a requirement is installed after it.
"""

import os
import sys

import find_torch_include
from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403


def get_requires_for_build_wheel(config_settings=None):
    if not os.environ.get("SPARSEKIT_TORCH_INCLUDE") and not find_torch_include.find():
        sys.exit(
            "sparsekit needs the headers of an installed torch >= 2.11 and found none.\n"
            "Type:  pip install 'torch>=2.11'   and install sparsekit again, in the same environment,\n"
            "or set SPARSEKIT_TORCH_INCLUDE to the folder torch/include of any torch >= 2.11."
        )
    return _backend.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings=None):
    get_requires_for_build_wheel(config_settings)
    return _backend.get_requires_for_build_editable(config_settings)

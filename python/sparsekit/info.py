"""`python -m sparsekit.info`. The module is callable, as `sparsekit.info` is whether or not it was imported."""

import sys
import types

from ._info import info, main


class _CallableModule(types.ModuleType):
    __call__ = staticmethod(info)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    main()

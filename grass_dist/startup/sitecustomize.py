"""Python imports this when it starts, if the run of `grass_dist.run` has put its folder first in PYTHONPATH.

It arms the process, and leaves `sys.path` and the module ``sitecustomize`` as they would be without it.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec


def _arm():
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != folder]
    if os.environ.get("GRASS_DIST_RUN") == "":
        return
    sys.path.append(os.path.dirname(os.path.dirname(folder)))  # a child may look for packages in other folders
    try:
        from grass_dist.startup import VARIABLE, arm
    finally:
        sys.path.pop()
    arm(os.environ.get(VARIABLE))


def _go_on():
    """Runs the file of this name that Python would have found without ours."""
    spec = PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        sys.modules["sitecustomize"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":  # and not imported as a module of the package
    try:
        _arm()
    finally:
        _go_on()

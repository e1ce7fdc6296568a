"""Stand in for the package where a script is run as a file, `python scripts/base_train.py`: Python then looks for it in
this folder. It finds the real one, in the folder above, and puts it in the place of this module.

The usual way is `python -m scripts.base_train`, in the project's folder.
"""

import sys
from importlib import import_module
from pathlib import Path

_folder = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != _folder]
sys.path.insert(0, str(_folder.parent))
del sys.modules[__name__]
import_module("nanochat")

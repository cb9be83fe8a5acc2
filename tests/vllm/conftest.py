"""Makes the package and the shared test support importable from the source tree.

With WEIGHTD_INSTALLED set, the installed wheel is tested instead of the source tree.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at imports, also by servers that fork

_ROOT = Path(__file__).resolve().parents[2]
_PATHS = [_ROOT] if "WEIGHTD_INSTALLED" in os.environ else [_ROOT / "client" / "python", _ROOT]
for _path in _PATHS:
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))

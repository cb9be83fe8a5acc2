"""Makes the package and the shared test support importable from the source tree."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
for _path in (_ROOT / "client" / "python", _ROOT):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))

"""The tests of evaluation share the fake network with those of inference."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))

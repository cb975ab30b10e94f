"""Makes `paged_memory` importable for the tests beside it, and Triton interpret its kernels."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# Triton decides when it is imported, and its own functions with it.
os.environ.setdefault("TRITON_INTERPRET", "1")

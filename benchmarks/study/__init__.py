"""Does CKTAT help, which part of it, and with what recipe? A grid of runs, and the page that is made of them."""

import sys
from pathlib import Path

# A run is made of the examples, which import one another as modules of their own folder.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

"""Report what gates select, what that costs, and whether it pays.

explain         gate, window_size -> Explanation
Explanation     the report: print it, or use `to_json`
"""

from flexdma.tools.explain.call import explain
from flexdma.tools.explain.report import Explanation

__all__ = ["Explanation", "explain"]

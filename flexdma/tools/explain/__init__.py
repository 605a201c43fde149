"""Explanation: what a gate selects, what that costs, and whether it pays; in words and numbers.

explain         gate, window_size -> Explanation
Explanation     what it returns: prints, to_json
"""

from flexdma.tools.explain.call import explain
from flexdma.tools.explain.report import Explanation

__all__ = ["Explanation", "explain"]

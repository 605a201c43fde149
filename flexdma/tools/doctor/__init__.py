"""Find what keeps a model call from its compiled kernels.

doctor          run calls of a model and report graph breaks, recompilations, uncompiled FlexAttention, versions
Diagnosis       its result: print it, or use `ok` and `to_json`
Finding         one finding: what, where, what to do
"""

from flexdma.tools.doctor.call import doctor
from flexdma.tools.doctor.report import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "doctor"]

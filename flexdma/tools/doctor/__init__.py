"""Diagnosis: what stands between a model call and its compiled kernels.

doctor          run calls of a model and report graph breaks, recompilations, uncompiled FlexAttention, versions
Diagnosis       what it returns: prints, to_json, ok
Finding         one thing found: what, where, what to do
"""

from flexdma.tools.doctor.call import doctor
from flexdma.tools.doctor.report import Diagnosis, Finding

__all__ = ["Diagnosis", "Finding", "doctor"]

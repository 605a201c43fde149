"""Inspection: the kernels that Inductor generates for a call, on any machine.

inspect_kernels     compile one call for the tensors' device, or for a GPU that is not there
KernelReport        what it returns: prints, saves, compares
Kernel, Compiled    one kernel, and the figures of its machine code
TARGETS             the GPUs to choose from
"""

from flexdma.inspection.call import inspect_kernels
from flexdma.inspection.kernel import Compiled, Kernel
from flexdma.inspection.report import KernelDiff, KernelReport
from flexdma.inspection.targets import TARGETS

__all__ = ["TARGETS", "Compiled", "Kernel", "KernelDiff", "KernelReport", "inspect_kernels"]

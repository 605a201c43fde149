"""Report the kernels that Inductor generates for a call, on any machine.

inspect_kernels     compile one call for the tensors' device, or for a GPU on a machine without one
KernelReport        its result: print it, or use `save` and `diff`
Kernel              one kernel
Compiled            the figures of its machine code; CompiledForAMD: the same for AMD
TARGETS             the GPUs to compile for
"""

from flexdma.tools.inspect.call import inspect_kernels
from flexdma.tools.inspect.kernel import Compiled, CompiledForAMD, Kernel
from flexdma.tools.inspect.report import KernelDiff, KernelReport
from flexdma.tools.inspect.targets import TARGETS

__all__ = ["TARGETS", "Compiled", "CompiledForAMD", "Kernel", "KernelDiff", "KernelReport", "inspect_kernels"]

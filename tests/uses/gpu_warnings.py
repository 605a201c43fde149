"""Warnings of torch about itself, which only calls on a GPU cause; as filters of pytest."""

TORCHS_OWN_ON_A_GPU = (
    # Dynamo causes these two itself while it traces an autograd.Function.
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning",
    "ignore:TensorFloat32 tensor cores:UserWarning",
    "ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning",
    "ignore:Synchronization debug mode is a prototype:UserWarning",
    # Of the first, empty graph that a tree of graphs records.
    "ignore:The CUDA Graph is empty:UserWarning",
)

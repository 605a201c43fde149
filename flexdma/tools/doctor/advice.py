"""Advice on a graph break, a recompilation or an error, from the first rule whose words occur in torch's message."""

# (words, advice): any of the words, in lower case.
GRAPH_BREAKS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("`print`", "logging.", "logger", "warnings.warn"),
        "remove it, or write it under `if not torch.compiler.is_compiling():`",
    ),
    (
        ("item()", "_local_scalar_dense", "tolist", "scalar"),
        "keep the number in a tensor (torch.where, index_select); reading it also waits for the device",
    ),
    (
        ("generic_jump", "data-dependent branching", "data dependent"),
        "replace the branch on a tensor's value by torch.where or torch.cond",
    ),
    (
        ("torch.compiler.disable", "torch._dynamo.disable", "skip function", "disallowed"),
        "take the call out of the compiled region, or remove the decorator that disables compilation",
    ),
    (("numpy", "np."), "use torch's function instead of numpy's"),
    (("generator", "yield"), "return a list or a tuple instead of yielding"),
)
RECOMPILATIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("size mismatch", ".size()[", "stride mismatch", ".shape["),
        "sizes vary: pad to few lengths, or call torch._dynamo.mark_dynamic(tensor, dim) before the first call; on a CPU "
        "flexdma's flex lowering compiles for each shape, lowering='gather' does not",
    ),
    (
        ("integer attributes of the nn.module",),
        "an int attribute of the module changes: keep it as a tensor (register_buffer), or count outside forward",
    ),
    (("grad_mode",), "call it under the same grad mode each time, or expect one compilation per mode"),
    (
        ("dtype mismatch", "dispatch key set mismatch", "requires_grad mismatch"),
        "call it with tensors of the same dtype, device and requires_grad",
    ),
    (
        ("___check_obj_id", "___check_type_id", "___check_obj", "id("),
        "each call makes a new object: make it once, outside, or pass its tensors",
    ),
    (("len(",), "a container changes its length: pass a tensor, or always the same number of entries"),
    (
        (" == ", " is ", " != "),
        "a Python value changes between calls: pass it as a tensor, keep it constant, or expect one compilation per value",
    ),
)
ERRORS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("novalidchoices", "no valid choices"),
        "capture in score_mod and mask_mod only graph inputs and outputs of flexdma.opaque.realize",
    ),
    (
        ("no backward on a cpu", "does not require_grad", "backward on cpu", "requires_grad=true"),
        "FlexAttention has no CPU backward: use lowering='gather' (the default) to train, or torch.no_grad()",
    ),
    (("recompile", "fullgraph=true"), "see the recompilations: the function was compiled too often"),
    (("float64",), "compiled FlexAttention does not support float64: use float32 or bfloat16"),
    (("invalidcxxcompiler", "no working c++ compiler"), "install a C++ compiler, or set CXX"),
    (("out of memory",), "use fewer tokens or a smaller batch for the check"),
    (("",), "run the call without torch.compile: if it raises there too, the error is not one of compilation"),
)
OTHERWISE = "the reason above is torch's; TORCH_LOGS=graph_breaks,recompiles prints more"


def advice(rules: tuple[tuple[tuple[str, ...], str], ...], text: str) -> str:
    """The advice of the first rule that applies, else torch's hint, else OTHERWISE."""
    lowered = text.lower()
    for words, sentence in rules:
        if any(word in lowered for word in words):
            return sentence
    hints = [line.strip().removeprefix("Hint:").strip() for line in text.splitlines() if "Hint:" in line]
    return hints[0] if hints else OTHERWISE

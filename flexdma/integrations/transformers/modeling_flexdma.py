"""Loads the model of this folder with its gates of Dynamic Mask Attention (arXiv 2508.02124), through the package flexdma.

`save_pretrained` of a converted model copies this file into the folder, and `auto_map` in config.json names its classes, so

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

returns the converted model.  Without trust_remote_code transformers loads the model without its gates.
"""

from packaging.version import Version

# The oldest version of flexdma that can load the folder.
NEEDED = "0.1.0"
INSTALL = f"pip install 'flexdma[transformers]>={NEEDED}'"

# In a try, because transformers imports the other packages that this file names before it runs the file.
try:
    import flexdma
except ModuleNotFoundError as error:
    if error.name != "flexdma":
        raise
    raise ImportError(f"flexdma: expected {NEEDED} or newer, got none; {INSTALL}") from error
if Version(flexdma.__version__) < Version(NEEDED):
    raise ImportError(f"flexdma: expected {NEEDED} or newer, got {flexdma.__version__}; {INSTALL}")
try:
    from flexdma.integrations.transformers.auto_classes import stand_in
except ImportError as error:
    raise ImportError(f"flexdma: expected {NEEDED} or newer with transformers, got {error}; {INSTALL}") from error


def __getattr__(name: str) -> type:
    """FlexdmaConfig, FlexdmaModelForCausalLM and so on: one class for each Auto class of transformers."""
    return stand_in(name)

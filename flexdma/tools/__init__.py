"""The commands of `python -m flexdma`, one folder each, and the modules that they share.  The core imports none of them."""

"""What is built on the operator and never imported by it: the commands of `python -m flexdma`, a folder each."""

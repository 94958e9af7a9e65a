"""Kernels run on the card where there is one, and in Triton's interpreter, on CPU tensors, where there is none."""

from __future__ import annotations

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before kernels.triton is imported

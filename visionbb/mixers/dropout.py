"""Dropout that is not there when nothing is to be dropped."""

import torch
import torch.nn.functional as F
from torch import nn


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`, which outside of training hands on its input at once: PyTorch's takes some 50 us a call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.p, True, self.inplace) if self.training else x

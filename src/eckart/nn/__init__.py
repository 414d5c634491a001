"""Factored layers that run, train and save in torch."""

from eckart.nn.convolution import LowRankConv2d, PivotedConv2d
from eckart.nn.linear import LowRankLinear, PivotedLinear

FactoredLayer = LowRankLinear | PivotedLinear | LowRankConv2d | PivotedConv2d

__all__ = ["FactoredLayer", "LowRankConv2d", "LowRankLinear", "PivotedConv2d", "PivotedLinear"]

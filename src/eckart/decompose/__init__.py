"""Each matrix factored once, and kept on disk as a part. The only expensive stage."""

from eckart.decompose.part import Decomposition as Decomposition
from eckart.decompose.part import read_part as read_part
from eckart.decompose.request import Request as Request
from eckart.decompose.unit import Decomposer as Decomposer
from eckart.decompose.unit import Failure as Failure

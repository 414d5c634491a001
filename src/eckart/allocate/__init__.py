"""Spectra in, ranks out. Pure: knows no files and no tensors but singular values.

A policy sees all matrices at once, so a global budget and a per-matrix rule are one kind of thing.
"""

from collections.abc import Callable
from typing import Any

from eckart.allocate.budgets import Budget as Budget
from eckart.allocate.budgets import Keep as Keep
from eckart.allocate.budgets import Priced as Priced
from eckart.allocate.budgets import Size as Size
from eckart.allocate.item import Choice as Choice
from eckart.allocate.item import Form as Form
from eckart.allocate.item import Item as Item
from eckart.allocate.item import Terms as Terms
from eckart.allocate.item import cost as cost
from eckart.allocate.item import paying_rank as paying_rank
from eckart.allocate.loss import Loss as Loss
from eckart.allocate.policies import BELOW_FLOOR as BELOW_FLOOR
from eckart.allocate.policies import AutoRank as AutoRank
from eckart.allocate.policies import Energy as Energy
from eckart.allocate.policies import FixedRank as FixedRank
from eckart.allocate.policies import RankPolicy as RankPolicy
from eckart.allocate.policies import RelativeError as RelativeError
from eckart.allocate.uniform import one_rank as one_rank

POLICIES: dict[str, Callable[[Any], RankPolicy]] = {
    policy.name: policy for policy in (FixedRank, Energy, RelativeError, Keep, Size, Loss)
}

"""So many threads, and afterwards as many as before."""

import pytest
import torch

from eckart.linalg.threads import computing_on


def test_threads_are_as_before_afterwards():
    """Nested, and after an error too."""
    before = torch.get_num_threads()
    with computing_on(3):
        with computing_on(1):
            inner = torch.get_num_threads()
        outer = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), computing_on(2):
        raise ZeroDivisionError

    assert (inner, outer, torch.get_num_threads()) == (1, 3, before)

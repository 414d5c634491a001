"""The digest of a tensor is that of its bytes, by a published algorithm."""

import torch

from eckart.checkpoint.hashing import TensorHash, bytes_of, digest_of


def test_the_digest_is_blake3_of_the_bytes():
    """The published test vector of three bytes 0, 1, 2."""
    tensor = torch.tensor([0, 1, 2], dtype=torch.uint8)

    assert digest_of(tensor) == "e1be4d7a8ab5560aa4199eea339849ba8e293d55ca0a81006726d184519e647f"


def test_the_order_of_a_tensor_in_memory_does_not_matter():
    """A transposed view is hashed as it reads, row by row."""
    W = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)

    assert digest_of(W.mT) == digest_of(W.mT.contiguous()) != digest_of(W)


def test_pieces_give_the_digest_of_the_whole():
    """What is read piece by piece is hashed as it comes, and a copy goes on by itself."""
    W = torch.randn(300, 7)
    seen = TensorHash()
    seen.update(bytes_of(W[:100]))
    other = seen.copy()
    seen.update(bytes_of(W[100:]))

    assert seen.hexdigest() == digest_of(W)
    assert other.hexdigest() == digest_of(W[:100])

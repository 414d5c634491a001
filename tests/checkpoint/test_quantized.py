"""8-bit floats with scales beside them are read as the numbers that they stand for."""

import pytest
import torch
from builders import write_checkpoint

from eckart.checkpoint.opening import open_source
from eckart.checkpoint.quantized import dequantized

M, N = 200, 136


def scaled(m: int, n: int, shape: tuple[int, ...], side: int) -> tuple[torch.Tensor, ...]:
    """Stored numbers, their scales, and the product by plain loops over blocks."""
    generator = torch.Generator().manual_seed(m)
    W = torch.randn(m, n, generator=generator).to(torch.float8_e4m3fn)
    S = torch.rand(shape, generator=generator) + 0.5
    expected = W.float()
    if S.numel() == 1:
        return W, S, expected * S.item()
    if len(shape) == 1 or (shape[1] == 1 and shape[0] == m):
        return W, S, expected * S.reshape(m, 1)
    for i in range(shape[0]):
        for j in range(shape[1]):
            expected[i * side : (i + 1) * side, j * side : (j + 1) * side] *= S[i, j]
    return W, S, expected


@pytest.mark.parametrize("end", ["_scale_inv", "_scale"])
@pytest.mark.parametrize(
    ("shape", "side"),
    [((2, 2), 128), ((7, 5), 32), ((1,), 0), ((), 0), ((M, 1), 1), ((M,), 1)],
)
def test_weights_are_the_numbers_times_the_scales(shape, side, end, tmp_path):
    """Blocks with a rest at the borders, one scale for all, and one for each row."""
    W, S, expected = scaled(M, N, shape, side)
    tensors = {"q.weight": W, f"q.weight{end}": S, "q.bias": torch.ones(M)}
    source = open_source(write_checkpoint(tmp_path / "model", tensors))
    found = dequantized(source)

    assert found.tensors.keys() == {"q.weight", "q.bias"}
    assert torch.equal(found.load("q.weight"), expected)
    assert torch.equal(found.load("q.weight", 70, 131), expected[70:131])
    assert torch.equal(found.entries("q.weight", 1000, 9001), expected.reshape(-1)[1000:9001])
    assert found.fingerprint() == source.fingerprint()


@pytest.mark.parametrize("shape", [(3, 3), (M, 2), (2,)])
def test_scales_of_an_unknown_shape_leave_the_tensor_as_it_is(shape, tmp_path):
    """Nothing is guessed."""
    W = torch.zeros(M, N).to(torch.float8_e4m3fn)
    tensors = {"q.weight": W, "q.weight_scale_inv": torch.ones(shape)}
    source = open_source(write_checkpoint(tmp_path / "model", tensors))

    assert dequantized(source) is source


def test_a_checkpoint_without_8_bit_floats_is_itself(tmp_path):
    """Nothing to do."""
    source = open_source(write_checkpoint(tmp_path / "model", {"q.weight": torch.ones(2, 2)}))

    assert dequantized(source) is source

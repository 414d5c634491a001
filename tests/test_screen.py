"""Documents as tables: whatever the width, every figure is there with all its digits."""

import io

import pytest
from builders import decaying, small_tensors, write_checkpoint, write_moments
from rich.console import Console

from eckart import compress, extract
from eckart.screen import adapter_table, certificate_table


def shown(table, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_narrow_terminal_takes_no_digit_from_an_adapters_figures(width, tmp_path):
    """Names go on in the next line instead."""
    name = "model.layers.31.self_attn.q_proj.weight"
    base = {name: decaying("W", 192, 128), "lm_head.weight": decaying("head", 96, 128)}
    tuned = {key: tensor + 0.01 * decaying(key, *tensor.shape) for key, tensor in base.items()}
    src = write_checkpoint(tmp_path / "tuned", tuned), write_checkpoint(tmp_path / "base", base)
    certificate = extract(*src, tmp_path / "out", rank=4)
    text = shown(adapter_table(certificate, width), width)

    assert "…" not in text
    for row in certificate.matrices:
        assert f"{row.relative_error:.3g}" in text
        assert f"{row.energy_share:.2%}" in text
        assert "×".join(map(str, row.shape)) in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_error_in_the_metric_stands_beside_the_optimum_in_the_metric(width, tmp_path):
    """Plain errors beside an optimum of another norm could not be compared."""
    src = write_checkpoint(tmp_path / "src", small_tensors(layers=2))
    statistics = write_moments(tmp_path / "S", src).folder
    certificate = compress(src, tmp_path / "out", keep=0.6, statistics=statistics)
    text = shown(certificate_table(certificate, width), width)

    assert "in the metric" in text
    for row in certificate.matrices:
        assert row.metric_error is not None
        assert f"{row.metric_error:.3g}" in text

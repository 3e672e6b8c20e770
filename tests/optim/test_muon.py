"""Muon's orthogonalisation."""

import pytest
import torch

from hybridlm.optim.muon import muon_updates, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_directions(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    result = orthogonalize(matrix, 8)
    values = torch.linalg.svdvals(result)
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ result @ vh.T
    assert float((inner - inner.diagonal().diag()).abs().max()) < 1e-6


def test_fused_projections_are_orthogonalised_block_by_block():
    torch.manual_seed(0)
    fused, plain = torch.randn(10, 6), torch.randn(4, 6)
    got = muon_updates([fused, plain], [(4, 6), ()], 5)
    parts = [orthogonalize(fused[:4], 5), orthogonalize(fused[4:], 5)]
    torch.testing.assert_close(got[0], torch.cat(parts))
    torch.testing.assert_close(got[1], orthogonalize(plain, 5))

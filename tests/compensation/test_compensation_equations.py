"""Normal equations against numpy's least squares over collected matrices."""

import numpy as np
import pytest
import torch

from avss.compensation.equations import NormalEquations, choose_ridge

GROUPS, OUTPUTS = (3, 4), 5


def drawn(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_tokens, sum(GROUPS), generator=generator, dtype=torch.float64)
    features[:, 3:] *= 100  # the second group lives on another scale
    residuals = torch.randn(num_tokens, OUTPUTS, generator=generator, dtype=torch.float64) + 0.01 * features[:, :5]
    return features, residuals, torch.rand(num_tokens, generator=generator, dtype=torch.float64) + 0.1


def summed(features, residuals, weights=None, *, affine=False, pieces=1) -> NormalEquations:
    equations = NormalEquations.empty(GROUPS, OUTPUTS, affine=affine)
    for rows in torch.arange(len(features)).chunk(pieces):
        equations.add(features[rows], residuals[rows], None if weights is None else weights[rows])
    return equations


def ridge_by_numpy(features, residuals, weights, ridge, *, affine=False, anchors=None):
    """Ridge regression as ordinary least squares over extra rows, one a feature."""
    own = np.hstack([features, np.ones((len(features), 1))]) if affine else features
    scales = [np.mean(np.sum(weights[:, None] * features[:, group] ** 2, 0)) for group in (slice(0, 3), slice(3, 7))]
    shrink = np.diag(np.sqrt(ridge * np.repeat(scales, GROUPS)))
    shrink = np.hstack([shrink, np.zeros((len(shrink), 1))]) if affine else shrink
    rows = [np.sqrt(weights)[:, None] * own, shrink]
    targets = [np.sqrt(weights)[:, None] * residuals, np.zeros((len(shrink), OUTPUTS))]
    if anchors is not None:
        rows, targets = [*rows, anchors[0]], [*targets, anchors[1]]
    return np.linalg.lstsq(np.vstack(rows), np.vstack(targets), rcond=None)[0]


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_solution_is_that_of_least_squares(ridge, affine, weighted):
    features, residuals, weights = drawn(60)
    equations = summed(features, residuals, weights if weighted else None, affine=affine, pieces=3)
    expected = ridge_by_numpy(
        features.numpy(), residuals.numpy(), weights.numpy() if weighted else np.ones(60), ridge, affine=affine
    )
    np.testing.assert_allclose(equations.solve(ridge).numpy(), expected, rtol=1e-6, atol=1e-9)


def test_anchors_are_fitted_and_change_neither_scale_nor_error():
    features, residuals, _ = drawn(60)
    giant, aim = 1e4 * features[:2] + 1, residuals[:2] * 50
    equations = summed(features, residuals)
    bare = equations.error()
    equations.add_anchors(giant, aim)
    expected = ridge_by_numpy(
        features.numpy(), residuals.numpy(), np.ones(60), 0.1, anchors=(giant.numpy(), aim.numpy())
    )
    np.testing.assert_allclose(equations.solve(0.1).numpy(), expected, rtol=1e-5, atol=1e-9)
    assert equations.error() == bare
    assert equations.num_tokens == 60


def test_split_into_pieces_changes_nothing():
    features, residuals, weights = drawn(64)
    whole, pieces = (summed(features, residuals, weights, affine=True, pieces=count) for count in (1, 7))
    torch.testing.assert_close(whole.gram, pieces.gram)
    torch.testing.assert_close(whole.cross, pieces.cross)
    assert whole.power == pytest.approx(pieces.power)
    assert whole.weight == pytest.approx(pieces.weight)


@pytest.mark.parametrize("affine", [False, True])
def test_error_is_the_mean_square_of_what_is_left(affine):
    features, residuals, weights = drawn(40)
    equations = summed(features, residuals, weights, affine=affine)
    solution = torch.randn(sum(GROUPS) + affine, OUTPUTS, dtype=torch.float64) * 0.01
    own = torch.cat([features, torch.ones(40, 1, dtype=torch.float64)], dim=1) if affine else features
    left = (weights[:, None] * (residuals - own @ solution) ** 2).sum() / weights.sum()
    assert equations.error(solution) == pytest.approx(float(left))
    assert equations.error() == pytest.approx(float((weights[:, None] * residuals**2).sum() / weights.sum()))


def test_ridge_is_the_one_with_the_least_error_on_held_out_tokens():
    fit, held = summed(*drawn(12, seed=1)[:2]), summed(*drawn(200, seed=2)[:2])
    ridges = (1e-6, 1e-2, 1.0, 100.0)
    ridge, solution = choose_ridge(fit, held, ridges)
    errors = {tried: held.error(fit.solve(tried)) for tried in ridges}
    assert errors[ridge] == min(errors.values())
    assert ridge > 1e-6, "twelve tokens for seven features overfit: the oracle would be blind otherwise"
    torch.testing.assert_close(solution, fit.solve(ridge))


def test_feature_that_is_always_zero_keeps_its_weights_at_zero():
    features, residuals, _ = drawn(30)
    features[:, :3] = 0
    solution = summed(features, residuals).solve(1e-3)
    assert bool((solution[:3] == 0).all())
    assert bool(torch.isfinite(solution).all())

"""Encoders: shapes under any left batch dimensions, scales that stay positive, inputs of every kind."""

import pickle

import pytest
import torch

from pyro_ilvae import ConvEncoder, MLPEncoder

ENCODERS = {
    "mlp": (lambda **options: MLPEncoder(event_shape=(6, 5), latent_dim=2, hidden_features=(8,), **options), (6, 5)),
    "conv": (
        lambda **options: ConvEncoder(event_shape=(6, 5), latent_dim=2, channels=(3,), hidden_features=(8,), **options),
        (6, 5),
    ),
    "conv-deep": (
        lambda **options: ConvEncoder(
            event_shape=(2, 9, 7), latent_dim=2, channels=(3, 4, 5), hidden_features=(8,), **options
        ),
        (2, 9, 7),
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("batch_shape", [(), (1,), (4,), (3, 4), (2, 1, 3)])
def test_batch_shapes(name, batch_shape):
    build, event_shape = ENCODERS[name]
    encoder = build()
    x = torch.randn(*batch_shape, *event_shape)
    loc, scale = encoder(x)
    assert loc.shape == scale.shape == (*batch_shape, 2)
    one_by_one = [encoder(datum) for datum in x.reshape(-1, *event_shape)]
    torch.testing.assert_close(loc.reshape(-1, 2), torch.stack([one[0] for one in one_by_one]))
    torch.testing.assert_close(scale.reshape(-1, 2), torch.stack([one[1] for one in one_by_one]))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_scale_is_positive_with_a_finite_log(name, dtype, size):
    build, event_shape = ENCODERS[name]
    _, scale = build().to(dtype)(size * torch.randn(50, *event_shape, dtype=dtype))
    assert scale.dtype == dtype
    assert scale.log().isfinite().all()


@pytest.mark.parametrize("name", ENCODERS)
def test_guides_start_near_the_scale_of_the_prior(name):
    build, event_shape = ENCODERS[name]
    _, scale = build()(torch.rand(50, *event_shape))
    assert 0.5 < scale.mean() < 2


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_integers_are_their_values(name, dtype):
    build, event_shape = ENCODERS[name]
    encoder = build()
    x = torch.randint(2, (4, *event_shape)).to(dtype)
    torch.testing.assert_close(encoder(x), encoder(x.float()))


@pytest.mark.parametrize("name", ENCODERS)
def test_input_transform(name):
    build, event_shape = ENCODERS[name]
    encoder, counts = build(input_transform=torch.log1p), torch.randint(1000, (4, *event_shape))
    expected = encoder(counts)
    encoder.input_transform = None
    torch.testing.assert_close(encoder(torch.log1p(counts)), expected)
    restored = pickle.loads(pickle.dumps(build(input_transform=torch.log1p)))
    assert restored.input_transform is torch.log1p


@pytest.mark.parametrize("name", ENCODERS)
def test_refuses_other_shapes(name):
    build, event_shape = ENCODERS[name]
    with pytest.raises(ValueError, match=r"Expected x of shape \(\.\.\., .*\), got"):
        build()(torch.zeros(4, *event_shape[:-1], event_shape[-1] + 1))
    with pytest.raises(ValueError, match="latent_dim"):
        type(build())(event_shape=event_shape, latent_dim=0)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("num_components", [1, 3, 50])
@pytest.mark.parametrize("batch_shape", [(), (4,), (3, 4), (2, 1, 3)])
def test_posteriors_of_components(name, num_components, batch_shape):
    build, event_shape = ENCODERS[name]
    encoder = build(num_components=num_components)
    x = torch.randn(*batch_shape, *event_shape)
    output = encoder(x)
    shape = (num_components, 2)
    assert [part.shape for part in output] == [(*batch_shape, *shape[:1]), *[(*batch_shape, *shape)] * 2]
    assert 0.5 < output[2].mean() < 2
    one_by_one = zip(*map(encoder, x.reshape(-1, *event_shape)), strict=True)
    for part, ones in zip(output, one_by_one, strict=True):
        torch.testing.assert_close(part.reshape(-1, *ones[0].shape), torch.stack(ones))


@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_of_components_have_weights_of_their_own(name):
    """One row of the last layer for each logit, location and scale, and no other output moves with it."""
    encoder, event_shape = ENCODERS[name][0](num_components=3), ENCODERS[name][1]
    x = torch.randn(*event_shape)
    before = torch.cat([part.flatten() for part in encoder(x)])
    assert len(encoder.network[-1].bias) == len(before) == 3 + 2 * 3 * 2
    moved = []
    for i in range(len(before)):
        with torch.no_grad():
            encoder.network[-1].bias[i] += 1
            [changed] = (torch.cat([part.flatten() for part in encoder(x)]) - before).abs().gt(1e-3).nonzero()
            encoder.network[-1].bias[i] -= 1
        moved.append(int(changed))
    assert sorted(moved) == list(range(len(before)))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_refuses_numbers_of_components(name, value):
    with pytest.raises(ValueError, match="Expected num_components to be an int >= 1"):
        ENCODERS[name][0](num_components=value)

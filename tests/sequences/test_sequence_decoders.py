"""The decoders of sequences: the inverse Lipschitz inequality for every history, causality, and the contract."""

import copy
import pickle

import pytest
import torch
from helpers.decoders import perturb
from helpers.sequence_decoders import (
    DECODERS,
    EVERY_DECODER,
    EVERY_INVERSE_LIPSCHITZ_DECODER,
    HISTORIES,
    INVERSE_LIPSCHITZ_DECODERS,
    LATENT,
    VOCAB,
    WIDTH,
    composition,
    projected,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_ilvae import (
    InverseLipschitzDecoder,
    MLPDecoder,
    ProjectedDecoder,
    RecurrentHistory,
    SequenceDecoder,
    mlp,
    principal_token_frame,
)
from pyro_ilvae.decoders.frame_arguments import make_frame
from pyro_ilvae.diagnostics import lipschitz_audit
from pyro_ilvae.distributions import TokenSequence

LENGTH = 5


def centered(logits):
    """What the softmax sees of them."""
    return logits - logits.mean(-1, keepdim=True)


def smallest_ratio(decoder, x, distance, num_pairs=64):
    """The smallest ratio of distances of logits, centered or not, to distances of z, over pairs and positions."""
    z = 3 * torch.randn(num_pairs, 1, LATENT, dtype=torch.float64)
    other = z + distance * torch.randn_like(z)
    with torch.no_grad():
        difference = decoder(z, x) - decoder(other, x)
    length = (z - other).norm(dim=-1)[..., None]
    assert (centered(difference).norm(dim=-1) <= difference.norm(dim=-1) * (1 + 1e-9)).all()
    return float((centered(difference).norm(dim=-1) / length).min())


@pytest.mark.parametrize("name", EVERY_INVERSE_LIPSCHITZ_DECODER)
@pytest.mark.parametrize("constant", [0.0, 0.7, 5.0])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000), distance=st.sampled_from([1e-3, 1.0, 30.0]))
def test_inverse_lipschitz_for_every_history_after_perturbation(name, constant, seed, distance):
    torch.manual_seed(seed)
    decoder = perturb(INVERSE_LIPSCHITZ_DECODERS[name](constant).double())
    assert smallest_ratio(decoder, tokens(4, LENGTH, seed), distance) >= constant * (1 - 1e-6)
    decoder.inverse_lipschitz = 2.0
    assert smallest_ratio(decoder, tokens(4, LENGTH, seed + 1), distance) >= 2.0 * (1 - 1e-6)


@pytest.mark.parametrize("name", INVERSE_LIPSCHITZ_DECODERS)
def test_smallest_singular_value_of_the_centered_jacobian(name):
    decoder = perturb(INVERSE_LIPSCHITZ_DECODERS[name](1.5).double())
    x = tokens(1, LENGTH, seed=3)
    decoder(torch.zeros(1, LATENT, dtype=torch.float64), x)
    for z in torch.randn(5, 1, LATENT, dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(lambda z: centered(decoder(z, x))[0], z).squeeze(-2)
        assert torch.linalg.svdvals(jacobian).min() >= 1.5 * (1 - 1e-6)


@pytest.mark.parametrize("kind", [composition, projected])
def test_the_constant_and_the_frame_survive_conversions_and_files(kind):
    decoder = perturb(kind(HISTORIES["gru"], 1.5)).double().float().double()
    restored = kind(HISTORIES["gru"], 0.0).double()
    restored.load_state_dict(decoder.state_dict())
    for one in (decoder, restored, pickle.loads(pickle.dumps(decoder)), copy.deepcopy(decoder)):
        assert one.inverse_lipschitz == pytest.approx(1.5)
        assert smallest_ratio(one, tokens(4, LENGTH), 1.0) >= 1.5 * (1 - 1e-6)
        assert one.decoder.frame.matrix.sum(0).abs().max() < 1e-6


@pytest.mark.parametrize(("kind", "features"), [(composition, LATENT + 4), (projected, LATENT)])
def test_a_frame_from_data(kind, features):
    matrix = principal_token_frame(tokens(50, LENGTH), vocab_size=VOCAB, latent_dim=features)
    decoder = perturb(kind(HISTORIES["gru"], 1.5, frame=matrix).double())
    assert smallest_ratio(decoder, tokens(4, LENGTH), 1.0) >= 1.5 * (1 - 1e-6)


class Bilinear(torch.nn.Module):
    """A backbone that does what it can to undo the map."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, LATENT, VOCAB))

    def forward(self, z, context):
        return self.scale * torch.einsum("nc,nk,ckv->nv", context, z, self.weight)


@pytest.mark.parametrize("scale", [-100.0, 0.0, 100.0])
def test_any_backbone_can_be_projected(scale):
    decoder = projected(HISTORIES["gru"], 1.5, backbone=Bilinear(scale)).double()
    x, z = tokens(4, LENGTH), torch.randn(4, LATENT, dtype=torch.float64)
    assert decoder(z, x).shape == (4, LENGTH, VOCAB)
    values = [smallest_ratio(decoder, row.unsqueeze(0), 1.0, 1) for row in x]
    assert min(values) >= 1.5 * (1 - 1e-6)


@pytest.mark.parametrize("name", EVERY_DECODER)
def test_a_decoder_at_one_history_is_a_function_of_z(name):
    decoder = DECODERS[name]().double()
    x, z = torch.randint(VOCAB, (4,)), torch.randn(6, LATENT, dtype=torch.float64)
    given = decoder.given(x)
    torch.testing.assert_close(given(z), decoder(z, x.expand(6, 4)))
    assert given.event_shape == (4, VOCAB)
    if name not in INVERSE_LIPSCHITZ_DECODERS:
        assert given.inverse_lipschitz is None
        return
    audit = lipschitz_audit(given, num_samples=50, steps=5, seed=0)
    assert audit.certified == pytest.approx(2 * decoder.inverse_lipschitz)
    assert audit.smallest >= audit.certified * (1 - 1e-6)


def test_frame_has_to_say_whether_it_is_centered():
    decoder = DECODERS["plain-gru"]().decoder
    decoder.frame = torch.eye(VOCAB)[:, :LATENT]
    with pytest.raises(ValueError, match="frame that has the method coordinates, got Tensor"):
        SequenceDecoder("gru", decoder)


@pytest.mark.parametrize("event_shape", [(5,), (2, 4)])
def test_ordinary_decoders_take_centered_frames(event_shape):
    features = torch.Size(event_shape).numel()
    for decoder in (
        ProjectedDecoder(
            mlp(2, (8,), features), latent_dim=2, event_shape=event_shape, inverse_lipschitz=1.5, frame="centered"
        ),
        InverseLipschitzDecoder(
            latent_dim=2, event_shape=event_shape, inverse_lipschitz=1.5, map_features=(8,), frame="centered"
        ),
    ):
        perturb(decoder.double())
        z, other = torch.randn(2, 100, 2, dtype=torch.float64)
        difference = centered(decoder(z) - decoder(other)).flatten(1).norm(dim=-1)
        assert (difference >= 1.5 * (z - other).norm(dim=-1) * (1 - 1e-6)).all()
    free = features - features // event_shape[-1]
    ProjectedDecoder(
        mlp(free, (8,), features), latent_dim=free, event_shape=event_shape, inverse_lipschitz=1.5, frame="centered"
    )
    with pytest.raises(ValueError, match=f"Expected latent_dim <= {free} with frame='centered', got {free + 1}"):
        ProjectedDecoder(
            mlp(free + 1, (8,), features),
            latent_dim=free + 1,
            event_shape=event_shape,
            inverse_lipschitz=1.5,
            frame="centered",
        )


@pytest.mark.parametrize(("event_shape", "columns"), [((2,), 1), ((2, 2), 2)])
def test_centered_frames_are_centered_to_rounding(event_shape, columns):
    """Also where the draws are almost equal, so that little is left of them when they are centered."""
    for seed in range(200):
        torch.manual_seed(seed)
        frame = make_frame("centered", torch.Size(event_shape), columns).matrix
        assert frame.reshape(*event_shape, columns).sum(-2).abs().max() < 1e-5
        torch.testing.assert_close(frame.mT @ frame, torch.eye(columns), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", EVERY_DECODER)
def test_causality(name):
    decoder = perturb(DECODERS[name]().double(), 0.5).eval()
    x = torch.randint(VOCAB, (6, LENGTH))
    z = torch.randn(6, LATENT, dtype=torch.float64)
    before = decoder(z, x)
    for t in range(LENGTH):
        changed = x.clone()
        changed[:, t:] = (changed[:, t:] + torch.randint(1, VOCAB, (6, LENGTH - t))) % VOCAB
        after = decoder(z, changed)
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=1e-12, atol=1e-12)
        if t + 1 < LENGTH:
            assert ((after - before)[:, t + 1 :].abs().amax((1, 2)) > 1e-6).all()
    # What stands in place of tokens after the last one does not matter either.
    padded = x.clone()
    padded[:, 3:] = -1
    torch.testing.assert_close(decoder(z, padded)[:, :4], before[:, :4], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EVERY_DECODER)
def test_left_dimensions_are_a_loop_over_them(name):
    decoder = DECODERS[name]().double().eval()
    x, z = tokens(4, LENGTH), torch.randn(3, 2, 4, LATENT, dtype=torch.float64)
    logits = decoder(z, x)
    assert logits.shape == (3, 2, 4, LENGTH, VOCAB)
    torch.testing.assert_close(logits[1, 1], decoder(z[1, 1], x))
    several = torch.stack([x, x.roll(1, 0)])
    torch.testing.assert_close(decoder(z, several)[:, 1], decoder(z[:, 1], several[1]))


@pytest.mark.parametrize("name", EVERY_DECODER)
def test_word_dropout_is_of_training_and_hides_tokens_only(name):
    decoder = DECODERS[name](word_dropout=0.3).double()
    x = torch.randint(VOCAB, (4000, 2))
    z = torch.randn(4000, LATENT, dtype=torch.float64)
    shown, hidden = decoder.eval()(z, x), decoder(z, x).clone()
    assert torch.equal(shown, hidden)
    dropped = decoder.train()(z, x)
    assert torch.equal(dropped[:, 0], shown[:, 0])
    rate = (dropped[:, 1] != shown[:, 1]).any(-1).double().mean()
    assert abs(rate - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5
    blind = DECODERS[name](word_dropout=1.0).double().train()
    torch.testing.assert_close(blind(z, x), blind(z, torch.randint(VOCAB, x.shape)))
    assert not torch.allclose(blind.eval()(z, x), blind(z, (x + 1) % VOCAB))


@pytest.mark.parametrize("name", EVERY_DECODER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_no_grad(name, dtype):
    decoder = DECODERS[name]().to(dtype)
    x, z = tokens(4, LENGTH), torch.randn(4, LATENT, dtype=dtype)
    with torch.no_grad():
        expected = decoder(z, x)
    assert expected.dtype == dtype
    torch.testing.assert_close(decoder(z, x), expected, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("from_data", [False, True])
def test_memory_is_linear_in_a_vocabulary_of_50000(from_data):
    vocab_size, hidden, batch = 50_000, 8, 2
    x = torch.randint(vocab_size, (batch, 3))
    sizes = {"latent_dim": LATENT, "event_shape": vocab_size, "context_dim": hidden}
    with LargestTensor() as largest:
        history = RecurrentHistory(vocab_size, embedding_features=8, hidden_features=hidden)
        frame = "centered"
        if from_data:
            frame = principal_token_frame(torch.arange(30).reshape(10, 3), vocab_size=vocab_size, latent_dim=LATENT)
        backbone = MLPDecoder(**sizes, hidden_features=(hidden,))
        decoder = SequenceDecoder(history, ProjectedDecoder(backbone, **sizes, inverse_lipschitz=2.0, frame=frame))
        TokenSequence(decoder(torch.randn(batch, LATENT), x), x).log_prob(x).sum().backward()
    assert largest.numel <= max((vocab_size + 2) * 8, x.numel() * vocab_size)


def over(decoder=MLPDecoder, history="gru", word_dropout=0.0, **options):
    """A decoder of sequences over a decoder of nine logits, whose sizes may be wrong."""
    options = {"latent_dim": 2, "event_shape": 9, "context_dim": WIDTH} | options
    return SequenceDecoder(history, decoder(**options), word_dropout=word_dropout)


def projected_plain(**options):
    sizes = {name: options[name] for name in ("latent_dim", "event_shape", "context_dim")}
    return ProjectedDecoder(MLPDecoder(**sizes, hidden_features=(4,)), **options)


class OtherBackbone(torch.nn.Module):
    """A backbone of four numbers instead of nine."""

    def forward(self, z, context):
        return z.new_zeros(len(z), 4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: over(word_dropout=1.5), r"word_dropout .*\[0, 1\], got 1.5"),
        (lambda: over(word_dropout=-0.1), r"word_dropout .*\[0, 1\], got -0.1"),
        (lambda: over(history="rnn"), "history .* 'gru', 'lstm', 'transformer' or a module, got 'rnn'"),
        (lambda: over(history=torch.nn.Linear(2, 2)), f"history .*features = {WIDTH}, .*got None"),
        (lambda: over(history=HISTORIES["gru"](), context_dim=WIDTH + 1), f"history .*features = {WIDTH + 1}, .*got 8"),
        (lambda: over(history=HISTORIES["lstm"](), event_shape=10), "history .*vocab_size = 10, .*got 9"),
        (lambda: over(context_dim=None), "decoder .*context_dim.*got MLPDecoder"),
        (lambda: SequenceDecoder("gru", torch.nn.Linear(2, 9)), "decoder .*context_dim.*got Linear"),
        (lambda: over(event_shape=(3, 3)), r"decoder with event_shape .*got \(3, 3\)"),
        (lambda: over().given(torch.tensor([3, -1])), "no padding"),
        (lambda: over().given(torch.tensor([[3, 1]])), r"x of shape \(T,\)"),
        (lambda: over()(torch.zeros(4, 3), tokens(4, 2)), r"z of shape \(..., 2\), got \(4, 3\)"),
        (lambda: over().begin(torch.zeros(4, 3)), r"z of shape \(..., 2\), got \(4, 3\)"),
        *[
            (lambda build=build, frame=frame: over(build, frame=frame), "frame whose columns .*sum to up to")
            for build in (projected_plain, InverseLipschitzDecoder)
            for frame in ("identity", "random", torch.eye(9)[:, : 2 if build is projected_plain else 5])
        ],
        (lambda: over(projected_plain, frame=torch.ones(9, 2)), "orthonormal"),
        (
            lambda: projected(HISTORIES["gru"], backbone=OtherBackbone())(torch.zeros(3, LATENT), tokens(3, 1)),
            r"Expected backbone to return shape \(3, 9\).*, got \(3, 4\)",
        ),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()

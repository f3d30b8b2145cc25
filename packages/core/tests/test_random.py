import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robust_core.random import SampleStreams, derive, resolve_seed, stream

MAX = (1 << 63) - 1
seeds = st.integers(0, MAX)
quick = settings(deadline=None, derandomize=True, max_examples=40)


def streams(n=64, seed=0, purpose="test"):
    return SampleStreams(seed, torch.arange(n), purpose)


@pytest.mark.quick
def test_seeds():
    assert resolve_seed(None) == 0
    assert resolve_seed(7) == 7
    assert resolve_seed(MAX) == MAX
    generator = torch.Generator().manual_seed(3)
    first, second = resolve_seed(generator), resolve_seed(generator)
    assert first != second
    assert first == resolve_seed(torch.Generator().manual_seed(3))
    for bad in (-1, MAX + 1):
        with pytest.raises(ValueError, match="generator"):
            resolve_seed(bad)
    for bad in (1.0, True, "1"):
        with pytest.raises(TypeError, match="generator"):
            resolve_seed(bad)


@pytest.mark.quick
def test_derived_seeds_depend_on_every_part_its_type_and_the_order():
    paths = [(), (1,), (2,), ("1",), (1, 2), (2, 1), (12,), ("1", 2), ("a",), ("a", "b"), ("ab",), ("b", "a"), (-1,)]
    found = [derive(5, *path) for path in paths] + [derive(6), derive(51), derive(5, 1, 0)]
    assert len(set(found)) == len(found)
    assert all(0 <= value <= MAX for value in found)
    assert derive(0, "attack", 3) == derive(0, "attack", 3)


def test_derived_seeds_are_the_same_in_every_release():
    # A change here changes every published number: it needs a changelog entry.
    assert (derive(0, "attack", 3), derive(1)) == (6905865438235413488, 8518482412311870710)


@quick
@given(seeds, st.lists(st.integers(0, 10**9), min_size=1, max_size=20, unique=True), st.randoms())
def test_rows_do_not_depend_on_company_order_or_size(seed, index, random):
    whole = SampleStreams(seed, torch.tensor(index), "noise")
    shuffled = index.copy()
    random.shuffle(shuffled)
    turned = SampleStreams(seed, torch.tensor(shuffled), "noise")
    place = [index.index(i) for i in shuffled]
    for draw in (
        lambda s: s.normal((3, 2)),
        lambda s: s.uniform((5,), dtype=torch.float64),
        lambda s: s.integers(10, (4,)),
        lambda s: s.signs((3,)),
        lambda s: s.normal((3,), chunk=2),
    ):
        assert torch.equal(draw(whole)[place], draw(turned))
        alone = SampleStreams(seed, torch.tensor(index[:1]), "noise")
        assert torch.equal(draw(whole)[:1], draw(alone))
    rows = torch.tensor(place[:3])
    assert torch.equal(whole.select(rows).uniform((4,)), whole.uniform((4,))[rows])
    chunks = torch.arange(len(index)) % 3
    mixed = whole.uniform((4,), chunk=chunks)
    for chunk in range(3):
        assert torch.equal(mixed[chunks == chunk], whole.uniform((4,), chunk=chunk)[chunks == chunk])


@pytest.mark.quick
def test_seed_index_purpose_and_chunk_all_matter():
    base = streams().uniform((8,))
    for other in (
        streams(seed=1).uniform((8,)),
        streams(purpose="other").uniform((8,)),
        streams().uniform((8,), chunk=1),
        SampleStreams(0, torch.arange(64) + 64, "test").uniform((8,)),
    ):
        assert not bool((base == other).any())


def test_native_streams_are_pure_functions_too():
    first, again = (torch.rand(5, generator=stream(1, 2, "a")) for _ in range(2))
    assert torch.equal(first, again)
    for arguments in ((2, 2, "a"), (1, 3, "a"), (1, 2, "b")):
        assert not torch.equal(first, torch.rand(5, generator=stream(*arguments)))
    assert not torch.equal(first, torch.rand(5, generator=stream(1, 2, "a", chunk=1)))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    streams().normal((4,))
    stream(0, 0, "a")
    resolve_seed(None)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_stays_between_its_ends(dtype):
    values = streams(2000).uniform((200,), dtype=dtype)
    assert values.dtype == dtype
    assert float(values.min()) > 0 if dtype != torch.bfloat16 else float(values.min()) >= 0
    if dtype in (torch.float32, torch.float64):  # half precision rounds values near 1 up to it
        assert float(values.max()) < 1


def _mix(word):
    """SplitMix64's finaliser on whole numbers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def test_words_are_those_of_whole_number_arithmetic():
    golden, factor, index, chunks = 0x9E3779B97F4A7C15, 0x94D049BB133111EB, [0, 5, 2**40], [3, 0, MAX]
    source = SampleStreams(7, torch.tensor(index), "reference")
    found = source.words((5,), chunk=torch.tensor(chunks))
    for row, (i, chunk) in enumerate(zip(index, chunks, strict=True)):
        key = _mix((_mix((i * golden + derive(7, "reference")) % 2**64) + chunk * factor) % 2**64)
        wanted = [_mix((_mix((k * golden + key) % 2**64) + key) % 2**64) for k in range(5)]
        assert [int(word) % 2**64 for word in found[row]] == wanted
    uniform = source.uniform((5,), chunk=torch.tensor(chunks), dtype=torch.float64)
    assert [float(u) for u in uniform[1]] == [((int(w) % 2**64 >> 12) + 0.5) / 2**52 for w in found[1]]


def test_extreme_words_still_give_interior_uniforms_and_finite_normals():
    source = streams(1)
    for word in (0, -1, MAX, -MAX - 1):
        source.words = lambda shape, chunk=0, word=word: torch.full((1, *shape), word, dtype=torch.int64)
        for dtype in (torch.float32, torch.float64):
            assert 0 < float(source.uniform((1,), dtype=dtype)) < 1
            assert bool(torch.isfinite(source.normal((1,), dtype=dtype)).all())
        assert 0 <= int(source.integers(10, (1,))) < 10


def test_distributions_across_samples_and_along_them():
    """Kolmogorov-Smirnov within samples, across samples, and over chunks; a false alarm once in 1e5 tests."""
    many = SampleStreams(11, torch.arange(20_000) * 7, "ks")
    single = SampleStreams(11, torch.tensor([3]), "ks")
    uniforms = {
        "across": many.uniform((1,), dtype=torch.float64).flatten(),
        "along": single.uniform((20_000,), dtype=torch.float64).flatten(),
        "over chunks": torch.cat([single.uniform((1,), chunk=c, dtype=torch.float64).flatten() for c in range(5000)]),
    }
    for name, values in uniforms.items():
        assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-5, name
    for values in (many.normal((1,)), single.normal((20_000,))):
        assert stats.kstest(values.flatten().double().numpy(), "norm").pvalue > 1e-5
    signs = many.signs((4,))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 5 / math.sqrt(signs.numel())


def test_neighbours_are_uncorrelated():
    """Consecutive indices, counters, seeds and chunks: correlations like those of independent draws."""
    n = 20_000

    def line(seed=0, start=0, chunk=0, column=0):
        source = SampleStreams(seed, torch.arange(start, start + n), "corr")
        return source.uniform((2,), chunk=chunk, dtype=torch.float64)[:, column]

    base = line()
    others = {"index": line(start=1), "counter": line(column=1), "seed": line(seed=1), "chunk": line(chunk=1)}
    for name, other in others.items():
        correlation = float(torch.corrcoef(torch.stack([base, other]))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(n), name
        bits = (base < 0.5) ^ (other < 0.5)
        assert abs(float(bits.double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(n), name


def test_every_bit_of_the_words_is_fair():
    words = streams(4000).words((8,)).flatten()
    for bit in range(64):
        share = float(((words >> bit) & 1).double().mean())
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(len(words)), bit
    assert len(words.unique()) == len(words)


def test_integers_are_even_and_broadcast():
    values = streams(5000).integers(10, (10,))
    assert values.dtype == torch.int64
    counts = torch.bincount(values.flatten(), minlength=10).numpy()
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > 1e-5
    high = torch.arange(1, 65)[:, None]
    rows = streams().integers(high, (100,))
    assert bool((rows < high).all())
    assert bool((rows >= 0).all())
    assert bool((rows[0] == 0).all())


def test_shapes():
    for shape in ((), (1,), (2, 3), (0,)):
        assert streams(5).normal(shape).shape == (5, *shape)
        assert streams(5).words(shape).shape == (5, *shape)
    assert streams(0).uniform((3,)).shape == (0, 3)


def test_chunks_of_a_sample_never_share_a_native_seed():
    low = {stream(3, 17, "noise", chunk=chunk).initial_seed() & 0xFFFFFFFF for chunk in range(20_000)}
    assert len(low) == 20_000  # the CPU generator heeds no more than these 32 bits


def test_coarse_draws_are_the_samples_own_and_have_their_moments():
    streams = SampleStreams(0, torch.arange(400), "coarse")
    z = streams.coarse_normal((501, 3))
    assert z.dtype == torch.float32
    assert abs(float(z.mean())) < 4 / z.numel() ** 0.5
    assert float(z.var()) == pytest.approx(1, abs=6 * (2 / z.numel()) ** 0.5)
    assert float((z**4).mean()) == pytest.approx(3, abs=6 * (96 / z.numel()) ** 0.5)
    rows = z.reshape(400, -1)
    assert float(torch.corrcoef(rows).fill_diagonal_(0).abs().max()) < 0.16  # 5.8 deviations over 80,000 pairs
    assert float((rows[:, :-1] * rows[:, 1:]).mean()) == pytest.approx(0, abs=5 / rows.numel() ** 0.5)
    u = streams.coarse_uniform((1000,))
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    counts = torch.histc(u, 64, 0, 1)
    assert float(((counts - u.numel() / 64) ** 2 / (u.numel() / 64)).sum()) < 63 + 5 * (2 * 63) ** 0.5
    # a row is a function of (seed, index, purpose, chunk), and longer draws begin as shorter ones do
    some = torch.tensor([17, 3])
    again = SampleStreams(0, some, "coarse")
    assert torch.equal(again.coarse_normal((501, 3)), z[some])
    assert torch.equal(again.coarse_normal((100, 3)), z[some, :100])
    assert not torch.equal(again.coarse_normal((501, 3), chunk=1), z[some])


def test_words_of_32_bits_are_the_same_in_both_arithmetics():
    from robust_core import random as source

    key = source._mix(torch.arange(9) * 1234567)
    low, high, counter = key & 0xFFFFFFFF, source._shift(key, 32), torch.arange(257)
    full = 0xFFFFFFFF
    x = (counter * source._G32 + low[:, None]) & full  # the form of other devices
    x = (((x ^ (x >> 16)) * source._M1) & full) ^ high[:, None]
    x = ((x ^ (x >> 15)) * source._M2) & full
    assert torch.equal(source._hash32(counter, low, high), (x ^ (x >> 16)).to(torch.int32))

"""Properties of paths and conversions: inverses, exact on their tables, defined or refused at endpoints."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fieldsmith.paths import Prediction, RectifiedFlow, VariancePreserving, expand, guide, noised, snr
from tests.drawn import f64

FLOW = RectifiedFlow()
ABAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
DDPM = VariancePreserving(ABAR)
KINDS = ("velocity", "eps", "x_0", "v_prediction")

paths = st.sampled_from([FLOW, DDPM])
times = st.floats(0.001, 0.999)
quick = settings(deadline=None, max_examples=60)


def time(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def pair(seed: int, shape=(3, 2, 4)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x_0, torch.randn(shape, generator=generator, dtype=torch.float64)


def truth(path, x_0: Tensor, eps: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Every form of the network that knows x_0 and eps."""
    alpha, sigma = expand(path.alpha(t), x_0), expand(path.sigma(t), x_0)
    d_alpha, d_sigma = expand(path.d_alpha(t), x_0), expand(path.d_sigma(t), x_0)
    return {
        "x_0": x_0,
        "eps": eps,
        "velocity": d_alpha * x_0 + d_sigma * eps,
        "v_prediction": alpha * eps - sigma * x_0,
        "score": -eps / sigma,
    }


@quick
@given(paths, times, st.integers(0, 1000), st.sampled_from(KINDS), st.sampled_from(["velocity", "eps", "x_0", "score"]))
def test_every_form_converts_into_every_other(path, t, seed, said, asked):
    x_0, eps = pair(seed)
    forms, x_t = truth(path, x_0, eps, time(t)), noised(path, x_0, eps, time(t))
    value = getattr(Prediction(said, forms[said], x_t, time(t), path), asked)
    torch.testing.assert_close(value, forms[asked], rtol=1e-6, atol=1e-6)


@quick
@given(paths, times, st.integers(0, 1000), st.sampled_from(KINDS[:3]), st.sampled_from(KINDS[:3]))
def test_conversions_are_inverses(path, t, seed, first, second):
    """Whatever the network said, there and back is where we were; no x_0 and eps need to exist behind it."""
    value, x_t = pair(seed)
    there = getattr(Prediction(first, value, x_t, time(t), path), second)
    back = getattr(Prediction(second, there, x_t, time(t), path), first)
    torch.testing.assert_close(back, value, rtol=1e-6, atol=1e-6)


@quick
@given(paths, st.lists(times, min_size=3, max_size=3), st.sampled_from(KINDS))
def test_one_time_a_sample_is_that_time_for_each(path, ts, said):
    value, x_t = pair(0)
    together = Prediction(said, value, x_t, f64(*ts), path)
    for i, t in enumerate(ts):
        alone = Prediction(said, value[i : i + 1], x_t[i : i + 1], time(t), path)
        for asked in ("velocity", "eps", "x_0", "score"):
            torch.testing.assert_close(getattr(together, asked)[i : i + 1], getattr(alone, asked))


@pytest.mark.parametrize("path", [FLOW, DDPM], ids=["flow", "ddpm"])
@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("said", KINDS)
@pytest.mark.parametrize("asked", ["velocity", "eps", "x_0", "score"])
def test_endpoints_are_defined_or_refused_but_never_inf(path, t, said, asked):
    value, x_t = pair(1)
    try:
        answer = getattr(Prediction(said, value, x_t, time(t), path), asked)
    except ValueError as refusal:
        assert "t" in str(refusal) and said != asked
    else:
        assert torch.isfinite(answer).all()


@pytest.mark.parametrize(
    "said, asked, t",
    [("eps", "x_0", 1.0), ("eps", "velocity", 1.0), ("x_0", "eps", 0.0), ("x_0", "velocity", 0.0)]
    + [(said, "score", 0.0) for said in ("velocity", "eps", "x_0")],
)
def test_what_flow_endpoints_refuse(said, asked, t):
    value, x_t = pair(2)
    with pytest.raises(ValueError, match="ask for it at"):
        getattr(Prediction(said, value, x_t, time(t), FLOW), asked)


def test_what_flow_endpoints_define():
    x_0, eps = pair(3)
    at_data = Prediction("velocity", eps - x_0, x_0, time(0.0), FLOW)
    at_noise = Prediction("velocity", eps - x_0, eps, time(1.0), FLOW)
    for said in (at_data, at_noise):
        torch.testing.assert_close(said.x_0, x_0)
        torch.testing.assert_close(said.eps, eps)
    torch.testing.assert_close(at_noise.score, -eps)


def test_one_endpoint_in_a_batch_is_refused():
    value, x_t = pair(4)
    with pytest.raises(ValueError, match="t > 0"):
        _ = Prediction("velocity", value, x_t, f64(0.5, 0.0, 0.5), FLOW).score
    with pytest.raises(ValueError, match="t > 0"):
        DDPM.d_sigma(f64(0.5, 0.0))


# the variance-preserving table


@quick
@given(st.integers(0, 999))
def test_indices_and_times_are_inverses(index):
    k = torch.tensor([index])
    assert float(DDPM.index(DDPM.time(k.double()))) == pytest.approx(index, abs=1e-9)
    assert int(DDPM.index(DDPM.time(k)).round()) == index  # in float32, as the samplers hold it


def test_alpha_and_sigma_at_indices_are_the_table():
    t = DDPM.time(torch.arange(1000, dtype=torch.float64))
    torch.testing.assert_close(DDPM.alpha(t), ABAR.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(DDPM.sigma(t), (1 - ABAR).sqrt(), rtol=1e-9, atol=0)
    short = DDPM.time(torch.arange(1000))
    torch.testing.assert_close(DDPM.alpha(short), ABAR.sqrt().float(), rtol=2e-6, atol=0)
    torch.testing.assert_close(DDPM.sigma(short), (1 - ABAR).sqrt().float(), rtol=2e-6, atol=0)


def test_time_zero_is_clean_data():
    for path in (FLOW, DDPM):
        assert path.alpha(time(0.0)) == 1 and path.sigma(time(0.0)) == 0
    assert DDPM.time(torch.tensor(-1)) == 0 and DDPM.time(torch.tensor(999)) == 1


@quick
@given(paths, st.integers(1, 999), st.floats(0.1, 0.9))
def test_slopes_are_finite_differences(path, cell, inside):
    """Strictly between two indices, where the table's interpolation is smooth."""
    t, h = time((cell + inside) / 1000), 1e-5
    for of, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        assert float(slope(t)) == pytest.approx(float(of(t + h) - of(t - h)) / (2 * h), rel=1e-4, abs=1e-9)


@quick
@given(times)
def test_the_variance_is_preserved(t):
    assert float(DDPM.alpha(time(t)) ** 2 + DDPM.sigma(time(t)) ** 2) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("table", [[0.9, 0.5, 0.0], [1.0, 0.5, 0.1], [0.9, float("nan"), 0.1], [0.5, 0.9]])
def test_a_table_without_signal_or_noise_somewhere_is_refused(table):
    """abar = 0 (zero terminal SNR, or a product that underflowed) made alpha and every conversion NaN."""
    with pytest.raises(ValueError, match="alphas_cumprod"):
        VariancePreserving(torch.tensor(table))


def test_a_schedule_that_float32_cannot_hold_works_in_float64():
    """VSM notes, 3.2: beta 1e-3 to 0.2, abar = 1.3e-47 at the end."""
    path = VariancePreserving((1 - torch.linspace(1e-3, 0.2, 1000, dtype=torch.float64)).cumprod(0))
    t = path.time(torch.tensor([99.0, 199.0, 999.0]).double())
    torch.testing.assert_close(path.alpha(t)[:2] ** 2, f64(0.33, 0.014), rtol=0.05, atol=0)
    assert 0 < path.alpha(t)[2] ** 2 < 1e-45


# small things


@quick
@given(paths, times)
def test_snr_is_alpha_over_sigma_squared(path, t):
    expected = (float(path.alpha(time(t))) / float(path.sigma(time(t)))) ** 2
    assert float(snr(path, time(t))) == pytest.approx(expected)
    assert snr(path, time(0.0)) == math.inf


def test_guidance_one_is_conditional_and_zero_is_unconditional():
    c, u = pair(5)
    torch.testing.assert_close(guide(c, u, 1.0), c)
    assert torch.equal(guide(c, u, 0.0), u)
    torch.testing.assert_close(guide(c, u, 3.5), u + 3.5 * (c - u))


@pytest.mark.parametrize("path", [FLOW, DDPM], ids=["flow", "ddpm"])
@quick
@given(t=times)
def test_an_exact_gaussians_eps_gives_its_closed_form_velocity(path, t):
    """x_0 ~ N(m, s^2): d x_t / d t along x_t = alpha m + sqrt(alpha^2 s^2 + sigma^2) z with z held."""
    m, s, t = 0.7, 0.3, time(t)
    alpha, sigma, d_alpha, d_sigma = (float(f(t)) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    x_t = f64([-1.0], [0.2], [2.0])
    V = alpha**2 * s**2 + sigma**2
    eps = sigma * (x_t - alpha * m) / V
    velocity = d_alpha * m + (alpha * d_alpha * s**2 + sigma * d_sigma) / V * (x_t - alpha * m)
    torch.testing.assert_close(Prediction("eps", eps, x_t, t, path).velocity, velocity, rtol=1e-6, atol=1e-6)

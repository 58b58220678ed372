"""The tables, against each solver's formula stated on its own, closed forms, and diffusers' schedulers."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sr3fast.schedule import Schedule, half_logsnr
from sr3fast.solver import GRIDS, SOLVERS, rows

SR3 = Schedule.named()
SHORT = Schedule.named("linear", T=150, start=1e-4, end=0.1)
DDPM = Schedule.named("linear", T=1000, start=1e-4, end=2e-2)
LEVELS = [SR3.gamma[-1].item(), 1e-4, 7e-4, 0.004, 0.01, 0.05, 0.11, 0.3, 0.42, 0.7, 0.93, 0.97, 0.9999]


def run(table, f, y, z=None):
    """What the rows say, in float64: y' and the largest term so far; a row with C0 = 0 keeps no history."""
    history, scale = [torch.zeros_like(y)] * 2, 1.0
    for i, row in enumerate(table.rows.double()):
        recip, ratio, clip, A, B, C0, C1, C2, S = row.tolist()
        eps_hat = f(y, table.gamma[i].item())
        m = (recip * y - ratio * eps_hat).clamp(-clip, clip)
        terms = [A * y, B * eps_hat, C0 * m, C1 * history[0], C2 * history[1], C0 * recip * y]
        if S:
            terms.append(S * z[len(table) - i])
        y = sum(terms[:5] + terms[6:])
        if C0:
            history = [m, history[0]]
        scale = max(scale, max(term.abs().max().item() for term in terms))
        yield y, scale


def network(y, gamma):
    """Roughly a denoiser, not linear, different at every level: it tells every wrong coefficient."""
    return math.sqrt(1 - gamma) * (y / (1 - 0.75 * gamma) + 0.3 * torch.sin(3 * y) + 0.2 * gamma)


def start(shape=(2, 1, 5, 7)):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def noises(n, shape=(2, 1, 5, 7)):
    generator = torch.Generator().manual_seed(2)
    return {step: torch.randn(shape, dtype=torch.float64, generator=generator) for step in range(1, n + 1)}


def close(actual, expected):
    """Equal but for the coefficients, each of which float32 rounds by at most 2^-24, over the rows so far."""
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected)
    for n, ((y, scale), e) in enumerate(zip(actual, expected, strict=True), start=1):
        assert (y - e).abs().max().item() <= 8 * n * 2**-24 * scale, f"row {n}"


# ------------------------------------------------------------- each solver, as its paper states it


def predict(y, f, gamma, clip):
    m = (y - math.sqrt(1 - gamma) * f) / math.sqrt(gamma)
    return m if clip is None else m.clamp(-clip, clip)


def state_sr3(f, y, levels, z, clip):
    ends = [*levels, 1.0]
    n = len(levels)
    for i in range(n):
        alpha = ends[i] / ends[i + 1]
        y = (y - (1 - alpha) / math.sqrt(1 - ends[i]) * f(y, ends[i])) / math.sqrt(alpha)
        if i < n - 1:
            y = y + math.sqrt(1 - alpha) * z[n - i]
        yield y


def state_ddpm(f, y, levels, z, clip, variance=0.0):
    ends = [*levels, 1.0]
    n = len(levels)
    for i in range(n):
        a, b = ends[i], ends[i + 1]
        beta = 1 - a / b
        m = predict(y, f(y, a), a, clip)
        y = math.sqrt(b) * beta / (1 - a) * m + math.sqrt(a / b) * (1 - b) / (1 - a) * y
        if i < n - 1:
            log_variance = (1 - variance) * math.log((1 - b) * beta / (1 - a)) + variance * math.log(beta)
            y = y + math.exp(0.5 * log_variance) * z[n - i]
        yield y


def state_ddim(f, y, levels, z, clip, eta=0.0):
    ends = [*levels, 1.0]
    n = len(levels)
    for i in range(n):
        a, b = ends[i], ends[i + 1]
        m = predict(y, f(y, a), a, clip)
        eps_hat = (y - math.sqrt(a) * m) / math.sqrt(1 - a)
        s = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        y = math.sqrt(b) * m + math.sqrt(1 - b - s**2) * eps_hat
        if s and i < n - 1:
            y = y + s * z[n - i]
        yield y


def sigma_over_alpha(gamma):
    return math.sqrt((1 - gamma) / gamma)


def state_dpmpp2m(f, y, levels, z, clip):
    """DPM-Solver++(2M), Algorithm 2 of Lu et al. 2022: t, lambda, sigma, alpha as there."""
    previous = before = None
    for i, a in enumerate(levels):
        x_0 = predict(y, f(y, a), a, clip)
        if i == len(levels) - 1:
            yield x_0
            return
        b = levels[i + 1]
        lam_a, lam_b = -math.log(sigma_over_alpha(a)), -math.log(sigma_over_alpha(b))
        h = lam_b - lam_a
        D = x_0
        if previous is not None:
            r = (lam_a + math.log(sigma_over_alpha(before))) / h
            D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * previous
        y = math.sqrt(1 - b) / math.sqrt(1 - a) * y - math.sqrt(b) * (math.exp(-h) - 1) * D
        previous, before = x_0, a
        yield y


def state_sde_dpmpp2m(f, y, levels, z, clip):
    """The exact solution of the linear part of the reverse SDE, D held over the step."""
    previous = before = None
    n = len(levels)
    for i, a in enumerate(levels):
        x_0 = predict(y, f(y, a), a, clip)
        if i == n - 1:
            yield x_0
            return
        b = levels[i + 1]
        h = math.log(sigma_over_alpha(a) / sigma_over_alpha(b))
        D = x_0
        if previous is not None:
            r = math.log(sigma_over_alpha(before) / sigma_over_alpha(a)) / h
            D = x_0 + (x_0 - previous) / (2 * r)
        y = math.sqrt((1 - b) / (1 - a)) * math.exp(-h) * y + math.sqrt(b) * (1 - math.exp(-2 * h)) * D
        y = y + math.sqrt(1 - b) * math.sqrt(1 - math.exp(-2 * h)) * z[n - i]
        previous, before = x_0, a
        yield y


def state_unipc2(f, y, levels, z, clip):
    """UniPC-2 with B2(h) = e^h - 1, data prediction (Zhao et al. 2023), the corrector run on its own."""

    def update(y, a, b, m, differences, ratios):
        """y at b from y at a: UniP or UniC with the differences D_k = m_k - m at lambda_a + r_k h."""
        h = half_logsnr(torch.tensor(b, dtype=torch.float64)) - half_logsnr(torch.tensor(a, dtype=torch.float64))
        hh = -h.item()
        phi = [math.expm1(hh)]
        for k in range(1, len(ratios) + 2):
            phi.append(phi[-1] / hh - 1 / math.factorial(k))
        B = math.expm1(hh)
        if len(ratios) < 2:
            weights = [0.5] * len(ratios)  # the paper's choice for one difference
        else:
            R = np.array([[r**k for r in ratios] for k in range(len(ratios))])
            weights = np.linalg.solve(R, [phi[k + 1] * math.factorial(k + 1) / B for k in range(len(ratios))])
        total = sum((w / r * D for w, r, D in zip(weights, ratios, differences, strict=True)), torch.zeros_like(y))
        return math.sqrt((1 - b) / (1 - a)) * y - math.sqrt(b) * phi[0] * m - math.sqrt(b) * B * total

    lam = [half_logsnr(torch.tensor(a, dtype=torch.float64)).item() for a in levels]
    ms, corrected, predicted = [], None, y
    for i, a in enumerate(levels):
        ms.append(predict(predicted, f(predicted, a), a, clip))
        if i == 0:
            corrected = y
        else:
            h = lam[i] - lam[i - 1]
            differences, ratios = [ms[i] - ms[i - 1]], [1.0]
            if i >= 2:
                differences.insert(0, ms[i - 2] - ms[i - 1])
                ratios.insert(0, (lam[i - 2] - lam[i - 1]) / h)
            corrected = update(corrected, levels[i - 1], a, ms[i - 1], differences, ratios)
        if i == len(levels) - 1:
            yield ms[i]
            return
        differences, ratios = [], []
        if i >= 1:
            differences = [ms[i - 1] - ms[i]]
            ratios = [(lam[i - 1] - lam[i]) / (lam[i + 1] - lam[i])]
        predicted = update(corrected, a, levels[i + 1], ms[i], differences, ratios)
        yield predicted


STATED = [
    ("sr3", state_sr3, {}),
    ("ddpm", state_ddpm, {}),
    ("ddpm", state_ddpm, {"variance": 1.0}),
    ("ddpm", state_ddpm, {"variance": 0.3}),
    ("ddim", state_ddim, {}),
    ("ddim", state_ddim, {"eta": 0.6}),
    ("ddim", state_ddim, {"eta": 1.0}),
    ("dpm++2m", state_dpmpp2m, {}),
    ("sde-dpm++2m", state_sde_dpmpp2m, {}),
    ("unipc2", state_unipc2, {}),
]


@pytest.mark.parametrize("clip", [1.0, 0.7, None])
@pytest.mark.parametrize("solver, stated, options", STATED, ids=lambda v: v if isinstance(v, str) else "")
def test_solver_is_its_formula(solver, stated, options, clip):
    if solver == "sr3":
        clip = None
    table = rows(SR3, solver=solver, grid=LEVELS, clip=clip, **options)
    z = noises(len(LEVELS))
    close(run(table, network, start(), z), stated(network, start(), LEVELS, z, clip, **options))


def test_stated_list_has_every_solver():
    assert {name for name, _, _ in STATED} == set(SOLVERS)


# ------------------------------------------------------------------------------- the exact chain


@pytest.mark.parametrize("schedule", [SR3, SHORT, DDPM], ids=repr)
def test_sr3_on_every_step_is_algorithm_2(schedule):
    table = rows(schedule)
    T, alpha, gamma = schedule.T, schedule.alpha, schedule.gamma
    t = torch.arange(T, 0, -1)
    assert torch.equal(table.t, t) and torch.equal(table.gamma, gamma[t]) and table.depth == 0
    A = 1 / alpha[t].sqrt()
    B = -(1 - alpha[t]) / (1 - gamma[t]).sqrt() / alpha[t].sqrt()
    S = torch.where(t > 1, (1 - alpha[t]).sqrt(), 0)
    assert torch.equal(table.rows[:, 2], torch.full((T,), math.inf))
    assert torch.equal(table.rows[:, 5:8], torch.zeros(T, 3))
    for column, expected in ((3, A), (4, B), (8, S)):
        # alpha is gamma_t/gamma_{t-1} here: 1 - alpha is right to 1e-16/(1 - alpha)
        assert torch.allclose(table.rows[:, column].double(), expected, rtol=1e-7, atol=0), column


@pytest.mark.parametrize("schedule", [SR3, SHORT, DDPM], ids=repr)
def test_ddpm_on_every_step_is_the_posterior(schedule):
    table = rows(schedule, solver="ddpm")
    alpha, gamma = schedule.alpha, schedule.gamma
    t = torch.arange(schedule.T, 0, -1)
    A = alpha[t].sqrt() * (1 - gamma[t - 1]) / (1 - gamma[t])
    C0 = gamma[t - 1].sqrt() * (1 - alpha[t]) / (1 - gamma[t])
    S = ((1 - gamma[t - 1]) * (1 - alpha[t]) / (1 - gamma[t])).sqrt()
    assert torch.equal(table.rows[:, 2], torch.ones(schedule.T))
    assert torch.equal(table.rows[:, [4, 6, 7]], torch.zeros(schedule.T, 3))
    for column, expected in ((3, A), (5, C0), (8, S)):
        assert torch.allclose(table.rows[:, column].double(), expected, rtol=1e-7, atol=0), column


@pytest.mark.parametrize("schedule", [SR3, SHORT], ids=repr)
def test_one_picture_is_refined_along_q(schedule):
    """With the true noise of one picture c, ddpm passes through q(y_t given c) exactly."""
    c, mean, variance = 0.37, 0.37 * schedule.gamma[-1].sqrt().item(), 1 - schedule.gamma[-1].item()
    table = rows(schedule, solver="ddpm")
    for i, (A, _, C0, _, _, S) in enumerate(table.rows[:, 3:].double().tolist()):
        mean = A * mean + C0 * c  # m is c
        variance = A * A * variance + S * S
        gamma = schedule.gamma[schedule.T - 1 - i].item()
        assert mean == pytest.approx(math.sqrt(gamma) * c, abs=1e-5)
        assert variance == pytest.approx(1 - gamma, rel=1e-5, abs=1e-12)


def test_sr3_and_ddpm_share_their_mean():
    """Without a clip the posterior's mean is the paper's."""
    sr3, ddpm = rows(SHORT).rows.double(), rows(SHORT, solver="ddpm", clip=None).rows.double()
    recip, ratio, C0 = ddpm[:, 0], ddpm[:, 1], ddpm[:, 5]
    assert torch.allclose(ddpm[:, 3] + C0 * recip, sr3[:, 3], rtol=1e-6)
    assert torch.allclose(-C0 * ratio, sr3[:, 4], rtol=1e-5)
    both = rows(SHORT, solver="ddpm", variance=1.0).rows
    assert torch.allclose(both[:-1, 8], sr3[:-1, 8].float(), rtol=1e-6)


def test_ddim_with_eta_1_is_ddpm():
    ddim, ddpm = rows(SHORT, solver="ddim", eta=1.0), rows(SHORT, solver="ddpm")
    assert torch.allclose(ddim.rows[:-1], ddpm.rows[:-1], rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------- closed forms


def sampled_over_true(table, std):
    """Texture of N(0, std^2), denoised by the optimal (linear) f: what comes out, over std, in closed form.

    y and the two m kept are linear in y_T and the z's: a row is one column for y_T and one for each z.
    """
    n = len(table)
    y, history = np.zeros(n + 1), [np.zeros(n + 1)] * 2
    y[0] = 1
    for i, (row, gamma) in enumerate(zip(table.rows.double().tolist(), table.gamma.tolist(), strict=True)):
        recip, ratio, _, A, B, C0, C1, C2, S = row
        f = math.sqrt(1 - gamma) / (gamma * std**2 + 1 - gamma) * y
        m = recip * y - ratio * f
        y = A * y + B * f + C0 * m + C1 * history[0] + C2 * history[1]
        y[i + 1] += S
        if C0:
            history = [m, history[0]]
    return np.linalg.norm(y) / std


TEXTURES = (0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5)


@pytest.mark.parametrize("solver, low, high", [("dpm++2m", 0.998, 1.0345), ("unipc2", 1.0045, 1.0325)])
def test_25_steps_keep_the_texture(solver, low, high):
    table = rows(SR3, solver=solver, steps=25, grid="blend", clip=None)
    ratios = [sampled_over_true(table, std) for std in TEXTURES]
    assert all(0.97 <= r <= 1.05 for r in ratios), ratios
    assert low <= min(ratios) and max(ratios) <= high, ratios  # the known figures


@pytest.mark.parametrize("solver, expected", [("ddim", 0.16), ("dpm++2m", 0.16), ("unipc2", 0.16), ("sr3", 0.29)])
def test_25_steps_even_in_t_erase_it(solver, expected):
    table = rows(SR3, solver=solver, steps=25, grid="t", clip=None)
    assert sampled_over_true(table, 0.02) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("solver, order", [("ddim", 1), ("dpm++2m", 2), ("unipc2", 3), ("sr3", 1), ("ddpm", 1)])
def test_order_of_convergence(solver, order):
    """Twice the levels, 2^-order of the error; unipc2's corrector adds one order."""
    errors = [
        abs(sampled_over_true(rows(SR3, solver=solver, steps=n, grid="logsnr", clip=None), 0.5) - 1)
        for n in (40, 80, 160)
    ]
    # the grid ends at a finite lambda, an error of its own that does not shrink: take differences
    shrink = (errors[0] - errors[1]) / (errors[1] - errors[2])
    assert shrink == pytest.approx(2**order, rel=0.35), errors


@pytest.mark.parametrize("snr", [0.16, 0.5])
@pytest.mark.parametrize("v", [0.04, 1.0])
def test_langevin_leaves_its_stationary_variance(v, snr):
    table = rows(SR3, solver="ddim", steps=6, corrector_steps=1, snr=snr)
    for i in range(1, len(table), 2):
        gamma = table.gamma[i].item()
        _, _, _, A, B, C0, C1, C2, S = table.rows[i].double().tolist()
        assert (A, C0, C1, C2) == (1, 0, 0, 0)
        v_t = gamma * v + 1 - gamma  # variance of y_t; score = -y/v_t = -f/sqrt(1-gamma)
        slope = A + B * math.sqrt(1 - gamma) / v_t
        delta = 2 * snr**2 * (1 - gamma)
        assert S**2 / (1 - slope**2) == pytest.approx(v_t / (1 - delta / (2 * v_t)), rel=1e-4)


def test_langevin_rows_stand_between_the_solvers():
    plain = rows(SR3, solver="unipc2", steps=5)
    table = rows(SR3, solver="unipc2", steps=5, corrector_steps=2)
    assert len(table) == 5 + 4 * 2
    solver_rows = [0, 3, 6, 9, 12]
    assert torch.equal(table.rows[solver_rows], plain.rows)
    assert torch.equal(table.gamma[solver_rows], plain.gamma)
    for i in (1, 2, 4, 5, 7, 8, 10, 11):
        assert table.gamma[i] == table.gamma[i - i % 3 + 3]  # the level that the row before led to
        assert table.t[i] == table.t[i - i % 3 + 3]
    assert table.rows[-1, 8] == 0


# -------------------------------------------------------------------------------------- diffusers

diffusers = pytest.importorskip("diffusers")
INDEX = [998, 870, 745, 610, 500, 420, 333, 240, 170, 99, 41, 7, 0]


def follow(scheduler, f, y, z=None, **options):
    """Their loop on our grid, with their alphas_cumprod replaced by the float64 ones."""
    n = len(INDEX)
    for i, t in enumerate(scheduler.timesteps):
        eps_hat = f(y, DDPM.gamma[int(t) + 1].item())
        if z is not None:
            options["variance_noise"] = z[n - i]
        y = scheduler.step(eps_hat, t, y, **options).prev_sample
        yield y


def on_our_grid(scheduler):
    scheduler.set_timesteps(len(INDEX))
    scheduler.alphas_cumprod = DDPM.gamma[1:].clone()
    scheduler.timesteps = torch.tensor(INDEX)
    gamma = scheduler.alphas_cumprod[INDEX]
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = torch.cat([((1 - gamma) / gamma).sqrt(), torch.zeros(1, dtype=torch.float64)])
    return scheduler


def ours(solver, z=None, **options):
    table = rows(DDPM, solver=solver, grid=DDPM.gamma[1:][INDEX], **options)
    return run(table, network, start(), z)


def test_agrees_with_diffusers_ddpm():
    scheduler = on_our_grid(diffusers.DDPMScheduler(1000, 1e-4, 2e-2, "linear", clip_sample=True))
    generator = torch.Generator().manual_seed(2)
    theirs = list(follow(scheduler, network, start(), generator=generator))
    generator = torch.Generator().manual_seed(2)  # it draws one randn a step, as it goes
    n = len(INDEX)
    z = {n - i: torch.randn(2, 1, 5, 7, dtype=torch.float64, generator=generator) for i in range(n)}
    close(ours("ddpm", z), theirs)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_agrees_with_diffusers_ddim(eta):
    scheduler = diffusers.DDIMScheduler(1000, 1e-4, 2e-2, "linear", clip_sample=True, set_alpha_to_one=True)
    # its previous t is t - T/N: take the grid that it can have
    index = list(range(960, -1, -40))
    scheduler.alphas_cumprod = DDPM.gamma[1:].clone()
    scheduler.set_timesteps(25)
    assert scheduler.timesteps.tolist() == index
    z = noises(25)
    y, theirs = start(), []
    for i, t in enumerate(index):
        eps_hat = network(y, DDPM.gamma[t + 1].item())
        noise = z[25 - i] if eta else None
        y = scheduler.step(eps_hat, t, y, eta=eta, use_clipped_model_output=True, variance_noise=noise).prev_sample
        theirs.append(y)
    table = rows(DDPM, solver="ddim", eta=eta, grid=DDPM.gamma[1:][index])
    close(run(table, network, start(), z), theirs)


@pytest.mark.parametrize("solver, theirs", [("dpm++2m", "dpmsolver++"), ("sde-dpm++2m", "sde-dpmsolver++")])
def test_agrees_with_diffusers_dpmpp(solver, theirs):
    scheduler = on_our_grid(
        diffusers.DPMSolverMultistepScheduler(
            1000, 1e-4, 2e-2, "linear", solver_order=2, algorithm_type=theirs, final_sigmas_type="zero"
        )
    )
    z = noises(len(INDEX)) if solver.startswith("sde") else None
    close(ours(solver, z, clip=None), follow(scheduler, network, start(), z))


def test_agrees_with_diffusers_unipc():
    scheduler = on_our_grid(
        diffusers.UniPCMultistepScheduler(
            1000, 1e-4, 2e-2, "linear", solver_order=2, solver_type="bh2", final_sigmas_type="zero"
        )
    )
    close(ours("unipc2", clip=None), follow(scheduler, network, start()))


# ------------------------------------------------------------------------------------------ grids


def test_defaults():
    assert torch.equal(rows(SR3).rows, rows(SR3, solver="sr3", grid="t", steps=2000).rows)
    few = rows(SR3, steps=25)
    assert torch.equal(few.rows, rows(SR3, solver="dpm++2m", grid="blend", steps=25, clip=1.0).rows)
    assert torch.equal(rows(SR3, grid=LEVELS).rows, rows(SR3, solver="dpm++2m", grid=LEVELS).rows)
    chain = rows(SHORT, solver="ddpm", steps=150)
    assert torch.equal(chain.rows, rows(SHORT, solver="ddpm", grid="t").rows)


def test_grids_as_stated():
    N, T = 25, 2000
    i = torch.arange(N, dtype=torch.float64)
    logs = SR3.gamma.log()

    def log_gamma(t):
        return torch.from_numpy(np.interp(t, np.arange(T + 1), logs.numpy()))

    def lam(log):
        return 0.5 * (log - torch.log1p(-log.exp()))

    assert torch.allclose(rows(SR3, steps=N, grid="t").gamma, SR3.gamma[(T - 80 * i).long()])
    line = lam(logs[-1]) + (-math.log(0.005) - lam(logs[-1])) * i / (N - 1)
    assert torch.allclose(half_logsnr(rows(SR3, steps=N, grid="logsnr").gamma), line)
    blend = (line + lam(log_gamma(T * (1 - i / N) ** 2))) / 2
    assert torch.allclose(half_logsnr(rows(SR3, steps=N, grid="blend").gamma), blend)


@settings(deadline=None, max_examples=60)
@given(
    T=st.integers(2, 400),
    N=st.integers(1, 400),
    grid=st.sampled_from(sorted(GRIDS)),
    solver=st.sampled_from(sorted(SOLVERS)),
    end=st.floats(0.01, 0.2),
    integer=st.booleans(),
)
def test_any_grid_makes_a_run(T, N, grid, solver, end, integer):
    schedule = Schedule.from_betas(np.append(np.linspace(1e-4, end, T), 0.995))
    if N > T + 1:
        if grid == "t" or integer:
            with pytest.raises(ValueError, match="at most T levels"):
                rows(schedule, solver=solver, grid=grid, steps=N, integer=integer)
        return
    table = rows(schedule, solver=solver, grid=grid, steps=N, integer=integer)
    assert len(table) == N and table.rows.dtype == torch.float32
    assert not table.rows.isnan().any() and table.rows[:, [0, 1, 3, 4, 5, 6, 7, 8]].isfinite().all()
    assert table.gamma[0] == schedule.gamma[-1] or integer
    assert (table.gamma.diff() > 0).all() and table.gamma[-1] <= schedule.gamma[1]
    assert (table.t >= 1).all() and (table.t <= schedule.T).all()
    assert table.rows[-1, 8] == 0 and table.rows[0, 6] == 0 and not table.rows[:2, 7][:1].any()
    if integer:
        assert (table.t.diff() < 0).all() and torch.equal(table.gamma, schedule.gamma[table.t])


def test_one_level_is_the_coarsest():
    for grid in GRIDS:
        table = rows(SR3, steps=1, grid=grid)
        assert torch.equal(table.gamma, SR3.gamma[-1:])
        assert table.rows[0].tolist()[3:] == [0, 0, 1, 0, 0, 0]


def test_grids_stay_in_the_trained_range():
    for grid in GRIDS:  # gamma_1 = 1 - 1e-4 comes before lambda = -ln 0.005
        gamma = rows(DDPM, steps=300, grid=grid).gamma
        assert gamma[0] == DDPM.gamma[-1] and gamma[-1] <= DDPM.gamma[1]


@pytest.mark.parametrize("grid", [[1e-6, 0.5], [0.5, 1 - 1e-9]])
def test_levels_beyond_the_trained_ones_are_warned_about(grid):
    with pytest.warns(UserWarning, match="go beyond the trained ones, 4.39e-05 to 1 - 1e-06"):
        assert torch.allclose(rows(SR3, grid=grid).gamma, torch.tensor(grid, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows(SR3, grid=SR3.gamma[[2000, 700, 1]].float())  # rounding is not beyond


def test_whole_t_where_the_network_needs_it():
    table = rows(DDPM, steps=10, grid="blend", integer=True)
    free = rows(DDPM, steps=10, grid="blend")
    assert torch.equal(table.gamma, DDPM.gamma[table.t])
    assert (table.t - DDPM.t_at(free.gamma)).abs().max() <= 0.5
    assert torch.equal(table.levels("t"), table.t - 1)
    crowded = rows(SHORT, steps=150, grid="logsnr", integer=True)
    assert torch.equal(crowded.t, torch.arange(150, 0, -1))


def test_levels_given_to_the_network():
    table = rows(SR3, steps=7)
    assert torch.equal(table.levels("gamma"), table.gamma.float())
    assert torch.equal(table.levels("sqrt_gamma"), table.gamma.sqrt().float())
    assert table.levels("t").dtype == torch.int64 and table.levels("t")[0] == 1999
    with pytest.raises(ValueError, match="sqrt_gamma, gamma, t"):
        table.levels("alpha")


def test_start_leaves_out_the_first_levels():
    whole, half = rows(SR3, steps=20), rows(SR3, steps=20, start=0.5)
    assert torch.equal(half.gamma, whole.gamma[10:])
    assert half.rows[0, 6] == 0, "the first row that runs has no history"
    assert torch.equal(half.rows[2:], whole.rows[12:])
    assert torch.equal(rows(SR3, steps=20, start=0.0).rows, whole.rows)
    assert len(rows(SR3, steps=20, start=0.999)) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"solver": "euler"}, "solver must be one of sr3, ddpm"),
        ({"steps": 0}, "steps must be at least 1: got 0"),
        ({"steps": 2001, "grid": "t"}, "at most T levels: got steps=2001 and T=2000"),
        ({"grid": "cosine", "steps": 5}, "grid must be one of t, logsnr, blend"),
        ({"grid": [0.1, 0.1]}, "must rise"),
        ({"grid": [0.5, 0.1]}, "must rise"),
        ({"grid": [0.5, 1.0]}, "below 1"),
        ({"grid": [0.0, 0.5]}, "above 0"),
        ({"grid": [float("nan"), 0.5]}, "above 0"),
        ({"grid": []}, "list of gammas"),
        ({"grid": [0.1, 0.5], "steps": 3}, "number of levels of the grid: got 3 and 2"),
        ({"solver": "ddim", "eta": 1.5}, r"eta must be in \[0, 1\]"),
        ({"solver": "ddpm", "eta": 0.5}, "eta is an option of ddim: got eta=0.5 for ddpm"),
        ({"solver": "ddim", "variance": 0.5}, "variance is an option of ddpm"),
        ({"solver": "ddpm", "variance": -0.1}, r"variance must be in \[0, 1\]"),
        ({"solver": "sr3", "clip": 1.0}, "sr3 is the paper's step, which clips nothing"),
        ({"solver": "ddpm", "clip": 0.0}, "clip must be above 0"),
        ({"solver": "ddpm", "clip": float("nan")}, "clip must be above 0"),
        ({"corrector_steps": -1}, "corrector_steps must be at least 0"),
        ({"corrector_steps": 1, "snr": 0.0}, "snr must be above 0"),
        ({"steps": 5, "start": 1.0}, r"start must be in \[0, 1\)"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rows(SR3, **options)


@pytest.mark.parametrize("options", [{"steps": 2.5}, {"steps": True}, {"corrector_steps": 0.5}])
def test_whole_numbers_only(options):
    with pytest.raises(TypeError, match="whole number"):
        rows(SR3, **options)


@pytest.mark.parametrize("solver", ["dpm++2m", "sde-dpm++2m", "unipc2"])
def test_levels_that_stand_still_are_refused_by_what_extrapolates(solver):
    schedule = Schedule.from_betas([0.1, 0, 0, 0.9, 0.9, 0.9])
    with pytest.raises(ValueError, match=r"must rise, and betas of 0 leave them: got gamma 0\.9 twice"):
        rows(schedule, solver=solver, steps=6, grid="t")
    assert len(rows(schedule, solver="ddpm", steps=6, grid="t")) == 6

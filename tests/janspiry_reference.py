"""Janspiry's SR3 networks, diffusion object and sampling loop, stated once more and as plainly as possible.

Written from the facts (names of tensors, formulas, order of random draws), independently of sr3fast: no op,
no schedule and no network of ours is imported. Its state dict has their names.
"""

import math

import numpy as np
import torch
from torch import nn

CONFIGS = {
    "sr_sr3_16_128": dict(inner=64, multiplier=(1, 2, 4, 8, 8), res_blocks=2, attn_res=(16,), groups=32, size=128),
    "sr_sr3_64_512": dict(inner=64, multiplier=(1, 2, 4, 8, 16), res_blocks=1, attn_res=(), groups=16, size=512),
    "sample_sr3_128": dict(
        inner=64, multiplier=(1, 2, 4, 8, 8), res_blocks=2, attn_res=(16,), groups=32, size=128, inputs=3
    ),
    "sr_ddpm_16_128": dict(
        inner=64,
        multiplier=(1, 1, 2, 2, 4, 4),
        res_blocks=2,
        attn_res=(16,),
        groups=32,
        size=128,
        variant="ddpm",
    ),
}
TENSORS = {"sr_sr3_16_128": 374, "sr_sr3_64_512": 241, "sample_sr3_128": 374, "sr_ddpm_16_128": 433}
PARAMETERS = {
    "sr_sr3_16_128": 97_807_491,
    "sr_sr3_64_512": 155_334_339,
    "sample_sr3_128": 97_805_763,
    "sr_ddpm_16_128": 26_451_587,
}
BUFFERS = [
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
]


class Swish(nn.Module):
    def forward(self, v):
        return v * torch.sigmoid(v)


class Sinusoid(nn.Module):
    """The sr3 variant's: of sqrt(gamma) [B, 1]."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, level):
        n = self.width // 2
        f = torch.exp(-math.log(10000) * torch.arange(n, dtype=level.dtype) / n)
        return torch.cat([torch.sin(level * f), torch.cos(level * f)], dim=-1)


class TimeSinusoid(nn.Module):
    """The ddpm variant's: of an integer t [B]; the frequencies are a saved buffer."""

    def __init__(self, width):
        super().__init__()
        n = width // 2
        self.register_buffer("inv_freq", torch.exp(-math.log(10000) * torch.arange(n, dtype=torch.float32) / n))

    def forward(self, t):
        angle = t[:, None].to(self.inv_freq.dtype) * self.inv_freq
        return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)


class Wrapped(nn.Module):
    """An extra name in the tree."""

    def __init__(self, name, module):
        super().__init__()
        setattr(self, name, module)
        self.inside = name

    def forward(self, *inputs):
        return getattr(self, self.inside)(*inputs)


def norm_act_conv(ins, outs, groups, dropout=0.0):
    layers = nn.Sequential(nn.GroupNorm(groups, ins), Swish(), nn.Dropout(dropout), nn.Conv2d(ins, outs, 3, padding=1))
    return Wrapped("block", layers)


class ResBlock(nn.Module):
    def __init__(self, ins, outs, emb, groups, dropout, variant):
        super().__init__()
        if variant == "sr3":
            self.noise_func = Wrapped("noise_func", nn.Sequential(nn.Linear(emb, outs)))
        else:
            self.mlp = nn.Sequential(Swish(), nn.Linear(emb, outs))
        self.block1 = norm_act_conv(ins, outs, groups)
        self.block2 = norm_act_conv(outs, outs, groups, dropout)
        self.res_conv = nn.Conv2d(ins, outs, 1) if ins != outs else nn.Identity()
        self.variant = variant

    def forward(self, v, emb):
        h = self.block1(v)
        projected = self.noise_func(emb) if self.variant == "sr3" else self.mlp(emb)
        h = h + projected[:, :, None, None]
        return self.block2(h) + self.res_conv(v)


class SelfAttention(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, v):
        B, C, H, W = v.shape
        qkv = self.qkv(self.norm(v)).reshape(B, 3, C, H * W)
        q, k, values = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(C), dim=-1)
        return self.out(torch.einsum("bij,bcj->bci", weights, values).reshape(B, C, H, W)) + v


class BlockWithAttention(nn.Module):
    def __init__(self, *args, attention):
        super().__init__()
        self.res_block = ResBlock(*args)
        if attention:
            self.attn = SelfAttention(args[1], args[3])
        self.attention = attention

    def forward(self, v, emb):
        v = self.res_block(v, emb)
        return self.attn(v) if self.attention else v


class Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, v, emb):
        return self.conv(v)


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, v, emb):
        return self.conv(v.repeat_interleave(2, 2).repeat_interleave(2, 3))


class Network(nn.Module):
    def __init__(
        self,
        inner,
        multiplier,
        res_blocks,
        attn_res,
        groups,
        size,
        inputs=6,
        outputs=3,
        dropout=0.0,
        variant="sr3",
    ):
        super().__init__()
        if variant == "sr3":
            embed = Sinusoid(inner)
            self.noise_level_mlp = nn.Sequential(
                embed, nn.Linear(inner, 4 * inner), Swish(), nn.Linear(4 * inner, inner)
            )
        else:
            embed = TimeSinusoid(inner)
            self.time_mlp = nn.Sequential(embed, nn.Linear(inner, 4 * inner), Swish(), nn.Linear(4 * inner, inner))
        self.variant = variant
        rest = (inner, groups, dropout, variant)

        width, stack = inner, [inner]
        downs = [nn.Conv2d(inputs, inner, 3, padding=1)]
        for level in range(len(multiplier)):
            for _ in range(res_blocks):
                has = size // 2**level in attn_res
                downs.append(BlockWithAttention(width, inner * multiplier[level], *rest, attention=has))
                width = inner * multiplier[level]
                stack.append(width)
            if level + 1 < len(multiplier):
                downs.append(Down(width))
                stack.append(width)
        self.downs = nn.ModuleList(downs)
        self.mid = nn.ModuleList(
            [
                BlockWithAttention(width, width, *rest, attention=True),
                BlockWithAttention(width, width, *rest, attention=False),
            ]
        )
        ups = []
        for level in range(len(multiplier) - 1, -1, -1):
            for _ in range(res_blocks + 1):
                has = size // 2**level in attn_res
                ups.append(BlockWithAttention(width + stack.pop(), inner * multiplier[level], *rest, attention=has))
                width = inner * multiplier[level]
            if level > 0:
                ups.append(Up(width))
        self.ups = nn.ModuleList(ups)
        self.final_conv = norm_act_conv(width, outputs, groups)

    def forward(self, v, level):
        emb = self.noise_level_mlp(level) if self.variant == "sr3" else self.time_mlp(level)
        v = self.downs[0](v)
        stack = [v]
        for layer in self.downs[1:]:
            v = layer(v, emb)
            stack.append(v)
        for layer in self.mid:
            v = layer(v, emb)
        for layer in self.ups:
            if isinstance(layer, BlockWithAttention):
                v = torch.cat([v, stack.pop()], 1)
            v = layer(v, emb)
        return self.final_conv(v)


class GaussianDiffusion(nn.Module):
    """Their object: twelve float32 buffers and denoise_fn; sampling one random tensor a step."""

    def __init__(self, denoise_fn, image_size, channels=3, conditional=True):
        super().__init__()
        self.denoise_fn = denoise_fn
        self.image_size = image_size
        self.channels = channels
        self.conditional = conditional

    def set_new_noise_schedule(self, schedule_opt, device="cpu"):
        assert schedule_opt["schedule"] == "linear"
        T = schedule_opt["n_timestep"]
        beta = np.linspace(schedule_opt["linear_start"], schedule_opt["linear_end"], T, dtype=np.float64)
        gamma = np.cumprod(1 - beta)
        before = np.concatenate([[1.0], gamma[:-1]])
        variance = beta * (1 - before) / (1 - gamma)
        buffers = dict(
            zip(
                BUFFERS,
                [
                    beta,
                    gamma,
                    before,
                    np.sqrt(gamma),
                    np.sqrt(1 - gamma),
                    np.log(1 - gamma),
                    np.sqrt(1 / gamma),
                    np.sqrt(1 / gamma - 1),
                    variance,
                    np.log(np.maximum(variance, 1e-20)),
                    beta * np.sqrt(before) / (1 - gamma),
                    (1 - before) * np.sqrt(1 - beta) / (1 - gamma),
                ],
                strict=True,
            )
        )
        for name, values in buffers.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32, device=device))
        self.num_timesteps = T
        self.sqrt_alphas_cumprod_prev = np.sqrt(np.concatenate([[1.0], gamma]))

    def level(self, t, batch):
        if self.denoise_fn.variant == "ddpm":
            return torch.full((batch,), t, dtype=torch.int64)
        return torch.full((batch, 1), float(self.sqrt_alphas_cumprod_prev[t + 1]), dtype=torch.float32)

    def step(self, y, t, x=None, z=None):
        """y_t -> y_{t-1} in their index t = T-1 .. 0; z is not used at 0."""
        f = self.denoise_fn(y if x is None else torch.cat([x, y], 1), self.level(t, len(y)))
        y_0 = self.sqrt_recip_alphas_cumprod[t] * y - self.sqrt_recipm1_alphas_cumprod[t] * f
        y_0 = y_0.clamp(-1, 1)
        mean = self.posterior_mean_coef1[t] * y_0 + self.posterior_mean_coef2[t] * y
        return mean if t == 0 else mean + (0.5 * self.posterior_log_variance_clipped[t]).exp() * z

    def run(self, x, shape, y=None, z=None):
        """All of y_T, y_{T-1}, .., y_0. y: y_T, z: a function of t, both drawn where not given."""
        y = torch.randn(shape) if y is None else y
        trace = [y]
        for t in reversed(range(self.num_timesteps)):
            noise = None
            if t > 0 or self.denoise_fn.variant == "ddpm":
                noise = torch.randn_like(y) if z is None else z(t) if t > 0 else None
            y = self.step(y, t, x, noise)
            trace.append(y)
        return trace

    def snapshots(self, trace):
        every = 1 | (self.num_timesteps // 10)
        T = self.num_timesteps
        return [trace[T - t] for t in reversed(range(T)) if t % every == 0]

    @torch.no_grad()
    def super_resolution(self, x_in, continous=False):
        trace = self.run(x_in, x_in.shape)
        stack = torch.cat([x_in, *self.snapshots(trace)])
        return stack if continous else stack[-1]

    @torch.no_grad()
    def sample(self, batch_size=1, continous=False):
        trace = self.run(None, (batch_size, self.channels, self.image_size, self.image_size))
        if self.denoise_fn.variant == "ddpm":
            return trace[-1]
        stack = torch.cat([trace[0], *self.snapshots(trace)])
        return stack if continous else stack[-1]


class Wrapper:
    """Their training script's `diffusion`: netG is the GaussianDiffusion, or DataParallel around it."""

    def __init__(self, diffusion, parallel=False):
        self.netG = nn.DataParallel(diffusion) if parallel else diffusion

    def test(self, x, continous=False):
        net = self.netG.module if isinstance(self.netG, nn.DataParallel) else self.netG
        net.eval()
        result = net.super_resolution(x, continous)
        net.train()
        return result


def schedule(T=2000, start=1e-6, end=1e-2):
    return {"schedule": "linear", "n_timestep": T, "linear_start": start, "linear_end": end}


def diffusion(seed=0, T=2000, start=1e-6, end=1e-2, **options):
    """A diffusion on a random network whose every tensor tells (norms and biases off their defaults)."""
    torch.manual_seed(seed)
    small = dict(inner=16, multiplier=(1, 2, 4), res_blocks=1, attn_res=(8,), groups=8, size=16)
    options = {**small, **options}
    network = Network(**options)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.dim() == 1:
                p.copy_((name.endswith(("norm.weight", "block.0.weight"))) + 0.3 * torch.randn(p.shape))
    inputs, outputs = options.get("inputs", 6), options.get("outputs", 3)
    theirs = GaussianDiffusion(network, options["size"], outputs, conditional=inputs > outputs)
    theirs.set_new_noise_schedule(schedule(T, start, end))
    return theirs.eval()

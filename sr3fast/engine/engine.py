"""The engine: what it keeps of a UNet for each shape, and who may use it when."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import FLOATS
from ..unet import Attention, Downsample, NoiseEmbedding, ResnetBlock, UNet, Upsample
from .capture import Captures
from .form import Form
from .network import Network, without_autocast
from .run import CapturedRun, Run

KEPT = 4  # shapes whose buffers (and CUDA graphs) are kept


class Engine:
    """The inference form of a UNet; f_theta for a Sampler.

    Equivalent to (to rounding)::

        run = Engine(unet).start_run(x, y_t.shape, levels); run.into.copy_(y_t)
        run(i) == unet(x, y_t, levels[i].expand(B, 1))

    Args:
        unet: any `UNet`. Its weights are read, never changed; changed ones are noticed at the next start (see
            `repack`). Dropout never applies.
        dtype: of the network's arithmetic: float32, float16 or bfloat16; by default that of the weights.
        form: the transformations (`Form`).
        graph: capture the step as a CUDA graph, once a shape: "auto" on CUDA, True requires it, False not.

    Runs of one engine may interleave and may run in several threads and streams: each has buffers of its own.
    For each shape the packed weights, buffers and CUDA graphs are kept, for the last few shapes. On a CPU, in float32,
    most weights are four times as large as the network's (Form.winograd), once for all shapes.

    Raises:
        TypeError: not a UNet, or one whose layers were exchanged, patched or hooked, or parameters of another dtype.
    """

    def __init__(
        self,
        unet: UNet,
        dtype: torch.dtype | None = None,
        form: Form | None = None,
        graph: bool | str = "auto",
    ):
        if (reason := refusal(unet)) is not None:
            raise TypeError(reason)
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype must be float32, float16 or bfloat16: got {dtype}")
        if dtype is None and (own := unet.conv_in.weight.dtype) not in FLOATS:
            raise TypeError(f"parameters, or dtype=, must be float32, float16 or bfloat16: got {own}")
        if not (graph in (True, False) or graph == "auto"):
            raise ValueError(f'graph must be "auto", True or False: got {graph!r}')
        self.unet, self.dtype = unet, dtype
        self.form = Form() if form is None else form
        self.graph = graph
        self.variant, self.in_channels, self.out_channels = unet.variant, unet.in_channels, unet.out_channels
        self.multiple = unet.multiple
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._idle: list[Network] = []  # the last used last
        self._packed: dict[Any, Any] = {}  # layers and weights that any shape can use
        self._version: Any = None
        self._values: Tensor | None = None
        self._captures = Captures()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def start_run(self, x: Tensor | None, shape: Sequence[int], levels: Tensor) -> Run:
        """A run over the noise levels.

        Args:
            x: [B, Cx, H, W] in [-1, 1], any float dtype; None for an unconditional network.
            shape: of y_t, [B, Cy, H, W].
            levels: [N], float32 (variant "sr3") or int64 ("ddpm"), on the device of the weights.

        Returns:
            run, with run.x and run.into: views of the network's input, the second for y_t; and run(i):
            eps_hat [B, Cy, H, W] at levels[i], in the engine's dtype, valid until the next call. Where the
            step is captured, also run.loop.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit. TypeError: layers were patched or hooked meanwhile.
        """
        self._check(x, shape, levels)
        with torch.inference_mode(False), torch.no_grad(), without_autocast(levels.device):
            network = self._take(tuple(shape), levels.device)
            try:
                if x is not None:
                    assert network.x is not None
                    network.x.copy_(x)
                captured = self.graph is not False and levels.device.type == "cuda"
                run = CapturedRun(network, levels, self._captures) if captured else Run(network, levels)
                weakref.finalize(run, self._give_back, network)
                return run
            except BaseException:
                self._give_back(network)
                raise

    def repack(self) -> None:
        """Read the weights anew.

        `start_run` does so by itself where it sees a change: an in-place operation, an exchange, or, for writes
        through `.data`, another first element of a tensor.
        """
        with self._lock:
            self._drop()
            self._version = None

    def _check(self, x: Tensor | None, shape: Sequence[int], levels: Tensor) -> None:
        if levels.ndim != 1 or len(levels) == 0:
            raise ValueError(f"levels must be [N], N at least 1: got {list(levels.shape)}")
        weight = self.unet.conv_in.weight
        for name, t in (("x", x), ("levels", levels)):
            if t is not None and t.device != weight.device:
                raise ValueError(f"{name} must be where the weights are, on {weight.device}: got {t.device}")
        if self.graph is True and weight.device.type != "cuda":
            raise ValueError(f"graph=True captures a CUDA graph: got weights on {weight.device}")
        if len(shape) != 4:
            raise ValueError(f"shape must be that of y_t, [B, C, H, W]: got {list(shape)}")
        level = levels[:1].expand(shape[0])
        y_t = weight.new_empty(0).expand(*shape[:3], 0) if 0 in shape else weight.new_empty(1).expand(*shape)
        self.unet.check_inputs(x, y_t, level if self.variant == "ddpm" else level[:, None])

    def _take(self, shape: tuple[int, ...], device: torch.device) -> Network:
        """An idle network for the shape, or a new one: its caller's own until it gives it back."""
        with self._lock:
            self._refresh()
            dtype = self.dtype or self.unet.conv_in.weight.dtype
            form = self.form.on(device, dtype)  # another where a backend is forced
            network = next((n for n in reversed(self._idle) if n.shape == shape and n.form == form), None)
            if network is not None:
                self._idle.remove(network)
            else:
                network = Network(self.unet, form, dtype, device, shape, self._packed)
                network.version = self._version
            if device.type == "cuda":
                stream = torch.cuda.current_stream(device)
                if network.stream not in (None, stream):
                    stream.wait_stream(network.stream)
                network.stream = stream
            return network

    def _give_back(self, network: Network) -> None:
        with self._lock:
            if network.version is self._version:
                self._idle.append(network)
                if len(self._idle) <= KEPT:
                    return
                network = self._idle.pop(0)
            if network.device.type == "cuda":
                torch.cuda.synchronize(network.device)  # another stream may still use it
            network.graph = None  # which knows the network: else both would wait for the garbage collector

    def _refresh(self) -> None:
        """Drop what was packed from other weights. TypeError: the network has become one that is refused."""
        if (reason := refusal(self.unet)) is not None:
            raise TypeError(f"{reason}; a Sampler made of it now calls it as it is")
        tensors = list(self.unet.parameters())
        norms = [(m.num_groups, m.eps) for m in self.unet.modules() if isinstance(m, nn.GroupNorm)]
        version = norms, [(t.data_ptr(), t.device, t.dtype, -1 if t.is_inference() else t._version) for t in tensors]
        # `p.data.copy_(...)`, as averages of weights are often kept, leaves the counter alone
        values = torch.stack([t.detach()[(0,) * t.ndim].float() for t in tensors])
        if version != self._version or self._values is None or not torch.equal(values, self._values):
            self._drop()
            self._version, self._values = version, values

    def _drop(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        for network in self._idle:
            network.graph = None
        self._idle.clear()
        self._packed = {}

    def __repr__(self) -> str:
        return f"Engine({type(self.unet).__name__}, dtype={self.dtype}, {self.form})"


LAYERS = (
    *(UNet, NoiseEmbedding, ResnetBlock, Attention, Downsample, Upsample),
    *(nn.ModuleList, nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Dropout),
)


def refusal(f_theta: Any) -> str | None:
    """Why the engine cannot take the place of f_theta; None where it can."""
    if type(f_theta) is not UNet:
        return f"the engine runs sr3fast.UNet: got {type(f_theta).__name__}"
    strided = {id(layer.conv) for layer in f_theta.downs if isinstance(layer, Downsample)}
    for name, module in f_theta.named_modules():
        if type(module) not in LAYERS:
            return f"the engine knows the UNet's own layers: got {type(module).__name__} as {name}"
        if "forward" in vars(module):
            return f"the forward of {name or 'the network'} was replaced: it would not run in the engine"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a hook of {name or 'the network'} would not run in the engine"
        if isinstance(module, nn.Conv2d):
            half, stride = module.kernel_size[0] // 2, 2 if id(module) in strided else 1
            built = {"stride": (stride,) * 2, "padding": (half,) * 2, "dilation": (1, 1), "groups": 1}
            for option, value in (built | {"padding_mode": "zeros"}).items():
                if (got := getattr(module, option)) != value:
                    return f"the engine's {name} has {option}={value!r}: got {got!r}"
    return None
